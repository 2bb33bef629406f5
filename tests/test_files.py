import errno
import json

import pytest

from t3jax import files


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"first": 1})

    def fail():
        with files.replacing(path) as temporary:
            temporary.write_text('{"half')
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        fail()
    assert json.loads(path.read_text()) == {"first": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_appears_whole_and_replaces_the_old_one(tmp_path):
    folder = tmp_path / "deep" / "folder"
    for content in ("old", "new"):
        with files.replacing_folder(folder) as temporary:
            (temporary / "inner").mkdir()
            (temporary / "inner" / content).write_text(content)
            assert folder.exists() == (content == "new")
    assert [p.name for p in (folder / "inner").iterdir()] == ["new"]
    assert [p.name for p in folder.parent.iterdir()] == ["folder"]


def test_a_folder_that_a_kill_set_aside_comes_back(tmp_path):
    folder = tmp_path / "folder"
    (tmp_path / ".folder.1.old").mkdir()
    (tmp_path / ".folder.1.old" / "a").write_text("1")
    with files.replacing_folder(folder):
        assert (folder / "a").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_a_failed_folder_leaves_the_old_one(tmp_path):
    folder = tmp_path / "folder"
    with files.replacing_folder(folder) as temporary:
        (temporary / "a").write_text("1")

    def fail():
        with files.replacing_folder(folder) as temporary:
            (temporary / "a").write_text("2")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        fail()
    assert (folder / "a").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
