"""From the tokens of an answer to its text: stop strings, and text that no token can change."""

from collections.abc import Sequence
from typing import Any

_HALF = "\ufffd"  # a tokenizer's text for the bytes of an incomplete character


class Detokenizer:
    """Decodes answers with a tokenizer; without one every text is empty."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._special = _special_tokens(tokenizer)

    def text(self, tokens: Sequence[int], stop: Sequence[str]) -> str:
        """The text without special tokens, up to the first stop string."""
        text, ends = self._decode(tokens, stop)
        return text[: min(ends)] if ends else text

    def settled_text(self, tokens: Sequence[int], stop: Sequence[str]) -> str:
        """The part of an unfinished answer's text that further tokens cannot change.

        An incomplete character and a possible beginning of a stop string are held back.
        """
        text = self.text(tokens, stop).rstrip(_HALF)
        held = max((_overlap(text, string) for string in stop), default=0)
        return text[: len(text) - held]

    def stop_at(self, tokens: list[int], new: int, stop: Sequence[str]) -> int | None:
        """Number of tokens up to the one that ends a stop string; None without a stop string.

        The last `new` of the tokens are new since the last call.
        """
        if not self._decode(tokens, stop)[1]:
            return None
        counts = range(len(tokens) - new + 1, len(tokens))
        return next((n for n in counts if self._decode(tokens[:n], stop)[1]), len(tokens))

    def _decode(self, tokens: Sequence[int], stop: Sequence[str]) -> tuple[str, list[int]]:
        """The text without special tokens, and the starts of stop strings in it."""
        if self._tokenizer is None:
            return "", []
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        ends = [at for string in stop if (at := text.find(string)) >= 0]
        special = [string for string in stop if any(token in string for token in self._special)]
        if special:
            full_text = self._tokenizer.decode(tokens, skip_special_tokens=False)
            places = [at for string in special if (at := full_text.find(string)) >= 0]
            if places:
                before = full_text[: min(places)]
                for token in self._special:
                    before = before.replace(token, "")
                ends.append(len(before))
        return text, ends


def _overlap(text: str, string: str) -> int:
    """Length of the longest end of a text with which a string begins."""
    lengths = range(min(len(text), len(string) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(string[:n])), 0)


def _special_tokens(tokenizer: Any) -> list[str]:
    """Special tokens, the longest first."""
    if tokenizer is None:
        return []
    added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    return sorted({*tokenizer.all_special_tokens, *added}, key=len, reverse=True)
