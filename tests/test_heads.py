"""A head's card and the list of heads."""

import datetime
import errno
import json
import pathlib
import textwrap

import jax
import pytest
from huggingface_hub.repocard import metadata_load

import t3jax
from t3jax import heads, hosts
from t3jax.head import HeadConfig, init_head
from t3jax.head_card import DEFAULT_LIMITS, write_card
from t3jax.head_io import Head, save_head, save_reference_head

D, R, V = 6, 4, 16
DATE = datetime.date(2026, 2, 3)
RECORD = {
    "training": {"learning_rate": 0.01, "zero_output": True, "seed": 7},
    "tokens": {"retain": 4000, "forget": 300},
    "sequences": {"retain": 160, "forget": 20},
    "features": {"retain": ["c0ffee", "facade"], "forget": "decade"},
    "digests": {"retain": "beaded", "forget": "faced", "model": "deaf"},
}


def make_head(**fields) -> Head:
    config = HeadConfig(D, V, R)
    fields = {"model": "models/base", **fields}
    return Head(config, init_head(jax.random.key(0), config), 2.5, 0.56, **fields)


def carded(folder: pathlib.Path, head: Head | None = None, **options) -> str:
    """The card of a head that is saved to a folder."""
    save_head(folder, head or make_head())
    write_card(folder, head or make_head(), **{"date": DATE, **options})
    return (folder / "README.md").read_text()


def cells(card: str) -> list[list[str]]:
    """Rows of all tables of a card."""
    lines = [line for line in card.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_a_card_says_what_was_asked_trained_and_verified(tmp_path):
    card = carded(tmp_path, make_head(record=RECORD), request="case 12", verdict="passed: 0 leaks")
    rows = cells(card)
    for row in (
        ["request", "case 12"],
        ["date (UTC)", "2026-02-03"],
        ["verdict", "passed: 0 leaks"],
        ["model", "models/base"],
        ["digest of the model's weights", "deaf"],
        ["base temperature T", "2.5"],
        ["guidance scale s", "0.56"],
        ["forget", "20", "300", "faced", "decade"],
        ["retain", "160", "4000", "beaded", "c0ffee, facade"],
        ["rank", "4"],
        ["features", "mean"],
        ["activation", "identity"],
        ["learning rate", "0.01"],
        ["zero output", "yes"],
        ["seed", "7"],
    ):
        assert row in rows
    for limit in DEFAULT_LIMITS:
        assert f"\n- {limit}\n" in card
    assert "delete this folder" in card
    assert "not recorded" not in card
    assert "not verified" not in card


def test_a_card_says_what_is_not_known(tmp_path):
    card = carded(tmp_path, make_head(model=""), limits=["It is a test."])
    rows = cells(card)
    unknown = "not recorded"
    assert ["digest of the model's weights", unknown] in rows
    assert ["forget", *[unknown] * 4] in rows
    assert ["training", unknown] in rows
    assert ["verdict", "not verified"] in rows
    assert "## Limits\n\n- It is a test.\n\n" in card
    assert "base_model" not in metadata_load(tmp_path / "README.md")


@pytest.mark.parametrize(
    "text",
    [
        "the authors of case 12",
        'say "no": {a} [b] # c',
        "two\nlines\r\n---\n# and a rule",
        "忘记林晓梅 😀 \U000f0000",
        "\x1b[31m \x7f \x85 \u2028 \ufeff \u202e back\\slash",
        "",
    ],
)
def test_front_matter_is_read_by_the_hub_and_by_the_list(tmp_path, text):
    carded(tmp_path, request=text, verdict=text)
    data = metadata_load(tmp_path / "README.md")
    assert data == {
        "library_name": "t3jax",
        "base_model": "models/base",
        "tags": ["unlearning", "temper-then-tilt"],
        "request": text,
        "date": "2026-02-03",
        "verdict": text or "not verified",
    }
    card = heads._read_card(tmp_path / "README.md")
    assert {name: card[name] for name in ("request", "date", "verdict")} == {
        name: data[name] for name in ("request", "date", "verdict")
    }


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("*a* _b_ `c` ~~d~~ $e$", r"\*a\* \_b\_ \`c\` \~\~d\~\~ \$e\$"),
        ("[x](http://y) <script> &lt;", r"\[x\](http://y) \<script\> \&lt;"),
        ("a | b \\| c", r"a \| b \\\| c"),
        ("a\n# b\n\n- c", r"a \# b - c"),
        ("a\x1b[31m\u202eb", r"a \[31m b"),
    ],
)
def test_markdown_is_escaped(tmp_path, text, shown):
    card = carded(tmp_path, request=text, verdict=text, limits=[text])
    assert f"\n# A head that forgets: {shown}\n" in card
    assert f"\n| request | {shown} |\n" in card
    assert f"\n| verdict | {shown} |\n" in card
    assert f"\n- {shown}\n" in card


