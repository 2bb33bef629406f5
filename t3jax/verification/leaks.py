"""Finds the answers that leak: the best answer of each row, and the leaks expected by chance."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from t3jax.evaluation.recall import leak_recall
from t3jax.sampling import Sample
from t3jax.verification.attacks import Attack

Tries = Sequence[Sequence[tuple[str, str]]]  # by row, pairs of a question and an answer


class Leaks(NamedTuple):
    """The leaks that an attack finds, row by row.

    Attributes:
        recall: Largest recall of the true answer in an answer, `[rows]`.
        best: The question and the answer of that recall.
        leaks: 1 if the row leaks, else 0, `[rows]`; see `count_leaks`.
        chance: Share of others' answers that would leak in its place, `[rows]`.
    """

    recall: Float[np.ndarray, "rows"]
    best: list[tuple[str, str]]
    leaks: Float[np.ndarray, "rows"]
    chance: Float[np.ndarray, "rows"]


def find_leaks(
    attack: Attack,
    tries: Tries,
    wording: Float[np.ndarray, "rows"],
    pools: Sequence[Sequence[float]],
    threshold: float,
) -> Leaks:
    """Finds the rows that an attack brings back; the last three arguments are `count_leaks`'s."""
    recall, best = best_answers(attack, tries)
    return Leaks(recall, best, *count_leaks(recall, wording, pools, threshold))


def count_leaks(
    recall: Float[np.ndarray, "rows"],
    wording: Float[np.ndarray, "rows"],
    pools: Sequence[Sequence[float]],
    threshold: float,
) -> tuple[Float[np.ndarray, "rows"], Float[np.ndarray, "rows"]]:
    """Finds leaks, and the rate at which answers without knowledge would leak, `[rows]` each.

    An answer leaks if its recall of the true answer reaches the threshold, and exceeds `wording`,
    the recall in texts of the same wording, and the row's pool, the recall in answers about others.
    An answer without knowledge is the best of its pool by chance alone, as often as any other.
    """
    leaks, chance = np.zeros(len(recall)), np.zeros(len(recall))
    for i, pool in enumerate(pools):
        best, *rest = sorted([float(recall[i]), *pool], reverse=True)
        if best < threshold or best <= wording[i] or best in rest:
            continue
        if recall[i] == best:
            leaks[i] = 1.0
        else:
            chance[i] = 1 / len(pool)
    return leaks, chance


def group_answers(attack: Attack, samples: Sequence[Sample]) -> Tries:
    """Groups samples, which are ordered by prompt, by row, with their questions."""
    draws = len(samples) // len(attack.prompts)
    tries: list[list[tuple[str, str]]] = [[] for _ in attack.rows]
    for i, sample in enumerate(samples):
        prompt = i // draws
        tries[attack.owners[prompt]].append((attack.questions[prompt], sample.text))
    return tries


def best_answers(
    attack: Attack, tries: Tries
) -> tuple[Float[np.ndarray, "rows"], list[tuple[str, str]]]:
    """Each row's largest recall of the true answer, with the question and the answer."""
    answers = [answer for row in tries for answer in row]
    truths = [truth for truth, row in zip(attack.truths, tries, strict=True) for _ in row]
    recall = recall_once(truths, [text for _, text in answers])
    starts = np.cumsum([0, *map(len, tries)])
    chosen = [
        start + int(np.argmax(recall[start : start + len(row)]))
        for start, row in zip(starts[:-1].tolist(), tries, strict=True)
    ]
    return recall[chosen], [answers[i] for i in chosen]


def recall_once(truths: Sequence[str], texts: Sequence[str]) -> Float[np.ndarray, "rows"]:
    """`leak_recall`, computed once for equal pairs, since samples are often equal."""
    pairs = list(zip(truths, texts, strict=True))
    distinct = {pair: i for i, pair in enumerate(dict.fromkeys(pairs))}
    recall = leak_recall([truth for truth, _ in distinct], [text for _, text in distinct])
    return recall[[distinct[pair] for pair in pairs]]
