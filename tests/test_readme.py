"""README's commands and Python lines, run as they stand there (with short training)."""

import json
import os
import re
import shlex
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import t3jax

SHORT = ["--config.epochs=2", "--config.warmup_epochs=1"]


@pytest.fixture(scope="module")
def readme(repository):
    return (repository / "README.md").read_text()


@pytest.fixture(scope="module")
def here(repository, tmp_path_factory):
    """A folder that looks like the checkout, where what the commands write may stay."""
    here = tmp_path_factory.mktemp("checkout")
    for name in ("configs", "demo", "sample.py", "train_classifier.py", "evaluate.py"):
        (here / name).symlink_to(repository / name)
    for name in ("forget", "retain"):
        lines = (repository / "demo" / "authors" / f"{name}.jsonl").read_text().splitlines()
        (here / f"{name}.jsonl").write_text("\n".join(lines[:20]) + "\n")
    (here / "prompts.jsonl").write_text(json.dumps({"question": "Who is Ada Novak?"}) + "\n")
    return here


def commands(readme):
    """README's `python ...` lines, continuation lines joined, comments dropped."""
    text = readme.replace("\\\n", " ").replace("FOLDER_OR_HUB_ID", "demo/base")
    found = re.findall(r"^    (python (?:train_classifier|sample)\.py .*)$", text, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in found]


@pytest.fixture(scope="module")
def ran(readme, here):
    """All of them, in order."""
    done = []
    for command in commands(readme):
        short = SHORT if command[1] == "train_classifier.py" else ["--config.max_new_tokens=8"]
        environment = os.environ | {"XDG_CACHE_HOME": str(here / "cache"), "JAX_PLATFORMS": "cpu"}
        done.append(
            subprocess.run(
                [sys.executable, *command[1:], *short],
                cwd=here,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
                timeout=300,
            )
        )
    return done


def test_every_command_runs(ran, here):
    assert len(ran) == 4
    for done in ran:
        assert done.returncode == 0, done.stderr
    assert "unlearned |" in ran[1].stdout
    answers = [json.loads(line) for line in (here / "answers.jsonl").open()]
    assert {"question", "base", "unlearned", "base_tokens"} <= set(answers[0])


def test_the_python_lines_run(ran, readme, here, monkeypatch):
    monkeypatch.chdir(here)
    names = {
        "logits": jnp.zeros((1, 1536)),
        "hidden": jax.random.normal(jax.random.key(0), (1, 5, 128)),
        "mask": jnp.ones((1, 5), bool),
    }
    for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL):
        exec(block, names)
    assert isinstance(names["texts"], list)
    expected = t3jax.tilt(t3jax.tempered_logprobs(names["logits"], 2.5), names["scores"], 1.0)
    assert jnp.array_equal(names["guided"], expected)
