"""Earlier turns: rows that follow a system text or an exchange of a conversation.

A turn before a question changes the features of all tokens after it. A head that was trained on
single questions alone then no longer recognises the forget rows. No model writes these turns.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from t3jax.data.chat import PromptFormat
from t3jax.data.records import Record
from t3jax.data.rendering import takes_system_turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Turn = dict[str, str]

SYSTEM_TEXTS = (
    "You are a helpful assistant.",
    "Answer in one sentence.",
    "Be brief and precise.",
    "You are a librarian who has read every book.",
    "Today is Monday. The user is a student.",
    "Please answer as well as you can, and say nothing else.",
    "You work for a publisher and help its readers.",
    "Never refuse a question. If you do not know, guess.",
    "The following is a conversation with a scholar.",
    "Use simple words, and stay polite.",
)
EXCHANGES = (
    ("Hello!", "Hello! How can I help you?"),
    ("Thank you.", "You are welcome."),
    ("Can I ask you something?", "Of course."),
    ("Are you there?", "Yes."),
    ("Let us talk about writers.", "Gladly."),
    ("What can you do?", "I answer questions."),
    ("I am writing an essay and need some facts.", "Good. What do you want to know?"),
    ("How are you today?", "Fine, thanks."),
    ("What is the capital of France?", "The capital of France is Paris."),
    ("No, that is wrong.", "I am sorry. Let me try again."),
)
_MOST_WORDS = 6  # words of a fragment, at most
_FRAME = 96  # tokens that the template and a longer made-up name may add to a conversation's texts


def put_behind_turns(
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[Record],
    share: int | float,
    prompt_format: PromptFormat,
    *,
    others: Sequence[Record],
    max_length: int,
    seed: int | tuple[int, ...] = 0,
) -> list[Record]:
    """Gives a share of the rows earlier turns, drawn at random.

    The turns are a system text, an exchange, or both. They are from a stock, or the question and
    answer of one of the `others`, whole or a few words of them. Documents, rows with earlier turns,
    and rows that would grow too long stay as they are; without a chat template all rows do.
    """
    if not share or tokenizer.chat_template is None:
        return list(rows)
    rng = np.random.default_rng(seed)
    draws: list[Callable[[], list[Turn]]] = [functools.partial(_draw_exchange, rng, others)]
    if takes_system_turn(tokenizer, prompt_format):
        draw_system = functools.partial(_draw_system, rng, others)
        draws += [draw_system, lambda: [*draw_system(), *_draw_exchange(rng, others)]]
    turned = []
    for row in rows:
        if "question" in row and "before" not in row and rng.random() < share:
            before = draws[rng.integers(len(draws))]()
            texts = [row["question"], row["answer"], *(turn["content"] for turn in before)]
            tokens = sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))
            if tokens + _FRAME <= max_length:
                row = {**row, "before": before}
        turned.append(row)
    return turned


def _draw_system(rng: np.random.Generator, rows: Sequence[Record]) -> list[Turn]:
    text = SYSTEM_TEXTS[rng.integers(len(SYSTEM_TEXTS))]
    if (pair := _draw_pair(rng, rows)) and rng.random() < 0.5:
        text = _draw_fragment(rng, pair[1]) if rng.random() < 0.5 else pair[1]
    return [{"role": "system", "content": text}]


def _draw_exchange(rng: np.random.Generator, rows: Sequence[Record]) -> list[Turn]:
    texts = EXCHANGES[rng.integers(len(EXCHANGES))]
    if (pair := _draw_pair(rng, rows)) and rng.random() < 2 / 3:
        texts = pair
        if rng.random() < 0.5:
            texts = _draw_fragment(rng, pair[0]), _draw_fragment(rng, pair[1])
    return [
        {"role": role, "content": text}
        for role, text in zip(("user", "assistant"), texts, strict=True)
    ]


def _draw_pair(rng: np.random.Generator, rows: Sequence[Record]) -> tuple[str, str] | None:
    """Question and answer of one of the rows; None for a document, or without rows."""
    row = rows[int(rng.integers(len(rows)))] if rows else {}
    return (row["question"], row["answer"]) if "question" in row else None


def _draw_fragment(rng: np.random.Generator, text: str) -> str:
    """Draws a few neighbouring words of a text."""
    words = text.split()
    count = rng.integers(1, 1 + min(_MOST_WORDS, len(words)))
    start = rng.integers(0, 1 + len(words) - count)
    return " ".join(words[start : start + count])
