"""Every statement of docs/theory.md on random finite mixtures, in float64.

A mixture has A atoms; atom i has reference measure m_i, and p_r, p_f and p are densities with
respect to it, so that an atom of small measure is a spike. Each statement returns both of its
sides, of which the left one must be at most the right one. An identity returns its deviation, and
a bound of the rounding error. Proofs are in docs/theory.md and not here.

Axes: I instances, A atoms.

References:
    Temper-Then-Tilt, arXiv 2602.10217, bounds on retain and forget error.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import expit, kl_div, xlogy

_ROUNDING = 1e-9
_ATOMS = 12
Sides = tuple[Float[np.ndarray, " I"], Float[np.ndarray, " I"]]


class Instances(NamedTuple):
    """Random mixtures with a classifier and a temperature each.

    Attributes:
        measure: m, reference measure of the atoms, `[I, A]`.
        retain: Density of p_r, `[I, A]`.
        forget: Density of p_f, `[I, A]`.
        gamma: γ, `[I]`.
        learned: f̂, in (0, 1), `[I, A]`.
        temperature: T, at least 1, `[I]`.
        scale: s, for statement 11, `[I]`; all other statements have s = 1.
    """

    measure: Float[np.ndarray, "I A"]
    retain: Float[np.ndarray, "I A"]
    forget: Float[np.ndarray, "I A"]
    gamma: Float[np.ndarray, " I"]
    learned: Float[np.ndarray, "I A"]
    temperature: Float[np.ndarray, " I"]
    scale: Float[np.ndarray, " I"]

    @property
    def base(self) -> Float[np.ndarray, "I A"]:
        """Density of p = (1 - γ) p_r + γ p_f."""
        gamma = self.gamma[:, None]
        return (1 - gamma) * self.retain + gamma * self.forget

    @property
    def exact(self) -> Float[np.ndarray, "I A"]:
        """f* = P(retain | z)."""
        return (1 - self.gamma[:, None]) * self.retain / self.base

    def integral(self, values: Float[np.ndarray, "I A"]) -> Float[np.ndarray, " I"]:
        """Integrals with respect to m."""
        return np.sum(self.measure * values, axis=1)

    @property
    def excess_risk(self) -> Float[np.ndarray, " I"]:
        """ε, nats: the mean over p of KL(f* || f̂)."""
        return self.integral(self.base * _coin_kl(self.exact, self.learned))

    def weighted(self, classifier: Float[np.ndarray, "I A"], tempered: bool = True) -> np.ndarray:
        """p^(1/T) f, not normalised; p f if not tempered."""
        power = 1 / self.temperature[:, None] if tempered else 1.0
        return self.base**power * classifier

    def estimate(self, classifier: Float[np.ndarray, "I A"], tempered: bool = True) -> np.ndarray:
        """p^(1/T) f over its integral."""
        weighted = self.weighted(classifier, tempered)
        return weighted / self.integral(weighted)[:, None]

    def kl(self, p: Float[np.ndarray, "I A"], q: Float[np.ndarray, "I A"]) -> np.ndarray:
        """KL(p || q) of two densities, nats."""
        return self.integral(kl_div(p, q))

    @property
    def widest(self) -> Float[np.ndarray, " I"]:
        """W, the largest of p_f p^(1/T - 1); at T = 1 the peak of p_f."""
        return np.max(self.forget * self.base ** (1 / self.temperature[:, None] - 1), axis=1)


def draw_instances(rng: np.random.Generator, number: int) -> Instances:
    """Draws mixtures that are flat, spiky or of disjoint supports, with a classifier each.

    γ is from 0.001 to 0.999 and T from 1 to 10. Classifiers are near the exact one, far from it,
    leaky by the same share everywhere, or independent of it.
    """
    shape = number, _ATOMS

    def choose(*values: float) -> np.ndarray:
        return rng.choice(values, (number, 1))

    measure = np.exp(choose(0.0, 1.0, 4.0) * rng.normal(size=shape))
    split = rng.integers(1, _ATOMS, (number, 1))  # where supports are disjoint, or nearly
    left = np.arange(_ATOMS) < split
    kind = choose(0.0, 1.0, 2.0, 3.0)
    masses = []
    for side in (left, ~left):
        mass = rng.gamma(np.broadcast_to(choose(0.1, 1.0, 10.0), shape)) + 1e-12
        mass = np.where((kind == 0) & ~side, 0.0, np.where((kind == 1) & ~side, 1e-6 * mass, mass))
        masses.append(mass / mass.sum(axis=1, keepdims=True))
    retain, forget = (mass / measure for mass in masses)
    gamma = expit(rng.uniform(np.log(0.001), -np.log(0.001), number))
    blank = Instances(measure, retain, forget, gamma, retain, gamma, gamma)
    exact = blank.exact
    logit = np.log(np.maximum(exact, 1e-9)) - np.log(np.maximum(1 - exact, 1e-9))
    near = expit(logit + choose(0.01, 0.3, 3.0) * rng.normal(size=shape))
    rate = 10 ** rng.uniform(-4, -0.01, (number, 1))
    leaky = np.clip(exact + rate * (1 - exact), 1e-12, 1 - 1e-12)
    random = expit(choose(0.5, 5.0) * rng.normal(size=shape))
    which = choose(0.0, 1.0, 2.0)
    learned = np.where(which == 0, near, np.where(which == 1, leaky, random))
    temperature = np.exp(rng.uniform(0, np.log(10), number))
    scale = np.where(rng.random(number) < 0.5, 1.0, rng.uniform(0.1, 3, number))
    return blank._replace(learned=learned, temperature=temperature, scale=scale)


def chain_rule(x: Instances) -> Sides:
    """Statement 1: excess risk splits into class sizes, retain side and forget side."""
    estimate = x.estimate(x.learned, tempered=False)
    other = x.estimate(1 - x.learned, tempered=False)
    share = x.integral(x.base * x.learned)
    parts = (
        _coin_kl(1 - x.gamma, share)
        + (1 - x.gamma) * x.kl(x.retain, estimate)
        + x.gamma * x.kl(x.forget, other)
    )
    return np.abs(x.excess_risk - parts), _ROUNDING * (1 + parts)


def retain_error(x: Instances) -> Sides:
    """Statement 1: KL(p_r || q̂) <= ε / (1 - γ) at T = 1."""
    error = x.kl(x.retain, x.estimate(x.learned, tempered=False))
    return error, x.excess_risk / (1 - x.gamma)


def forget_error(x: Instances) -> Sides:
    """Statement 2: forget error <= ‖p_f‖∞ sqrt(2 ε / (1 - γ)) at T = 1."""
    gap = np.abs(x.estimate(x.learned, tempered=False) - x.retain)
    bound = np.max(x.forget, axis=1) * np.sqrt(2 * x.excess_risk / (1 - x.gamma))
    return x.integral(x.forget * gap), bound


def unnormalised(x: Instances) -> Sides:
    """Statement 3: the integral of p_f p^(1/T) |f̂ - f*| <= W sqrt(ε / 2)."""
    return _classifier_part(x), x.widest * np.sqrt(x.excess_risk / 2)


def widest_and_peak(x: Instances) -> Sides:
    """Statement 3: W <= γ^(1/T - 1) ‖p_f‖∞^(1/T)."""
    return x.widest, _peak_power(x)


def peak_and_mixture(x: Instances) -> Sides:
    """Statement 3: γ^(1/T - 1) ‖p_f‖∞^(1/T) <= ‖p‖∞^(1/T) / γ."""
    return _peak_power(x), np.max(x.base, axis=1) ** (1 / x.temperature) / x.gamma


def fast_rate(x: Instances) -> Sides:
    """Statement 4: the same integral <= W ε + 2 sqrt(W ε O), O the integral of p_f p^(1/T) f*."""
    overlap = x.integral(x.forget * x.weighted(x.exact))
    product = x.widest * x.excess_risk
    return _classifier_part(x), product + 2 * np.sqrt(product * overlap)


def tempered_forget_error(x: Instances) -> Sides:
    """Statement 5: forget error <= bias + (W + A S) sqrt(ε / 2) / Ẑ."""
    target = x.estimate(x.exact)
    bias = x.integral(x.forget * np.abs(target - x.retain))
    spread = np.sqrt(x.integral(x.base ** (2 / x.temperature[:, None] - 1)))
    factor = x.widest + x.integral(x.forget * target) * spread
    of_classifier = factor * np.sqrt(x.excess_risk / 2) / x.integral(x.weighted(x.learned))
    error = x.integral(x.forget * np.abs(x.estimate(x.learned) - x.retain))
    return error, bias + of_classifier


def tempered_retain_error(x: Instances) -> Sides:
    """Statement 6: the retain error that tempering adds, for any classifier."""
    plain = x.estimate(x.learned, tempered=False)
    error = x.kl(x.retain, x.estimate(x.learned))
    expected = x.kl(x.retain, plain) + _price(x, plain)
    return np.abs(error - expected), _ROUNDING * (1 + np.abs(error))


def bias_not_negative(x: Instances) -> Sides:
    """Statement 6: with the exact classifier tempering never lowers the retain error."""
    return -_price(x, x.retain), np.full(len(x.gamma), _ROUNDING)


def bias_bound(x: Instances) -> Sides:
    """Statement 6: tempering costs at most (1 - 1/T)² osc(log p)² / 8, osc over p_r > 0."""
    held = x.retain > 0
    logs = np.log(x.base)
    oscillation = np.max(np.where(held, logs, -np.inf), axis=1) - np.min(
        np.where(held, logs, np.inf), axis=1
    )
    bound = ((1 - 1 / x.temperature) * oscillation) ** 2 / 8
    return _price(x, x.retain), bound + _ROUNDING


def held_out_loss(x: Instances) -> Sides:
    """Statement 7: the log-loss is at least ε."""
    exact, learned = x.exact, x.learned
    losses = -exact * np.log(learned) - (1 - exact) * np.log1p(-learned)
    return x.excess_risk, x.integral(x.base * losses) + _ROUNDING


def second_moment(x: Instances) -> Sides:
    """Statement 11: the classifier's part by the second moment of p^(1/T) / Ẑ under p_f."""
    scale = x.scale[:, None]
    tilted = x.base ** (1 / x.temperature[:, None])
    amplified = tilted / x.integral(tilted * x.learned**scale)[:, None]
    error = x.integral(x.forget * amplified * np.abs(x.learned**scale - x.exact**scale))
    size = np.sqrt(x.integral(x.forget * amplified**2))
    power = 0.5 * np.minimum(1, x.scale)
    of_classifier = np.maximum(1, x.scale) * (x.excess_risk / (2 * x.gamma)) ** power
    return error, size * of_classifier


