"""Two processes of four devices each do what one process of eight does, and end together.

Also what SIGTERM does: in both processes, in one, and what is resumed on fewer devices.
"""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import chex
import jax
import numpy as np
import pytest
import tiny

import t3jax
from configs import paper
from t3jax import hosts, pipeline
from t3jax.features import Features
from t3jax.finetuning.trainer import Trainer
from t3jax.head import HeadConfig
from t3jax.head_io import save_head
from t3jax.lm import save_hf
from t3jax.sharding import make_mesh
from t3jax.training import TrainConfig, train_heads

MESH = (2, 2, 2)
QUESTIONS = ["Who is Ada?", "Where was Bo born?", "What did Cy write?", "Why is it so?"]
TOLD_AFTER = 5  # epochs
CONFIG = dataclasses.replace(tiny.CONFIG, num_layers=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, a head, a retain and a forget file, prompts."""
    folder = tmp_path_factory.mktemp("hosts")
    lm = tiny.make_lm(CONFIG)
    save_hf(folder / "model", CONFIG, lm.params, list(lm.eos_ids))
    lm.tokenizer.save_pretrained(folder / "model")
    save_head(folder / "head", tiny.make_head(lm))
    for name, answer in (("forget", "In a town by the sea."), ("retain", "On a hill.")):
        rows = [{"question": question, "answer": answer} for question in QUESTIONS]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def settings(folder):
    return {
        "model": f"{folder}/model",
        "mesh": MESH,
        "forget": f"{folder}/forget.jsonl",
        "retain": f"{folder}/retain.jsonl",
        "feature_store": f"{folder}/features",
        "workdir": f"{folder}/run",
        "classifier.rank": 3,
        "train.epochs": 8,
        "train.warmup_ratio": 0.25,
        "train.batch_size": 2,
        "train.holdout_fraction": 0.25,
        "head": f"{folder}/head",
        "prompts": f"{folder}/retain.jsonl",
        "output": f"{folder}/answers.jsonl",
        "sampling.max_new_tokens": 8,
        "finetune.data": (f"{folder}/retain.jsonl",),
        "finetune.workdir": f"{folder}/tuning",
        "finetune.epochs": 2,
        "finetune.batch_size": 2,
        "finetune.learning_rate": 0.01,
    }


@pytest.fixture(scope="module")
def config(settings):
    return tiny.make_settings(paper, settings)


def run_pair(repository, folder, settings, *flags):
    """Runs scripts in two processes.

    Returns:
        Output, errors and status of each, and the seconds that the first outlived the second.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "4",
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2",
        "XDG_CACHE_HOME": str(folder / "cache"),
        # Half of the time is imports.
        "PYTHONPYCACHEPREFIX": os.environ.get("PYTHONPYCACHEPREFIX", str(folder / "cache")),
        "PYTHONDONTWRITEBYTECODE": "",
        "PYTHONPATH": str(repository),
    }
    command = [sys.executable, "tests/distributed_worker.py", "--config=configs/paper.py", *flags]
    command += [f"--config.{name}={value}" for name, value in settings.items()]
    first, second = (
        subprocess.Popen(
            command,
            cwd=repository,
            env=environment | {"JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    )
    try:
        ended_second = *second.communicate(timeout=600), second.returncode
        start = time.monotonic()
        ended_first = *first.communicate(timeout=120), first.returncode
        return ended_first, ended_second, time.monotonic() - start
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def told_to_end(repository, folder, settings):
    """Sampling, serving and fine-tuning whole; head training until one process gets SIGTERM."""
    scripts = "--scripts=sample,engine,finetune,train"
    when = f"--signal=SIGTERM,epoch,{TOLD_AFTER}"
    first, second, _ = run_pair(repository, folder, settings, scripts, when)
    assert first[2] == second[2] == hosts.PREEMPTED_STATUS, first[1] + second[1]
    return first, second


def train(config, mesh, workdir):
    lm = t3jax.load_lm(config.model, mesh=mesh)
    sets = pipeline.training_sets(config, lm)
    (head,) = train_heads(
        sets.retain,
        sets.forget,
        pipeline.head_config(config, lm),
        config.train,
        seeds=config.seeds,
        workdir=workdir,
        mesh=mesh,
    )
    return head, metrics(workdir)


def metrics(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "head")} for line in lines]


@pytest.fixture(scope="module")
def in_one_process(told_to_end, config, folder):
    """The same head training on eight devices of this process."""
    return train(config, make_mesh(MESH), folder / "one")


def assert_close(found, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        jax.device_get(found),
        jax.device_get(expected),
    )


def test_sampling_gives_the_answers_of_one_process(told_to_end, folder, config):
    lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    sampler = t3jax.Sampler(t3jax.load_lm(config.model), t3jax.load_head(folder / "head"))
    expected = sampler.generate(QUESTIONS, max_new_tokens=8)
    assert [line["unlearned_tokens"] for line in lines] == [sample.tokens for sample in expected]
    (served,) = [line for line in told_to_end[0][0].splitlines() if line.startswith("served: ")]
    assert json.loads(served.removeprefix("served: ")) == [sample.tokens for sample in expected]


def tune(config, mesh, workdir=None):
    lm = t3jax.load_lm(config.model, mesh=mesh)
    rows = pipeline.encode(config, lm, config.finetune.data[0])
    recipe = pipeline.finetune_config(config)
    return t3jax.finetune(CONFIG, lm.params, rows, recipe, workdir=workdir, mesh=mesh)


@pytest.fixture(scope="module")
def tuned_in_one_process(config):
    return tune(config, make_mesh(MESH))


def test_fine_tuning_gives_the_model_of_one_process(told_to_end, folder, tuned_in_one_process):
    assert_close(t3jax.load_lm(folder / "tuning" / "model").params, tuned_in_one_process)


def test_sigterm_to_one_saves_the_epoch_and_ends_both(told_to_end, folder, in_one_process):
    for _, errors, _ in told_to_end:
        assert f"SIGTERM): epoch {TOLD_AFTER} is saved in {folder}/run; start again" in errors
    assert (folder / "run" / "checkpoints" / str(TOLD_AFTER)).is_dir()
    assert not (folder / "run" / "head").exists()
    assert_close(metrics(folder / "run"), in_one_process[1][:TOLD_AFTER])


def test_only_the_first_process_prints(told_to_end):
    (output, errors, _), (no_output, other_errors, _) = told_to_end
    assert "written: " in output
    assert "wrote 4 lines" in errors
    assert not no_output
    assert "wrote" not in other_errors


def test_what_eight_devices_saved_is_resumed_on_four(told_to_end, in_one_process, config, folder):
    shutil.copytree(folder / "run", folder / "four")
    head, lines = train(config, make_mesh((2, 1, 2), jax.devices()[:4]), folder / "four")
    assert_close(head.params, in_one_process[0].params)
    assert_close(lines, in_one_process[1])


def test_a_killed_process_ends_the_other(told_to_end, in_one_process, repository, folder, settings):
    """Both first resume what they were told to end, and then one is killed in fine-tuning."""
    flags = "--scripts=train,finetune", "--signal=SIGKILL,step,2"
    again = settings | {"finetune.workdir": f"{folder}/killed"}
    first, second, seconds = run_pair(repository, folder, again, *flags)
    assert_close(t3jax.load_head(folder / "run" / "head").params, in_one_process[0].params)
    assert second[2] == -signal.SIGKILL
    assert first[2] not in (0, hosts.PREEMPTED_STATUS)
    assert "process 0 of 2 ends; if it lost another one" in first[1]
    assert seconds < hosts.HEARTBEAT_TIMEOUT_SECONDS


# In a single process.


def synthetic(rows, seed):
    rng = np.random.default_rng(seed)
    starts = np.arange(0, rows + 1, 2)
    pooled = rng.normal(size=(rows, 8)).astype(np.float32)
    return Features(pooled, rng.integers(0, 40, rows).astype(np.int32), starts)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_head_told_to_end_is_resumed_to_the_same_bits(tmp_path):
    def run(name, report):
        recipe = TrainConfig(epochs=6, warmup_ratio=1 / 3, batch_size=2)
        sets = synthetic(12, 0), synthetic(10, 1)
        workdir = tmp_path / name
        return train_heads(*sets, HeadConfig(8, 64, 3), recipe, workdir=workdir, report=report)

    (expected,) = run("whole", None)
    with pytest.raises(hosts.Preempted, match=r"epoch 4 is saved in .*told"):
        run("told", lambda line: terminate() if line.startswith("epoch 3") else None)
    assert len(metrics(tmp_path / "told")) == 4
    (found,) = run("told", None)
    chex.assert_trees_all_equal(found.params, expected.params)
    assert metrics(tmp_path / "told") == metrics(tmp_path / "whole")


def test_a_model_told_to_end_is_resumed_on_other_devices(
    config, tuned_in_one_process, tmp_path, monkeypatch
):
    step = Trainer.step
    steps = []

    def step_and_tell(self, state, examples):
        steps.append(examples)
        if len(steps) == 2:
            terminate()
        return step(self, state, examples)

    monkeypatch.setattr(Trainer, "step", step_and_tell)
    with pytest.raises(hosts.Preempted, match="step 2 is saved"):
        tune(config, make_mesh(MESH), tmp_path)
    found = tune(config, make_mesh((2, 1, 2), jax.devices()[:4]), tmp_path)
    assert_close(found, tuned_in_one_process)
    assert len(steps) == 4


def test_sigterm_that_comes_too_late_takes_effect_after_the_block(monkeypatch):
    raised = []
    monkeypatch.setattr(signal, "raise_signal", raised.append)
    with hosts.deferred_sigterm() as told:
        assert not told()
        terminate()
        assert told()
    assert raised == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.fixture
def joined(monkeypatch):
    """What would be passed to JAX; nothing is joined."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: calls.append(options))
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    for name in list(os.environ):
        if name.startswith(("JAX_", "SLURM_", "OMPI_", "KUBERNETES_")):
            monkeypatch.delenv(name)
    return calls


def slurm(monkeypatch, tasks):
    values = {"JOB_ID": "7", "STEP_NODELIST": "a", "NTASKS": tasks, "PROCID": "0", "LOCALID": "0"}
    for name, value in values.items():
        monkeypatch.setenv(f"SLURM_{name}", value)


@pytest.mark.parametrize(
    ("mode", "tasks", "calls"),
    [("auto", "2", 1), ("auto", "1", 0), ("auto", None, 0), ("on", "1", 1), ("off", "2", 0)],
)
def test_auto_joins_where_jax_finds_several_processes(joined, monkeypatch, mode, tasks, calls):
    if tasks:
        slurm(monkeypatch, tasks)
    hosts.initialize(mode)
    assert len(joined) == calls


def test_processes_may_be_told_of_each_other_by_hand(joined, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1234")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "3")
    with pytest.raises(ValueError, match=r"missing: JAX_PROCESS_ID \("):
        hosts.initialize("auto")
    monkeypatch.setenv("JAX_PROCESS_ID", "x")
    with pytest.raises(ValueError, match="JAX_PROCESS_ID=x: expected a number"):
        hosts.initialize("auto")
    monkeypatch.setenv("JAX_PROCESS_ID", "2")
    hosts.initialize("auto")
    assert [(call["num_processes"], call["process_id"]) for call in joined] == [(3, 2)]


def test_on_without_a_cluster_says_what_is_needed(joined):
    with pytest.raises(ValueError, match="missing: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES"):
        hosts.initialize("on")
    with pytest.raises(ValueError, match="'yes' is not known; expected one of auto, on, off"):
        hosts.initialize("yes")
