"""Ranges of options, and the base class of options that checks them."""

import dataclasses
import functools
import typing
from typing import NamedTuple


class Numbers(NamedTuple):
    """The numbers from `low` to `high` that a field may have, `whole` ones or all.

    `above` and `below` exclude `low` and `high` themselves.
    """

    low: float
    high: float
    whole: bool = False
    above: bool = False
    below: bool = False

    def __contains__(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int if self.whole else (int, float)):
            return False
        # NaN fails every comparison.
        return (self.low < value if self.above else self.low <= value) and (
            value < self.high if self.below else value <= self.high
        )

    def __str__(self) -> str:
        start, end = "(" if self.above else "[", ")" if self.below else "]"
        kind = "a whole number" if self.whole else "a number"
        return f"{kind} in {start}{self.low:.10g}, {self.high:.10g}{end}"


class Words(NamedTuple):
    """The words that a field may have: one of them, or some joined by a character of `joined`."""

    known: tuple[str, ...]
    joined: str = ""

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, str):
            return False
        parts = value.split(self.joined[0]) if self.joined else [value]
        if len(self.joined) > 1:
            parts = [word for part in parts for word in part.split(self.joined[1])]
        return all(part in self.known for part in parts)

    def __str__(self) -> str:
        joined = f", or some joined by {' and '.join(map(repr, self.joined))}" * bool(self.joined)
        return f"one of {', '.join(self.known)}{joined}"


def whole(low: int, high: int = 2**31 - 1) -> Numbers:
    """The whole numbers from `low` to `high`."""
    return Numbers(low, high, whole=True)


# JAX keeps 32 bits of a seed: a larger seed would draw like a smaller one.
SEED = whole(0, 2**32 - 1)
SHARE = Numbers(0, 1)
BELOW_1 = Numbers(0, 1, below=True)
TOP_P = Numbers(0, 1, above=True)
POSITIVE = Numbers(0, 10**6, above=True)
NOT_NEGATIVE = Numbers(0, 10**6)
RATE = Numbers(0, 1000, above=True)
RANK = whole(1, 2**16)
COUNT = whole(1, 2**20)
BASE_TEMPERATURE = Numbers(0.001, 1000)
GUIDANCE_SCALE = Numbers(0, 1000)
REFINEMENTS = ("plain", "gated", "protected", "product")
TRUNCATE_ON = Words(("guided", "base", "tilted"))


class Ranged:
    """Options with ranges, a base of frozen dataclasses: `rows: Annotated[int, COUNT] = 16`.

    A value out of the range of its annotation is a ValueError, which names the field, the value and
    the range. Each element of a tuple is checked. A default of None is in range.
    """

    def __post_init__(self) -> None:
        for name, expected, optional in _ranges(type(self)):  # type: ignore[arg-type]
            value = getattr(self, name)
            if value is None and optional:
                continue
            values = value if isinstance(value, tuple) else (value,)
            if not all(element in expected for element in values):
                raise ValueError(f"{name} = {value!r}: expected {expected}")


@functools.cache
def _ranges(options: type) -> list[tuple[str, Numbers | Words, bool]]:
    """The fields of a dataclass that have a range, and whether None is allowed."""
    hints = typing.get_type_hints(options, include_extras=True)
    return [
        (field.name, expected, field.default is None)
        for field in dataclasses.fields(options)  # type: ignore[arg-type]
        for expected in getattr(hints[field.name], "__metadata__", ())
        if isinstance(expected, Numbers | Words)
    ]
