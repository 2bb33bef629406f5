"""TOFU through TFDS: order, text, staleness, missing and broken files, interrupted preparation."""

import json
import sys

import huggingface_hub
import pytest

from t3jax.data import load_dataset, load_records
from t3jax.data import tofu as tofu_module
from t3jax.data.tofu import SPLITS, Tofu, load_tofu

ROWS = [{"question": f"Who is {i}?", "answer": f"Zoë\u2028{i}."} for i in range(25)]
PERTURBED = [
    {
        **row,
        "paraphrased_question": row["question"] + "?",
        "paraphrased_answer": row["answer"] + ".",
        "perturbed_answer": [f"Ann {i}.", f"Bö {i}.", "C."],
    }
    for i, row in enumerate(ROWS)
]
NO_PARAPHRASE = [{"question": "Where?", "answer": "Rome", "perturbed_answer": ["Oslo", "Bern"]}]


def write(folder, split, rows):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / f"{split}.json").write_text(text, encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "files"
    path.mkdir()
    write(path, "forget05", ROWS)
    write(path, "forget05_perturbed", PERTURBED)
    write(path, "world_facts_perturbed", NO_PARAPHRASE)
    return path


@pytest.fixture
def data_dir(tmp_path):
    return tmp_path / "prepared"


def test_rows_are_text_in_the_order_of_the_file(folder, data_dir):
    assert load_tofu("forget05", folder, data_dir) == ROWS
    assert load_tofu("forget05_perturbed", folder, data_dir) == PERTURBED
    empty = {"paraphrased_question": "", "paraphrased_answer": ""}
    rows = load_tofu("world_facts_perturbed", folder, data_dir)
    assert rows == [row | empty for row in NO_PARAPHRASE]


def test_prepared_once_and_again_when_a_file_changes(folder, data_dir, monkeypatch):
    load_tofu("forget05", folder, data_dir)
    generate = Tofu._generate_examples
    calls = []

    def counting(self, split, content):
        calls.append(split)
        return generate(self, split, content)

    monkeypatch.setattr(Tofu, "_generate_examples", counting)
    load_tofu("forget05", folder, data_dir)
    assert calls == []
    changed = [*ROWS[:-1], {"question": "New?", "answer": "Yes."}]
    write(folder, "forget05", changed)
    assert load_tofu("forget05", folder, data_dir) == changed
    assert calls == ["forget05"]


def test_builder_tells_licence_and_source(folder, data_dir):
    builder = Tofu(config="perturbed", folder=folder, data_dir=data_dir)
    assert builder.info.redistribution_info.license == "MIT"
    assert "2401.06121" in builder.info.citation
    assert [config.name for config in Tofu.BUILDER_CONFIGS] == ["qa", "perturbed"]


def test_dataset_source_names_a_split(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(tofu_module.tfds.core.constants, "DATA_DIR", str(tmp_path / "default"))
    assert load_dataset("tofu:forget05", tofu_dir=folder) == ROWS
    assert len(list((tmp_path / "default").iterdir())) == 1


def test_unknown_split_lists_the_known_ones(folder, data_dir):
    with pytest.raises(ValueError, match=r"no split 'forget5'; expected one of full, .*forget05"):
        load_tofu("forget5", folder, data_dir)


def test_missing_file_names_file_and_folder(folder, data_dir):
    with pytest.raises(FileNotFoundError, match=r"forget01\.json .* in the folder .*files;"):
        load_tofu("forget01", folder, data_dir)
    with pytest.raises(FileNotFoundError, match="does not exist or has none of TOFU's files"):
        Tofu(config="qa", folder=folder / "nowhere", data_dir=data_dir)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a", "answer": "b"}, "'perturbed_answer' must be a list"),
        ({"question": "a", "answer": "b", "perturbed_answer": [3]}, "'perturbed_answer' must be"),
        (NO_PARAPHRASE[0] | {"paraphrased_answer": ["a"]}, "'paraphrased_answer' must be a string"),
        ({"text": "a"}, "got a document"),
        ({"question": "a"}, r"world_facts_perturbed\.json:2: expected"),
    ],
)
def test_bad_row_is_named_and_nothing_is_prepared(folder, data_dir, row, message):
    write(folder, "world_facts_perturbed", [*NO_PARAPHRASE, row])
    with pytest.raises(ValueError, match=message):
        load_tofu("forget05_perturbed", folder, data_dir)
    assert not list(data_dir.rglob("*.array_record*"))


