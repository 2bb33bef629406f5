"""A cache of beginnings of prompts that were read, so that later prompts need not read them.

A system prompt is the beginning of many prompts, and several answers to one prompt share all of it.
A beginning ends where a piece ends, and is kept from the second time on: a beginning that comes
once costs nothing. The least recently used are given up first. The states themselves are the
device's.
"""

import collections
import hashlib
from collections.abc import Callable

import numpy as np

_REMEMBERED = 4096  # digests of beginnings that came


class Prefixes:
    """Beginnings of prompts by their tokens."""

    def __init__(self, capacity: int, drop: Callable[[bytes], None]):
        """Makes an empty set whose states have at most `capacity` slots together.

        `drop` is called with the name of a beginning that is given up.
        """
        self._capacity = capacity
        self._drop = drop
        self._kept: collections.OrderedDict[bytes, int] = collections.OrderedDict()  # slots
        self._came: collections.OrderedDict[bytes, None] = collections.OrderedDict()

    def clear(self) -> None:
        """Forgets all; the states are gone already."""
        self._kept.clear()

    def find(self, tokens: np.ndarray) -> bytes | None:
        """The name of a beginning, if its state is kept; it is then the last to be given up."""
        if not self._kept or (name := _name(tokens)) not in self._kept:
            return None
        self._kept.move_to_end(name)
        return name

    def add(self, tokens: np.ndarray, slots: int) -> bytes | None:
        """Notes that a beginning was read, whose state has this many slots.

        Its name is returned if its state is to be kept from now on.
        """
        name = _name(tokens)
        if slots > self._capacity or name in self._kept:
            return None
        if name not in self._came:
            self._came[name] = None
            if len(self._came) > _REMEMBERED:
                self._came.popitem(last=False)
            return None
        while sum(self._kept.values()) + slots > self._capacity:
            oldest, _ = self._kept.popitem(last=False)
            self._drop(oldest)
        self._kept[name] = slots
        return name


def _name(tokens: np.ndarray) -> bytes:
    return hashlib.sha256(tokens.astype(np.int32).tobytes()).digest()