def test_an_item_begins_no_list_within(tmp_path):
    limits = ["- a", "+ b", "1. c", "12) d", "2.5 is T", "-"]
    card = carded(tmp_path, limits=limits)
    assert "\n- \\- a\n- \\+ b\n- 1\\. c\n- 12\\) d\n- 2\\.5 is T\n- \\-\n" in card


def test_a_name_that_is_no_text_is_written(tmp_path):
    card = carded(tmp_path, request="case \udc80")
    assert "| request | case ? |" in card
    assert heads._read_card(tmp_path / "README.md")["request"] == "case ?"


def test_the_lines_that_serve_the_head(tmp_path, monkeypatch):
    card = carded(tmp_path / "it's", make_head(model="models/'base'"))
    lines = card.split("```python\n")[1].split("```")[0]
    assert len(lines.splitlines()) == 3
    monkeypatch.setattr(t3jax, "load_lm", lambda name: name)
    monkeypatch.setattr(t3jax, "Sampler", lambda lm, head: lambda texts: (lm, head, texts))
    names: dict = {}
    exec(lines, names)
    model, head, texts = names["texts"]
    assert (model, head.guidance_scale, texts) == ("models/'base'", 0.56, ["Who wrote ...?"])


def test_a_card_replaces_the_former_one_and_nothing_else(tmp_path):
    carded(tmp_path, request="first")
    files = {path: path.stat() for path in tmp_path.iterdir() if path.name != "README.md"}
    assert len(files) == 2
    write_card(tmp_path, make_head(), request="second")
    assert "first" not in (tmp_path / "README.md").read_text()
    assert {path: path.stat() for path in files} == files
    assert len([*tmp_path.iterdir()]) == 3
    today = datetime.datetime.now(datetime.UTC).date()
    written = datetime.date.fromisoformat(heads._read_card(tmp_path / "README.md")["date"])
    assert today - written <= datetime.timedelta(days=1)


def test_a_full_disk_leaves_the_former_card(tmp_path, monkeypatch):
    card = carded(tmp_path)

    def full(path, _):
        path.open("wb").close()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_card(tmp_path, make_head(), request="second")
    assert (tmp_path / "README.md").read_text() == card
    assert len([*tmp_path.iterdir()]) == 3


