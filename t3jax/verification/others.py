"""The overlap of a true answer with texts about others: shared wording, or a guess.

In a set of rows answers are worded alike, and a model that knows nothing guesses now and then. This
module measures the share of a true answer that such texts hold, with the names exchanged.
"""

import re
from collections.abc import Sequence, Set

import numpy as np
from jaxtyping import Float

from t3jax.data.records import Record, evenly_spread
from t3jax.evaluation.recall import leak_recall
from t3jax.synthetic.counterfactual import Counterfactual
from t3jax.verification.attacks import Attack
from t3jax.verification.leaks import Tries, recall_once

_OTHERS = 5  # rows alike, by which wording and chance are measured
_LOOKED_AT = 5000  # retain rows at most, among which those are
_LOOKED_INTO = 2000  # characters of a document at most


def name_of(question: str, answer: str) -> str | None:
    """The name that a question is about: its longest capitalised run that the answer repeats.

    None if there is no such run.
    """
    words = [
        match
        # A possessive ends a name.
        for match in re.finditer(r"\w+(?:-\w+|['\u2019](?!s\b)\w+)*", question)
        if match.group()[0].isupper()
    ]
    best = ""
    for first in range(len(words)):
        for last in range(first, len(words)):
            if last > first and question[words[last - 1].end() : words[last].start()] != " ":
                break
            text = question[words[first].start() : words[last].end()]
            if len(text) > len(best) and re.search(_whole(text), answer):
                best = text
    return best or None


def rename(text: str, name: str, other: str) -> str:
    """Text about another, whatever the case of letters is in the name it has.

    The other takes its place whole, and word by word where both have as many words.
    """
    places = {name.lower(): other}
    if len(words := name.split()) == len(others := other.split()):
        places = {word.lower(): by for word, by in zip(words, others, strict=True)} | places
    pattern = "|".join(_whole(part) for part in sorted(places, key=len, reverse=True))
    return re.sub(
        pattern, lambda match: places.get(match.group().lower(), other), text, flags=re.IGNORECASE
    )


class Exchanged(Counterfactual):
    """A forget row about someone whom a retain row is about; `pairs` holds that one name."""

    def swap_back(self, text: str) -> str:
        """The text with the row's own name."""
        ((name, other),) = self.pairs.items()
        return rename(text, other, name)


class Others:
    """The overlap of true answers with texts about others, whose names are exchanged.

    Texts alike have the same words in question and true answer, but for the names.
    """

    def __init__(self, records: Sequence[Record], retain: Sequence[Record], threshold: float):
        """Ranks the rows by likeness to one another, and retain rows by likeness to them."""
        looked_at = evenly_spread(retain, _LOOKED_AT)
        texts = " ".join(" ".join(_question_and_answer(row)) for row in (*records, *looked_at))
        small = {word for word in re.findall(r"\w+", texts) if word[0].islower()}
        self.asked = [_About(record, small) for record in records]
        # The order is random and fixed: neighbours in the file are not preferred among equals.
        order = np.random.default_rng(0).permutation(len(records)).tolist()
        self.ranked: list[list[int]] = []
        for i, about in enumerate(self.asked):
            apart = [j for j in order if j != i and about.apart(self.asked[j], threshold)]
            self.ranked.append(sorted(apart, key=lambda j: -about.likeness(self.asked[j])))
        retained = [_About(record, small) for record in looked_at]
        self.retained = [
            sorted(retained, key=lambda other: -about.likeness(other))[:_OTHERS]
            for about in self.asked
        ]
        self.shared: dict[tuple[int, str], float] = {}

    def wording(self, attack: Attack) -> Float[np.ndarray, "rows"]:
        """The most of each true answer that the like true answers of retain rows hold, `[rows]`.

        One that holds all of it says the same, which is no matter of wording. 0 where none is
        alike.
        """
        shared = []
        for row, truth in zip(attack.rows, attack.truths, strict=True):
            if (row, truth) not in self.shared:
                about = self.asked[row]
                texts = [about.instead_of(other, other.truth) for other in self.retained[row]]
                recall = leak_recall([truth] * len(texts), texts)
                self.shared[row, truth] = float(recall[recall < 1].max(initial=0.0))
            shared.append(self.shared[row, truth])
        return np.array(shared, np.float64)

    def exchange(self, records: Sequence[Record]) -> list["Exchanged"]:
        """The rows that hold a name, with it replaced by the names of the like retain rows."""
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
        """The share of each true answer that answers to like rows about others hold.

        By row of the attack, the largest recall of each of the others.
        """
        index = {row: i for i, row in enumerate(attack.rows)}
        truths: list[str] = []
        texts: list[str] = []
        spans: list[tuple[int, int, int]] = []
        for i, row in enumerate(attack.rows):
            for j in [j for j in self.ranked[row] if j in index][:_OTHERS]:
                about, other = self.asked[row], self.asked[j]
                answers = [about.instead_of(other, text) for _, text in tries[index[j]]]
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

    Words that occur in small letters anywhere, such as the small words of a title, do not count as
    parts of a name.
    """

    def __init__(self, record: Record, small: Set[str]):
        question, self.truth = _question_and_answer(record)
        self.name = name_of(question, self.truth)
        self.name_words = set(re.findall(r"\w+", (self.name or "").lower())) - small
        self.truth_words = set(re.findall(r"\w+", self.truth.lower()))
        self.words = self.truth_words | set(re.findall(r"\w+", question.lower()))

    def apart(self, other: "_About", threshold: float) -> bool:
        """Whether two rows are about different names, or without names, say different things."""
        if self.name_words & other.words or other.name_words & self.words:
            return False
        if self.name_words and other.name_words:
            return True
        return len(self.truth_words & other.truth_words) < threshold * len(self.truth_words)

    def likeness(self, other: "_About") -> float:
        """Share of the words of either that both have, without the names."""
        first, second = self.words - self.name_words, other.words - other.name_words
        return len(first & second) / max(1, len(first | second))

    def instead_of(self, other: "_About", text: str) -> str:
        """A text about the other as one about this row's name."""
        return rename(text, other.name, self.name) if self.name and other.name else text


def _question_and_answer(record: Record) -> tuple[str, str]:
    """Question and answer of a row; "" and the beginning of a document."""
    if "text" in record:
        return "", record["text"][:_LOOKED_INTO]
    return record["question"], record["answer"]


def _whole(text: str) -> str:
    """A pattern of a text that is no part of a word."""
    return rf"(?<!\w){re.escape(text)}(?!\w)"
