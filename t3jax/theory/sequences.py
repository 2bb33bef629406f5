"""Two ways to temper and tilt, token by token or whole sequences, on enumerable chains.

    whole:   q(x) ∝ p(x)^(1/T) f_L(x)^s
    tokens:  q(x_t | x_<t) ∝ p(x_t | x_<t)^(1/T) f_t(x_<=t)^s

f_t(x_<=t) is P(retain | the first t tokens). A language model can serve the second alone; the
statements about p and f hold for the first. docs/theory.md proves when the two are the same.

Distributions of sequences are arrays with an axis for each token, `[V, ..., V]`, in float64; a
classifier is a list of L arrays, and array t has t axes.

Axes: V tokens, L length of a sequence.

References:
    Temper-Then-Tilt, arXiv 2602.10217, decoding.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float
from scipy.special import expit, kl_div, logit, xlogy

from t3jax.theory.bounds import Check

Prefixes = list[np.ndarray]
_ROUNDING = 1e-9


def draw_chain(
    rng: np.random.Generator, tokens: int, length: int, concentration: float
) -> Float[np.ndarray, "..."]:
    """Draws an autoregressive chain: the next token's distribution depends on the whole prefix.

    It is drawn from a Dirichlet distribution, which is spiky where the concentration is small. The
    result is the probability of each sequence, `[V, ..., V]`.
    """
    chain = np.ones(())
    for _ in range(length):
        weights = rng.gamma(concentration, size=(*chain.shape, tokens)) + 1e-3
        chain = chain[..., None] * (weights / weights.sum(axis=-1, keepdims=True))
    return chain


def prefix_probabilities(chain: np.ndarray) -> Prefixes:
    """The probability of each prefix of 0 to L tokens: L + 1 arrays."""
    masses = [chain]
    for _ in range(chain.ndim):
        masses.append(np.asarray(masses[-1].sum(axis=-1)))
    return masses[::-1]


def exact_classifier(retain: np.ndarray, forget: np.ndarray, gamma: float) -> Prefixes:
    """f_1 to f_L of P(retain | prefix), the minimum of the paper's loss over all tokens."""
    retain_masses = [(1 - gamma) * mass for mass in prefix_probabilities(retain)[1:]]
    forget_masses = [gamma * mass for mass in prefix_probabilities(forget)[1:]]
    return [r / (r + f) for r, f in zip(retain_masses, forget_masses, strict=True)]


def disturb(rng: np.random.Generator, classifier: Prefixes, noise: float) -> Prefixes:
    """A classifier whose logits are off by Gaussian noise, one draw for each prefix."""
    return [expit(logit(f) + noise * rng.normal(size=f.shape)) for f in classifier]


def average_last(chain: np.ndarray, last: np.ndarray) -> Prefixes:
    """The classifier whose value at a prefix is the mean of f_L over its continuations."""
    masses = prefix_probabilities(chain)[1:]
    weighted = prefix_probabilities(chain * last)[1:]
    return [w / m for w, m in zip(weighted, masses, strict=True)]


def tilt_whole(
    chain: np.ndarray, last: np.ndarray, temperature: float = 1.0, scale: float = 1.0
) -> np.ndarray:
    """Tempers and tilts whole sequences by f_L."""
    weights = chain ** (1 / temperature) * last**scale
    return weights / weights.sum()


def tilt_tokens(
    chain: np.ndarray, classifier: Prefixes, temperature: float = 1.0, scale: float = 1.0
) -> np.ndarray:
    """Tempers and tilts the next token after each prefix; returns sequence probabilities."""
    probabilities = np.ones(())
    for step, _ in _tilt_steps(chain, classifier, temperature, scale):
        probabilities = probabilities[..., None] * step
    return probabilities


def defects(
    chain: np.ndarray, classifier: Prefixes, temperature: float = 1.0, scale: float = 1.0
) -> Prefixes:
    """h_t(x_<t) = log c_t(x_<t) - s log f_(t-1)(x_<t), c_t the normaliser of a next token.

    The two ways agree where no h_t depends on the prefix: the ratio of token by token to whole is
    exp(-h_1 - ... - h_L) up to a constant. Array t of the result has t - 1 axes.
    """
    before = [np.ones(()), *classifier[:-1]]
    return [
        np.asarray(np.log(normaliser) - scale * np.log(f))
        for (_, normaliser), f in zip(
            _tilt_steps(chain, classifier, temperature, scale), before, strict=True
        )
    ]


def excess_risks(chain: np.ndarray, exact: Prefixes, learned: Prefixes) -> list[float]:
    """ε_1 to ε_L: the mean over p of KL(f*_t || f̂_t), nats, of each token."""
    masses = prefix_probabilities(chain)[1:]
    return [
        float(np.sum(m * (xlogy(a, a / b) + xlogy(1 - a, (1 - a) / (1 - b)))))
        for m, a, b in zip(masses, exact, learned, strict=True)
    ]


def kl(p: np.ndarray, q: np.ndarray) -> float:
    """KL(p || q) of two distributions of sequences, nats."""
    return float(kl_div(p, q).sum())


# Both sides of each statement, on one random instance.


def exact_is_exact(rng: np.random.Generator) -> tuple[float, float]:
    """Statement 8: at T = s = 1 both ways give p_r when the classifier is exact."""
    retain, chain, exact, _ = _draw(rng)
    gaps = [np.abs(q - retain).max() for q in _tilt_both(chain, exact, 1.0, 1.0)]
    return max(gaps), _ROUNDING