def test_hub_is_used_without_a_folder(folder, data_dir, monkeypatch):
    for split in SPLITS["qa"]:
        write(folder, split, [{"question": split, "answer": "a"}])
    asked = []

    def download(repository, name, repo_type):
        asked.append((repository, name, repo_type))
        return str(folder / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert load_tofu("forget10", data_dir=data_dir) == [{"question": "forget10", "answer": "a"}]
    assert ("locuslab/TOFU", "forget10.json", "dataset") in asked
    asked.clear()
    assert load_tofu("full", data_dir=data_dir) == [{"question": "full", "answer": "a"}]
    assert asked == []


def test_unreachable_hub_says_what_to_do(data_dir, monkeypatch):
    def download(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(ConnectionError, match=r"no network.*give a local folder"):
        load_tofu("forget10", data_dir=data_dir)
    assert not list(data_dir.rglob("1.0.0"))


def test_interrupted_preparation_is_never_taken_for_a_whole_one(folder, data_dir, monkeypatch):
    generate = Tofu._generate_examples

    def interrupted(self, split, content):
        yield from list(generate(self, split, content))[:10]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Tofu, "_generate_examples", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load_tofu("forget05", folder, data_dir)
    assert not list(data_dir.rglob("1.0.0"))
    assert load_tofu("forget05", folder, data_dir) == ROWS


def test_two_processes_prepare_at_the_same_time(folder, data_dir, monkeypatch):
    generate = Tofu._generate_examples
    other = []

    def overtaken(self, split, content):
        yield from generate(self, split, content)
        if not other:  # Another process begins and ends while this one is still at work.
            other.append("began")
            other.append(load_tofu("forget05", folder, data_dir))

    monkeypatch.setattr(Tofu, "_generate_examples", overtaken)
    assert load_tofu("forget05", folder, data_dir) == ROWS
    assert other == ["began", ROWS]


def test_full_disk_is_reported(folder, data_dir, monkeypatch):
    def full(self, split, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Tofu, "_generate_examples", full)
    with pytest.raises(OSError, match="No space left"):
        load_tofu("forget05", folder, data_dir)


def test_tensorflow_is_not_imported(folder, data_dir):
    load_tofu("forget05_perturbed", folder, data_dir)
    assert "tensorflow" not in sys.modules


def test_real_files(shared, tmp_path, data_dir):
    splits = {"full": 4000, "retain90": 3600, "forget10": 400, "forget05": 200, "forget01": 40}
    folder = tmp_path / "some"  # Preparing retain95 and retain99 too would take seconds.
    folder.mkdir()
    for split in splits:
        (folder / f"{split}.json").symlink_to(shared / "data" / "tofu" / f"{split}.json")
    rows = {split: load_tofu(split, folder, data_dir) for split in splits}
    assert {split: len(rows[split]) for split in splits} == splits
    assert rows["full"] == load_records(folder / "full.json")
    assert rows["retain90"] == rows["full"][:3600]
    assert rows["forget10"] == rows["full"][3600:]
    assert rows["forget05"] == rows["full"][3800:]
    assert rows["forget01"] == rows["full"][3960:]


def test_real_perturbed_files(shared, data_dir):
    folder = shared / "data" / "tofu"
    splits = {
        "forget10_perturbed": (400, 5),
        "forget05_perturbed": (200, 5),
        "forget01_perturbed": (40, 5),
        "retain_perturbed": (400, 5),
        "real_authors_perturbed": (100, 3),
        "world_facts_perturbed": (117, 3),
    }
    empty = {"paraphrased_question": "", "paraphrased_answer": ""}
    for split, (number, wrong) in splits.items():
        rows = load_tofu(split, folder, data_dir)
        assert rows == [empty | row for row in load_records(folder / f"{split}.json")]
        assert len(rows) == number
        assert {len(row["perturbed_answer"]) for row in rows} == {wrong}