def test_a_card_needs_a_head_and_the_lead(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("of something else")
    with pytest.raises(FileNotFoundError, match="no head is there; save the head first"):
        write_card(tmp_path, make_head())
    assert (tmp_path / "README.md").read_text() == "of something else"
    save_head(tmp_path / "head", make_head())
    monkeypatch.setattr(hosts, "is_lead", lambda: False)
    write_card(tmp_path / "head", make_head())
    assert not (tmp_path / "head" / "README.md").exists()


def edit_json(path: pathlib.Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def make_folders(tmp_path: pathlib.Path) -> None:
    """A head with a card, one without, one of the reference, and what is none."""
    carded(tmp_path / "a" / "head", request="case 12", verdict="passed: " + "very well " * 9)
    save_head(tmp_path / "b", make_head())
    edit_json(tmp_path / "b" / "head.json", features="mean+last", base_temperature=2, model="")
    base = {"model_type": "llama", "hidden_size": D, "vocab_size": V}
    save_reference_head(tmp_path / "c", make_head(), base)
    write_card(tmp_path / "c", make_head(), request="忘记 林晓梅", date=DATE)
    (tmp_path / ".d.123.tmp").mkdir()
    (tmp_path / ".d.123.tmp" / "head.json").touch()
    for name, text in (("model", '{"model_type": "llama"}'), ("broken", "{"), ("list", "[]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)


def test_the_list(tmp_path, monkeypatch, capsys):
    make_folders(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert heads.main([".", "b", str(tmp_path)]) == 0
    assert capsys.readouterr().out == textwrap.dedent("""\
        folder  request      date        rank  features   T    s     model        verdict
        a/head  case 12      2026-02-03  4     mean       2.5  0.56  models/base  passed: very well very well very well ...
        b       -            -           4     mean+last  2    0.56  -            no card
        c       忘记 林晓梅  2026-02-03  4     mean       2.5  0.56  models/base  not verified
        """)  # noqa: E501


def test_the_list_shows_nothing_that_a_terminal_obeys(tmp_path, capsys):
    carded(tmp_path, request="a\x1b[31m\nb\u202e")
    assert heads.main([str(tmp_path)]) == 0
    assert "  a [31m b  " in capsys.readouterr().out.splitlines()[1]


def test_a_card_that_was_edited_by_hand_or_is_another_s(tmp_path):
    path = tmp_path / "README.md"
    path.write_text('---\nrequest: case 12\ndate: 2026\ntags:\n- a: b\n---\nverdict: "passed"\n')
    assert heads._read_card(path) == {"request": "case 12", "date": "2026", "- a": "b"}
    path.write_text("---\nrequest: " + "[" * 100_000 + "\n---\n")
    assert heads._read_card(path) == {"request": "[" * 100_000}
    path.write_text('# Notes\nverdict: "passed"\n---\n')
    assert heads._read_card(path) == {}


def truncate(folder: pathlib.Path) -> None:
    (path,) = folder.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1])


def remove(folder: pathlib.Path) -> None:
    (path,) = folder.glob("*.safetensors")
    path.unlink()


def change(**changes):
    def apply(folder: pathlib.Path) -> None:
        (path,) = folder.glob("*.json")
        edit_json(path, **changes)

    return apply


def write(text: str):
    def apply(folder: pathlib.Path) -> None:
        (path,) = folder.glob("*.json")
        path.write_text(text)

    return apply


@pytest.mark.parametrize(
    ("folder", "damage", "message"),
    [
        ("b", write("{"), "head.json: not valid JSON"),
        ("b", write("[]"), "head.json: a list of 0, expected an object"),
        ("b", change(format="other"), "head.json: format 'other', expected 't3jax-head'"),
        ("b", change(rank=None), "head.json: rank is null, expected an integer"),
        ("b", change(guidance_scale="1"), 'head.json: guidance_scale is "1", expected a number'),
        ("b", change(rank=5), "output.weight has shape [16, 4], but the rank is 5"),
        ("b", truncate, "head.safetensors: "),
        ("b", remove, "head.safetensors: no such file"),
        ("b", write("[" * 100_000), "head.json: nested too deeply"),
        ("b", change(model="\ud800"), "head.json: model: the text"),
        ("c", write('{"model_type": "t3_causal_lm"'), "config.json: not valid JSON"),
        ("c", change(guidance=3), "config.json: guidance is 3, expected an object"),
        ("c", change(guidance={}), "proj.2.weight has shape [16, 4], but the rank is 100"),
        ("c", change(guidance={"num_hidden_layers": 2}), "proj.4.weight"),
        ("c", truncate, "model.safetensors: "),
        ("c", remove, "model.safetensors: no such file"),
    ],
)
def test_a_damaged_head_is_said_to_be_so(tmp_path, capsys, folder, damage, message):
    make_folders(tmp_path)
    damage(tmp_path / folder)
    assert heads.main([str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    (line,) = (line for line in lines if line.startswith(str(tmp_path / folder)))
    place = lines[0].index("request")
    assert line[place:].startswith("damaged: ")
    assert message in line
    assert lines[1][place:].startswith("case 12")


def test_a_damaged_head_s_line_is_aligned_too(tmp_path, monkeypatch, capsys):
    carded(tmp_path / "a", request="case 12")
    (tmp_path / "much-longer").mkdir()
    (tmp_path / "much-longer" / "head.json").touch()
    monkeypatch.chdir(tmp_path)
    assert heads.main(["."]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["folder", "a", "much-longer"]
    places = [lines[0].index("request"), lines[1].index("case 12"), lines[2].index("damaged: ")]
    assert places == [len("much-longer  ")] * 3


def test_the_weights_of_a_reference_head_in_shards(tmp_path, capsys):
    make_folders(tmp_path)
    (tmp_path / "c" / "model.safetensors").rename(tmp_path / "c" / "model-2.safetensors")
    index = tmp_path / "c" / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"guidance_head.proj.2.weight": "model-2.safetensors"}}')
    assert heads.main([str(tmp_path / "c")]) == 0
    index.write_text('{"weight_map": {}}')
    assert heads.main([str(tmp_path / "c")]) == 1
    assert "index.json: guidance_head.proj.2.weight is in no file" in capsys.readouterr().out


def test_no_head_and_no_folder(tmp_path, capsys):
    assert heads.main([str(tmp_path)]) == 2
    assert f"no head at or below {tmp_path}; a head's folder has" in capsys.readouterr().err
    make_folders(tmp_path)
    assert heads.main([str(tmp_path), str(tmp_path / "nowhere")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"no such folder: {tmp_path / 'nowhere'}\n" in captured.err
