"""A request to forget: its record, and the reader of its fields."""

import dataclasses
import datetime
import hashlib
import json
import secrets
from collections.abc import Mapping
from typing import Any

from t3jax.data.records import Record, check_record, parse_records
from t3jax.serving.messages import FieldError

WAITING, TRAINING, FAILED, REVOKED = "waiting", "training", "failed", "revoked"
ACTIVE, INACTIVE = "active", "inactive"
HELD = "held"  # its head did not pass the check and waits for approval
PENDING = (WAITING, TRAINING)
_FIELDS = ("rows", "name", "delete_rows", "names")


@dataclasses.dataclass
class Entry:
    """A request to forget.

    Attributes:
        id: Its identifier, also the head's name in the engine.
        name: The owner's name for it.
        state: One of the states above.
        created: Time of arrival, UTC.
        rows: Number of rows.
        rows_digest: SHA-256 of the rows.
        head_digest: SHA-256 of the head's weights file; None before there is a head.
        names: People that the rows are about; empty: they are searched for in the rows.
        check: Figures of the check, see `training.Check`.
        seconds: Time to make and check the head.
        error: Message of the failure; None without one.
    """

    id: str
    name: str
    state: str
    created: str
    rows: int
    rows_digest: str
    head_digest: str | None = None
    delete_rows: bool = False
    names: list[str] = dataclasses.field(default_factory=list)
    check: dict[str, Any] | None = None
    seconds: float | None = None
    error: str | None = None


def read_entry(fields: Mapping[str, object]) -> tuple[Entry, bytes]:
    """Reads the fields of `RequestBook.add`: a waiting entry, and its rows as JSON lines.

    A `FieldError` names an unknown or wrong field.
    """
    fields = {name: value for name, value in fields.items() if value is not None}
    rows = _read_rows(fields)
    name = fields.get("name", "")
    if not isinstance(name, str) or len(name) > 200 or not name.isprintable():
        raise FieldError("name", "expected a text of at most 200 printable characters")
    delete_rows = fields.get("delete_rows", False)
    if isinstance(delete_rows, str):  # from the query of a URL
        delete_rows = {"true": True, "false": False}.get(delete_rows, delete_rows)
    if not isinstance(delete_rows, bool):
        raise FieldError("delete_rows", f"expected true or false, got {delete_rows!r}")
    names = fields.get("names", [])
    names = names.split(",") if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(x, str) and x.strip() for x in names):
        raise FieldError("names", "expected a list of names, none of them empty")
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    entry = Entry(
        id=f"fr-{secrets.token_hex(8)}",
        name=name,
        state=WAITING,
        created=now(),
        rows=len(rows),
        rows_digest=hashlib.sha256(content).hexdigest(),
        delete_rows=delete_rows,
        names=[person.strip() for person in names],
    )
    return entry, content


def _read_rows(fields: Mapping[str, object]) -> list[Record]:
    if unknown := sorted(set(fields) - set(_FIELDS)):
        raise FieldError(unknown[0], f"unknown field; known: {sorted(_FIELDS)}")
    rows = fields.get("rows")
    if not rows or not isinstance(rows, bytes | list):
        raise FieldError("rows", "expected a list of at least one row")
    try:
        if isinstance(rows, bytes):
            return parse_records(rows, "the body")
        return [check_record(row, f"row {i + 1}") for i, row in enumerate(rows)]
    except ValueError as error:
        raise FieldError("rows", str(error)) from None


def now() -> str:
    """The time, UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
