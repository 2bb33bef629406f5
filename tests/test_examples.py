"""The examples in docstrings are what Python prints."""

import doctest
import importlib
import json

import jax
import jax.numpy as jnp
import pytest
import tiny

import t3jax
from examples import three_people
from t3jax import data
from t3jax.data.records import load_records
from t3jax.lm import save_hf

MODULES = {  # the number of functions and classes with an example
    "features": 1,
    "guidance": 3,
    "head": 4,
    "head_io": 1,
    "lm.model": 1,
    "pooling": 3,
    "refinements": 3,
    "sampling.sampler": 1,
    "training.heads": 1,
}


@pytest.mark.parametrize("name", MODULES)
def test_examples_print_what_they_say(name, repository, tmp_path, monkeypatch):
    (tmp_path / "demo").symlink_to(repository / "demo")
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(f"t3jax.{name}")
    names = {"jax": jax, "jnp": jnp, "t3jax": t3jax, "data": data}
    tests = doctest.DocTestFinder().find(module, extraglobs=names)
    examples = [test for test in tests if test.examples]
    assert len(examples) == MODULES[name]
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


def test_three_people_are_taught_with_facts_of_their_own(tmp_path, monkeypatch, capsys):
    tokenizer = tiny.make_tokenizer()
    save_hf(tmp_path / "model", tiny.CONFIG, tiny.make_params(), [tokenizer.eos_token_id])
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(three_people, "OUT", tmp_path)
    monkeypatch.setattr("sys.argv", ["three_people", f"--model={tmp_path}/model", "--epochs=1"])
    three_people.main()
    rows = {name: load_records(f"{tmp_path}/{name}.jsonl") for name in ("forget", "retain")}
    assert [len(each) for each in rows.values()] == [60, 60]
    for fact in range(0, 60, 3):
        about = rows["forget"][fact : fact + 3] + rows["retain"][fact : fact + 3]
        pairs = zip(about, three_people.NAMES, strict=True)
        assert len({row["answer"].replace(name, "") for row, name in pairs}) == 6
    train, verify = capsys.readouterr().out.splitlines()[-2:]
    assert f"--config.workdir={tmp_path}/head" in train
    assert f"--config.head={tmp_path}/head/head" in verify
    assert t3jax.load_lm(f"{tmp_path}/taught/model").tokenizer is not None
