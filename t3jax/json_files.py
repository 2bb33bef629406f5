"""JSON from outside: one strict reader with one wording of errors.

Everything that RFC 8259 leaves open is refused: a name that occurs twice in an object, NaN and
Infinity, numbers that float64 cannot hold, lone surrogates, deep nesting. A schema is a type that
msgspec can check, usually a `msgspec.Struct` whose fields have ranges. JSON that this project has
written is read in the same way, since it may be damaged.
"""

import json
import math
import os
import pathlib
import re
import stat
from typing import Any, TypeVar, overload

import msgspec

T = TypeVar("T")

LARGEST_FILE = 1 << 28  # bytes; a log of the whole of TOFU takes 2 MB
DEEPEST = 64  # levels of objects and lists
LONGEST_INTEGER = 64  # digits; tokenizers hold int(1e30) for "no limit"
_LONGEST_SHOWN = 60  # characters of a value in an error
_TOO_DEEP = f"nested too deeply, expected at most {DEEPEST} levels"

_TYPES = {
    "int": "an integer",
    "float": "a number",
    "str": "a text",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}


@overload
def read_json(path: pathlib.Path) -> Any: ...
@overload
def read_json(path: pathlib.Path, schema: type[T]) -> T: ...
def read_json(path: pathlib.Path, schema: Any = None) -> Any:
    """Reads a JSON file: a regular file in UTF-8, with or without a byte order mark.

    The content has the type `schema`; None takes any JSON. A ValueError names the file, the field,
    its value and the expectation.
    """
    return parse_json(read_bytes(path), str(path), schema)


@overload
def parse_json(text: str | bytes, where: str) -> Any: ...
@overload
def parse_json(text: str | bytes, where: str, schema: type[T]) -> T: ...
def parse_json(text: str | bytes, where: str, schema: Any = None) -> Any:
    """Reads JSON from a text or from its bytes in UTF-8, as `read_json` does.

    Errors call it `where`, for example "rows.jsonl:3".
    """
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            fault = "UTF-16" if text[:2] in (b"\xff\xfe", b"\xfe\xff") else f"byte {error.start}"
            raise ValueError(f"{where}: not text in UTF-8 ({fault}); save it as UTF-8") from error
    text = text.removeprefix("\ufeff")
    if not text.strip():
        raise ValueError(f"{where}: empty, expected JSON")
    try:
        value = json.loads(text, object_pairs_hook=_refuse_duplicates, parse_int=_parse_int)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON ({error}); is it whole, and JSON?") from error
    except RecursionError:
        raise ValueError(f"{where}: {_TOO_DEEP}") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if schema is not None:
        return check_json(value, where, schema)
    _check_values(value, where)
    return value


@overload
def check_json(value: object, where: str, schema: type[T]) -> T: ...
@overload
def check_json(value: object, where: str, schema: Any) -> Any: ...
def check_json(value: object, where: str, schema: Any) -> Any:
    """Checks a value from JSON, or for JSON, against a schema, and returns it as the schema's type.

    A ValueError names the place `where`, the field, its value and the expectation.
    """
    _check_values(value, where)
    try:
        return msgspec.convert(value, schema)
    except msgspec.ValidationError as error:
        raise ValueError(f"{where}: {_explain(value, schema, str(error))}") from None


def read_bytes(path: pathlib.Path, largest: int = LARGEST_FILE) -> bytes:
    """Reads a regular file of bounded size; pipes and devices are refused, never waited for."""
    path = pathlib.Path(path)
    check_regular(path, largest)
    # Non-blocking: the file may have been replaced by a pipe since.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        _check_status(path, os.fstat(file.fileno()), largest)
        return file.read()


def check_regular(path: pathlib.Path, largest: int | None = None) -> None:
    """Checks that a path is a regular file, or a link to one, without opening it.

    A ValueError means anything else, or more than `largest` bytes; None allows any number.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except ValueError as error:  # a name with a zero byte
        raise ValueError(f"{path!r}: {error}") from None
    _check_status(path, status, largest)


def _check_status(path: pathlib.Path, status: os.stat_result, largest: int | None) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path}: {_kind_of_file(status.st_mode)}, expected a regular file")
    if largest is not None and status.st_size > largest:
        raise ValueError(f"{path}: larger than {largest / 2**20:.3g} MiB, the most that is read")


def show_json(value: object) -> str:
    """A value for an error, in JSON's notation and short."""
    match value:
        case dict():
            return f"an object of {len(value)} fields"
        case list():
            return f"a list of {len(value)}"
        case str() if len(value) > _LONGEST_SHOWN:
            return f"{json.dumps(value[:_LONGEST_SHOWN])}... ({len(value)} characters)"
        case int() if not isinstance(value, bool) and abs(value) >= 10**_LONGEST_SHOWN:
            return f"an integer of {len(str(abs(value)))} digits"
    return json.dumps(value)


def _refuse_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"the name {show_json(name)} occurs twice in one object")
            seen.add(name)
    return value


