"""The examples in docstrings are what Python prints."""

import doctest
import importlib
import json

import jax
import jax.numpy as jnp
import pytest

import t3jax

MODULES = ("guidance", "head", "pooling", "refinements")


@pytest.mark.parametrize("name", MODULES)
def test_examples_print_what_they_say(name):
    module = importlib.import_module(f"t3jax.{name}")
    names = {"jax": jax, "jnp": jnp, "t3jax": t3jax}
    tests = doctest.DocTestFinder().find(module, extraglobs=names)
    examples = [test for test in tests if test.examples]
    assert len(examples) >= 2
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for test in examples:
        assert runner.run(test).failed == 0, test.name


def test_the_notebook_runs_and_shows_what_it_says(repository, tmp_path, monkeypatch):
    cells = json.loads((repository / "examples" / "first_steps.ipynb").read_text())["cells"]
    for name in ("demo", "configs"):
        (tmp_path / name).symlink_to(repository / name)
    monkeypatch.chdir(tmp_path)
    names = {}
    for cell in cells:
        assert not cell.get("outputs"), "clear the outputs before committing"
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    recalls = names["recalls"]
    assert recalls["forget", "base"] > 0.95
    assert recalls["forget", "unlearned"] < 0.6
    assert recalls["retain", "unlearned"] > 0.9
