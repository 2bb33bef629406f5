"""The effect of head and gate on texts that no head was trained on: do they reach too far?

The gate's P(retain | prefix) is the normaliser of the tilt at T = 1 and s = 1. It follows from the
scores of a token under the base model and under that setting, without a further program.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from t3jax.data.records import Record
from t3jax.evaluation.scoring import TextScores


class Probe(NamedTuple):
    """The effect of a setting on texts of one kind.

    Attributes:
        texts: Number of texts.
        retain_prob: Mean over texts of the mean over answer tokens of q = P(retain | prefix).
        lowest: The lowest mean of a text.
        below_half: Share of texts whose mean is below 1/2.
        change: Mean over texts of the answer's log-probability under the setting minus under the
            base model, nats a token.
    """

    texts: int
    retain_prob: float
    lowest: float
    below_half: float
    change: float


def retain_probabilities(base: TextScores, tilted: TextScores) -> Float[np.ndarray, "N"]:
    """The gate's q = Σ_v p(v) sigmoid(g(v)) at every answer token, from scores of the answers.

    p_tilted(v) = p(v) f(v) / q holds for any token v; it is solved for q at the token that follows
    the prefix. `tilted` are the scores at T = 1, s = 1 without refinements.
    """
    log_f = np.log(np.maximum(tilted.retain_prob, np.finfo(np.float64).tiny))
    return np.exp(base.logprobs.astype(np.float64) + log_f - tilted.logprobs)


def probe(base: TextScores, tilted: TextScores, served: TextScores) -> Probe:
    """Summarizes scores of texts of one kind under the base model, T = s = 1 and a setting."""
    q = base.text_means(retain_probabilities(base, tilted))
    return Probe(
        texts=len(q),
        retain_prob=float(q.mean()),
        lowest=float(q.min()),
        below_half=float((q < 0.5).mean()),
        change=float((base.avg_loss - served.avg_loss).mean()),
    )


def split_answers(records: Sequence[Record]) -> list[Record]:
    """Cuts answers in two: the question quotes the first half, and the answer is the second.

    Answers of one word are left out.
    """
    halves = []
    for record in records:
        words = record["answer"].split()
        if len(words) > 1:
            first, second = words[: len(words) // 2], words[len(words) // 2 :]
            question = f"Please continue this text: {' '.join(first)}"
            halves.append({"question": question, "answer": " ".join(second)})
    return halves
