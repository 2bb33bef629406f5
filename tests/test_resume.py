"""A run that is killed again and again ends with the very bits of one that is not.

Each run is a process of its own, forked from a server that has imported what takes seconds.
"""

import gc
import json
import multiprocessing
import os
import pathlib
import random
import resource
import shutil
import sys
import time
import warnings

import numpy as np
import pytest
from damage import damaged

KILLS = 12
EPOCHS = 40
SEEDS = (1, 2)
FLIPS = int(os.environ.get("T3JAX_FLIPS", "2"))  # bits of each file, one at a time; by hand 16
DISK_FULL = 77  # exit status


def train(folder: pathlib.Path, largest_file: int | None = None) -> None:
    """Trains on the features stored in `folder`; run in a process of its own."""
    import jax

    from t3jax.features import Features
    from t3jax.head import HeadConfig
    from t3jax.training import TrainConfig, train_heads

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", str(folder.parent / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    stored = np.load(folder.parent / "features.npz")
    retain, forget = (
        Features(*(stored[f"{name}_{field}"] for field in ("pooled", "targets", "starts")))
        for name in ("retain", "forget")
    )
    config = TrainConfig(
        epochs=EPOCHS,
        warmup_ratio=0.2,
        batch_size=4,
        holdout_fraction=0.2,
        eval_every=3,
        checkpoint_every=1,
        patience=100,  # never over; the best evaluation is kept, and is what remains
    )
    try:
        train_heads(retain, forget, HeadConfig(8, 64, rank=4), config, SEEDS, workdir=folder)
    except OSError as error:
        sys.exit(DISK_FULL if "could not be saved" in str(error) else 1)


@pytest.fixture(scope="module")
def server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["t3jax.training", "orbax.checkpoint.v1", "tensorboardX"])
    return context


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("resume")
    rng = np.random.default_rng(0)
    stored = {}
    for name, sequences in (("retain", 12), ("forget", 10)):
        starts = np.cumsum([0, *rng.integers(1, 6, sequences)])
        stored[f"{name}_pooled"] = rng.normal(size=(starts[-1], 8)).astype(np.float32)
        stored[f"{name}_targets"] = rng.integers(0, 40, starts[-1]).astype(np.int32)
        stored[f"{name}_starts"] = starts
    np.savez(folder / "features.npz", **stored)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(server, root) -> dict:
    return finish(server, root / "uninterrupted")


def start(server, folder: pathlib.Path, **options):
    process = server.Process(target=train, args=(folder,), kwargs=options)
    process.start()
    return process


def finish(server, folder: pathlib.Path) -> dict:
    process = start(server, folder)
    process.join(300)
    assert process.exitcode == 0
    return results(folder)


def results(folder: pathlib.Path) -> dict:
    """All that a run leaves behind, without the wall clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = {"metrics": [{k: v for k, v in line.items() if k != "seconds"} for line in lines]}
    for seed in SEEDS:
        head = folder / f"head-seed{seed}"
        description = json.loads((head / "head.json").read_text())
        assert description["record"].pop("seconds") > 0
        found[f"description {seed}"] = description
        found[f"weights {seed}"] = (head / "head.safetensors").read_bytes()
    return found


def unfinished_saves(folder: pathlib.Path) -> list[str]:
    return [path.name for path in (folder / "checkpoints").glob("*tmp*")]


def saved_epoch(folder: pathlib.Path) -> int:
    """The newest whole checkpoint; 0 if there is none."""
    names = [path.name for path in (folder / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def wait_for(condition, process) -> None:
    deadline = time.monotonic() + 120
    while not condition() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.001)


def test_killed_at_many_moments_ends_with_the_same_bits(server, root, uninterrupted):
    assert len(uninterrupted["metrics"]) == EPOCHS * len(SEEDS)
    folder = root / "killed"
    moments = random.Random(0)
    kills = killed_while_saving = 0
    for i in range(KILLS):
        before = saved_epoch(folder)
        process = start(server, folder)
        if i % 4 == 0:  # while it starts, compiles, or restores
            time.sleep(moments.uniform(0.0, 1.5))
        else:  # after it got further than the run before it
            wait_for(lambda: saved_epoch(folder) > before, process)  # noqa: B023
            if i % 4 == 1:  # while it trains or saves
                time.sleep(moments.uniform(0.0, 0.15))
            else:  # while it saves
                wait_for(lambda: unfinished_saves(folder), process)
                time.sleep(moments.uniform(0.0, 0.03))
        process.kill()
        process.join()
        kills += process.exitcode == -9
        killed_while_saving += bool(unfinished_saves(folder))
    assert kills >= 10
    assert killed_while_saving >= 1
    assert not list(folder.glob("head*")), "the run ended before it was killed for the last time"
    assert KILLS // 2 <= saved_epoch(folder) < EPOCHS

    assert finish(server, folder) == uninterrupted
    assert not unfinished_saves(folder)


def test_full_disk_while_saving_is_an_error_and_the_run_goes_on_later(server, root, uninterrupted):
    folder = root / "full"
    process = start(server, folder, largest_file=2000)
    process.join(300)
    assert process.exitcode == DISK_FULL
    whole = {path.name for path in (folder / "checkpoints").iterdir()} - {*unfinished_saves(folder)}
    assert not whole
    assert not list(folder.glob("head*"))
    assert finish(server, folder) == uninterrupted


class Stopped(Exception):
    """Stands for a kill."""


def train_here(folder: pathlib.Path, features: pathlib.Path, epochs_now: int = 6) -> None:
    """Trains for six epochs in this process, or stops after fewer."""
    from t3jax.features import Features
    from t3jax.head import HeadConfig
    from t3jax.training import TrainConfig, train_heads

    def report(line: str) -> None:
        if epochs_now < 6 and line.startswith(f"epoch {epochs_now}/"):
            raise Stopped

    stored = np.load(features)
    retain, forget = (
        Features(*(stored[f"{name}_{field}"] for field in ("pooled", "targets", "starts")))
        for name in ("retain", "forget")
    )
    config = TrainConfig(
        epochs=6, batch_size=4, holdout_fraction=0.2, eval_every=1, checkpoint_every=1, patience=6
    )
    train_heads(
        retain, forget, HeadConfig(8, 64, rank=4), config, SEEDS, workdir=folder, report=report
    )


# Orbax leaves reads alone that are under way when one fails; they are collected at the end of the
# test, where the warnings are ignored.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
def test_a_byte_that_changed_on_the_disk_never_changes_the_result(root, tmp_path):
    features = root / "features.npz"
    train_here(tmp_path / "whole", features)
    expected = results(tmp_path / "whole")
    with pytest.raises(Stopped):
        train_here(tmp_path / "stopped", features, 4)
    resumed = tmp_path / "resumed"
    refusals, warned = [], 0
    for path in sorted(tmp_path.joinpath("stopped").rglob("*")):
        name = path.relative_to(tmp_path / "stopped")
        # TensorBoard's files are never read, and the older checkpoint only if the newer is bad.
        if not path.is_file() or "tensorboard" in name.parts or "3" in name.parts:
            continue
        for data in damaged(path.read_bytes(), FLIPS):
            shutil.rmtree(resumed, ignore_errors=True)
            shutil.copytree(tmp_path / "stopped", resumed)
            (resumed / name).write_bytes(data)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                try:
                    train_here(resumed, features)
                except ValueError as error:
                    refusals.append(str(error))
                    continue
            assert results(resumed) == expected, name
            warned += bool(said)
    assert warned > 0
    assert refusals
    assert all(str(resumed) in message for message in refusals), refusals
    gc.collect()
