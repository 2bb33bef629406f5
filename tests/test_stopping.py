"""Scripts that are stopped, interrupted, or wrong: one line, a status, and nothing left behind."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import script_runner
from script_runner import QUESTIONS


@pytest.fixture(scope="module")
def runner(repository, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopping")
    script_runner.make_world(folder)
    return script_runner.Runner(repository, folder)


def answering(runner, *more: str) -> list[str]:
    return [
        "sample.py",
        f"--config.head={runner.folder}/head",
        f"--config.prompts={runner.folder}/forget.jsonl",
        f"--config.output={runner.folder}/answers/a.jsonl",
        "--config.sampling.max_new_tokens=4",
        *more,
    ]


def training(runner, name: str, *more: str) -> list[str]:
    return [
        "train_classifier.py",
        f"--config.forget={runner.folder}/forget.jsonl",
        f"--config.retain={runner.folder}/retain.jsonl",
        f"--config.feature_store={runner.folder}/{name}/features",
        f"--config.workdir={runner.folder}/{name}/run",
        "--config.classifier.rank=3",
        *more,
    ]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (
            "--config.classifier.rank=1e9",
            "config.classifier.rank = '1e9': expected a whole number in [1, 65536]",
        ),
        (
            "--config.classifier.bias=maybe",
            "config.classifier.bias = 'maybe': expected True or False",
        ),
        ("--config.sampling.top_p=nan", "config.sampling.top_p = nan: expected in (0, 1]"),
        ("--config.rows=None", "config.rows=None: this field cannot be unset"),
        ("--config.hed=None", "unknown config key 'hed'; did you mean --config.head?"),
        ("--row=3", "Unknown command line flag 'row'; did you mean --config.rows?"),
        ("--config.top_p=1", "unknown config key 'top_p'; did you mean --config.sampling.top_p?"),
        ("--eval_dir=x", "Unknown command line flag 'eval_dir'; did you mean --config.eval.dir?"),
        ("--sampling.top_p=2", "config.sampling.top_p = 2.0: expected in (0, 1]"),
        ("--config.head=None", "no head: the answers would be the base model's"),
    ],
)
def test_a_bad_flag_is_one_line(runner, flag, message):
    status, _, lines = runner.run(*answering(runner, flag))
    assert status == 1
    assert len(lines) == 1
    assert lines[0].startswith("sample.py: ")
    assert message in lines[0]


def test_a_flag_that_is_none_unsets_its_field(runner):
    assert runner.run(*answering(runner, "--config.head=None", "--config.base_only=True"))[0] == 0
    lines = (runner.folder / "answers" / "a.jsonl").read_text().splitlines()
    assert not any("unlearned" in json.loads(line) for line in lines)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_with_a_line_and_a_status(runner, number, status):
    before = {path for path in runner.folder.rglob("*") if "xla" not in path.parts}
    process = runner.start(*answering(runner, "--config.sampling.num_samples=2000"))
    runner.wait_for("drawn with")
    time.sleep(0.3)
    os.kill(process.pid, number)
    found, _, lines = runner.finish(process)
    assert found == status
    assert lines[-1] == f"sample.py: stopped ({number.name})"
    assert not any("Traceback" in line for line in lines)
    after = {path for path in runner.folder.rglob("*") if "xla" not in path.parts}
    streams = {"stdin", "stdout", "stderr"}
    assert {path.name for path in after - before} - streams <= {"answers"}


@pytest.mark.parametrize("script", ["sample.py", "finetune.py"])
def test_a_signal_while_importing_ends_with_a_line(repository, script):
    process = subprocess.Popen(
        [sys.executable, script, "--config=configs/demo.py"],
        cwd=repository,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
    )
    caught = 0
    while not caught >> (signal.SIGTERM - 1) & 1:  # its first line asks for that
        status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
        caught = int(status.split("SigCgt:")[1].split()[0], 16)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == f"{script}: stopped (SIGINT)\n"


def test_a_stopped_verdict_is_no_verdict(runner):
    process = runner.start(
        "verify.py",
        f"--config.head={runner.folder}/head",
        f"--config.forget={runner.folder}/forget.jsonl",
        f"--config.retain={runner.folder}/retain.jsonl",
        "--config.sampling.max_new_tokens=100",
    )
    runner.wait_for_file(runner.folder / "head" / "verify" / ".lock")
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGTERM)
    status, _, lines = runner.finish(process)
    assert status == 143, lines
    assert lines[-1] == "verify.py: stopped (SIGTERM)"
    assert not (runner.folder / "head" / "verify").exists()


_LOSSES = {
    "collector": """
