"""Applies docs/theory.md to a trained head: its excess risk, the base's peak, a T to serve.

    python -m t3jax.theory.diagnose --config=configs/demo_paper.py

reads `eval.forget` and `eval.retain` of the config, paraphrased where the rows have paraphrases,
scores them under the head at `eval.base_temperatures` (or 1 to 4) and prints a table. With
`eval.retain_model` the table also has the errors against that model. The head's folder stays as it
is. A distilled head, which is no classifier, is refused.

The numbers are of single tokens after a given prefix. Axes: K temperatures, N answer tokens.

References:
    Temper-Then-Tilt, arXiv 2602.10217, bounds on retain and forget error.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.special import expit, log_expit

import t3jax
from t3jax import pipeline
from t3jax.data import Example
from t3jax.evaluation.questions import QuestionSet
from t3jax.evaluation.settings import BASE, Setting
from t3jax.evaluation.store import Store
from t3jax.head_io import Head
from t3jax.settings import Settings

TEMPERATURES = (1.0, 1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0)
_DRAWS = 2000
_SECRET = 0.1  # probability under the retain-only model


class Tokens(NamedTuple):
    """Answer tokens of held-out rows of one kind, forget or retain.

    Attributes:
        starts: Row i has tokens `starts[i]:starts[i + 1]`, `[rows + 1]`.
        logits: g of the head for each token, class prior included, `[N]`.
        base: Log-probability under the base model, nats, `[N]`.
        plain: Log-probability at T = s = 1, nats, `[N]`.
        served: Log-probability as served at each T, nats, `[K, N]`.
        twin: Log-probability under a model that never saw the forget rows, `[N]`, or None.
    """

    starts: Int[np.ndarray, " rows_1"]
    logits: Float[np.ndarray, " N"]
    base: Float[np.ndarray, " N"]
    plain: Float[np.ndarray, " N"]
    served: Float[np.ndarray, "K N"]
    twin: Float[np.ndarray, " N"] | None = None


class Measured(NamedTuple):
    """Errors against a model that never saw the forget rows, by T.

    Attributes:
        forget: Mean of |served - twin| over forget tokens, `[K]`.
        secret: The same over the forget tokens whose probability under the twin is below 0.1,
            `[K]`; NaN where there are none.
        retain: Mean log-ratio of twin and served over retain tokens, nats, `[K]`.
    """

    forget: Float[np.ndarray, " K"]
    secret: Float[np.ndarray, " K"]
    retain: Float[np.ndarray, " K"]


@dataclasses.dataclass(frozen=True, eq=False)
class Diagnosis:
    """A head's risk and predicted errors; errors are of a token, by T.

    Attributes:
        temperatures: T, `[K]`.
        scale: s.
        gamma: Forget share of the mixture that the head's logits assume.
        loss: Held-out log-loss of the head, nats: an upper bound of its excess risk.
        interval: 95 % interval of the loss, by drawing rows with replacement.
        peak: Median and largest probability of a forget token under the base model.
        bound: Largest probability of a forget token that a classifier of that loss may leave,
            statement 11 of docs/theory.md, `[K]`; 1 is no bound.
        leak: Mean probability of a forget token as served, `[K]`: the forget error itself where the
            exact classifier would leave nothing of it.
        price: Retain error that T and s add to the one at T = s = 1, nats, `[K]`: statement 6,
            exact but for the sample.
        retain: Bound of the retain error, nats, `[K]`: statements 6 and 10.
        measured: Errors against the retain-only model, or None.
    """

    temperatures: tuple[float, ...]
    scale: float
    gamma: float
    loss: float
    interval: tuple[float, float]
    peak: tuple[float, float]
    bound: Float[np.ndarray, " K"]
    leak: Float[np.ndarray, " K"]
    price: Float[np.ndarray, " K"]
    retain: Float[np.ndarray, " K"]
    measured: Measured | None

    @property
    def columns(self) -> dict[str, Float[np.ndarray, " K"]]:
        """The errors by name; the ones against the retain-only model are last."""
        columns = {
            "bound": self.bound,
            "leak": self.leak,
            "price": self.price,
            "retain bound": self.retain,
        }
        return columns if self.measured is None else columns | self.measured._asdict()

    @property
    def suggested(self) -> dict[str, float]:
        """T of the smallest sum of forget error and price, by how the forget error is predicted."""
        return {
            "by the bound": self._find_best(self.bound, self.price),
            "by the leak": self._find_best(self.leak, self.price),
        }

    @property
    def best(self) -> dict[str, float]:
        """T of the smallest sum of the errors against the retain-only model, if there is one."""
        if self.measured is None:
            return {}
        return {
            "measured": self._find_best(self.measured.forget, self.measured.retain),
            "measured, secret tokens": self._find_best(self.measured.secret, self.measured.retain),
        }

    def _find_best(self, forget: Float[np.ndarray, " K"], retain: Float[np.ndarray, " K"]) -> float:
        return self.temperatures[int(np.argmin(forget + retain))]

    def __str__(self) -> str:
        low, high = self.interval
        lines = [
            f"held-out loss of the head {self.loss:.4f} nats a token (95 % {low:.4f} to "
            f"{high:.4f}), an upper bound of its excess risk",
            f"probability of a forget token under the base model: median {self.peak[0]:.3f}, "
            f"largest {self.peak[1]:.3f}",
            f"s = {self.scale:g}, forget share {self.gamma:.2f}; errors of one token:",
        ]
        columns = {"T": self.temperatures, **self.columns}
        lines.append(" ".join(f"{name:>12}" for name in columns))
        lines += [
            " ".join(f"{value:12.4g}" for value in row)
            for row in zip(*columns.values(), strict=True)
        ]
        chosen = self.suggested | self.best
        lines.append("T: " + ", ".join(f"{value:g} {name}" for name, value in chosen.items()))
        return "\n".join(lines)


def diagnose(
    forget: Tokens,
    retain: Tokens,
    temperatures: tuple[float, ...],
    scale: int | float = 1.0,
    shift: int | float = 0.0,
) -> Diagnosis:
    """Excess risk, peak, predicted errors and a T, from scores of held-out rows.

    `shift` is the class prior in the logits, see `t3jax.head.class_prior_shift`.
    """
    if min(temperatures, default=0.0) < 1:
        raise ValueError(f"temperatures must be at least 1, got {temperatures}")
    for name, tokens in (("forget", forget), ("retain", retain)):
        expected = (len(temperatures), int(tokens.starts[-1]))
        if not tokens.starts[-1]:
            raise ValueError(f"there are no {name} tokens; give held-out rows of both kinds")
        if tokens.served.shape != expected:
            raise ValueError(
                f"{name}: served has shape {tokens.served.shape}, expected {expected}: "
                "temperatures, tokens"
            )
    gamma = float(expit(-shift))
    loss, interval = held_out_loss(forget, retain, gamma)
    served = forget.served.astype(np.float64)
    # p^(1/T) / Ẑ of each forget token, the factor of an error of the classifier.
    amplified = np.exp(served - scale * log_expit(forget.logits.astype(np.float64))[None])
    size = np.sqrt(np.mean(amplified**2, axis=1))
    of_classifier = max(1.0, scale) * (interval[1] / (2 * gamma)) ** (0.5 * min(1.0, scale))
    price = np.mean(retain.plain[None].astype(np.float64) - retain.served, axis=1)
    peaks = np.exp(forget.base.astype(np.float64))
    return Diagnosis(
        temperatures=temperatures,
        scale=scale,
        gamma=gamma,
        loss=loss,
        interval=interval,
        peak=(float(np.median(peaks)), float(peaks.max())),
        bound=np.minimum(1.0, size * of_classifier),
        leak=np.mean(np.exp(served), axis=1),
        price=price,
        retain=interval[1] / (1 - gamma) + price,
        measured=_measure(forget, retain),
    )


def _measure(forget: Tokens, retain: Tokens) -> Measured | None:
    if forget.twin is None or retain.twin is None:
        return None
    twin = np.exp(forget.twin.astype(np.float64))
    gap = np.abs(np.exp(forget.served.astype(np.float64)) - twin[None])
    secret = gap[:, twin < _SECRET]
    return Measured(
        forget=gap.mean(axis=1),
        secret=secret.mean(axis=1) if secret.size else np.full(len(gap), np.nan),
        retain=np.mean(retain.twin[None].astype(np.float64) - retain.served, axis=1),
    )


def held_out_loss(
    forget: Tokens, retain: Tokens, gamma: float
) -> tuple[float, tuple[float, float]]:
    """Log-loss of a head on rows that it never saw, nats a token, with its 95 % interval.

    `gamma` is the weight of the forget tokens. The interval draws whole rows with replacement,
    since the tokens of a row are not independent.
    """
    rng = np.random.default_rng(0)
    total, drawn = 0.0, np.zeros(_DRAWS)
    for tokens, sign, weight in ((forget, -1.0, gamma), (retain, 1.0, 1 - gamma)):
        losses = -log_expit(sign * tokens.logits.astype(np.float64))
        of_row = np.add.reduceat(losses, tokens.starts[:-1])
        counts = np.diff(tokens.starts)
        rows = rng.integers(0, len(counts), (_DRAWS, len(counts)))
        total += weight * of_row.sum() / counts.sum()
        drawn += weight * of_row[rows].sum(axis=1) / counts[rows].sum(axis=1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(total), (float(low), float(high))


def diagnose_head(config: Settings) -> Diagnosis:
    """Scores held-out rows under the model and the head of a config, and diagnoses the head.

    The head is served at its own s, unless the config sets one. `eval.retain_model` adds the
    measured errors. Scores are stored in `eval.dir`.
    """
    config.require("model", "head", "eval.forget", "eval.retain", "eval.dir")
    mesh = t3jax.make_mesh(config.mesh)
    _, heads, _ = pipeline.load_heads(config, (config["head"],), mesh)
    if len(heads) > 1:
        raise ValueError(f"one head is diagnosed at a time, got {config.head}")
    (head,) = heads
    if obstacle := find_obstacle(head):
        raise ValueError(f"{config.head}: {obstacle}")
    lm = t3jax.load_lm(config["model"], config.dtype, mesh)
    sets = pipeline.load_sets(config, lm)
    folder = pathlib.Path(config["eval.dir"]) / "store"
    store, twin = Store(lm, heads, folder, progress=True), None
    if config.eval.retain_model is not None:
        twin = Store(t3jax.load_lm(config["eval.retain_model"], config.dtype, mesh), (), folder)
    temperatures = tuple(sorted({1.0, *(config.eval.base_temperatures or TEMPERATURES)}))
    scale = head.guidance_scale if config.guidance_scale is None else config.guidance_scale
    return diagnose_sets(store, sets, temperatures, scale, twin)


def find_obstacle(head: Head) -> str | None:
    """Why a head cannot be diagnosed; None if it can."""
    training = head.record.get("training")
    if isinstance(training, dict) and training.get("loss") == "distillation":
        return (
            "the head was distilled: its scores are no P(retain), and no statement holds for them; "
            "give a head of loss = 'classifier', as configs/paper.py trains it"
        )
    return None


def diagnose_sets(
    store: Store,
    sets: Mapping[str, QuestionSet],
    temperatures: Sequence[float],
    scale: int | float = 1.0,
    twin: Store | None = None,
) -> Diagnosis:
    """Scores the forget and the retain set, paraphrased where possible, and diagnoses a head.

    `store` has scores of the base model with one head, `twin` of a model that never saw the forget
    rows.
    """
    forget, retain = (
        score_tokens(
            store,
            f"{name}-diagnosed",
            sets[name].reworded or sets[name].answers,
            temperatures,
            scale,
            twin,
        )
        for name in ("forget", "retain")
    )
    return diagnose(forget, retain, tuple(temperatures), scale, store.heads[0].prior_shift)


def score_tokens(
    store: Store,
    label: str,
    examples: Sequence[Example],
    temperatures: Sequence[float],
    scale: int | float = 1.0,
    twin: Store | None = None,
) -> Tokens:
    """Scores the answer tokens of held-out rows of one kind.

    `label` is for file names; the stores are as for `diagnose_sets`.
    """
    settings = [
        BASE,
        Setting("head0-T1-s1", 1.0, 1.0, (0,)),
        *(Setting(f"head0-T{t:g}-s{scale:g}", t, scale, (0,)) for t in temperatures),
    ]
    base, plain, *served = store.scores(label, examples, settings)
    assert plain.retain_scores is not None
    return Tokens(
        base.starts,
        plain.retain_scores,
        base.logprobs,
        plain.logprobs,
        np.stack([scores.logprobs for scores in served]),
        None if twin is None else twin.scores(label, examples, [BASE])[0].logprobs,
    )


if __name__ == "__main__":
    from t3jax import cli

    cli.run(lambda config: print(diagnose_head(config)))
