"""The folder of a training run: settings, checkpoints, metrics.

    run.json        settings and data of the run; another run is refused
    checkpoints/    the last two training states, by epoch or step (Orbax)
    metrics.jsonl   one line for each epoch or step, and each head
    tensorboard/    the same for TensorBoard

A run may be killed at any moment. The last whole checkpoint is restored, on any number of devices,
and the metrics are truncated to it. Metrics are written before the checkpoint of their epoch or
step. SIGTERM saves the current epoch or step.

A checkpoint has a digest of its state and of the metrics up to it, with which the restored ones are
compared: if bytes have changed on the disk the run resumes from the previous checkpoint, with a
warning, and ends with the same bits. The digest is computed on the device, once at every save and
every resume, from 12 bytes a weight when all weights are fine-tuned (0.4 GB/s on two busy CPU
cores). No file is read for it.

Each process writes its part of a checkpoint; process 0 writes everything else.
"""

import atexit
import contextlib
import hashlib
import json
import logging
import os
import pathlib
import shutil
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
from jaxtyping import PyTree

from t3jax import files, hosts
from t3jax.digests import params_digest

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

Metrics = dict[str, Any]


def open_run(
    folder: str | pathlib.Path | None,
    settings: Mapping[str, object],
    abstract_state: PyTree,
    unit: str,
) -> "contextlib.AbstractContextManager[RunFolder | UnsavedRun]":
    """A run in a folder, see `RunFolder`; without one, a run that keeps no files."""
    if folder is None:
        return contextlib.nullcontext(UnsavedRun())
    return RunFolder(pathlib.Path(folder), settings, abstract_state, unit)


class UnsavedRun:
    """A new run that keeps no files; see `RunFolder`."""

    def __init__(self) -> None:
        self.done, self.state = 0, None
        self.metrics: list[Metrics] = []

    def finish(self, done: int, lines: Sequence[Metrics], state: PyTree, save: bool) -> None:
        """Does nothing."""


