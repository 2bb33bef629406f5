"""How to draw an answer: the options of a call, checked."""

import dataclasses
import math
import operator
from typing import Any

from t3jax.sampling.next_token import Controls

REFUSAL_THRESHOLD = 3.0  # nats, see `SamplingOptions`
_LARGEST = 1e6  # bounds of all factors of logits (T, s, ...), far inside float32's range
_SMALLEST = 1e-6


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How to draw an answer.

    Attributes:
        max_new_tokens: Longest answer, tokens.
        temperature: Sampling temperature on the tilted distribution; 0 is greedy. 1 / T, drawn from
            all tokens, is plain guidance of the strength T · s.
        top_k: Draw among the k likeliest tokens; 0 among all.
        top_p: Draw among the likeliest tokens whose probability reaches p; 1 among all.
        min_p: Draw among tokens at least this share as likely as the likeliest; 0 among all.
        truncate_on: The distribution that decides top-k, top-p and min-p. "guided" is the guided
            one without its tempering: base logits + T · s · log f. "tilted" is the tempered one
            that is drawn from; its order of the tokens is the same, so top-k is too. "base" is the
            base model's: where it is sure of a token to forget, a tight top-p or min-p keeps that
            token alone.
        repetition_penalty: Above 1, tokens already in prompt or answer become less likely.
        num_samples: Answers to each prompt.
        seed: Seed of the draws, 0 to 2^64 - 1.
        stop: Strings that end an answer; they are cut off. Special tokens may be in them.
        stop_ids: Token ids that end an answer, besides the model's own.
        logprobs: Whether to return log-probabilities of the chosen tokens.
        refusal: Text that replaces each answer whose `Sample.log_ratio` exceeds
            `refusal_threshold`; None serves the alternative answer. It needs T = 1.
        refusal_threshold: Nats. An answer drawn from the base itself exceeds it with a probability
            of at most exp(-threshold) (Markov's inequality).
    """

    max_new_tokens: int = 200
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    truncate_on: str = "guided"
    repetition_penalty: float = 1.0
    num_samples: int = 1
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    logprobs: bool = False
    refusal: str | None = None
    refusal_threshold: float = REFUSAL_THRESHOLD

    def __post_init__(self):
        temperature, penalty = as_number(self.temperature), as_number(self.repetition_penalty)
        in_range = f"{_SMALLEST:g} to {_LARGEST:g}"
        checks = {
            "max_new_tokens": (1 <= as_integer(self.max_new_tokens) <= 2**20, "1 to 2^20"),
            "temperature": (
                temperature == 0 or _SMALLEST <= temperature <= _LARGEST,
                f"0 (greedy) or more: {in_range}",
            ),
            "top_k": (0 <= as_integer(self.top_k) < 2**31, "0 (all), or 1 to 2^31 - 1"),
            "top_p": (0 < as_number(self.top_p) <= 1, "in (0, 1]"),
            "min_p": (0 <= as_number(self.min_p) <= 1, "in [0, 1]"),
            "truncate_on": (
                self.truncate_on in ("guided", "base", "tilted"),
                "'guided', 'base' or 'tilted'",
            ),
            "repetition_penalty": (_SMALLEST <= penalty <= _LARGEST, in_range),
            "num_samples": (1 <= as_integer(self.num_samples) <= 10**6, "1 to 10^6"),
            "seed": (0 <= as_integer(self.seed) < 2**64, "an integer, 0 to 2^64 - 1"),
            "stop": (
                isinstance(self.stop, tuple | list)
                and all(isinstance(string, str) and string for string in self.stop),
                "non-empty strings",
            ),
            "stop_ids": (
                isinstance(self.stop_ids, tuple | list)
                and all(as_integer(token) >= 0 for token in self.stop_ids),
                "token ids",
            ),
            "refusal": (
                self.refusal is None or (isinstance(self.refusal, str) and self.refusal.strip()),
                "a text, or None",
            ),
            "refusal_threshold": (as_number(self.refusal_threshold) > 0, "positive"),
        }
        for name, (fine, expected) in checks.items():
            if not fine:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")

    def controls(self, rows: int, base_temperature: float, guidance_scale: float) -> Controls:
        """The same controls for each of B rows."""
        return Controls.filled(
            rows,
            base_temperature=base_temperature,
            guidance_scale=guidance_scale,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )

    @property
    def truncates(self) -> bool:
        """Whether some tokens may not be drawn."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def returns_logprobs(self) -> bool:
        """Whether the program returns the log-probabilities under the served distribution."""
        return self.logprobs or self.refusal is not None


def check_guidance(base_temperature: float, guidance_scale: float) -> None:
    """Refuses a T or an s that is out of range."""
    if not _SMALLEST <= as_number(base_temperature) <= _LARGEST:
        raise ValueError(
            f"base_temperature must be positive, {_SMALLEST:g} to {_LARGEST:g}, got "
            f"{base_temperature!r}"
        )
    if not 0 <= as_number(guidance_scale) <= _LARGEST:
        raise ValueError(f"guidance_scale must be 0 to {_LARGEST:g}, got {guidance_scale!r}")


def as_number(value: Any) -> float:
    """A number unchanged; NaN, which is in no range, for anything else."""
    try:
        return math.nan if isinstance(value, str | bytes | bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def as_integer(value: Any) -> int:
    """An integer unchanged; -1 for anything else."""
    try:
        return -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return -1