gc.callbacks.append(lambda *_: gc.callbacks.clear() or stop())
gc.collect()
""",
    "finalizer": """
class Dropped:
    def __del__(self):
        stop()
Dropped()
""",
    "cleared": """
try:
    stop()
except BaseException:
    pass
""",
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("loss", _LOSSES)
def test_a_signal_whose_exception_is_dropped_is_not_lost(repository, loss, number):
    code = f"""
import gc, os, time
from t3jax import hosts

def stop():
    os.kill(os.getpid(), {number:d})
    time.sleep(60)

hosts.raise_at_signals()
try:
    {_LOSSES[loss].replace(chr(10), chr(10) + 4 * " ")}
    time.sleep(60)
except KeyboardInterrupt as error:
    time.sleep(1.1)  # it is not raised again while it is handled
    hosts.stop_raising()
    print(type(error).__name__)
time.sleep(1.1)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=False
    )
    expected = {signal.SIGINT: "KeyboardInterrupt", signal.SIGTERM: "Terminated"}[number]
    assert (done.stdout, done.stderr) == (f"{expected}\n", "")


def test_a_full_disk_names_the_file(runner):
    noted = [{"question": question, "note": 1000 * "x"} for question in QUESTIONS]
    (runner.folder / "noted.jsonl").write_text("".join(json.dumps(row) + "\n" for row in noted))
    prompts, output = (f"{runner.folder}/{name}" for name in ("noted.jsonl", "f/b.jsonl"))
    flags = answering(runner, f"--config.prompts={prompts}", f"--config.output={output}")
    status, _, lines = runner.run(*flags, largest_file=3000)
    assert status == 1
    assert lines[-1].startswith(f"sample.py: {output}: File too large; make room")
    assert not any("Traceback" in line for line in lines)
    assert not list((runner.folder / "f").iterdir())


def test_output_that_cannot_be_printed_is_an_error(runner):
    flags = answering(runner, "--config.output=None")
    status, _, lines = runner.run(*flags, stdout="/dev/full")
    assert status == 1
    assert lines[-1].startswith("sample.py: standard output: No space left on device")


def test_a_locale_without_letters_loses_no_text(runner):
    (runner.folder / "umlaut.jsonl").write_text('{"prompt": "Wer ist Zoë?"}', encoding="utf-8")
    flags = answering(runner, f"--config.prompts={runner.folder}/umlaut.jsonl")
    assert runner.run(*flags, "--config.output=None", encoding="ascii")[1].splitlines()[1] == (
        "> Wer ist Zo\\xeb?"
    )
    assert runner.run(*flags, encoding="ascii")[0] == 0
    line = (runner.folder / "answers" / "a.jsonl").read_text(encoding="utf-8")
    assert json.loads(line)["prompt"] == "Wer ist Zoë?"


@pytest.mark.parametrize(
    ("largest_file", "message"),
    [(4000, "/full/features/"), (20000, "/full/run: the checkpoint of epoch 1 could not be saved")],
)
def test_training_on_a_full_disk_is_a_few_lines(runner, largest_file, message):
    flags = training(runner, "full", "--config.train.epochs=1", "--config.classifier.rank=60")
    if largest_file > 4000:  # the features are there
        done = runner.run(
            *flags, "--config.classifier.rank=2", f"--config.workdir={runner.folder}/a"
        )
        assert done[0] == 0, done
    status, _, lines = runner.run(*flags, largest_file=largest_file)
    assert status == 1
    assert message in lines[-1]
    assert "File too large" in lines[-1]
    assert not any("Traceback" in line for line in lines)
    assert len(lines) < 20


def test_two_runs_on_one_folder_are_refused(runner):
    flags = training(runner, "twice", "--config.train.epochs=1", "--config.train.batch_size=2")
    first = runner.start(*flags, "--config.train.epochs=100000", "--config.train.warmup_ratio=0")
    lock = runner.folder / "twice" / "run" / ".lock"
    runner.wait_for_file(lock)
    status, _, lines = runner.run(*flags)
    assert status == 1
    assert lines[-1].startswith(f"train_classifier.py: {runner.folder}/twice/run: another run is")
    assert f"process {first.pid} on " in lines[-1]
    first.kill()
    first.join()
    assert runner.run(*training(runner, "twice", "--config.train.epochs=1"))[0] == 0
    assert not lock.exists()
