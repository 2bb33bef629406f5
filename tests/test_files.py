import ast
import errno
import json
import os
import re
import socket
import subprocess
import sys

import numpy as np
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


def leave(path, process: int | str, host: str | None = None) -> str:
    """The name of what a process may have left of `path`."""
    return f".{path.name}.{files.slug(host or socket.gethostname())}.{process}.tmp"


@pytest.fixture(scope="module")
def dead() -> int:
    """The number of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path, dead):
    path, folder = tmp_path / "a[1].json", tmp_path / "folder"
    others = {leave(path, os.getppid()), leave(path, dead, "elsewhere"), ".a[1].json.tmp"}
    for name in {leave(path, dead), *others}:
        (tmp_path / name).write_text("half")
    (tmp_path / leave(folder, dead)).mkdir()
    (tmp_path / leave(folder, dead) / "half").write_text("half")
    files.write_json(path, 1)
    with files.replacing_folder(folder):
        pass
    assert {each.name for each in tmp_path.iterdir()} == {path.name, folder.name, *others}


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError("9000 requested and 2484 written"),  # NumPy's
        RuntimeError("I/O error: No space left on device (os error 28)"),  # safetensors'
    ],
)
def test_a_full_disk_is_an_error_about_the_file(tmp_path, error):
    for replacing in (files.replacing, files.replacing_folder):
        with pytest.raises(OSError, match="No space") as found, replacing(tmp_path / "a"):
            raise error
        assert found.value.filename == str(tmp_path / "a")
        assert files.is_full(found.value)
    assert not list(tmp_path.iterdir())


def test_other_errors_stay_as_they_are(tmp_path):
    with pytest.raises(FileNotFoundError) as found, files.replacing(tmp_path / "a"):
        (tmp_path / "elsewhere").read_bytes()
    assert found.value.filename == str(tmp_path / "elsewhere")
    with pytest.raises(KeyError), files.replacing_folder(tmp_path / "a"):
        raise KeyError


def test_allocated_bytes_are_on_the_disk(tmp_path, monkeypatch):
    path = tmp_path / "a"

    def fail(number):
        def fallocate(*_):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "posix_fallocate", fallocate)

    for able in (True, False):
        if not able:
            fail(errno.EOPNOTSUPP)
        path.write_bytes(b"old")
        files.allocate(path, 3_000_001)
        assert path.stat().st_size == 3_000_001
        assert path.stat().st_blocks * 512 >= 3_000_001  # 0 of a file of holes
        assert not np.fromfile(path, np.uint8).any()
    fail(errno.ENOSPC)
    with pytest.raises(OSError, match="No space") as found:
        files.allocate(path, 10)
    assert found.value.filename == str(path)


def test_a_folder_is_claimed_by_one_at_a_time(tmp_path):
    folder = tmp_path / "deep" / "run"
    with files.claim(folder):
        with (
            pytest.raises(
                OSError, match=rf"run: another run is at work here \(process {os.getpid()}"
            ),
            files.claim(folder),
        ):
            pass
        (folder / "result").write_text("1")
    with files.claim(folder):
        pass
    assert [path.name for path in folder.iterdir()] == ["result"]


def test_a_claim_leaves_no_empty_folder(tmp_path):
    with files.claim(tmp_path / "deep" / "run"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_claim_ends_with_the_process(tmp_path):
    program = (
        f"import os, pathlib, runpy; claim = runpy.run_path({files.__file__!r})['claim']\n"
        f"with claim(pathlib.Path({str(tmp_path)!r})): os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 9
    assert (tmp_path / ".lock").is_file()
    with files.claim(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_text_files_are_utf_8_whatever_the_locale(repository):
    """A read or a write without an encoding takes the locale's."""
    wrong = []
    for path in [*repository.glob("*.py"), *repository.glob("t3jax/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            module = getattr(getattr(node.func, "value", None), "id", "")
            mode = "".join(ast.unparse(argument) for argument in node.args[:2])
            reads = name == "read_text" and not node.args
            writes = name == "write_text" and len(node.args) == 1
            opens = name == "open" and module != "os" and not re.search("'[rwax]?b", mode)
            named = any(keyword.arg == "encoding" for keyword in node.keywords)
            if (reads or writes or opens) and not named:
                wrong.append(f"{path.relative_to(repository)}:{node.lineno}")
    assert not wrong
