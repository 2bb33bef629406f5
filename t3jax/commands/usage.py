"""The text of `--help`: fields with comments and defaults, read from the source.

Comments come from the docstrings of the dataclasses, defaults from the dataclasses or from
`configs/default.py`. Nothing is imported, since that takes seconds.
"""

import ast
import functools
import pathlib
import re
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).parent.parent
_WIDTH = 100


class Field(NamedTuple):
    """A field of a dataclass in its source."""

    default: str
    comment: str
    section: ast.ClassDef | None = None
    file: pathlib.Path = ROOT
    prefix: str = ""
    without: tuple[str, ...] = ()


def overview(names: Iterable[str]) -> str:
    """The commands, a line each."""
    lines = [f"  {name:12}{document(name).splitlines()[0]}" for name in names]
    return "\n".join(["usage: t3jax COMMAND [--FIELD=VALUE ...]", "", *lines])


def document(name: str) -> str:
    """The docstring of a command."""
    return ast.get_docstring(_parse(ROOT / "commands" / f"{name}.py")) or ""


def describe(name: str, program: str, fields: Iterable[str]) -> str:
    """The help of a command: its docstring, and the fields that it reads by section."""
    lines = [
        f"usage: {program} [--config=NAME] [--FIELD=VALUE ...]",
        "",
        document(name),
        "",
        "A field is given as --FIELD=VALUE or --config.FIELD=VALUE; None unsets it. --config takes",
        "another recipe than configs/default.py, whose values follow. A relative path starts at",
        "the working folder.",
        "",
    ]
    top = _fields(*_find("Settings", ROOT / "settings.py"))
    changed, before = _changed_defaults(), ""
    for field in fields:
        section, _, selected = field.partition(".")
        known = top[section]
        if known.section is None:
            lines += _entry(section, known, changed)
            continue
        if section != before:
            lines += ["", *textwrap.wrap(f"{section}: {known.comment}", _WIDTH)]
        before = section
        for inner, inner_field in _fields(known.section, known.file).items():
            shown = inner.removeprefix(known.prefix)
            if inner not in known.without and selected in ("", shown):
                lines += _entry(f"{section}.{shown}", inner_field, changed)
    return "\n".join(lines)


def _entry(name: str, field: Field, changed: dict[str, str]) -> Iterator[str]:
    yield f"  --{name}={changed.get(name, field.default)}"
    yield from textwrap.wrap(
        field.comment, _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6
    )


@functools.cache
def _parse(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _find(name: str, path: pathlib.Path) -> tuple[Any, pathlib.Path]:
    """The class or value that a module calls `name`, and the file that defines it."""
    for node in _parse(path).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node, path
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return node.value, path
        if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
            module = ROOT.parent.joinpath(*(node.module or "").split("."))
            file = module / "__init__.py" if module.is_dir() else module.with_suffix(".py")
            return _find(name, file) if file.is_file() else (None, path)
    return None, path


def _fields(node: ast.ClassDef, path: pathlib.Path) -> dict[str, Field]:
    """The fields of a dataclass, those of its bases first."""
    fields: dict[str, Field] = {}
    for base in reversed(node.bases):
        fields |= _fields(*_find(ast.unparse(base), path))
    text = (ast.get_docstring(node) or "").partition("Attributes:\n")[2]
    comments = {
        name: " ".join(comment.split())
        for name, comment in re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", text, re.MULTILINE)
    }
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign):
            name = ast.unparse(statement.target)
            fields[name] = _field(statement, path, comments.get(name, ""))
    return fields


def _field(node: ast.AnnAssign, path: pathlib.Path, comment: str) -> Field:
    value: Any = node.value
    if isinstance(value, ast.Call):
        section, file = _find(ast.unparse(node.annotation), path)
        if not isinstance(section, ast.ClassDef):
            return Field("{}", comment)
        arguments = list(zip(("prefix", "without"), value.args[1:], strict=False))
        arguments += [(str(keyword.arg), keyword.value) for keyword in value.keywords]
        options = {name: ast.literal_eval(argument) for name, argument in arguments}
        return Field("", comment, section, file, **options)
    if isinstance(value, ast.Name):
        value = _find(value.id, path)[0]
    return Field("" if value is None else ast.unparse(value), comment)


def _changed_defaults() -> dict[str, str]:
    """The values that `configs/default.py` assigns, by field."""
    return {
        ast.unparse(node.targets[0]).removeprefix("config."): ast.unparse(node.value)
        for node in ast.walk(_parse(ROOT / "configs" / "default.py"))
        if isinstance(node, ast.Assign)
    }
