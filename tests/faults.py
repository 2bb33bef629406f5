"""Runs scripts that are killed, stopped, out of disk, or find a flipped bit, by the dozen.

    python -m tests.faults --cases 24 --seed 1 [--fault kill] [--script sample]

Each case runs a script on a tiny model in a folder of its own. A case is right if

    kill      after SIGKILL at a random moment a second run ends with the bytes of an undisturbed
              one
    stop      SIGINT or SIGTERM ends the run with one line, its status and no temporary file, and a
              second run ends with those bytes
    disk      a limit on the size of files ends the run with a line that names a file, without a
              traceback, and a second run ends with those bytes
    flip      with a bit of one stored file flipped a second run ends with those bytes, or refuses
              the file by name

The same seed gives the same moments, sizes and bits, as far as the machine's speed allows.
"""

import argparse
import collections
import dataclasses
import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable

if __package__:  # `python -m tests.faults`: pytest puts this folder on the path by itself
    sys.path.insert(0, os.path.dirname(__file__))

import script_runner

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
_WALL_CLOCK = {"seconds", "date", "time"}


@dataclasses.dataclass(frozen=True)
class Job:
    """A script with the flags of a run in a folder, and the files that are its result."""

    flags: Callable[[pathlib.Path, pathlib.Path], list[str]]  # of the world and the run's folder
    results: tuple[str, ...]  # patterns


JOBS = {
    "sample": Job(
        lambda world, folder: [
            f"--config.head={world}/head",
            f"--config.prompts={world}/forget.jsonl",
            f"--config.output={folder}/answers.jsonl",
            "--config.sampling.max_new_tokens=8",
            "--config.sampling.num_samples=40",
            "--config.sampling.temperature=1",
        ],
        ("answers.jsonl",),
    ),
    "train_classifier": Job(
        lambda world, folder: [
            f"--config.forget={world}/forget.jsonl",
            f"--config.retain={world}/retain.jsonl",
            f"--config.feature_store={folder}/features",
            f"--config.workdir={folder}/run",
            "--config.train.epochs=60",
            "--config.train.batch_size=2",
            "--config.classifier.rank=3",
        ],
        ("run/head*/head.safetensors", "run/head*/head.json"),
    ),
    "finetune": Job(
        lambda world, folder: [
            f"--config.finetune.data=('{world}/forget.jsonl',)",
            f"--config.finetune.workdir={folder}/run",
            "--config.finetune.epochs=12",
            "--config.finetune.batch_size=2",
            "--config.finetune.checkpoint_every=2",
            "--config.finetune.learning_rate=1e-3",
        ],
        ("run/model/model.safetensors",),
    ),
    "evaluate": Job(
        lambda world, folder: [
            f"--config.head={world}/head",
            f"--config.eval.forget={world}/forget.jsonl",
            f"--config.eval.retain={world}/retain.jsonl",
            f"--config.eval.dir={folder}/evaluation",
            "--config.sampling.max_new_tokens=8",
        ],
        ("evaluation/**/TOFU_EVAL.json",),
    ),
}
FAULTS = ("kill", "stop", "disk", "flip")


def read_results(job: Job, folder: pathlib.Path) -> dict[str, str]:
    """Digests of a run's results by file, without what the wall clock says."""
    found = {}
    for pattern in job.results:
        for path in sorted(folder.glob(pattern)):
            data = path.read_bytes()
            if path.suffix == ".json":
                data = json.dumps(_without_clock(json.loads(data))).encode()
            found[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    assert found, f"{folder}: none of {job.results}"
    return found


def _without_clock(value: object) -> object:
    if isinstance(value, dict):
        kept = {name: part for name, part in value.items() if name not in _WALL_CLOCK}
        return {name: _without_clock(part) for name, part in kept.items()}
    return [_without_clock(part) for part in value] if isinstance(value, list) else value


def list_temporary_files(folder: pathlib.Path) -> list[str]:
    """Files that a run should have removed or renamed."""
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if "tmp" in path.name]


