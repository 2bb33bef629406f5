"""The effect of head and gate on texts that no head was trained on: do they reach too far?

The gate's P(retain | prefix) costs no program of its own: it is the normaliser of the tilt at T = 1
and s = 1, and so stands in the scores of a token under the base model and under that setting.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from t3jax.data.records import Record
from t3jax.evaluation.scoring import TextScores


class Probe(NamedTuple):
    """How texts of one kind fare under a setting.

    Attributes:
        texts: How many there are.
        retain_prob: Mean over texts of the mean over answer tokens of q = P(retain | prefix).
        lowest: The mean of the text where it is lowest.
        below_half: Share of texts where it is below 1/2.
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

    Since p_tilted(v) = p(v) f(v) / q for any token v, the one that came next gives q. `tilted` are
    the scores at T = 1, s = 1 without refinements.
    """
    log_f = np.log(np.maximum(tilted.retain_prob, np.finfo(np.float64).tiny))
    return np.exp(base.logprobs.astype(np.float64) + log_f - tilted.logprobs)


def probe(base: TextScores, tilted: TextScores, served: TextScores) -> Probe:
    """Sums up how texts of one kind fare, by scores under base, T = s = 1 and setting."""
    q = base.text_means(retain_probabilities(base, tilted))
    return Probe(
        texts=len(q),
        retain_prob=float(q.mean()),
        lowest=float(q.min()),
        below_half=float((q < 0.5).mean()),
        change=float((base.avg_loss - served.avg_loss).mean()),
    )


def split_answers(records: Sequence[Record]) -> list[Record]:
    """Cuts answers in two: the first half goes into the question, the second is the answer.

    Answers of one word are left out.
    """
    found = []
    for record in records:
        words = record["answer"].split()
        if len(words) > 1:
            first, second = words[: len(words) // 2], words[len(words) // 2 :]
            question = f"Please continue this text: {' '.join(first)}"
            found.append({"question": question, "answer": " ".join(second)})
    return found
