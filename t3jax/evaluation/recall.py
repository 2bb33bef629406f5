"""Recall of the right answer in a generated one, in any script.

ROUGE's tokenizer reads ASCII letters and digits alone. A Chinese or Russian answer has no tokens
there and scores 0, recited or not. Here text that ROUGE cannot read is cut into words and
characters by their Unicode categories; text that it can read keeps TOFU's value. There is no
dictionary. There is no stemming beyond ASCII: another ending is another word.
"""

import functools
import unicodedata
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from t3jax.evaluation.metrics import rouge_scores

# Scripts written without spaces between words: first and last code point.
_UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x0F00, 0x0FFF),  # Tibetan
    (0x1000, 0x109F),  # Myanmar
    (0xA9E0, 0xA9FF),
    (0xAA60, 0xAA7F),
    (0x1780, 0x17FF),  # Khmer
    (0x2E80, 0x2FDF),  # Han: radicals, iteration marks and numerals, characters
    (0x3005, 0x3007),
    (0x3021, 0x3029),
    (0x3038, 0x303B),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x31F0, 0x31FF),
    (0x1AFF0, 0x1B16F),
)
# Optional marks, which do not change a word's meaning: first and last code point.
_OPTIONAL = (
    (0x0610, 0x061A),  # Arabic: signs, tatweel, vowels
    (0x0640, 0x0640),
    (0x064B, 0x065F),
    (0x0670, 0x0670),
    (0x06D6, 0x06DC),
    (0x06DF, 0x06E4),
    (0x06E7, 0x06E8),
    (0x06EA, 0x06ED),
    (0xFE00, 0xFE0F),  # variation selectors
    (0xE0100, 0xE01EF),
)
# Kinds of characters; a single one is a token by itself.
_IGNORED, _SEPARATOR, _MARK, _LETTER, _SINGLE = range(5)


def leak_recall(
    ground_truths: Sequence[str], generations: Sequence[str]
) -> Float[np.ndarray, "rows"]:
    """Share of the right answer that the generated one contains, in order, in [0, 1].

    Where all letters and digits of the ground truth are ASCII, or become so under NFKC, it is
    ROUGE-L recall, see `metrics.rouge_scores`. Elsewhere it is the longest common subsequence of
    the two answers' tokens over the number of tokens of the ground truth. Tokens are words of
    letters, marks and digits, and single characters in scripts without spaces, after NFKC and case
    folding. A ground truth without such tokens, such as emoji, is compared by its characters. An
    empty answer scores 0.

    References:
        ROUGE-L: Lin 2004, ACL W04-1013.
    """
    if len(ground_truths) != len(generations):
        raise ValueError(
            f"leak_recall got {len(ground_truths)} ground truths but {len(generations)} generations"
        )
    recall = np.zeros(len(ground_truths), np.float64)
    rouge_rows: list[int] = []
    rouge_pairs: list[tuple[str, str]] = []
    for row, (truth, generation) in enumerate(zip(ground_truths, generations, strict=True)):
        pair = truth, generation
        if not _rouge_reads(truth):
            # NFKC maps full-width letters, ligatures and the like to ASCII.
            pair = unicodedata.normalize("NFKC", truth), unicodedata.normalize("NFKC", generation)
        if _rouge_reads(pair[0]):
            rouge_rows.append(row)
            rouge_pairs.append(pair)
        else:
            recall[row] = _compute_recall(truth, generation)
    if rouge_rows:
        recall[rouge_rows] = rouge_scores(*zip(*rouge_pairs, strict=True))["rougeL_recall"]
    return recall


def recall_of_wording(ground_truth: str, texts: Sequence[str]) -> float:
    """Largest recall of a right answer in texts about others; 0 without any.

    A recall of 1 is left out: that text says the same, which is not a matter of wording.
    """
    recall = leak_recall([ground_truth] * len(texts), texts)
    return float(recall[recall < 1].max(initial=0.0))


def _rouge_reads(text: str) -> bool:
    """Whether ROUGE's tokenizer sees all letters and digits; quotes and dashes do not matter."""
    if text.isascii():
        return True
    beyond = {_kind(char) for char in text if not char.isascii()}
    return beyond == {_SEPARATOR} and any(char.isascii() and char.isalnum() for char in text)


def _compute_recall(truth: str, generation: str) -> float:
    """The share of the truth's tokens in the longest common subsequence."""
    expected, answered = _tokenize(truth), _tokenize(generation)
    if not expected:
        expected, answered = _split_characters(truth), _split_characters(generation)
    return _common_length(expected, answered) / len(expected) if expected else 0.0


def _tokenize(text: str) -> list[str]:
    """Words, and single characters of scripts without spaces; marks stay with their letter."""
    tokens: list[str] = []
    last = _SEPARATOR
    for char in _fold(text):
        kind = _kind(char)
        if kind == _IGNORED:
            continue
        if kind == _MARK:
            if last != _SEPARATOR:
                tokens[-1] += char
            continue
        if kind == _LETTER == last:
            tokens[-1] += char
        elif kind != _SEPARATOR:
            tokens.append(char)
        last = kind
    return tokens


def _split_characters(text: str) -> list[str]:
    """All visible characters."""
    return [char for char in _fold(text) if _kind(char) != _IGNORED and not char.isspace()]


def _fold(text: str) -> str:
    """Applies NFKC and case folding, and maps digits of every script to ASCII."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    # Case folding may decompose a letter.
    return "".join(map(_fold_digit, unicodedata.normalize("NFKC", folded)))


@functools.cache
def _fold_digit(char: str) -> str:
    value = unicodedata.decimal(char, None)
    return char if value is None else str(value)


@functools.cache
def _kind(char: str) -> int:
    category = unicodedata.category(char)
    # Format characters (joiners, soft hyphens, directions) are invisible inside words.
    if category == "Cf" or _within(char, _OPTIONAL):
        return _IGNORED
    if category[0] == "M":
        return _MARK
    # An older Python has the newest Han characters as unassigned ("Cn").
    unspaced = _within(char, _UNSPACED)
    if category[0] in "LN" or (unspaced and category == "Cn"):
        return _SINGLE if unspaced else _LETTER
    return _SEPARATOR


def _within(char: str, ranges: Sequence[tuple[int, int]]) -> bool:
    return any(first <= ord(char) <= last for first, last in ranges)


def _common_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence.

    A row of the usual table is one integer: bit i is 0 where the length grows at token i of
    `first`.

    References:
        Hyyrö 2004, Bit-parallel LCS-length computation revisited.
    """
    places: dict[str, int] = {}
    for i, token in enumerate(first):
        places[token] = places.get(token, 0) | 1 << i
    full = (1 << len(first)) - 1
    row = full
    for token in second:
        matches = row & places.get(token, 0)
        row = (row + matches | row - matches) & full
    return len(first) - row.bit_count()
