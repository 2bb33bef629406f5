"""The audit log of requests to forget: who did what, and when, in an append-only file."""

import json
import os
import pathlib

from t3jax import files
from t3jax.serving.entry import Entry, now


class AuditLog:
    """A file of JSON lines. It keeps digests, not rows."""

    def __init__(self, path: pathlib.Path):
        """Repairs the last line of a server that was killed while it wrote."""
        self.path = path
        if not path.exists():
            return
        content = path.read_bytes()
        if content and not content.endswith(b"\n"):
            end = content.rfind(b"\n") + 1
            rest = content[end:].decode(errors="replace")
            line = {"when": now(), "who": "server", "what": "a line was cut short", "cut": rest}
            with files.replacing(path) as temporary:
                temporary.write_bytes(content[:end] + (json.dumps(line) + "\n").encode())

    def add(self, who: str, what: str, entry: Entry, **more: object) -> None:
        """Writes a line; it is on the disk before the method returns."""
        line = {
            "when": now(),
            "who": who,
            "what": what,
            "request": entry.id,
            "name": entry.name,
            "rows_digest": entry.rows_digest,
            "head_digest": entry.head_digest,
            **more,
        }
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(descriptor, (json.dumps(line, ensure_ascii=False) + "\n").encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def read(self) -> list[dict[str, object]]:
        """All lines, the oldest first."""
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
