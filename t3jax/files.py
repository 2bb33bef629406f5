"""Writing files so that a partial one is never taken for a whole one."""

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a temporary path that takes the place of `path` once it is whole and on the disk.

    If the block fails, or the disk is full, what stood at `path` stays as it was and the temporary
    file is removed.

    Args:
        path: The file to write or replace.

    Yields:
        The path to write to, in the same folder.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Like `replacing`, for a folder: all of its files appear together or not at all.

    A folder that a kill left set aside, just before the new one stood, comes back first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{path.name}.*.old"):
        if path.exists():
            shutil.rmtree(left)
        else:
            os.replace(left, path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb") as opened:
                    os.fsync(opened.fileno())
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def slug(text: str) -> str:
    """Text as part of a file's name: what is neither letter nor digit becomes a dash."""
    return "".join(c if c.isalnum() else "-" for c in text)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes indented JSON, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
