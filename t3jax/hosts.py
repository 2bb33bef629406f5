"""Several processes as one program: joining, distributed arrays, writing, stopping.

Every process runs the same script. All conditions in it (loop bounds, files on the disk, SIGTERM)
must be the same in every process: otherwise one waits for ever in a collective operation for
another. In a single process, which is the usual case, nothing here communicates.
"""

import contextlib
import functools
import logging
import os
import pathlib
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

MODES = ("auto", "on", "off")
# After this time without a heartbeat a process is lost, and the others end. JAX's default is 100.
HEARTBEAT_TIMEOUT_SECONDS = 30
_SECONDS_UNTIL_RAISED_AGAIN = 0.5
PREEMPTED_STATUS = 128 + signal.SIGTERM  # a shell's status of a process that SIGTERM ended


class Preempted(Exception):
    """SIGTERM came, and the finished work is saved."""


class Terminated(KeyboardInterrupt):
    """SIGTERM came and is not deferred; like Ctrl-C, so that no `except Exception` catches it."""


def raise_at_signals() -> None:
    """Lets Ctrl-C raise `KeyboardInterrupt` and SIGTERM `Terminated`; a second SIGTERM kills.

    An exception runs the blocks that remove temporary files. It may get lost: Python drops the
    exceptions of finalizers and of callbacks of its garbage collector, of which JAX has one, and
    extension modules clear some. So it is raised twice a second, except while it is being handled,
    until `stop_raising` is called.
    """

    def raise_until_handled(raised: type[KeyboardInterrupt]) -> NoReturn:
        def raise_again(_: int, __: object) -> None:
            handled = sys.exc_info()[1]
            while handled is not None:
                if isinstance(handled, KeyboardInterrupt):
                    return
                handled = handled.__context__
            raise raised

        signal.signal(signal.SIGALRM, raise_again)
        signal.setitimer(signal.ITIMER_REAL, *2 * [_SECONDS_UNTIL_RAISED_AGAIN])
        raise raised

    def interrupt(_: int, __: object) -> NoReturn:
        raise_until_handled(KeyboardInterrupt)

    def terminate(_: int, __: object) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise_until_handled(Terminated)

    hook = sys.unraisablehook

    def report(dropped: Any) -> None:
        if not isinstance(dropped.exc_value, KeyboardInterrupt):
            hook(dropped)

    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, terminate)
    sys.unraisablehook = report


def stop_raising() -> None:
    """Stops the repeated raising of `raise_at_signals`; the process is about to exit.

    Threads print no errors any more: a thread that saves would print a traceback.
    """
    signal.setitimer(signal.ITIMER_REAL, 0)
    logging.disable()
    sys.unraisablehook = lambda _: None
    threading.excepthook = lambda _: None


def initialize(mode: str = "auto") -> None:
    """Joins the processes of a cluster to one program; before any other use of JAX's devices.

    JAX itself finds TPU pod slices, Slurm, Open MPI and (with `jax[k8s]`) Kubernetes jobs, and
    reads `JAX_COORDINATOR_ADDRESS` and `JAX_LOCAL_DEVICE_IDS`. Elsewhere `JAX_NUM_PROCESSES` and
    `JAX_PROCESS_ID` are needed too; a ValueError names a missing or wrong one. The mode "on" joins;
    "auto" joins if there is more than one process, and "off" never.
    """
    if mode not in MODES:
        raise ValueError(f"distributed {mode!r} is not known; expected one of {', '.join(MODES)}")
    if mode == "off":
        return
    names = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    values = [os.environ.get(name) for name in names]
    cluster = _cluster_size()
    by_hand = "JAX_COORDINATOR_ADDRESS" in os.environ or any(values)
    if cluster is None and (by_hand or mode == "on"):
        needed = ("JAX_COORDINATOR_ADDRESS", *names)
        if missing := [name for name in needed if not os.environ.get(name)]:
            raise ValueError(
                "JAX finds no cluster here, so that JAX_COORDINATOR_ADDRESS=HOST:PORT, "
                "JAX_NUM_PROCESSES and JAX_PROCESS_ID must describe the processes; "
                f"missing: {', '.join(missing)} (for a single process give --distributed=off)"
            )
    for name, value in zip(names, values, strict=True):
        if value and not value.isdecimal():
            raise ValueError(f"{name}={value}: expected a number, such as 0 or 2")
    count, index = (int(value) if value else None for value in values)
    if count == 0 or (count is not None and index is not None and index >= count):
        raise ValueError(
            f"JAX_NUM_PROCESSES={count} and JAX_PROCESS_ID={index}: expected at least one process, "
            "and ids that count from 0"
        )
    if mode == "auto" and (count or cluster or 1) == 1:
        return
    # JAX would handle SIGTERM in the whole process; here training alone defers it.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        num_processes=count,
        process_id=index,
        heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_SECONDS,
    )


