"""PyTorch in a child process, which blocks on a pipe while this side is measured.

In one process the two disturb each other: after a parallel region the threads of libgomp, which
PyTorch's wheels bring, spin for some 6 ms before they sleep (OMP_WAIT_POLICY=passive would forbid
it, and slow PyTorch down; KMP_BLOCKTIME is for another library and has no effect). In a child
PyTorch keeps its defaults and its memory is counted apart; `alternate` waits longer than 6 ms.
"""

import importlib
import multiprocessing
import os
import pathlib
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


class Peer:
    """An object of `benchmarks.pytorch` that lives in a child process."""

    def __init__(self, name: str, *args: Any, **options: Any):
        """Starts the child, which makes `name(*args, **options)`."""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        serving = (theirs, name, args, options)
        self._child = context.Process(target=_serve, args=serving, daemon=True)
        self._child.start()
        theirs.close()
        self._receive()

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._child.join()

    def __call__(self, method: str, *args: Any, **options: Any) -> Any:
        """Calls a method of the object."""
        self._pipe.send((method, args, options))
        return self._receive()

    def set_threads(self, count: int) -> None:
        """Sets PyTorch's number of threads."""
        self("set_threads", count)

    @property
    def peak_memory_gib(self) -> float:
        """Peak memory of the child."""
        return self("peak_memory_gib")

    def _receive(self) -> Any:
        error, result = self._pipe.recv()
        if error:
            raise RuntimeError(f"the PyTorch side failed:\n{error}")
        return result


def thread_counts() -> list[int]:
    """Thread counts to try: one, half of the cores, all."""
    cores = len(os.sched_getaffinity(0))
    return sorted({1, max(1, cores // 2), cores})


def peak_memory_gib(process: int | str = "self") -> float:
    """Peak memory of a process; unlike `getrusage`, without its parent's."""
    status = pathlib.Path(f"/proc/{process}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**20


def _serve(pipe: Connection, name: str, args: tuple, options: dict) -> None:
    """Answers calls until the parent is gone."""
    try:
        import torch

        common: dict[str, Callable[..., Any]] = {
            "set_threads": torch.set_num_threads,
            "peak_memory_gib": peak_memory_gib,
        }
        served = getattr(importlib.import_module("benchmarks.pytorch"), name)(*args, **options)
        pipe.send((None, None))
        while True:
            method, args, options = pipe.recv()
            call = common.get(method) or getattr(served, method)
            pipe.send((None, call(*args, **options)))
    except EOFError:
        return
    except Exception:
        pipe.send((traceback.format_exc(), None))
