"""Several hosts: process 0 decides, and every process computes.

The engine runs in process 0. Each call of its device is broadcast to the other processes first, so
that all run the same programs in the same order. The arguments are small and on the host.
"""

import pickle
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from t3jax.serving.device import Device

_CALLS = ("begin", "read", "drop", "keep", "resume", "give_up", "fit", "join", "decode")
_SMALL = 1 << 12  # bytes; most calls fit, and take one broadcast
_HEADER = 8
IDLE_SECONDS = 5.0  # a broadcast that waits longer might be taken for a lost process


class Mirror:
    """The device of process 0, whose calls all processes repeat."""

    def __init__(self, device: Device):
        """Takes the device of this process; every process makes the same one."""
        self._device = device
        for name in _CALLS:
            setattr(self, name, lambda *args, name=name: self._call(name, *args))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)

    def ping(self) -> None:
        """Broadcasts a call that does nothing, so that no process seems lost."""
        _broadcast(pickle.dumps(("", ())))

    def end(self) -> None:
        """Ends `follow` in the other processes."""
        _broadcast(pickle.dumps((None, ())))

    def follow(self) -> None:
        """Repeats the calls of process 0 until its `end`."""
        while True:
            name, args = pickle.loads(_broadcast(b""))
            if name is None:
                return
            if name:
                getattr(self._device, name)(*args)

    def _call(self, name: str, *args: object) -> object:
        _broadcast(pickle.dumps((name, args)))
        return getattr(self._device, name)(*args)


def _broadcast(content: bytes) -> bytes:
    """Broadcasts bytes of process 0 to all processes."""
    head = np.zeros(_SMALL, np.uint8)
    if jax.process_index() == 0:
        head[:_HEADER] = np.frombuffer(len(content).to_bytes(_HEADER, "big"), np.uint8)
        head[_HEADER : _HEADER + len(content)] = np.frombuffer(
            content[: _SMALL - _HEADER], np.uint8
        )
    head = multihost_utils.broadcast_one_to_all(head)
    size = int.from_bytes(head[:_HEADER].tobytes(), "big")
    if size <= _SMALL - _HEADER:
        return head[_HEADER : _HEADER + size].tobytes()
    rest = np.zeros(1 << (size - 1).bit_length(), np.uint8)
    if jax.process_index() == 0:
        rest[:size] = np.frombuffer(content, np.uint8)
    return multihost_utils.broadcast_one_to_all(rest)[:size].tobytes()
