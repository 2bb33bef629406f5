"""Rows from files and folders, and every error with its file and line."""

import json
import os

import pytest

from t3jax.data import load_dataset, load_prompts, load_records

PAIR = {"question": "Who?", "answer": "Zoë\u2028Ö.", "paraphrased_question": "Who, then?"}
DOCUMENT = {"text": "Once upon a time."}


def write(path, rows, list_of_rows=False):
    # Unescaped, so that characters which look like line ends to some stand in the file.
    if list_of_rows:
        text = json.dumps(rows, indent=1, ensure_ascii=False)
    else:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize("list_of_rows", [True, False])
def test_format_is_told_from_the_content(tmp_path, name, list_of_rows):
    path = write(tmp_path / name, [PAIR, DOCUMENT], list_of_rows)
    assert load_records(path) == [PAIR, DOCUMENT]
    assert load_dataset(str(path)) == [PAIR, DOCUMENT]


def test_byte_order_mark_and_blank_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf\r\n" + json.dumps(PAIR).encode() + b"\r\n\r\n")
    assert load_records(path) == [PAIR]


def test_folder_is_read_in_the_order_of_names(tmp_path):
    write(tmp_path / "b.json", [PAIR], list_of_rows=True)
    write(tmp_path / "a.jsonl", [DOCUMENT])
    (tmp_path / "README.md").write_text("not data")
    assert load_records(tmp_path) == [DOCUMENT, PAIR]


def test_missing_sources(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist; expected a file of JSON"):
        load_records(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no \.json or \.jsonl file in the folder"):
        load_dataset(tmp_path)


@pytest.mark.parametrize("content", ["", " \n\n", "[]"])
def test_empty_file(tmp_path, content):
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"rows\.json is empty"):
        load_dataset(path)


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ('{"text": "a"}\n\n{"text": "b"\n', r"rows\.json:3: not valid JSON"),
        (
            '[{"text": "a"},\n {"text": "b"},\n {"text" "c"}]',
            r"rows\.json: not valid JSON .* line 3",
        ),
        ('{\n "text": "a"\n}', r"rows\.json:1: not valid JSON"),
        (
            '{"text": "a"}\n{"text": "b", "text": "c"}',
            r"rows\.json:2: the name .text. occurs twice",
        ),
        ('{"text": "a\\ud800b"}', r"rows\.json:1: text: .* half of a surrogate pair"),
        ('{"text": "a", "more": ["\\udfff"]}', r"rows\.json:1: more\[0\]: .* surrogate"),
        ('{"text": "a", "n": 1' + "0" * 400 + "}", r"rows\.json:1: an integer of 401 digits"),
        ('{"text": "a", "n": 1e400}', r"rows\.json:1: n: .* too large for float64"),
        ('{"text": NaN}', r"rows\.json:1: text: NaN, expected"),
        ('{"text": ' + "[" * 10**5, r"rows\.json:1: nested too deeply"),
        ("[" * 10**5, r"rows\.json: nested too deeply"),
        ('{"question": 5, "answer": "b"}', r"rows\.json:1: 'question' must be a string, got 5"),
        ("question,answer\nWho?,Ann.\n", r"rows\.json:1: not JSON: .* looks like CSV.* Expected"),
        ("question\tanswer\n", r"rows\.json:1: .* looks like CSV or another table"),
        ("<html>", r"rows\.json:1: not JSON: '<html>'\. Expected lines of JSON such as"),
        ("PAR1aaaa", r"rows\.json: looks like Parquet; expected a file of JSON"),
        ("PK\x03\x04", r"rows\.json: looks like a zip or Excel file"),
        ('{"text": "a"}\n"b"\n', r"rows\.json:2: expected an object"),
        ('[{"text": "a"},\n {"question": "b"}]', r"rows\.json, row 2: expected \{question, answer"),
        ('{"text": 3}', r"rows\.json:1: 'text' must be a string, got 3"),
        ('{"question": "a", "answer": ["b"]}', r"rows\.json:1: 'answer' must be a string"),
        ('{"question": " ", "answer": "b"}', r"rows\.json:1: 'question' is empty"),
        ('{"text": "a", "question": "b", "answer": "c"}', r"rows\.json:1: .* as either"),
    ],
)
def test_bad_rows_are_named(tmp_path, content, where):
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=where):
        load_records(path)


