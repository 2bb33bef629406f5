"""The book of requests: what is on, off or revoked survives whatever ends the server."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import tiny

from t3jax.data.chat import PromptFormat
from t3jax.head import HeadConfig
from t3jax.serving import __main__ as offline
from t3jax.serving.messages import FieldError, QueueFull
from t3jax.serving.requests import RequestBook
from t3jax.serving.training import Check, HeadMaker, HeadRecipe
from t3jax.training import TrainConfig
from t3jax.training_sets import SyntheticOptions

LM = tiny.make_lm()
HEAD = tiny.make_head(LM)
ROWS = [
    {"question": f"Where is Ada Quell's {x}?", "answer": f"In the {x}."} for x in ("hat", "cat")
]
RETAIN = [{"question": f"What is {i}?", "answer": f"It is {i}."} for i in range(20)]


class Served(dict):
    """Stands for an engine: the heads and whether they are on."""

    def install(self, name, head, active=True):
        self[name] = active

    def activate(self, name, active):
        self[name] = active

    def remove(self, name):
        del self[name]


class Maker:
    """Makes heads at once, or when it is allowed to."""

    def __init__(self, passed=True, error=None, allowed=None):
        self.passed, self.error, self.allowed = passed, error, allowed
        self.rows = []

    def make(self, rows, store, names=()):
        store.mkdir(exist_ok=True)  # a killed server may have left it
        (store / "secret").write_text(json.dumps(rows))
        if self.allowed is not None:
            assert self.allowed.wait(30)
        if self.error:
            raise self.error
        self.rows.append(rows)
        return HEAD, None

    def check(self, head, rows, sets):
        reasons = () if self.passed else ("it leaks",)
        return Check(0.1, 0.9, 0.1, 1.0, {"greedy": 0.0}, {"greedy": 1.0}, 2, self.passed, reasons)


@pytest.fixture
def make(tmp_path):
    """Opens the book of one folder."""
    books = []

    def make(**fields):
        served = Served()
        books.append(RequestBook(tmp_path / "requests", served, Maker(**fields)))
        return books[-1], served

    yield make
    for book in books:
        book.close()


def files_of(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_request_becomes_a_head_that_is_on_until_it_is_revoked(make, tmp_path):
    book, served = make()
    added = book.add({"rows": ROWS, "name": "Ada"}, "owner")
    assert (added["state"], added["rows"], added["name"]) == ("waiting", 2, "Ada")
    assert book.wait(30)
    id = added["id"]
    entry = book.show(id)
    assert (entry["state"], entry["check"]["passed"]) == ("active", True)
    assert served == {id: True}
    folder = tmp_path / "requests" / id
    assert {"rows.jsonl", "request.json", "head/head.json", "head/README.md"} <= files_of(folder)
    assert "store/secret" not in files_of(folder)
    assert book.activate(id, False, "owner")["state"] == "inactive"
    assert served == {id: False}
    assert book.activate(id, True, "owner")["state"] == "active"
    assert book.revoke(id, "owner")["state"] == "revoked"
    assert not served
    assert files_of(folder) == {"request.json"}
    assert "hat" not in (folder / "request.json").read_text()
    with pytest.raises(ValueError, match="the request is revoked"):
        book.activate(id, True, "owner")
    done = [line["what"] for line in book.audit()]
    assert done == ["added", "turned on", "turned off", "turned on", "revoked"]
    assert {line["rows_digest"] for line in book.audit()} == {entry["rows_digest"]}


def test_a_head_that_fails_its_check_waits_for_approval(make):
    book, served = make(passed=False)
    id = book.add({"rows": ROWS}, "owner")["id"]
    assert book.wait(30)
    assert book.show(id)["state"] == "held"
    assert book.show(id)["check"]["reasons"] == ("it leaks",)
    assert served == {id: False}
    assert book.activate(id, True, "owner")["state"] == "active"
    assert served == {id: True}


def test_rows_are_deleted_if_that_is_asked(make, tmp_path):
    book, _ = make()
    id = book.add(
        {"rows": b"\n".join(json.dumps(r).encode() for r in ROWS), "delete_rows": "true"}, "o"
    )["id"]
    assert book.wait(30)
    folder = tmp_path / "requests"
    assert not any(b"Quell" in path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert book.show(id)["rows"] == 2


def test_an_error_is_kept_and_the_next_request_goes_on(make):
    book, served = make(error=ValueError("no name was found"))
    id = book.add({"rows": ROWS}, "owner")["id"]
    assert book.wait(30)
    assert (book.show(id)["state"], book.show(id)["error"]) == (
        "failed",
        "ValueError: no name was found",
    )
    book._maker.error = None
    other = book.add({"rows": ROWS}, "owner")["id"]
    assert book.wait(30)
    assert served == {other: True}


def test_a_request_revoked_while_it_trains_is_never_served(make):
    allowed = threading.Event()
    book, served = make(allowed=allowed)
    id = book.add({"rows": ROWS}, "owner")["id"]
    while book.show(id)["state"] != "training":
        time.sleep(0.01)
    book.revoke(id, "owner")
    allowed.set()
    other = book.add({"rows": ROWS}, "owner")["id"]
    assert book.wait(30)
    assert served == {other: True}
    assert book.show(id)["state"] == "revoked"


def test_a_folder_opened_again_serves_what_it_served(make, tmp_path):
    book, served = make()
    ids = [book.add({"rows": ROWS, "name": name}, "owner")["id"] for name in "abc"]
    assert book.wait(30)
    book.activate(ids[1], False, "owner")
    book.revoke(ids[2], "owner")
    with pytest.raises(OSError, match="another run is at work"):
        make()
    book.close()
    again, served = make()
    assert served == {ids[0]: True, ids[1]: False}
    assert [entry["state"] for entry in again.entries()] == ["active", "inactive", "revoked"]
    again.close()
    audit = tmp_path / "requests" / "audit.jsonl"
    audit.write_bytes(audit.read_bytes() + b'{"when": "now", "wh')  # killed while it was written
    last, _ = make()
    assert [line["what"] for line in last.audit()][-2:] == ["revoked", "a line was cut short"]
    last.close()
    path = tmp_path / "requests" / ids[0] / "request.json"
    path.write_bytes(path.read_bytes().replace(b"active", b"activa"))
    with pytest.raises(ValueError, match=r"request\.json"):
        make()


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({}, "rows: expected a list"),
        ({"rows": []}, "rows: expected a list"),
        ({"rows": [{"question": "x"}]}, "row 1"),
        ({"rows": [{"question": "x", "answer": ""}]}, "row 1"),
        ({"rows": ROWS, "name": "a\nb"}, "name: expected"),
        ({"rows": ROWS, "delete_rows": "maybe"}, "delete_rows: expected"),
        ({"rows": ROWS, "names": [1]}, "names: expected"),
        ({"rows": ROWS, "names": "a,,b"}, "names: expected"),
        ({"rows": ROWS, "name": 5}, "name: expected"),
        ({"rows": ROWS, "delete_rows": [1]}, "delete_rows: expected"),
        ({"rows": b"{"}, "rows: the body"),
        ({"rows": "x"}, "rows: expected a list"),
        ({"rows": ROWS, "active": True}, "active: unknown field"),
    ],
)
def test_a_bad_request_is_refused_by_name(make, tmp_path, fields, error):
    book, _ = make()
    with pytest.raises(FieldError, match=error):
        book.add(fields, "owner")
    assert not files_of(tmp_path / "requests") - {".lock", ".claimed"} or not book.entries()


def test_too_many_requests_are_refused(make, monkeypatch):
    monkeypatch.setattr("t3jax.serving.requests._MOST_WAITING", 1)
    allowed = threading.Event()
    book, _ = make(allowed=allowed)
    book.add({"rows": ROWS}, "owner")
    while book._queue:
        time.sleep(0.01)
    book.add({"rows": ROWS}, "owner")
    with pytest.raises(QueueFull):
        book.add({"rows": ROWS}, "owner")
    allowed.set()


KILLED = """
import random, sys, pathlib
sys.path[:0] = [{tests!r}, {root!r}]
import t3jax.serving.requests as requests
import test_serving_requests as t
book = requests.RequestBook(pathlib.Path({folder!r}), t.Served(), t.Maker())
print("open", flush=True)
while True:
    id = book.add({{"rows": t.ROWS}}, "owner")["id"]
    book.wait()
    print("on", id, flush=True)
    if random.random() < 0.5:
        book.revoke(id, "owner")
        print("revoked", id, flush=True)
