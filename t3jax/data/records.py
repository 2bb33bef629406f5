"""Rows of text from files: question-answer pairs, plain documents, prompts.

A source is a file of JSON (one list of objects) or of JSON-lines (one object a line), or a folder
of such files. The content of a file decides its format, not its name. Every row is checked when
it is read, and an error names the file and the line. Nothing here knows about tokens, and no row
is ever shortened, skipped or repaired. Only regular files are read: a pipe would block.
"""

import os
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from t3jax import json_files

Record = dict[str, Any]
Row = TypeVar("Row")

_ACCEPTED = (
    "expected a file of JSON (a list of objects) or JSON-lines (one object a line), "
    "or a folder of .json and .jsonl files"
)
_LARGEST_FILE = 1 << 33  # bytes
# The first bytes of formats that are given by mistake.
_FORMATS = {
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "a zip or Excel file",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
# The fields that `sample.py` adds to a row.
_ANSWER_FIELDS = re.compile(
    r"sample|(base|unlearned)(_tokens|_base_logprobs|_guided_logprobs|_base_perplexity)?"
)


def check_record(row: object, where: str) -> Record:
    """Checks that a row is a question-answer pair or a plain document, and returns it.

    It has non-empty strings under "question" and "answer", or under "text". Other fields are
    allowed; `where` names the row in an error.
    """
    row = _check_object(row, where)
    if "text" in row and ("question" in row or "answer" in row):
        raise ValueError(
            f"{where}: the row has 'text' as well as a question or an answer, so it could be read "
            "as either; keep {question, answer} or {text}"
        )
    if "text" in row:
        _check_text(row, "text", where)
    elif "question" in row and "answer" in row:
        _check_text(row, "question", where)
        _check_text(row, "answer", where)
        _check_turns(row.get("before", []), where)
    else:
        raise ValueError(
            f"{where}: expected {{question, answer}} or {{text}}, got the fields {sorted(row)}"
        )
    return row


def parse_records(content: bytes, name: str) -> list[Record]:
    """Reads question-answer pairs or plain documents from the bytes of one file, in its order."""
    return _parse(content, name, check_record)


def load_records(source: str | os.PathLike[str]) -> list[Record]:
    """Loads question-answer pairs or plain documents; other fields stay as they are.

    The source is a file of JSON or JSON-lines, or a folder of .json and .jsonl files, which are
    read in the order of their names.

    Raises:
        FileNotFoundError: the source, or a file to read in the folder, does not exist.
        ValueError: broken JSON, a wrong row, an empty file, or a pipe or a device; names the file
            and the line.
    """
    return [
        row
        for file in _list_files(pathlib.Path(source))
        for row in parse_records(_read(file), str(file))
    ]


def load_prompts(path: str | os.PathLike[str]) -> list[Record]:
    """Loads prompts to sample answers to.

    The path is a source as in `load_records` with rows that have "question" or "prompt", an answer
    or none; or a .txt file with one prompt a line. Such a line becomes {"prompt": line}; blank
    lines are left out.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: broken JSON, a wrong row, a field that `sample.py` would overwrite, an empty
            file, or a pipe or a device; names the file and the line.
    """
    path = pathlib.Path(path)
    if path.suffix == ".txt" and path.exists():
        lines = _decode(_read(path), str(path)).split("\n")
        prompts: list[Record] = [{"prompt": line.strip()} for line in lines if line.strip()]
        if not prompts:
            raise ValueError(f"{path} is empty: expected one prompt a line")
        return prompts
    return [
        row for file in _list_files(path) for row in _parse(_read(file), str(file), _check_prompt)
    ]


def evenly_spread(rows: Sequence[Row], count: int) -> list[Row]:
    """At most `count` rows, evenly spread over all of them, in their order."""
    count = min(count, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def _list_files(source: pathlib.Path) -> list[pathlib.Path]:
    if source.is_dir():
        files = sorted(f for f in source.iterdir() if f.suffix in (".json", ".jsonl"))
        if not files:
            raise FileNotFoundError(f"no .json or .jsonl file in the folder {source}; {_ACCEPTED}")
        return files
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist; {_ACCEPTED}")
    return [source]


def _read(file: pathlib.Path) -> bytes:
    return json_files.read_bytes(file, _LARGEST_FILE)


def _parse(content: bytes, name: str, check: Callable[[object, str], Record]) -> list[Record]:
    text = _decode(content, name)
    if text.lstrip().startswith("["):
        rows = json_files.parse_json(text, name)
        located = [(f"{name}, row {number}", row) for number, row in enumerate(rows, start=1)]
    else:
        # Not splitlines: it also cuts at characters that JSON allows unescaped inside a string.
        lines = enumerate(text.split("\n"), start=1)
        located = [
            (f"{name}:{number}", _parse_line(line, f"{name}:{number}"))
            for number, line in lines
            if line.strip()
        ]
    if not located:
        raise ValueError(f"{name} is empty: it holds no row; {_ACCEPTED}")
    return [check(row, where) for where, row in located]


def _parse_line(line: str, where: str) -> object:
    try:
        return json_files.parse_json(line, where)
    except ValueError as error:
        if line.lstrip()[0] not in '{["':
            separator = next((mark for mark in ",\t;" if mark in line), None)
            table = "" if separator is None else "; it looks like CSV or another table"
            raise ValueError(
                f"{where}: not JSON: {line.strip()[:60]!r}{table}. Expected lines of JSON such as "
                '{"question": "...", "answer": "..."} or {"text": "..."}'
            ) from None
        raise ValueError(f"{error}; {_ACCEPTED}") from None


def _decode(content: bytes, name: str) -> str:
    for start, kind in _FORMATS.items():
        if content.startswith(start):
            raise ValueError(f"{name}: looks like {kind}; {_ACCEPTED}, in UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{name}:{line}: not UTF-8 text ({error.reason}); {_ACCEPTED}") from error


def _check_prompt(row: object, where: str) -> Record:
    row = _check_object(row, where)
    if ("question" in row) == ("prompt" in row):
        raise ValueError(
            f"{where}: expected either 'question' or 'prompt', got the fields {sorted(row)}"
        )
    _check_text(row, "question" if "question" in row else "prompt", where)
    if taken := [field for field in row if _ANSWER_FIELDS.fullmatch(field)]:
        raise ValueError(
            f"{where}: the fields {taken} are those that answers are written to; rename or remove "
            "them in the prompt file"
        )
    return row


def _check_object(row: object, where: str) -> Record:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object with named fields, got {row!r:.80}")
    return row


def _check_turns(turns: object, where: str) -> None:
    roles = ("system", "user", "assistant")
    if not isinstance(turns, list) or not all(
        isinstance(turn, dict) and turn.get("role") in roles for turn in turns
    ):
        raise ValueError(
            f"{where}: 'before' holds the turns before the question, a list of objects with 'role' "
            f"({', '.join(roles)}) and 'content', got {turns!r:.80}"
        )
    for number, turn in enumerate(turns, start=1):
        _check_text({"content": turn.get("content")}, "content", f"{where}, turn {number} before")


def _check_text(row: Record, field: str, where: str) -> None:
    value = row[field]
    if not isinstance(value, str):
        raise ValueError(f"{where}: {field!r} must be a string, got {value!r:.80}")
    if not value.strip():
        raise ValueError(f"{where}: {field!r} is empty; fill it in or remove the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: {field!r} holds half of a surrogate pair at character {error.start}, "
            "expected whole characters"
        ) from None