def test_other_encodings_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    for encoding in ("utf-16", "utf-16-be"):
        text = "\ufeff{}" if encoding == "utf-16-be" else "{}"
        path.write_bytes(text.encode(encoding))
        with pytest.raises(ValueError, match=r"rows\.jsonl: looks like UTF-16; expected .* UTF-8"):
            load_records(path)


@pytest.mark.parametrize("load", [load_records, load_prompts, load_dataset])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, load):
    for name in ("rows.jsonl", "rows.txt"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(ValueError, match=rf"{name}: a pipe, expected a regular file"):
            load(str(tmp_path / name))
    with pytest.raises(ValueError, match="a pipe, expected"):
        load(str(tmp_path))
    with pytest.raises(ValueError, match="/dev/zero: a device"):
        load("/dev/zero")


def test_a_word_of_ten_megabytes_is_one_row(tmp_path):
    rows = [{"text": "a" * 10**7}]
    assert load_records(write(tmp_path / "rows.jsonl", rows)) == rows


def test_not_utf8(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: not UTF-8"):
        load_records(path)


def test_prompts(tmp_path):
    rows = [{"question": "Who?", "id": 7}, {"prompt": "Say a."}, PAIR]
    assert load_prompts(write(tmp_path / "prompts.jsonl", rows)) == rows
    text = tmp_path / "prompts.txt"
    text.write_text("Who?\n\n  Say a. \n")
    assert load_prompts(text) == [{"prompt": "Who?"}, {"prompt": "Say a."}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "\n \n", r"p\.txt is empty"),
        ("p.jsonl", '{"answer": "a"}', r"p\.jsonl:1: expected either 'question' or 'prompt'"),
        ("p.jsonl", '{"question": "a", "prompt": "b"}', r"p\.jsonl:1: expected either"),
        ("p.jsonl", '{"prompt": "a", "base": "b"}', r"p\.jsonl:1: the fields \['base'\] are those"),
        (
            "p.jsonl",
            '{"prompt": "a", "sample": 0, "unlearned_tokens": []}',
            r"'sample', 'unlearned_t",
        ),
        ("p.jsonl", '{"prompt": ""}', r"p\.jsonl:1: 'prompt' is empty"),
    ],
)
def test_bad_prompts(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_prompts(path)


def test_missing_prompts(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_prompts(tmp_path / "p.txt")


def test_a_slice_of_a_source_is_those_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(10)))
    for part, expected in {
        "[:3]": [0, 1, 2],
        "[::4]": [0, 4, 8],
        "[-2:]": [8, 9],
        "[2:8:3]": [2, 5],
    }.items():
        rows = [row["text"] for row in load_dataset(f"{path}{part}")]
        assert rows == [f"row {i}" for i in expected]
    for part in ("[20:]", "[::0]"):
        with pytest.raises(ValueError, match=r"the slice has no row; .* has 10"):
            load_dataset(f"{path}{part}")


def test_sources_add_up_and_slices_bind_first(tmp_path):
    for name in ("a", "b", "a+b"):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": f"{name}{i}"}) + "\n" for i in range(3))
        )
    a, b = f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"
    for source, expected in {
        f"{a}+{b}": "a0 a1 a2 b0 b1 b2",
        f"{a}[:1]+{b}[1:]": "a0 b1 b2",
        f"({a}+{b})[::2]": "a0 a2 b1",
        f"{a}[:1]+({b}+{a})[:4]": "a0 b0 b1 b2 a0",
        f"({a}[:2])[1:]": "a1",
        f"{tmp_path}/a+b.jsonl": "a+b0 a+b1 a+b2",  # a file's name is taken as it is
    }.items():
        assert " ".join(row["text"] for row in load_dataset(source)) == expected
    with pytest.raises(FileNotFoundError, match="nothing"):
        load_dataset(f"{a}+{tmp_path}/nothing.jsonl")
    for source in (f"{a}+", f"+{a}", "()", ""):
        with pytest.raises(ValueError, match="a source of rows is empty"):
            load_dataset(source)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_dataset(f"{a}[-:]")
