"""Requests to forget, as records in a folder: each becomes a head that is on, off or revoked.

A thread makes the heads, one after another, while the engine answers. All files of the folder are
written atomically, so that a server that was killed resumes:

    audit.jsonl             who did what and when, one line each, append-only
    REQUEST/request.json    name, state, digests and figures
    REQUEST/rows.jsonl      the rows to forget, until they are deleted
    REQUEST/head/           the head
"""

import collections
import contextlib
import dataclasses
import hashlib
import pathlib
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from t3jax import checked, files
from t3jax.data.records import Record, parse_records
from t3jax.head_card import write_card
from t3jax.head_io import Head, load_head, save_head
from t3jax.serving.audit import AuditLog
from t3jax.serving.entry import (
    ACTIVE,
    FAILED,
    HELD,
    INACTIVE,
    PENDING,
    REVOKED,
    TRAINING,
    WAITING,
    Entry,
    read_entry,
)
from t3jax.serving.messages import QueueFull

if TYPE_CHECKING:
    from t3jax.serving.training import Check
    from t3jax.training_sets import TrainingSets

_MOST_WAITING = 64


@runtime_checkable
class Switchboard(Protocol):
    """A server of heads: an `Engine`."""

    def install(self, name: str, head: Head, active: bool = True) -> None:
        """Adds a head."""

    def activate(self, name: str, active: bool) -> None:
        """Turns a head on or off."""

    def remove(self, name: str) -> None:
        """Removes a head."""


@runtime_checkable
class Maker(Protocol):
    """A maker of heads: a `training.HeadMaker`."""

    def make(
        self, rows: Sequence[Record], store: pathlib.Path, names: tuple[str, ...] = ()
    ) -> "tuple[Head, TrainingSets]":
        """Makes a head; also returns the sets that it was trained on."""

    def check(self, head: Head, rows: Sequence[Record], sets: "TrainingSets") -> "Check":
        """Checks a head; returns a dataclass with the field `passed`."""


