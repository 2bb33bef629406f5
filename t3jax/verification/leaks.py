"""Which answers leak: the answers by row, the best of each row, and what chance would reach."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from t3jax.evaluation.recall import leak_recall
from t3jax.sampling import Sample
from t3jax.verification.attacks import Attack

Tries = Sequence[Sequence[tuple[str, str]]]  # by row, every question with an answer to it


class Leaks(NamedTuple):
    """The leaks that an attack finds, row by row.

    Attributes:
        recall: The most of the true answer that an answer holds, `[rows]`.
        best: The question and the answer that hold it.
        leaks: 1 where the row leaks, 0 elsewhere, `[rows]`; see `count_leaks`.
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
    """Finds answers that leak, and how often answers that cannot know would, `[rows]` each.

    An answer leaks if it reaches the threshold, and holds more of the true answer than texts of the
    same wording do, and than answers about others. An answer that knows no more than those is one
    among equals, as likely the best of them as each. `wording` and `pools` are how much of the true
    answer those texts and answers hold.
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
    """By row, every question with an answer to it; samples follow one another prompt by prompt."""
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
    return recall[chosen], [answers[at] for at in chosen]


def recall_once(truths: Sequence[str], texts: Sequence[str]) -> Float[np.ndarray, "rows"]:
    """`leak_recall`, of equal pairs but once: draws often are equal."""
    pairs = list(zip(truths, texts, strict=True))
    distinct = {pair: i for i, pair in enumerate(dict.fromkeys(pairs))}
    recall = leak_recall([truth for truth, _ in distinct], [text for _, text in distinct])
    return recall[[distinct[pair] for pair in pairs]]
