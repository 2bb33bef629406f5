"""Rows from files and folders, and every error with its file and line."""

import json

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
        ('{"text": "a"}\n\n{"text": "b"\n', r"rows\.json:3: broken JSON"),
        ('[{"text": "a"},\n {"text": "b"},\n {"text" "c"}]', r"rows\.json:3: broken JSON"),
        ('{\n "text": "a"\n}', r"rows\.json:1: broken JSON"),
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