STATEMENTS: dict[str, Callable[[Instances], Sides]] = {
    "1: chain rule of the excess risk": chain_rule,
    "1: retain error, T = 1": retain_error,
    "2: forget error, T = 1": forget_error,
    "3: classifier's part, not normalised": unnormalised,
    "3: W and the peak of p_f": widest_and_peak,
    "3: the peak of p_f and that of p": peak_and_mixture,
    "4: classifier's part, few retain points": fast_rate,
    "5: forget error, tempered": tempered_forget_error,
    "6: retain error, tempered": tempered_retain_error,
    "6: bias is not negative": bias_not_negative,
    "6: bias is bounded": bias_bound,
    "7: held-out loss": held_out_loss,
    "11: classifier's part, second moment": second_moment,
}


class Check(NamedTuple):
    """The check of a statement on random instances.

    Attributes:
        instances: Number of instances.
        violations: Number of instances whose left side is larger.
        tightest: The largest ratio of the left side to the right side.
    """

    instances: int
    violations: int
    tightest: float


def check(statement: str, instances: int, seed: int = 0) -> Check:
    """Checks a statement of `STATEMENTS` on random instances."""
    left, right = STATEMENTS[statement](draw_instances(np.random.default_rng(seed), instances))
    # The tolerance covers the rounding of a sum of 12 numbers.
    violated = left > right * (1 + 1e-10) + 1e-12
    ratio = left / np.maximum(right, 1e-300)
    return Check(instances, int(violated.sum()), float(np.max(ratio)))