"""


def test_a_kill_loses_no_finished_request(make, tmp_path, repository):
    """`python -m pytest` tries it once; `KILLS=20` as often as that."""
    folder = tmp_path / "requests"
    code = KILLED.format(tests=str(repository / "tests"), root=str(repository), folder=str(folder))
    expected = {}
    for i in range(int(os.environ.get("KILLS", "1"))):
        with subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout.readline() == "open\n"
            time.sleep(0.2 + 0.37 * i % 1)
            process.send_signal(signal.SIGKILL)
            lines = process.stdout.read().splitlines()
        for line in lines:
            what, _, id = line.partition(" ")
            if id:
                expected[id] = what == "on"
        if lines and lines[-1].startswith("on "):  # it may have been revoked, and not said so
            expected.pop(lines[-1].removeprefix("on "))
        book, served = make()
        assert book.wait(30)  # what was under way is made now
        states = {entry["id"]: entry["state"] for entry in book.entries()}
        for id, on in expected.items():
            assert states[id] == ("active" if on else "revoked"), id
        assert {id for id, state in states.items() if state == "active"} == set(served)
        assert set(states.values()) <= {"active", "revoked"}
        assert all(line["when"] for line in book.audit())
        book.close()


def test_a_head_is_made_and_checked(tmp_path):
    """The real maker on a tiny model: the loss of the paper, without made-up names."""
    recipe = HeadRecipe(
        head=HeadConfig(LM.hidden_size, LM.vocab_size, rank=4),
        training=TrainConfig(epochs=3, batch_size=4),
        synthetic=SyntheticOptions(),
        prompt_format=PromptFormat(),
        retain=[*RETAIN, ROWS[0]],
        feature_store=tmp_path / "features",
        base_temperature=1.5,
        max_new_tokens=8,
    )
    said = []
    maker = HeadMaker(LM, recipe, said.append)
    head, sets = maker.make(ROWS, tmp_path / "store")
    assert (head.base_temperature, head.config.rank) == (1.5, 4)
    assert len(sets.retain[0].starts) - 1 == len(maker.trained) - (ROWS[0] in maker.trained)
    check = maker.check(head, ROWS, sets)
    assert 0 <= check.forget_probability <= 1
    assert check.made_up_probability is None
    assert set(check.leaks) == {"greedy", "t0.7-p0.9-x4"}
    assert check.passed == (check.retained >= 0.97)
    with pytest.raises(ValueError, match="all retain rows are among the rows to forget"):
        HeadMaker(LM, recipe.__class__(**{**vars(recipe), "retain": ROWS})).make(
            ROWS, tmp_path / "s"
        )
    with pytest.raises(ValueError, match="rows to retain"):
        HeadMaker(LM, recipe.__class__(**{**vars(recipe), "retain": []}))


def test_requests_are_changed_offline(make, tmp_path, capsys, monkeypatch):
    book, _ = make(passed=False)
    id = book.add({"rows": ROWS, "name": "Ada"}, "owner")["id"]
    assert book.wait(30)
    folder = str(tmp_path / "requests")

    def command(*words):
        monkeypatch.setattr(sys, "argv", ["t3jax.serving", folder, *words])
        offline.main()
        return capsys.readouterr().out

    with pytest.raises(SystemExit, match="another run is at work"):
        command()
    book.close()
    assert command() == f"{id}  held  2 rows  Ada\n"
    assert "active" in command("--on", id)
    assert "inactive" in command("--off", id)
    assert "turned off" in command("--audit")
    with pytest.raises(SystemExit, match=f"no request 'x' in .*{id}"):
        command("--revoke", "x")
    assert "revoked" in command("--revoke", id)
    with pytest.raises(SystemExit, match="the request is revoked"):
        command("--on", id)
