"""Bytes that rot: copies of a file with a bit flipped in each of its regions, or cut short."""

import pathlib
from collections.abc import Callable, Iterator

import pytest


def damaged(data: bytes, count: int) -> Iterator[bytes]:
    """Copies with one bit flipped, in `count` places from the first byte to the last; one cut."""
    last = len(data) - 1
    for i in range(count):
        place = i * last // (count - 1)
        copy = bytearray(data)
        copy[place] ^= 1 << i % 8
        yield bytes(copy)
    yield data[:last]


def check_damage_is_recomputed(path: pathlib.Path, read: Callable[[], None]) -> None:
    """`read` warns of each damaged copy of a stored file and computes it anew, then reads it."""
    whole = path.read_bytes()
    for data in damaged(whole, 20):
        path.write_bytes(data)
        with pytest.warns(UserWarning, match=f"{path.name}: damaged.*computed anew"):
            read()
        read()  # without a warning