def _cluster_size() -> int | None:
    """Number of processes of the cluster that JAX finds; None if it finds none."""
    # JAX has no public way to find a cluster without joining it.
    from jax._src.clusters import ClusterEnv

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # in any pod of Kubernetes without jax[k8s]
        for environment in ClusterEnv._cluster_types:
            if not environment.opt_in_only_method and environment.is_env_present():
                return environment.get_process_count()
    return None


def is_lead() -> bool:
    """Whether this process writes and prints: process 0 does."""
    # This may be called before the devices are known, which the planner simulates later.
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def place(tree: PyTree, shardings: PyTree) -> PyTree:
    """Places arrays that every process has on a mesh of all devices; each device gets its slice.

    Distributed arrays are resharded. The shardings are a prefix of the tree.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)
    return jax.tree.map(_place, tree, jax.tree.broadcast(shardings, tree))


def _place(leaf: jax.typing.ArrayLike, sharding: jax.sharding.Sharding) -> jax.Array:
    if isinstance(leaf, jax.Array):
        if not leaf.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(_place(jax.random.key_data(leaf), sharding))
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def gather(tree: PyTree) -> PyTree:
    """Gathers arrays so that every process can read them whole; does not wait for them.

    All processes call this at the same point. Distributed arrays are replicated on every device.
    """

    def gather(leaf: object) -> object:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return leaf
        assert isinstance(leaf.sharding, NamedSharding)  # as all distributed arrays here
        return _make_replicate(NamedSharding(leaf.sharding.mesh, P()))(leaf)

    return jax.tree.map(gather, tree)


@functools.cache
def _make_replicate(replicated: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda leaf: leaf, out_shardings=replicated)


def fetch(tree: PyTree) -> PyTree:
    """Copies arrays to the host of every process, whole; all processes call this at one point."""
    return jax.device_get(gather(tree))


def fetch_to_lead(tree: PyTree) -> PyTree:
    """Copies arrays to the host of process 0, one after the other, to be written; None elsewhere.

    All processes call this at the same point.
    """

    def copy(leaf: object) -> np.ndarray | None:
        whole = gather(leaf)
        return np.asarray(whole) if is_lead() else None

    return jax.tree.map(copy, tree)


def of_lead(flags: PyTree) -> np.ndarray:
    """Broadcasts the booleans of process 0 to all processes: its view of the disk decides."""
    return multihost_utils.broadcast_one_to_all(np.asarray(flags, np.int32)).astype(bool)


def anywhere(flag: bool) -> bool:
    """Whether a flag is true in any process; all processes call this at the same point."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.asarray(flag)).any())


def wait_for(path: pathlib.Path) -> None:
    """Waits until process 0 has written a file or folder that all processes read next."""
    if jax.process_count() == 1:
        return
    multihost_utils.sync_global_devices(str(path))
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: process 0 wrote it and process {jax.process_index()} does not see it; write "
            "to a file system that all hosts share"
        )


@contextlib.contextmanager
def deferred_sigterm() -> Iterator[Callable[[], bool]]:
    """Defers SIGTERM, which schedulers send some seconds before they kill.

    Yields a function that returns whether SIGTERM came to any process; all processes call it at the
    same points. If it came and the block ends without an error, it takes effect then. Outside of
    the main thread of a process signals are not changed.
    """
    received = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield lambda: anywhere(False)
        return
    before = signal.signal(signal.SIGTERM, lambda *_: received.set())
    try:
        yield lambda: anywhere(received.is_set())
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
    if received.is_set():
        signal.raise_signal(signal.SIGTERM)