class RequestBook:
    """The requests to forget of one server."""

    def __init__(
        self,
        folder: pathlib.Path,
        heads: Switchboard,
        maker: Maker | None,
        report: Callable[[str], None] | None = None,
    ):
        """Opens a folder, created if missing, and installs the heads of its requests.

        Without a maker no request can be added. An OSError means that another process uses the
        folder, or that it cannot be written to; a ValueError, that a record or a head is damaged or
        does not fit the model.
        """
        self.folder = folder
        self._heads = heads
        self._maker = maker
        self._report = report or (lambda _: None)
        self._lock = threading.RLock()
        self._wake = threading.Condition(self._lock)
        self._closing = False
        self._claim = contextlib.ExitStack()
        self._claim.enter_context(files.claim(folder))
        self._audit = AuditLog(folder / "audit.jsonl")
        self._entries: dict[str, Entry] = {}
        for path in sorted(folder.glob("*/request.json")):
            entry = Entry(**checked.read_json(path))
            self._entries[entry.id] = entry
        for entry in self._entries.values():
            if entry.state in (ACTIVE, INACTIVE, HELD):
                head = load_head(folder / entry.id / "head")
                heads.install(entry.id, head, entry.state == ACTIVE)
            elif entry.state == TRAINING:
                entry.state = WAITING
            elif entry.state == REVOKED:
                self._delete_contents(entry)
        self._queue = collections.deque(
            entry.id
            for entry in sorted(self._entries.values(), key=lambda entry: entry.created)
            if entry.state == WAITING
        )
        self._thread = threading.Thread(target=self._work, name="requests", daemon=True)
        if maker is not None:
            self._thread.start()

    def add(self, fields: Mapping[str, object], who: str) -> dict[str, object]:
        """Takes a request of `who`; its head is made in the background.

        The fields are `rows`, a list of rows, or their JSON or JSON lines as bytes; `name`;
        `delete_rows`, whether to delete the rows once the head is made; and `names` of the people
        that the rows are about, searched for in the rows if missing. Raises a `FieldError` with an
        unknown or wrong field, `QueueFull` if too many wait, and a ValueError if the server cannot
        make heads.
        """
        if self._maker is None:
            raise ValueError(
                "this server cannot make heads: start it with --config.retain, rows to retain"
            )
        entry, content = read_entry(fields)
        with self._lock:
            if len(self._queue) >= _MOST_WAITING:
                raise QueueFull
            self._audit.add(who, "added", entry)
            (self.folder / entry.id).mkdir()
            with files.replacing(self.folder / entry.id / "rows.jsonl") as temporary:
                temporary.write_bytes(content)
            self._save(entry)
            self._entries[entry.id] = entry
            self._queue.append(entry.id)
            self._wake.notify_all()
        return self._describe(entry)

    def entries(self) -> list[dict[str, object]]:
        """All requests, the oldest first."""
        with self._lock:
            entries = sorted(self._entries.values(), key=lambda entry: entry.created)
            return [self._describe(entry) for entry in entries]

    def show(self, id: str) -> dict[str, object] | None:
        """One request; None if the identifier is unknown."""
        with self._lock:
            entry = self._entries.get(id)
            return None if entry is None else self._describe(entry)

    def activate(self, id: str, active: bool, who: str) -> dict[str, object]:
        """Turns a request's head on or off; turning a held head on approves it.

        A ValueError means that the request has no head.
        """
        with self._lock:
            entry = self._entries[id]
            if entry.state not in (ACTIVE, INACTIVE, HELD):
                raise ValueError(f"the request is {entry.state}: it has no head to turn on or off")
            self._audit.add(who, "turned on" if active else "turned off", entry)
            entry.state = ACTIVE if active else INACTIVE
            self._save(entry)
            self._heads.activate(id, active)
            return self._describe(entry)

    def revoke(self, id: str, who: str) -> dict[str, object]:
        """Revokes a request: its head is removed, and head and rows are deleted."""
        with self._lock:
            entry = self._entries[id]
            if entry.state == REVOKED:
                return self._describe(entry)
            self._audit.add(who, "revoked", entry)
            served = entry.state in (ACTIVE, INACTIVE, HELD)
            entry.state = REVOKED
            self._save(entry)
            if served:
                self._heads.remove(id)
            self._delete_contents(entry)
            self._wake.notify_all()
            return self._describe(entry)

    def audit(self) -> list[dict[str, object]]:
        """The audit log, the oldest line first."""
        return self._audit.read()

    def wait(self, timeout: int | float | None = None) -> bool:
        """Waits until no request waits or trains; False after `timeout` seconds."""

        def done() -> bool:
            return not any(entry.state in PENDING for entry in self._entries.values())

        with self._lock:
            return self._wake.wait_for(lambda: done() or self._closing, timeout)

    def close(self) -> None:
        """Ends the thread; a request in training starts again when the folder is opened again."""
        with self._lock:
            self._closing = True
            self._wake.notify_all()
        self._claim.close()

    # ---- the thread

    def _work(self) -> None:
        while True:
            with self._lock:
                self._wake.wait_for(lambda: self._queue or self._closing)
                if self._closing:
                    return
                entry = self._entries[self._queue.popleft()]
                if entry.state != WAITING:
                    continue
                entry.state = TRAINING
                self._save(entry)
            try:
                self._make(entry)
            except Exception as error:  # of one request; the next may succeed
                if self._closing:
                    return
                message = f"{type(error).__name__}: {error}"
                if not isinstance(error, ValueError):
                    traceback.print_exc()
                with self._lock:
                    if entry.state == TRAINING:
                        entry.state, entry.error = FAILED, message
                        self._audit.add("server", "failed", entry, error=message)
                        self._save(entry)
            with self._lock:
                self._wake.notify_all()

    def _make(self, entry: Entry) -> None:
        assert self._maker is not None
        request_folder = self.folder / entry.id
        rows = parse_records((request_folder / "rows.jsonl").read_bytes(), f"request {entry.id}")
        start = time.monotonic()
        head, sets = self._maker.make(rows, request_folder / "store", tuple(entry.names))
        check = self._maker.check(head, rows, sets)
        seconds = time.monotonic() - start
        with self._lock:
            if entry.state != TRAINING or self._closing:  # revoked meanwhile
                return
            save_head(request_folder / "head", head)
            write_card(request_folder / "head", head, request=entry.name or entry.id)
            entry.check = dataclasses.asdict(check)
            entry.seconds = seconds
            entry.head_digest = _digest_weights(request_folder / "head")
            entry.state = ACTIVE if check.passed else HELD
            self._heads.install(entry.id, head, check.passed)
            action = "turned on" if check.passed else "held: the check failed"
            self._audit.add("server", action, entry)
            self._save(entry)
            shutil.rmtree(request_folder / "store", ignore_errors=True)
            if entry.delete_rows:
                (request_folder / "rows.jsonl").unlink(missing_ok=True)
        self._report(f"request {entry.id} ({entry.name}): {entry.state} after {seconds:.0f} s")

    # ---- the folder

    def _save(self, entry: Entry) -> None:
        checked.write_json(self.folder / entry.id / "request.json", dataclasses.asdict(entry))

    def _delete_contents(self, entry: Entry) -> None:
        request_folder = self.folder / entry.id
        for name in ("head", "store"):
            shutil.rmtree(request_folder / name, ignore_errors=True)
        (request_folder / "rows.jsonl").unlink(missing_ok=True)

    def _describe(self, entry: Entry) -> dict[str, object]:
        return {"object": "forget_request", **dataclasses.asdict(entry)}


def _digest_weights(folder: pathlib.Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