def averages_are_equal(rng: np.random.Generator) -> tuple[float, float]:
    """Statement 9: at T = s = 1 both ways agree for any f̂ that `average_last` returns."""
    _, chain, _, learned = _draw(rng)
    tokens, whole = _tilt_both(chain, average_last(chain, learned[-1]), 1.0, 1.0)
    return float(np.abs(np.log(tokens / whole)).max()), _ROUNDING


def ratio_is_defects(rng: np.random.Generator) -> tuple[float, float]:
    """Statement 9: log q_tokens / q_whole is -(h_1 + ... + h_L) up to a constant."""
    _, chain, _, learned = _draw(rng)
    temperature, scale = _draw_settings(rng)
    tokens, whole = _tilt_both(chain, learned, temperature, scale)
    total = np.log(tokens / whole) + _sum_defects(chain, learned, temperature, scale)
    return float(np.ptp(total)), _ROUNDING * (1 + np.abs(total).max())


def ratio_is_bounded(rng: np.random.Generator) -> tuple[float, float]:
    """Statement 9: no sequence's log-ratio is larger than the sum of the ranges of the h_t."""
    _, chain, _, learned = _draw(rng)
    temperature, scale = _draw_settings(rng)
    tokens, whole = _tilt_both(chain, learned, temperature, scale)
    ranges = sum(float(np.ptp(h)) for h in defects(chain, learned, temperature, scale))
    return float(np.abs(np.log(tokens / whole)).max()), ranges + _ROUNDING


def independent_tokens(rng: np.random.Generator) -> tuple[float, float]:
    """Statement 9: tempering alone is the same both ways where tokens are independent."""
    length = int(rng.integers(2, 5))
    chain = np.ones(())
    for _ in range(length):
        chain = chain[..., None] * rng.dirichlet(np.ones(3))
    ones = [np.ones((3,) * t) for t in range(1, length + 1)]  # no tilt
    tokens, whole = _tilt_both(chain, ones, _draw_settings(rng)[0], 1.0)
    return float(np.abs(np.log(tokens / whole)).max()), _ROUNDING


def sequence_retain_error(rng: np.random.Generator) -> tuple[float, float]:
    """Statement 10: KL(p_r || q_tokens) <= (ε_1 + ... + ε_L) / (1 - γ) at T = s = 1."""
    retain, chain, exact, learned = _draw(rng)
    gamma = 1 - float((chain * exact[-1]).sum())
    bound = sum(excess_risks(chain, exact, learned)) / (1 - gamma)
    return kl(retain, tilt_tokens(chain, learned)), bound + _ROUNDING


STATEMENTS: dict[str, Callable[[np.random.Generator], tuple[float, float]]] = {
    "8: the exact classifier gives p_r": exact_is_exact,
    "9: equal for averaged classifiers": averages_are_equal,
    "9: the ratio is that of the defects": ratio_is_defects,
    "9: the ratio is bounded": ratio_is_bounded,
    "9: equal for independent tokens": independent_tokens,
    "10: retain error of sequences, T = 1": sequence_retain_error,
}


def check(statement: str, instances: int, seed: int = 0) -> Check:
    """Checks a statement of `STATEMENTS` on random chains."""
    rngs = np.random.default_rng(seed).spawn(instances)
    sides = np.array([STATEMENTS[statement](rng) for rng in rngs])
    left, right = sides.T
    violations = int(np.sum(left > right * (1 + 1e-10)))
    return Check(instances, violations, float(np.max(left / np.maximum(right, 1e-300))))


def _tilt_steps(
    chain: np.ndarray, classifier: Prefixes, temperature: float, scale: float
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The served next-token distributions with their normalisers, token by token."""
    masses = prefix_probabilities(chain)
    steps = []
    for before, after, f in zip(masses[:-1], masses[1:], classifier, strict=True):
        weights = (after / before[..., None]) ** (1 / temperature) * f**scale
        normaliser = np.asarray(weights.sum(axis=-1))
        steps.append((weights / normaliser[..., None], normaliser))
    return steps


def _sum_defects(chain: np.ndarray, learned: Prefixes, *settings: float) -> np.ndarray:
    hs = defects(chain, learned, *settings)
    return sum(
        (h.reshape(h.shape + (1,) * (chain.ndim - h.ndim)) for h in hs), np.zeros(chain.shape)
    )


def _tilt_both(
    chain: np.ndarray, classifier: Prefixes, temperature: float, scale: float
) -> Sequence[np.ndarray]:
    return (
        tilt_tokens(chain, classifier, temperature, scale),
        tilt_whole(chain, classifier[-1], temperature, scale),
    )


def _draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, Prefixes, Prefixes]:
    """p_r, p, the exact classifier and another, of 2 to 4 tokens and lengths 1 to 4."""
    size = int(rng.integers(2, 5)), int(rng.integers(1, 5))
    retain, forget = (draw_chain(rng, *size, rng.choice([0.1, 1.0, 10.0])) for _ in range(2))
    gamma = float(rng.uniform(0.01, 0.99))
    chain = (1 - gamma) * retain + gamma * forget
    exact = exact_classifier(retain, forget, gamma)
    return retain, chain, exact, disturb(rng, exact, rng.choice([0.1, 1.0, 3.0]))


def _draw_settings(rng: np.random.Generator) -> tuple[float, float]:
    """Draws T and s."""
    return float(np.exp(rng.uniform(0, 2))), float(rng.uniform(0, 2))