class Tester:
    """Runs cases; each script runs undisturbed once, for its results and how long it takes."""

    def __init__(self, folder: pathlib.Path):
        self._world = folder / "world"
        self._world.mkdir()
        script_runner.make_world(self._world)
        self._runner = script_runner.Runner(REPOSITORY, self._world)
        self._undisturbed: dict[str, tuple[pathlib.Path, dict[str, str], float]] = {}

    def run(self, script: str, fault: str, rng: random.Random, folder: pathlib.Path) -> str:
        """Runs one case in a new folder; an empty text if it is right, else what is wrong."""
        whole, expected, seconds = self._run_undisturbed(script, folder)
        if fault == "flip":
            shutil.copytree(whole, folder)
            stored = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]
            path = rng.choice(sorted(stored))
            data = bytearray(path.read_bytes())
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            path.write_bytes(bytes(data))
            return self._check_second_run(script, folder, expected, path)
        folder.mkdir()
        wrong = getattr(self, f"_{fault}")(script, rng, folder, seconds)
        return wrong or self._check_second_run(script, folder, expected)

    def _start(self, script: str, folder: pathlib.Path, **options):
        flags = JOBS[script].flags(self._world, folder)
        return self._runner.start(f"{script}.py", *flags, **options)

    def _run_undisturbed(self, script: str, folder: pathlib.Path):
        if script not in self._undisturbed:
            for _ in range(2):  # the second finds its programs compiled, and is timed
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                began = time.monotonic()
                status, _, lines = self._runner.finish(self._start(script, folder))
                assert status == 0, lines
            seconds = time.monotonic() - began
            expected = read_results(JOBS[script], folder)
            whole = folder.parent / script
            folder.rename(whole)
            self._undisturbed[script] = whole, expected, seconds
        return self._undisturbed[script]

    def _kill(self, script: str, rng: random.Random, folder: pathlib.Path, seconds: float) -> str:
        process = self._start(script, folder)
        process.join(rng.uniform(0, seconds))
        process.kill()
        process.join()
        return ""

    def _stop(self, script: str, rng: random.Random, folder: pathlib.Path, seconds: float) -> str:
        number = rng.choice((signal.SIGINT, signal.SIGTERM))
        process = self._start(script, folder)
        # Before that, the forked process has not asked for signals yet.
        process.join(rng.uniform(0.3 * seconds, seconds))
        if process.is_alive():
            os.kill(process.pid, number)
        status, _, lines = self._runner.finish(process)
        if status == 0:  # it was done before
            return ""
        if status != 128 + number:
            return f"status {status} after {number.name}: {lines[-1:]}"
        if any("Traceback" in line for line in lines):
            return f"a traceback after {number.name}: {lines[-3:]}"
        litter = list_temporary_files(folder)
        return f"left after {number.name}: {litter}" if litter else ""

    def _disk(self, script: str, rng: random.Random, folder: pathlib.Path, _: float) -> str:
        largest = max(path.stat().st_size for path in self._undisturbed[script][0].rglob("*"))
        # What the runs print to is a file too.
        limit = max(3000, int(largest ** rng.uniform(0.5, 0.99)))
        status, _, lines = self._runner.finish(self._start(script, folder, largest_file=limit))
        if status == 0:
            return ""
        if status != 1 or "too large" not in lines[-1] or str(folder) not in lines[-1]:
            return f"files of {limit} bytes: status {status}, {lines[-1:]}"
        if any("Traceback" in line for line in lines) or len(lines) > 20:
            return f"files of {limit} bytes: {len(lines)} lines, {lines[:2]}"
        litter = list_temporary_files(folder)
        return f"left with files of {limit} bytes: {litter}" if litter else ""

    def _check_second_run(
        self,
        script: str,
        folder: pathlib.Path,
        expected: dict[str, str],
        flipped: pathlib.Path | None = None,
    ) -> str:
        status, _, lines = self._runner.finish(self._start(script, folder))
        where = "" if flipped is None else f"{flipped.relative_to(folder)} flipped: "
        if status == 1 and flipped is not None:
            named = any(part in lines[-1] for part in (flipped.name, str(flipped.parent)))
            short = len(lines) < 20 and not any("Traceback" in line for line in lines)
            return "" if named and short else f"{where}{len(lines)} lines, {lines[-1:]}"
        if status != 0:
            return f"{where}the second run ended with status {status}: {lines[-1:]}"
        found = read_results(JOBS[script], folder)
        return "" if found == expected else f"{where}another result, status 0"


def main(argv: list[str] | None = None) -> int:
    """Runs the cases and prints the wrong ones and a table; the status is 1 if one is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--cases", type=int, default=24, help="of each fault in each script")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--fault", action="append", choices=FAULTS)
    parser.add_argument("--script", action="append", choices=list(JOBS))
    arguments = parser.parse_args(argv)
    counts: collections.Counter[tuple[str, str, bool]] = collections.Counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        tester = Tester(folder)
        for script in arguments.script or JOBS:
            for fault in arguments.fault or FAULTS:
                for number in range(arguments.cases):
                    rng = random.Random(f"{arguments.seed} {script} {fault} {number}")
                    wrong = tester.run(script, fault, rng, folder / "case")
                    counts[script, fault, not wrong] += 1
                    if wrong:
                        print(f"{script} {fault} {number}: {wrong}", flush=True)
                    shutil.rmtree(folder / "case")
    print(f"{'script':<18}" + "".join(f"{fault:>12}" for fault in FAULTS))
    for script in arguments.script or JOBS:
        ran = [(counts[script, fault, True], counts[script, fault, False]) for fault in FAULTS]
        print(f"{script:<18}" + "".join(f"{f'{ok} / {ok + no}':>12}" for ok, no in ran))
    return int(any(count for (*_, right), count in counts.items() if not right))


if __name__ == "__main__":
    sys.exit(main())
