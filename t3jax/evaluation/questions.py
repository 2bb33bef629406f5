"""Question sets with all their answers, loaded and encoded.

Sets are named by the prefixes of their metrics: forget, retain, ra (real authors), wf (world
facts); holdout is for membership inference.
"""

import dataclasses
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from t3jax.data import Example, PromptFormat, encode_records, evenly_spread, load_dataset
from t3jax.data.records import Record
from t3jax.sampling import Sample

if TYPE_CHECKING:  # slow to import: only who loads a tokenizer waits
    from transformers import PreTrainedTokenizerBase

SETS = {
    "forget": "forget",
    "retain": "retain",
    "ra": "real authors",
    "wf": "world facts",
    "holdout": "holdout",
}


@dataclasses.dataclass(frozen=True, eq=False)
class QuestionSet:
    """A set of questions with all their answers, encoded; lists of one example for each row.

    Attributes:
        name: A key of `SETS`.
        answers: Each question with its right answer.
        paraphrased: Each question with the paraphrased right answer; None where the set has none.
        wrong: For each j, each question with its j-th wrong answer; empty where there are none.
        reworded: Each paraphrased question with the right answer; None where the set has none.
        questions: The questions as text.
        inputs: The prompts as text, special tokens left out.
        answer_texts: The right answers as text, as the tokenizer gives their tokens back.
    """

    name: str
    answers: list[Example]
    paraphrased: list[Example] | None
    wrong: list[list[Example]]
    reworded: list[Example] | None
    questions: list[str]
    inputs: list[str]
    answer_texts: list[str]

    @property
    def num_rows(self) -> int:
        """Number of questions."""
        return len(self.answers)

    @property
    def ground_truths(self) -> list[str]:
        """The right answers, stripped, to compare generated ones with."""
        return [text.strip() for text in self.answer_texts]

    @property
    def prompts(self) -> list[np.ndarray]:
        """Token ids of each prompt."""
        return prompts(self.answers)

    @property
    def texts(self) -> list[Example]:
        """The texts of the teacher-forced metrics: answers, paraphrased answers, wrong answers."""
        return [*self.answers, *(self.paraphrased or []), *itertools.chain(*self.wrong)]


def prompts(examples: Sequence[Example]) -> list[np.ndarray]:
    """The tokens of each example before its answer."""
    return [example.tokens[: example.answer_start] for example in examples]


def append_answers(asked: Sequence[np.ndarray], samples: Sequence[Sample]) -> list[Example]:
    """Appends to each prompt the tokens of a model's answer to it."""
    return [
        Example(np.concatenate([prompt, np.asarray(sample.tokens, np.int32)]), len(prompt))
        for prompt, sample in zip(asked, samples, strict=True)
    ]


def load_sets(
    sources: Mapping[str, str | os.PathLike[str] | None],
    tokenizer: "PreTrainedTokenizerBase",
    prompt_format: PromptFormat,
    max_length: int,
    tofu_dir: str | os.PathLike[str] | None = None,
    max_rows: int | None = None,
) -> dict[str, QuestionSet]:
    """Loads and encodes the question sets that have a source.

    Sources are by key of `SETS`: "tofu:SPLIT" or a file of question-answer rows, as for
    `load_dataset`; None leaves the set out. `max_length` counts the tokens of a text. `max_rows` of
    each set are taken, evenly spread over it; None takes all. Errors are those of `load_dataset`
    and `encode_set`.
    """
    sets = {}
    for name, source in sources.items():
        if source is not None:
            records = load_dataset(source, tofu_dir)
            records = records if max_rows is None else evenly_spread(records, max_rows)
            sets[name] = encode_set(name, records, tokenizer, prompt_format, max_length)
    return sets


def encode_set(
    name: str,
    records: Sequence[Record],
    tokenizer: "PreTrainedTokenizerBase",
    prompt_format: PromptFormat,
    max_length: int,
) -> QuestionSet:
    """Encodes a question set with all the answers that its rows have.

    Raises:
        ValueError: An unknown set, a plain document among the rows, a field that only some rows
            have, unequal numbers of wrong answers, or a text that is too long; names the row.
    """
    if name not in SETS:
        raise ValueError(f"unknown set {name!r}; expected one of {sorted(SETS)}")
    if not records:
        raise ValueError(f"the {SETS[name]} set has no rows; give at least one, or leave it out")
    for number, record in enumerate(records, start=1):
        if "text" in record:
            raise ValueError(f"{SETS[name]} row {number}: expected a question and an answer")

    def encode(kind: str, questions: Sequence[str], answers: Sequence[str]) -> list[Example]:
        rows = [{"question": q, "answer": a} for q, a in zip(questions, answers, strict=True)]
        try:
            return encode_records(tokenizer, rows, prompt_format, max_length)
        except ValueError as error:
            raise ValueError(f"{SETS[name]} set, {kind}: {error}") from error

    questions = [record["question"] for record in records]
    answers = [record["answer"] for record in records]
    paraphrases = _field(name, records, "paraphrased_answer")
    reworded = _field(name, records, "paraphrased_question")
    wrong = _field(name, records, "perturbed_answer") or [[] for _ in records]
    for number, offered in enumerate(wrong, start=1):
        if not isinstance(offered, list | tuple):
            raise ValueError(
                f"{SETS[name]} row {number}: perturbed_answer must be a list of wrong answers, got "
                f"{offered!r:.80}"
            )
        if len(offered) != len(wrong[0]):
            raise ValueError(
                f"{SETS[name]} row {number} has {len(offered)} wrong answers, row 1 has "
                f"{len(wrong[0])}: give equally many in every row"
            )
    encoded = encode("answers", questions, answers)
    return QuestionSet(
        name=name,
        answers=encoded,
        paraphrased=paraphrases and encode("paraphrased answers", questions, paraphrases),
        wrong=[
            encode(f"wrong answers {j + 1}", questions, [offered[j] for offered in wrong])
            for j in range(len(wrong[0]))
        ],
        reworded=reworded and encode("paraphrased questions", reworded, answers),
        questions=questions,
        inputs=[_decode(tokenizer, prompt) for prompt in prompts(encoded)],
        answer_texts=[
            _decode(tokenizer, example.tokens[example.answer_start :]) for example in encoded
        ],
    )


def _field(name: str, records: Sequence[Record], field: str) -> list | None:
    """A field of all rows; None where no row has it."""
    values = [record.get(field) or None for record in records]
    missing = [number for number, value in enumerate(values, start=1) if value is None]
    if missing and len(missing) < len(values):
        raise ValueError(
            f"{SETS[name]} row {missing[0]} has no {field}, but other rows have; give it in every "
            "row or in none"
        )
    return None if missing else values


def _decode(tokenizer: "PreTrainedTokenizerBase", tokens: np.ndarray) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True))