class RunFolder:
    """Opens a folder for a run, new or to be resumed; use as a context manager.

    The folder is created if missing. `settings` are all settings that decide the result, as nested
    plain values; `abstract_state` is the training state as `jax.ShapeDtypeStruct` leaves with
    shardings; `unit` is the unit of progress, "epoch" or "step", a field of every line of metrics.
    A ValueError means that the folder holds another run, or that all of its checkpoints are
    damaged; a FileNotFoundError, that hosts do not share it.

    Attributes:
        done: Last finished epoch or step; 0 for a new run.
        state: The training state after it; None for a new run.
        metrics: The lines logged up to it.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        settings: Mapping[str, object],
        abstract_state: PyTree,
        unit: str,
    ):
        from orbax.checkpoint import v1 as ocp  # slow to import, and not always needed

        folder.mkdir(parents=True, exist_ok=True)
        # JSON turns tuples into lists, as they are read back.
        _check_same_run(folder, json.loads(json.dumps(settings)))
        self._checkpoints = ocp.training.Checkpointer(
            (folder / "checkpoints").absolute(),
            preservation_policy=ocp.training.preservation_policies.LatestN(n=2),
            cleanup_tmp_directories=True,
        )
        self.done = 0
        self.state = None
        self._folder, self._unit = folder, unit
        lines = _read_log(folder / "metrics.jsonl")
        damaged: list[str] = []
        steps = sorted((saved.step for saved in self._checkpoints.checkpoints), reverse=True)
        for step in steps:
            self.metrics, digest = _up_to(lines, unit, step)
            try:
                with _one_error():
                    self.state = self._load(step, abstract_state, digest)
            except Exception as error:
                # Orbax's messages have pages.
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                damaged.append(f"{folder / 'checkpoints' / str(step)}: {reason[:300]}")
            if not hosts.anywhere(self.state is None):
                self.done = step
                break
            self.state = None
        if damaged:
            self._remove_damaged(damaged)
        self.metrics, self._metrics_digest = _up_to(lines, unit, self.done)
        self._writers: dict[str, SummaryWriter] = {}
        self._open = contextlib.ExitStack()
        if hosts.is_lead():
            path = folder / "metrics.jsonl"
            files.write_text(path, "".join(json.dumps(line) + "\n" for line in self.metrics))
            self._metrics_file = self._open.enter_context(path.open("a", encoding="utf-8"))

    def _load(self, step: int, abstract_state: PyTree, metrics_digest: Any) -> PyTree:
        state = self._checkpoints.load(step, abstract_state)
        # Checkpoints of earlier versions have no digests.
        saved = self._checkpoints.metadata(step).custom_metadata or {}
        if saved.get("state") not in (None, params_digest(state)):
            raise ValueError("the state is not the one that was saved")
        if saved.get("metrics") not in (None, metrics_digest.hexdigest()):
            raise ValueError("metrics.jsonl is not as it was when this was saved")
        return state

    def _remove_damaged(self, damaged: Sequence[str]) -> None:
        """Removes damaged checkpoints if an earlier one is whole, else refuses the run."""
        reasons = "\n  ".join(damaged)
        if self.state is None:
            raise ValueError(
                f"{self._folder}: no checkpoint is as it was saved:\n  {reasons}\n"
                "remove this folder to start again, or start in another workdir"
            )
        if hosts.is_lead():
            for saved in self._checkpoints.checkpoints:
                if saved.step > self.done:
                    shutil.rmtree(self._folder / "checkpoints" / str(saved.step))
            warnings.warn(
                f"the run goes on from {self._unit} {self.done}, the checkpoint before; removed as "
                f"damaged:\n  {reasons}",
                stacklevel=4,
            )
        hosts.wait_for(self._folder)
        self._checkpoints.reload()

    def __enter__(self) -> "RunFolder":
        self._terminated: Callable[[], bool] = self._open.enter_context(hosts.deferred_sigterm())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        try:
            # A failed save raises again here; it must not hide the first error.
            with contextlib.suppress(*([Exception] if error is not None else [])):
                self._checkpoints.close()
            if error is not None and hosts.is_lead():
                checkpoints = self._folder / "checkpoints"
                _remove_cut_short(checkpoints)
                # Again at exit, when the writing threads have ended.
                atexit.register(_remove_cut_short, checkpoints)
        finally:
            self._open.__exit__(kind, error, trace)

    def finish(self, done: int, lines: Sequence[Metrics], state: PyTree, save: bool) -> None:
        """Logs an epoch or step, and saves it if `save` or if SIGTERM came.

        The checkpoint is whole on the disk when this returns. An OSError means that it could not be
        saved, `hosts.Preempted` that it is saved and SIGTERM came, to this process or another.
        """
        if hosts.is_lead():
            self._log(lines)
        _update(self._metrics_digest, lines)
        terminated = self._terminated()
        if save or terminated:
            self._save(done, state)
        if terminated:
            raise hosts.Preempted(
                f"told to end (SIGTERM): {self._unit} {done} is saved in {self._folder}; start "
                "again with the same settings to resume"
            )

    def _log(self, lines: Sequence[Metrics]) -> None:
        for line in lines:
            self._metrics_file.write(json.dumps(line) + "\n")
            writer = self._writer(line.get("head", ""))
            for name, value in line.items():
                if name not in (self._unit, "head", "seed"):
                    writer.add_scalar(name, value, line[self._unit])
        self._metrics_file.flush()

    def _save(self, done: int, state: PyTree) -> None:
        if hosts.is_lead():
            os.fsync(self._metrics_file.fileno())
        for writer in self._writers.values():
            writer.flush()
        digests = {"state": params_digest(state), "metrics": self._metrics_digest.hexdigest()}
        try:
            with _one_error():
                self._checkpoints.save(done, state, custom_metadata=digests)
        except Exception as error:  # a full disk is a ValueError of TensorStore's
            raise OSError(
                f"{self._folder}: the checkpoint of {self._unit} {done} could not be saved "
                f"({error}); those before it are whole: make room and start the run again to resume"
            ) from error

    def _writer(self, head: str) -> "SummaryWriter":
        if head not in self._writers:
            from tensorboardX import SummaryWriter

            self._writers[head] = self._open.enter_context(
                SummaryWriter(str(self._folder / "tensorboard" / head), purge_step=self.done + 1)
            )
        return self._writers[head]


def _remove_cut_short(folder: pathlib.Path) -> None:
    """Removes the files of a save that failed."""
    for path in folder.glob("*.orbax-checkpoint-tmp"):
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _one_error() -> Iterator[None]:
    """Silences the errors that follow the first one of a failed read or save.

    Orbax does not cancel its other reads and saves; each fails later, with its own traceback.
    """
    asyncio_log, hook = logging.getLogger("asyncio"), sys.unraisablehook

    def is_new(record: logging.LogRecord) -> bool:
        return "was never retrieved" not in record.getMessage()

    def report(error: Any) -> None:
        if "Event loop is closed" not in str(error.exc_value):
            hook(error)

    asyncio_log.addFilter(is_new)
    sys.unraisablehook = report
    yield  # after a failure later errors may follow: the filters stay
    asyncio_log.removeFilter(is_new)
    sys.unraisablehook = hook


def _check_same_run(folder: pathlib.Path, settings: Mapping[str, object]) -> None:
    path = folder / "run.json"
    if hosts.is_lead() and not path.is_file():
        files.write_json(path, settings)
    hosts.wait_for(path)
    try:
        before, now = _flat(json.loads(path.read_bytes())), _flat(settings)
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{path}: damaged ({error}); remove {folder} to start again, or give another workdir"
        ) from error
    different = [
        f"{name}: {before.get(name)} there, {now.get(name)} asked for"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if different:
        raise ValueError(
            f"{folder} holds a run that cannot be resumed with other settings or data:\n  "
            + "\n  ".join(different)
            + "\ngive another workdir, or remove this one to start again"
        )


def _flat(tree: Mapping[str, object]) -> dict[str, object]:
    leaves = jax.tree.leaves_with_path(tree, is_leaf=lambda node: not isinstance(node, dict))
    return {".".join(str(part.key) for part in path): leaf for path, leaf in leaves}


def _read_log(path: pathlib.Path) -> list[Metrics]:
    """The metrics of a folder up to a truncated or damaged line."""
    lines: list[Metrics] = []
    if not path.is_file():
        return lines
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            metrics = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or not isinstance(metrics, dict):
            break
        lines.append(metrics)
    return lines


def _up_to(lines: Sequence[Metrics], unit: str, done: int) -> tuple[list[Metrics], Any]:
    """The metrics up to an epoch or step, and their running digest."""
    until = [line for line in lines if isinstance(at := line.get(unit), int) and at <= done]
    digest = hashlib.sha256()
    _update(digest, until)
    return until, digest


def _update(digest: Any, lines: Sequence[Metrics]) -> None:
    for line in lines:
        digest.update(json.dumps(line).encode())
