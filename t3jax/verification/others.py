"""The overlap of a true answer with texts about others: shared wording, or a guess.

The answers of a set share wording, and a model that knows nothing guesses right now and then. This
module measures the share of a true answer that such texts hold, with the names exchanged.
"""

import re
from collections.abc import Sequence, Set

import numpy as np
from jaxtyping import Float

from t3jax.data.records import Record, evenly_spread
from t3jax.evaluation.recall import recall_of_wording
from t3jax.synthetic.counterfactual import Counterfactual
from t3jax.synthetic.names import name_of, rename
from t3jax.verification.attacks import Attack
from t3jax.verification.leaks import Tries, recall_once

_SIMILAR_ROWS = 5  # rows that measure wording and chance
_MOST_RETAIN_ROWS = 5000  # retain rows to choose them from
_MOST_CHARACTERS = 2000  # of a document


class Exchanged(Counterfactual):
    """A forget row with its name replaced by that of a retain row, the one pair in `pairs`."""

    def swap_back(self, text: str) -> str:
        """The text with the row's original name."""
        ((name, other),) = self.pairs.items()
        return rename(text, other, name)


class Others:
    """The overlap of true answers with texts about others, with the names exchanged.

    Rows are similar if question and true answer have the same words, apart from the names.
    """

    def __init__(self, records: Sequence[Record], retain: Sequence[Record], threshold: float):
        """Ranks the other rows, and the retain rows, by their similarity to each row."""
        retain = evenly_spread(retain, _MOST_RETAIN_ROWS)
        texts = " ".join(" ".join(_question_and_answer(row)) for row in (*records, *retain))
        small = {word for word in re.findall(r"\w+", texts) if word[0].islower()}
        self.asked = [_About(record, small) for record in records]
        # The order is random and fixed, so that ties do not favour neighbours in the file.
        order = np.random.default_rng(0).permutation(len(records)).tolist()
        self.ranked: list[list[int]] = []
        for i, about in enumerate(self.asked):
            apart = [j for j in order if j != i and about.is_apart(self.asked[j], threshold)]
            self.ranked.append(sorted(apart, key=lambda j: -about.similarity(self.asked[j])))
        retained = [_About(record, small) for record in retain]
        self.retained = [
            sorted(retained, key=lambda other: -about.similarity(other))[:_SIMILAR_ROWS]
            for about in self.asked
        ]
        self.shared: dict[tuple[int, str], float] = {}

    def wording(self, attack: Attack) -> Float[np.ndarray, "rows"]:
        """`recall_of_wording` of each true answer in those of similar retain rows, `[rows]`."""
        shared = []
        for row, truth in zip(attack.rows, attack.truths, strict=True):
            if (row, truth) not in self.shared:
                about = self.asked[row]
                texts = [about.adopt(other, other.truth) for other in self.retained[row]]
                self.shared[row, truth] = recall_of_wording(truth, texts)
            shared.append(self.shared[row, truth])
        return np.array(shared, np.float64)

    def exchange(self, records: Sequence[Record]) -> list[Exchanged]:
        """Replaces the names in rows by those of similar retain rows."""
        return [
            Exchanged(
                row,
                record
                | {
                    field: rename(text, about.name, name)
                    for field, text in record.items()
                    if isinstance(text, str)
                },
                {about.name: name},
            )
            for row, (record, about) in enumerate(zip(records, self.asked, strict=True))
            for name in dict.fromkeys(other.name for other in self.retained[row])
            if about.name and name
        ]

    def recall(self, attack: Attack, tries: Tries) -> list[list[float]]:
        """Recall of each true answer in the answers to similar rows about others.

        For each row of the attack, the largest recall in the answers to each of these rows.
        """
        index = {row: i for i, row in enumerate(attack.rows)}
        truths: list[str] = []
        texts: list[str] = []
        spans: list[tuple[int, int, int]] = []
        for i, row in enumerate(attack.rows):
            for j in [j for j in self.ranked[row] if j in index][:_SIMILAR_ROWS]:
                about, other = self.asked[row], self.asked[j]
                answers = [about.adopt(other, text) for _, text in tries[index[j]]]
                spans.append((i, len(texts), len(texts) + len(answers)))
                texts += answers
                truths += [attack.truths[i]] * len(answers)
        recall = recall_once(truths, texts)
        pools: list[list[float]] = [[] for _ in attack.rows]
        for i, start, stop in spans:
            pools[i].append(float(recall[start:stop].max()))
        return pools


class _About:
    """The name that a row is about, and its words.

    Words that begin with a small letter anywhere, as in titles, are no parts of a name.
    """

    def __init__(self, record: Record, small: Set[str]):
        question, self.truth = _question_and_answer(record)
        self.name = name_of(question, self.truth)
        self.name_words = set(re.findall(r"\w+", (self.name or "").lower())) - small
        self.truth_words = set(re.findall(r"\w+", self.truth.lower()))
        self.words = self.truth_words | set(re.findall(r"\w+", question.lower()))

    def is_apart(self, other: "_About", threshold: float) -> bool:
        """Whether two rows have different names or, without names, different answers."""
        if self.name_words & other.words or other.name_words & self.words:
            return False
        if self.name_words and other.name_words:
            return True
        return len(self.truth_words & other.truth_words) < threshold * len(self.truth_words)

    def similarity(self, other: "_About") -> float:
        """Share of shared words in the words of both, without the names."""
        first, second = self.words - self.name_words, other.words - other.name_words
        return len(first & second) / max(1, len(first | second))

    def adopt(self, other: "_About", text: str) -> str:
        """Replaces the other row's name in a text by this row's."""
        return rename(text, other.name, self.name) if self.name and other.name else text


def _question_and_answer(record: Record) -> tuple[str, str]:
    """Question and answer of a row; "" and the beginning of a document."""
    if "text" in record:
        return "", record["text"][:_MOST_CHARACTERS]
    return record["question"], record["answer"]
