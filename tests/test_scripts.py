"""The scripts, run as a user runs them, on a tiny random model."""

import json
import os
import subprocess
import sys

import pytest
import tiny

import t3jax
from t3jax.lm import save_hf

QUESTIONS = ["Who is Ada?", "Where was Bo born?", "What did Cy write?", "Why is it so?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder, a retain and a forget file."""
    folder = tmp_path_factory.mktemp("scripts")
    tokenizer = tiny.make_tokenizer()
    save_hf(folder / "model", tiny.CONFIG, tiny.make_params(), [tokenizer.eos_token_id])
    tokenizer.save_pretrained(folder / "model")
    for name, answer in (("forget", "In a town by the sea."), ("retain", "On a hill, long ago.")):
        rows = [{"question": question, "answer": answer} for question in QUESTIONS]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = [{"question": QUESTIONS[0], "id": 7}, {"prompt": QUESTIONS[1]}]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    return folder


def run(repository, folder, script, *flags, stdin=""):
    return subprocess.run(
        [sys.executable, script, f"--config={repository}/configs/default.py", *flags],
        cwd=repository,
        env=os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "JAX_PLATFORMS": "cpu"},
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(repository, folder):
    done = run(
        repository,
        folder,
        "train_classifier.py",
        f"--config.model={folder}/model",
        f"--config.forget={folder}/forget.jsonl",
        f"--config.retain={folder}/retain.jsonl",
        f"--config.feature_store={folder}/features",
        f"--config.workdir={folder}/run",
        "--config.epochs=6",
        "--config.warmup_epochs=2",
        "--config.rank=3",
        "--config.base_temperature=1.5",
        "--config.holdout_fraction=0.25",
    )
    assert done.returncode == 0, done.stderr
    return done


def test_training_leaves_a_head_that_says_what_it_is(trained, folder):
    head = t3jax.load_head(folder / "run" / "head")
    assert head.config == t3jax.HeadConfig(32, 264, rank=3)
    assert (head.base_temperature, head.guidance_scale) == (1.5, 1.0)
    assert head.model == f"{folder}/model"
    lines = read_lines(folder / "run" / "metrics.jsonl")
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert f"{folder}/run/head" in trained.stdout


def test_sampling_writes_base_and_unlearned_answers(trained, repository, folder):
    done = run(
        repository,
        folder,
        "sample.py",
        f"--config.model={folder}/model",
        f"--config.head={folder}/run/head",
        f"--config.prompts={folder}/prompts.jsonl",
        f"--config.output={folder}/new/answers.jsonl",
        "--config.max_new_tokens=12",
    )
    assert done.returncode == 0, done.stderr
    assert "T = 1.5, s = 1" in done.stderr  # the head's own
    lines = read_lines(folder / "new" / "answers.jsonl")
    assert [(line.get("question"), line.get("prompt")) for line in lines] == [
        (QUESTIONS[0], None),
        (None, QUESTIONS[1]),
    ]
    assert lines[0]["id"] == 7
    lm = t3jax.load_lm(folder / "model")
    unlearned = t3jax.Sampler(lm, t3jax.load_head(folder / "run" / "head"))
    for sampler, name in ((t3jax.Sampler(lm), "base"), (unlearned, "unlearned")):
        expected = sampler.generate(QUESTIONS[:2], max_new_tokens=12)
        assert [line[name] for line in lines] == [sample.text for sample in expected]
        assert [line[f"{name}_tokens"] for line in lines] == [s.tokens for s in expected]


def test_a_typed_prompt_is_answered_by_both(trained, repository, folder):
    done = run(
        repository,
        folder,
        "sample.py",
        f"--config.model={folder}/model",
        f"--config.head={folder}/run/head",
        "--config.base_temperature=3.5",
        "--config.max_new_tokens=5",
        stdin=f"{QUESTIONS[0]}\n\n",
    )
    assert done.returncode == 0, done.stderr
    assert "T = 3.5, s = 1" in done.stderr
    lines = [line for line in done.stdout.splitlines() if " | " in line]
    assert [line.split(" | ")[0].strip() for line in lines] == ["base", "unlearned"]


def test_fine_tuning_writes_a_model_that_opens(repository, folder):
    done = run(
        repository,
        folder,
        "finetune.py",
        f"--config.model={folder}/model",
        f"--config.finetune_data=('{folder}/retain.jsonl', '{folder}/forget.jsonl')",
        f"--config.finetune_validation=('{folder}/forget.jsonl',)",
        f"--config.finetune_workdir={folder}/tuned",
        "--config.finetune_epochs=4",
        "--config.finetune_warmup_steps=1",
        "--config.finetune_learning_rate=0.01",
    )
    assert done.returncode == 0, done.stderr
    assert f"written: {folder}/tuned/model" in done.stdout
    losses = [line["validation_loss"] for line in read_lines(folder / "tuned" / "metrics.jsonl")]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    base, tuned = t3jax.load_lm(folder / "model"), t3jax.load_lm(folder / "tuned" / "model")
    assert tuned.eos_ids == base.eos_ids
    assert tuned.tokenizer.get_vocab() == base.tokenizer.get_vocab()
    assert tuned.tokenizer.chat_template == base.tokenizer.chat_template
    assert (tuned.params["embed"]["weight"] != base.params["embed"]["weight"]).any()


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("sample.py", ["--config.temprature=1"], "unknown config key"),
        ("sample.py", ["--config.model=/no/such/folder"], "/no/such/folder: no such folder"),
        ("train_classifier.py", ["--config.model=x"], "not in the config: ['forget', 'retain'"),
        ("finetune.py", ["--config.model=x"], "not in the config: ['finetune_workdir'"),
    ],
)
def test_errors_are_one_clear_line(repository, folder, script, flags, message):
    done = run(repository, folder, script, *flags)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