def _parse_int(digits: str) -> int:
    if len(digits.lstrip("-")) > LONGEST_INTEGER:
        raise ValueError(
            f"an integer of {len(digits.lstrip('-'))} digits, expected at most {LONGEST_INTEGER}"
        )
    return int(digits)


def _check_values(value: object, where: str) -> None:
    """Refuses deep nesting, numbers that became infinite, and lone surrogates."""
    # An explicit stack allows any depth; a trail is (the parent's trail, the name).
    stack: list[tuple[Any, int, Any]] = [(value, 0, None)]
    while stack:
        item, depth, trail = stack.pop()
        if isinstance(item, dict):
            for name, child in item.items():
                if _has_surrogates(name):
                    raise ValueError(f"{where}: {_explain_surrogates(trail, 'a name', name)}")
                stack.append((child, depth + 1, (trail, name)))
        elif isinstance(item, list):
            stack.extend((child, depth + 1, (trail, i)) for i, child in enumerate(item))
        elif isinstance(item, str):
            if _has_surrogates(item):
                raise ValueError(f"{where}: {_explain_surrogates(trail, 'the text', item)}")
            continue
        else:
            if isinstance(item, float) and not math.isfinite(item):
                fault = "NaN" if math.isnan(item) else "infinite, or too large for float64"
                raise ValueError(
                    f"{where}: {_prefix(_path(trail))}{fault}, expected a finite number"
                )
            continue
        if depth >= DEEPEST:
            raise ValueError(f"{where}: {_prefix(_path(trail))}{_TOO_DEEP}")


def _has_surrogates(text: str) -> bool:
    return not text.isascii() and re.search("[\ud800-\udfff]", text) is not None


def _explain_surrogates(trail: Any, kind: str, text: str) -> str:
    return (
        f"{_prefix(_path(trail))}{kind} {show_json(text)} holds half of a surrogate pair, expected "
        "whole characters"
    )


def _path(trail: Any) -> str:
    """A trail as a path, `guidance.sizes[3]`."""
    names: list[str | int] = []
    while trail is not None:
        trail, name = trail
        names.append(name)
    return _join(names[::-1])


def _join(names: list[str | int]) -> str:
    path = ""
    for name in names:
        if isinstance(name, int):
            path += f"[{name}]"
        elif re.fullmatch(r"[\w-]{1,60}", name):
            path += f".{name}" if path else name
        else:  # a tensor's name has dots
            path += f"[{show_json(name)}]"
    return path if len(path) <= 200 else f"{path[:100]}...{path[-100:]}"


def _prefix(path: str) -> str:
    return f"{path}: " if path else ""


def _explain(value: object, schema: Any, message: str) -> str:
    """Rewords msgspec's message: the field's name, its value and the expectation."""
    reason, _, place = message.partition(" - at `")
    names, located = _locate(value, schema, place.rstrip("`"))
    path = _join(names)
    if match := re.fullmatch(r"Object (.*) field `(.*)`", reason):
        kind = "is missing" if "missing" in match[1] else "is unknown"
        return f"field {_join([*names, match[2]])} {kind}"
    if match := re.fullmatch(r"Expected `([^`]*)`(?:, got .*| (.*))", reason):
        types = [_TYPES.get(name, name) for name in match[1].split(" | ")]
        expected = " or ".join(types) + (f" {match[2]}" if match[2] else "")
    elif reason.startswith("Invalid enum value"):
        expected = "one of the values that the field may have"
    else:
        expected = reason
    if not path:
        return f"{show_json(located)}, expected {expected}"
    return f"{path} is {show_json(located)}, expected {expected}"


def _locate(value: Any, schema: Any, place: str) -> tuple[list[str | int], Any]:
    """Follows msgspec's path, which has `[...]` for a value of a dict, to the value."""
    names: list[str | int] = []
    current, root = value, [value]
    parent: Any = root
    key: Any = 0
    for step in re.findall(r"\.([^.\[\]]+)|\[(\d+|\.\.\.)\]", place):
        if step[0]:
            name: str | int = step[0]
        elif step[1] != "...":
            name = int(step[1])
        elif isinstance(current, dict):
            name = _find_first_wrong(root, parent, key, current, schema)
        else:
            break
        try:
            child = current[name]
        except (KeyError, IndexError, TypeError):
            break
        names.append(name)
        # Containers on the path are copied, so that `_find_first_wrong` may change them.
        parent[key] = current = current.copy()
        parent, key, current = current, name, child
    return names, current


def _find_first_wrong(
    root: list[Any], parent: Any, key: Any, content: dict[str, Any], schema: Any
) -> str:
    """The first name of a dict whose value alone the schema refuses."""
    for name, child in content.items():
        parent[key] = {name: child}
        try:
            msgspec.convert(root[0], schema)
        except msgspec.ValidationError:
            return name
        finally:
            parent[key] = content
    return next(iter(content))


def _kind_of_file(mode: int) -> str:
    for test, name in (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    ):
        if test(mode):
            return name
    return "no regular file"
