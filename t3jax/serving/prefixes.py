"""A cache of prefixes of prompts, so that later prompts need not read them again.

Many prompts begin with the same system prompt, and all answers to one prompt share it. A prefix
ends where a piece ends, and is kept from the second time on, so that a prefix of one prompt costs
nothing. The least recently used are dropped first. The states themselves are the device's.
"""

import collections
import hashlib
from collections.abc import Callable

import numpy as np

_REMEMBERED = 4096  # digests of prefixes that were read


class Prefixes:
    """The names of kept prefixes, which are digests of their tokens."""

    def __init__(self, capacity: int, drop: Callable[[bytes], None]):
        """Makes an empty set whose states have at most `capacity` slots together.

        `drop` is called with the name of a prefix that is dropped.
        """
        self._capacity = capacity
        self._drop = drop
        self._slots: collections.OrderedDict[bytes, int] = collections.OrderedDict()
        self._seen: collections.OrderedDict[bytes, None] = collections.OrderedDict()

    def clear(self) -> None:
        """Forgets all prefixes, whose states are dropped already."""
        self._slots.clear()

    def find(self, tokens: np.ndarray) -> bytes | None:
        """The name of a prefix whose state is kept, which is then the most recently used."""
        if not self._slots or (name := _name(tokens)) not in self._slots:
            return None
        self._slots.move_to_end(name)
        return name

    def add(self, tokens: np.ndarray, slots: int) -> bytes | None:
        """Records a prefix that was read; returns its name if its state is to be kept."""
        name = _name(tokens)
        if slots > self._capacity or name in self._slots:
            return None
        if name not in self._seen:
            self._seen[name] = None
            if len(self._seen) > _REMEMBERED:
                self._seen.popitem(last=False)
            return None
        while sum(self._slots.values()) + slots > self._capacity:
            oldest, _ = self._slots.popitem(last=False)
            self._drop(oldest)
        self._slots[name] = slots
        return name


def _name(tokens: np.ndarray) -> bytes:
    return hashlib.sha256(tokens.astype(np.int32).tobytes()).digest()
