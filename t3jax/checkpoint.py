"""The folder of a training run: settings, checkpoints, metrics.

    run.json        settings and data of the run; another run is refused
    checkpoints/    the last two training states, by epoch or step (Orbax)
    metrics.jsonl   one line for each epoch or step, and each head
    tensorboard/    the same for TensorBoard

A run may be killed at any moment. What is restored is the last checkpoint that was saved whole, on
whatever devices there are now; the metrics are cut back to it. Metrics are on the disk before the
checkpoint of their epoch or step is. SIGTERM saves the epoch or step that is under way.

Of several processes each writes its part of a checkpoint, and process 0 everything else.
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax

from t3jax import files, hosts

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

Metrics = dict[str, Any]


def open_run(
    folder: str | pathlib.Path | None, settings: dict[str, Any], abstract_state: Any, unit: str
) -> "contextlib.AbstractContextManager[RunFolder | None]":
    """The folder of a run, or None for a run that keeps no files; see `RunFolder`."""
    if folder is None:
        return contextlib.nullcontext()
    return RunFolder(pathlib.Path(folder), settings, abstract_state, unit)


class RunFolder:
    """Opens a folder for a run, new or to be resumed; use as a context manager.

    Args:
        folder: Where; created if missing.
        settings: All that decides the result, as nested plain values.
        abstract_state: The training state as `jax.ShapeDtypeStruct` leaves with shardings.
        unit: What the run counts, "epoch" or "step": a field of every line of metrics.

    Attributes:
        done: Last epoch or step that is done; 0 for a new run.
        state: The training state after it; None for a new run.
        metrics: What was logged up to then.

    Raises:
        ValueError: If the folder holds another run, or a checkpoint cannot be read.
        FileNotFoundError: If hosts do not share the folder.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        settings: dict[str, Any],
        abstract_state: Any,
        unit: str,
    ):
        from orbax.checkpoint import v1 as ocp  # slow to import: only who keeps files waits

        folder.mkdir(parents=True, exist_ok=True)
        # Through JSON, so that tuples compare as what they were read back as.
        _check_same_run(folder, json.loads(json.dumps(settings)))
        self._checkpoints = ocp.training.Checkpointer(
            (folder / "checkpoints").absolute(),
            preservation_policy=ocp.training.preservation_policies.LatestN(n=2),
            cleanup_tmp_directories=True,
        )
        self.done = 0
        self.state = None
        if (latest := self._checkpoints.latest) is not None:
            self.done = latest.step
            try:
                self.state = self._checkpoints.load(latest.step, abstract_state)
            except Exception as error:
                place = folder / "checkpoints" / str(latest.step)
                raise ValueError(
                    f"{place}: the checkpoint cannot be read ({error}); remove this folder to "
                    "resume from the one before it, or start anew in another workdir"
                ) from error
        self._folder, self._unit = folder, unit
        self.metrics = _kept_metrics(folder / "metrics.jsonl", unit, self.done)
        self._writers: dict[str, SummaryWriter] = {}
        self._open = contextlib.ExitStack()
        if hosts.is_lead():
            with files.replacing(folder / "metrics.jsonl") as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in self.metrics))
            self._metrics_file = self._open.enter_context((folder / "metrics.jsonl").open("a"))

    def __enter__(self) -> "RunFolder":
        self._terminated: Callable[[], bool] = self._open.enter_context(hosts.deferred_sigterm())
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            # A save that failed fails again here, and must not hide the first error.
            with contextlib.suppress(*([Exception] if any(error) else [])):
                self._checkpoints.close()
        finally:
            self._open.__exit__(*error)

    def finish(self, done: int, lines: Sequence[Metrics], state: Any, save: bool) -> None:
        """Logs an epoch or step, and saves it if that is due or the process is told to end.

        Args:
            done: Which one.
            lines: Its metrics, one line for each head.
            state: The training state after it.
            save: Whether a checkpoint is due; it is whole on the disk when this returns.

        Raises:
            OSError: If it could not be saved; the checkpoints before it stay.
            hosts.Preempted: If SIGTERM came, to this process or another; the state is saved.
        """
        if hosts.is_lead():
            self._log(lines)
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

    def _save(self, done: int, state: Any) -> None:
        if hosts.is_lead():
            os.fsync(self._metrics_file.fileno())
        for writer in self._writers.values():
            writer.flush()
        try:
            self._checkpoints.save(done, state)
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


def _check_same_run(folder: pathlib.Path, settings: dict[str, Any]) -> None:
    path = folder / "run.json"
    if hosts.is_lead() and not path.is_file():
        files.write_json(path, settings)
    hosts.wait_for(path)
    before, now = _flat(json.loads(path.read_text())), _flat(settings)
    different = [
        f"{name}: {before.get(name)} there, {now.get(name)} asked for"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if different:
        raise ValueError(
            f"{folder} holds a run that cannot be resumed with other settings or data:\n  "
            + "\n  ".join(different)
            + "\ngive another workdir, or remove this one to start anew"
        )


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    leaves = jax.tree.leaves_with_path(tree, is_leaf=lambda node: not isinstance(node, dict))
    return {".".join(str(part.key) for part in path): leaf for path, leaf in leaves}


def _kept_metrics(path: pathlib.Path, unit: str, done: int) -> list[Metrics]:
    """The metrics up to an epoch or step, without a last line that a kill cut short."""
    if not path.is_file():
        return []
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in map(json.loads, whole) if line[unit] <= done]
