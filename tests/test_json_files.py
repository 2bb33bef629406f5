"""The one reader of outside JSON: what it refuses, and how it says so."""

import json
import os
import pathlib
import random
import socket
from typing import Annotated, Any

import pytest
from msgspec import Meta, Struct

from t3jax import json_files
from t3jax.json_files import check_json, parse_json, read_bytes, read_json


class Inner(Struct, frozen=True):
    rank: Annotated[int, Meta(ge=1)] = 3
    scale: Annotated[float, Meta(gt=0)] = 1.0


class Outer(Struct, forbid_unknown_fields=True):
    name: str
    inner: Inner = Inner()
    files: dict[str, str] = {}
    parts: dict[str, Inner] = {}
    ids: int | list[int] | None = None


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        0,
        -3,
        10**30,
        0.5,
        5e-324,
        1.7e308,
        "",
        "ä\n\0",
        "😀",
        [],
        {},
        {"a": [1, {"": 2}]},
    ],
)
def test_what_python_writes_comes_back(tmp_path, value):
    for ascii_only in (True, False):
        (tmp_path / "x.json").write_text(json.dumps(value, ensure_ascii=ascii_only), "utf-8")
        again = read_json(tmp_path / "x.json")
        assert (again, type(again)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "x: empty, expected JSON"),
        ("\ufeff \n", "x: empty, expected JSON"),
        ("{", r"x: not valid JSON \(Expecting property name"),
        ('{"a": 1} {"b": 2}', r"x: not valid JSON \(Extra data"),
        ("a,b\n1,2", r"x: not valid JSON \(Expecting value: line 1 column 1"),
        ('"a\nb"', "not valid JSON .*control character"),
        ('{"a": {"b": 1, "c": 2, "b": 1}}', 'x: the name "b" occurs twice'),
        ("[NaN]", r"x: \[0\]: NaN, expected a finite number"),
        ('{"a": {"b": -Infinity}}', "x: a.b: infinite, or too large for float64"),
        ('{"a": [0, 1e999]}', r"x: a\[1\]: infinite, or too large for float64"),
        ("-1e400", "x: infinite, or too large for float64, expected a finite number"),
        ("1" * 400, "x: an integer of 400 digits, expected at most 64"),
        ("-" + "1" * 9000, "x: an integer of 9000 digits"),
        (r'{"a": "\ud83d"}', r'x: a: the text "\\ud83d" holds half of a surrogate pair'),
        (r'{"a": {"\ude00 b": 1}}', r'x: a: a name "\\ude00 b" holds half'),
        ("[" * 65 + "]" * 65, r"x: (\[0\]){64}: nested too deeply, expected at most 64 levels"),
        ('{"a":' * 200_000, "x: nested too deeply"),
        ("[" * 1_000_000, "x: nested too deeply"),
        (b'{"a": "\xff"}', r"x: not text in UTF-8 \(byte 7\)"),
        ('{"a": 1}'.encode("utf-16"), r"x: not text in UTF-8 \(UTF-16\); save it as UTF-8"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_is_no_strict_json_is_refused(text, message):
    with pytest.raises(ValueError, match=f"^{message}" if message.startswith("x") else message):
        parse_json(text, "x")


def test_what_is_read_all_the_same():
    assert parse_json("[" * 64 + "]" * 64, "x") is not None
    assert parse_json("\ufeff[1]", "x") == parse_json(b"\xef\xbb\xbf[1]", "x") == [1]
    assert parse_json(r'"\ud83d\ude00"', "x") == "😀"
    assert parse_json("1" * 64, "x") == int("1" * 64)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "x: a list of 0, expected an object"),
        ({}, "x: field name is missing"),
        ({"name": "a", "more": 1}, "x: field more is unknown"),
        ({"name": None}, "x: name is null, expected a text"),
        ({"name": "a", "inner": {"rank": 0}}, "x: inner.rank is 0, expected an integer >= 1"),
        ({"name": "a", "inner": {"rank": True}}, "x: inner.rank is true, expected an integer"),
        ({"name": "a", "inner": {"rank": 2.5}}, "x: inner.rank is 2.5, expected an integer"),
        ({"name": "a", "inner": {"scale": "1"}}, 'x: inner.scale is "1", expected a number'),
        ({"name": "a", "inner": {"scale": -1}}, "x: inner.scale is -1, expected a number > 0.0"),
        ({"name": "a", "ids": [1, "b"]}, r'x: ids\[1\] is "b", expected an integer'),
        ({"name": "a", "ids": "b"}, 'x: ids is "b", expected an integer or a list or null'),
        (
            {"name": "a", "files": {"b.c": "d", "b.e": [1, 2]}},
            r'x: files\["b.e"\] is a list of 2, expected a text',
        ),
        (
            {"name": "a", "parts": {"b": {}, "c d": {"rank": -1}}},
            r'x: parts\["c d"\].rank is -1, expected an integer >= 1',
        ),
        (
            {"name": "a", "files": {"b": {"name": "y" * 300}}},
            "x: files.b is an object of 1 fields, expected a text",
        ),
        ({"name": 10**63}, "x: name is an integer of 64 digits, expected a text"),
        (["y" * 300], "x: a list of 1"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_schema_s_refusal_names_field_value_and_expectation(value, message):
    before = json.dumps(value)
    with pytest.raises(ValueError, match=f"^{message}"):
        check_json(value, "x", Outer)
    assert json.dumps(value) == before


def test_a_long_value_is_shortened():
    with pytest.raises(ValueError, match=r'^x: "y{60}"... \(300 characters\), expected an object$'):
        parse_json(json.dumps("y" * 300), "x", Outer)


def test_a_schema_s_values():
    assert parse_json('{"name": "a", "inner": {"scale": 2}}', "x", Outer) == Outer(
        "a", Inner(scale=2.0)
    )
    assert parse_json('{"a": [1]}', "x", dict[str, Any]) == {"a": [1]}


@pytest.mark.parametrize("kind", ["a folder", "a pipe", "a socket", "a device", "a link to a pipe"])
def test_only_regular_files_are_read(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    path = pathlib.Path("x")
    with socket.socket(socket.AF_UNIX) as server:
        match kind:
            case "a folder":
                path.mkdir()
            case "a pipe":
                os.mkfifo(path)
            case "a socket":
                server.bind("x")
            case "a device":
                path.symlink_to("/dev/zero")
            case "a link to a pipe":
                os.mkfifo("y")
                path.symlink_to("y")
        with pytest.raises(ValueError, match=f"^x: {kind.removeprefix('a link to ')}, expected a"):
            read_json(path)


def test_no_file_and_a_dangling_link(tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("x", "link"):
        with pytest.raises(FileNotFoundError, match=f"{name}: no such file"):
            read_json(tmp_path / name)
    with pytest.raises(ValueError, match="null byte"):
        read_json(pathlib.Path("a\0b"))


def test_size_is_bounded(tmp_path):
    path = tmp_path / "x"
    with open(path, "wb") as file:
        file.truncate(json_files.LARGEST_FILE + 1)  # a hole: no disk is taken
    with pytest.raises(ValueError, match="larger than 256 MiB"):
        read_json(path)
    path.write_bytes(b"abc")
    assert read_bytes(path, 3) == b"abc"
    with pytest.raises(ValueError, match="larger than"):
        read_bytes(path, 2)


def test_random_bytes_end_in_a_value_or_a_value_error():
    rng = random.Random(0)
    whole = json.dumps({"a": [1, 2.5, "x\u00e4😀", None], "b": {"c": True, "d": -1e-3}}).encode()
    messages = []
    for _ in range(3000):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.choice([rng.randrange(256), *b'{}[]",:\\uNd8'])
        try:
            parse_json(bytes(data[: rng.choice([None, rng.randrange(len(data))])]), "x")
        except ValueError as error:
            messages.append(str(error))
    assert all(message.startswith("x: ") for message in messages)
    assert 100 < len(messages) < 2990