def spike_errors(
    peak: float, gamma: float, rate: float, temperature: float
) -> tuple[float, float, float]:
    """The example in which both slopes are exact: a uniform p_r with a uniform spike beside it.

    p_r has density 1 on a set of measure 1, p_f density `peak` on another; f̂ is 1 on the first and
    `rate` on the second, so that ε = -γ log(1 - rate) does not depend on the peak. The forget
    error, the retain error in nats, and the mass of q̂ on the spike are returned.
    """
    power = 1 / temperature
    on_spike = (gamma * peak) ** power * rate
    total = (1 - gamma) ** power + on_spike / peak
    return (
        on_spike / total,
        float(np.log(total) - power * np.log(1 - gamma)),
        on_spike / peak / total,
    )


def _classifier_part(x: Instances) -> np.ndarray:
    power = 1 / x.temperature[:, None]
    return x.integral(x.forget * x.base**power * np.abs(x.learned - x.exact))


def _peak_power(x: Instances) -> np.ndarray:
    power = 1 / x.temperature
    return x.gamma ** (power - 1) * np.max(x.forget, axis=1) ** power


def _price(x: Instances, plain: np.ndarray) -> np.ndarray:
    """The retain error that tempering adds: log E_plain[p^-β] + β E_retain[log p], β = 1 - 1/T."""
    beta = 1 - 1 / x.temperature
    mean = x.integral(np.where(x.retain > 0, x.retain, 0.0) * np.log(x.base))
    return np.log(x.integral(plain * x.base ** -beta[:, None])) + beta * mean


def _coin_kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL of two Bernoulli distributions."""
    return xlogy(p, p / q) + xlogy(1 - p, (1 - p) / (1 - q))
