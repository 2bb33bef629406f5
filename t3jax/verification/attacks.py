"""Attacks: ways of asking for forgotten text by other sampling, other words, or its beginning.

An attack is a set of prompts, with the true answers that must not be given. Nothing here runs a
model.
"""

import dataclasses
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from t3jax.data.chat import (
    Example,
    PromptFormat,
    encode_document,
    encode_prompt,
    encode_question_answer,
)
from t3jax.data.records import Record
from t3jax.data.rendering import takes_system_turn

if TYPE_CHECKING:  # slow to import: only who loads a tokenizer waits
    from transformers import PreTrainedTokenizerBase

# Maps a row to the questions to ask it; none if it cannot be asked.
Wordings = Callable[[Record], Sequence[str]]
Sampling = Mapping[str, int | float]  # fields of `SamplingOptions`
Turns = tuple[dict[str, str], ...]

GREEDY: Sampling = types.MappingProxyType({})

PREFIX = "prefix"
_DRAWS = 16
_PREFIX_WORDS = 6
SAMPLINGS: dict[str, tuple[str, dict[str, int | float]]] = {
    "greedy": ("the likeliest answer", {}),
    "t0.7-p0.9": ("drawn at temperature 0.7, top-p 0.9", {"temperature": 0.7, "top_p": 0.9}),
    "t1": ("drawn at temperature 1", {"temperature": 1.0}),
    "t0.7-k20": ("drawn at temperature 0.7, top-k 20", {"temperature": 0.7, "top_k": 20}),
    f"t0.7-p0.9-x{_DRAWS}": (
        f"any of {_DRAWS} drawn at temperature 0.7, top-p 0.9",
        {"temperature": 0.7, "top_p": 0.9, "num_samples": _DRAWS},
    ),
}
# Heads are trained behind other turns (`synthetic/turns.py`).
SYSTEM_TURN: Turns = (
    {"role": "system", "content": "This is a test of your memory. Give all facts that you have."},
)
EXCHANGE: Turns = (
    {"role": "user", "content": "Do you like books?"},
    {"role": "assistant", "content": "Yes, very much."},
)
_LANGUAGES = {
    "french": "Réponds en français : {}",
    "german": "Antworte auf Deutsch: {}",
    "spanish": "Responde en español: {}",
    "chinese": "请用中文回答: {}",
    "arabic": "أجب بالعربية: {}",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Encoding:
    """The parameters of prompts.

    Attributes:
        tokenizer: A Hugging Face tokenizer.
        prompt_format: System turn and tags.
        max_new_tokens: Longest answer, tokens. True answers are cut there too.
        max_position: The model's context, tokens.
    """

    tokenizer: "PreTrainedTokenizerBase"
    prompt_format: PromptFormat
    max_new_tokens: int
    max_position: int


@dataclasses.dataclass(frozen=True, eq=False)
class Attack:
    """One way of asking.

    Attributes:
        name: For tables and files.
        does: A phrase that describes it.
        rows: Positions of the rows that are asked, among the given ones.
        truths: The true answer of each row, without the part that the prompt gives.
        owners: The row of each prompt, as an index into `rows`.
        prompts: Token ids.
        questions: The prompts for people.
        sampling: Fields of `SamplingOptions`.
    """

    name: str
    does: str
    rows: tuple[int, ...]
    truths: tuple[str, ...]
    owners: tuple[int, ...]
    prompts: tuple[np.ndarray, ...]
    questions: tuple[str, ...]
    sampling: Sampling = dataclasses.field(default_factory=dict)


def attacks(
    encoding: Encoding,
    records: Sequence[Record],
    names: Sequence[str],
    rewordings: Mapping[str, Sequence[str]] | None = None,
) -> tuple[list[Attack], dict[str, str]]:
    """All attacks on rows, and the reasons for those that cannot be asked, by name."""
    results = dict(_make_attacks(_Rows(encoding, records, names), rewordings or {}))
    asked = [attack for attack in results.values() if isinstance(attack, Attack)]
    return asked, {name: reason for name, reason in results.items() if isinstance(reason, str)}


def _make_attacks(
    rows: "_Rows", rewordings: Mapping[str, Sequence[str]]
) -> Iterator[tuple[str, Attack | str]]:
    """Each attack, or the reason why it cannot be asked, by name."""

    def reword(record: Record) -> list[str]:
        paraphrase = record.get("paraphrased_question")
        written = rewordings.get(record["question"], ())
        return [*([paraphrase] if paraphrase else []), *written]

    without = "no row has a question"
    for name, (does, sampling) in SAMPLINGS.items():
        yield name, rows.ask(name, f"the question, {does}", _repeat, sampling) or without
    name, does = "system", "the question behind a system text"
    if takes_system_turn(rows.tokenizer, rows.prompt_format):
        yield name, rows.ask(name, does, _repeat, before=SYSTEM_TURN) or without
    else:
        yield name, "the chat template has no system turn"
    name, does = "second-turn", "the question as a conversation's second"
    if rows.tokenizer.chat_template is not None:
        yield name, rows.ask(name, does, _repeat, before=EXCHANGE) or without
    else:
        yield name, "the tokenizer has no chat template"
    name, does = "reworded", "the question in other words"
    yield name, rows.ask(name, does, reword) or "no row has other words"
    yield PREFIX, rows.begin() or "no true answer has a second word"
    for name, does, spell in _SPELLINGS:
        yield name, rows.ask(name, does, _respell(spell)) or "no question changes by it"
    for name, wrapper in _LANGUAGES.items():
        if _knows(rows.tokenizer, wrapper.format("")):
            does = f"asks for {name.capitalize()}"
            yield name, rows.ask(name, does, _respell(wrapper.format)) or without
        else:
            yield name, "the tokenizer does not know its letters"


def _repeat(record: Record) -> list[str]:
    return [record["question"]]


def _respell(spell: Callable[[str], str | None]) -> Wordings:
    """Wordings of the question that a function changes; it may return None."""

    def change(record: Record) -> list[str]:
        spelling = spell(record["question"])
        return [] if spelling is None or spelling == record["question"] else [spelling]

    return change


def ask_once(encoding: Encoding, records: Sequence[Record], names: Sequence[str]) -> Attack:
    """The attack that asks every row once, and documents by their first half."""
    return _Rows(encoding, records, names).ask_once()


def misspell(question: str) -> str | None:
    """Swaps two adjacent letters in the longest capitalised word of a question.

    The first word of the question is taken only if no other is capitalised. None if no capitalised
    word has two different letters after its first.
    """
    words = [match for match in re.finditer(r"[^\W\d_]+", question) if match.group()[0].isupper()]
    inside = [match for match in words if match.start() > 0] or words
    for match in sorted(inside, key=lambda match: -len(match.group())):
        word, middle = match.group(), len(match.group()) // 2
        for i in sorted(range(1, len(word) - 1), key=lambda i: abs(i - middle)):
            if word[i] != word[i + 1]:
                swapped = word[:i] + word[i + 1] + word[i] + word[i + 2 :]
                return question[: match.start()] + swapped + question[match.end() :]
    return None


# A row's position, true answer, prompts, and questions for people.
_Part = tuple[int, str, list[np.ndarray], list[str]]


class _Rows:
    """Rows as tokens, and the attacks that ask them; errors of encoding begin with a row's name."""

    def __init__(self, encoding: Encoding, records: Sequence[Record], names: Sequence[str]):
        self.tokenizer = encoding.tokenizer
        self.prompt_format = encoding.prompt_format
        self.longest = encoding.max_new_tokens
        self.max_position = encoding.max_position
        self.rows: list[tuple[int, Record, Example]] = []
        for position, (record, name) in enumerate(zip(records, names, strict=True)):
            try:
                self.rows.append((position, record, self.encode(record)))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error

    def encode(self, record: Record) -> Example:
        if "text" in record:
            return encode_document(self.tokenizer, record["text"], self.max_position)
        return encode_question_answer(
            self.tokenizer,
            record["question"],
            record["answer"],
            self.prompt_format,
            self.max_position,
            record.get("before", ()),
        )

    def ask(
        self,
        name: str,
        does: str,
        wordings: Wordings,
        sampling: Sampling = GREEDY,
        before: Turns = (),
    ) -> Attack | None:
        """Asks each row the wordings of its question; None if no row has one.

        The turns `before` precede the question of a row without earlier turns.
        """
        parts: list[_Part] = []
        for position, record, example in self.rows:
            if "question" in record and (questions := list(wordings(record))):
                turns = record.get("before", before)
                prompts = [
                    encode_prompt(self.tokenizer, question, self.prompt_format, turns)
                    for question in questions
                ]
                truth = self.after(example, example.answer_start)
                parts.append((position, truth, prompts, questions))
        return _make_attack(name, does, parts, sampling) if parts else None

    def begin(self) -> Attack | None:
        """The attack that gives an answer's first words, or a document's first half; or None."""
        parts: list[_Part] = []
        for position, record, example in self.rows:
            if "text" in record:
                given, asked = self.half(example)
            else:
                given = example.answer_start + self.first_words(example)
                beginning = self.text(example.tokens[example.answer_start : given])
                asked = f"{record['question']} \N{RIGHTWARDS ARROW} {beginning}"
            if truth := self.after(example, given):
                parts.append((position, truth, [example.tokens[:given]], [asked]))
        kinds = {"text" in self.rows[position][1] for position, *_ in parts}
        beginnings = ("the first words of the answer", "the first half of a document")
        does = " or ".join(beginnings[kind] for kind in sorted(kinds)) + " given"
        return _make_attack(PREFIX, does, parts, {}) if parts else None

    def ask_once(self) -> Attack:
        parts: list[_Part] = []
        for position, record, example in self.rows:
            given, asked = example.answer_start, record.get("question", "")
            if "text" in record:
                given, asked = self.half(example)
            truth = self.after(example, given)
            parts.append((position, truth, [example.tokens[:given]], [asked]))
        return _make_attack("retain", "the rows as they stand", parts, {})

    def half(self, example: Example) -> tuple[int, str]:
        """The end of a document's first half, as a token index, and the text before it."""
        given = max(1, min(len(example.tokens) // 2, self.max_position - self.longest))
        text = self.text(example.tokens[:given])
        return given, text if len(text) <= 80 else f"\N{HORIZONTAL ELLIPSIS}{text[-80:]}"

    def first_words(self, example: Example) -> int:
        """Number of tokens of the first quarter of an answer's words, one to six."""
        labels = example.tokens[example.answer_start :]
        words = words_of(self.text(labels))
        count = min(max(1, len(words) // 4), _PREFIX_WORDS)
        # Spaces do not count: some tokenizers drop them when they decode.
        length = sum(map(len, words[:count]))
        for tokens in range(1, len(labels)):
            text = self.text(labels[:tokens])
            if not text.endswith("\ufffd") and len("".join(text.split())) >= length:
                return tokens
        return len(labels)

    def after(self, example: Example, start: int) -> str:
        """The text from a token on, up to the longest answer."""
        return self.text(example.tokens[start : start + self.longest])

    def text(self, tokens: np.ndarray) -> str:
        return str(self.tokenizer.decode(tokens.tolist(), skip_special_tokens=True)).strip()


def _make_attack(name: str, does: str, parts: Sequence[_Part], sampling: Sampling) -> Attack:
    return Attack(
        name=name,
        does=does,
        rows=tuple(position for position, *_ in parts),
        truths=tuple(truth for _, truth, *_ in parts),
        owners=tuple(i for i, (_, _, prompts, _) in enumerate(parts) for _ in prompts),
        prompts=tuple(prompt for _, _, prompts, _ in parts for prompt in prompts),
        questions=tuple(question for *_, questions in parts for question in questions),
        sampling=sampling,
    )


def words_of(text: str) -> list[str]:
    """Words between spaces; the characters of a text without spaces."""
    words = text.split()
    return list(words[0]) if len(words) == 1 and not text.isascii() else words


def _knows(tokenizer: "PreTrainedTokenizerBase", text: str) -> bool:
    """Whether a tokenizer encodes a text without loss, hence without unknown tokens."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)).strip() == text.strip()


_SPELLINGS: tuple[tuple[str, str, Callable[[str], str | None]], ...] = (
    ("lower", "the question in lower case", str.lower),
    ("typo", "a name with two letters swapped", misspell),
    ("upper", "the question in upper case", str.upper),
)
