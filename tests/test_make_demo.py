"""The script that makes the demo's corpus and models, at a size that takes seconds."""

import dataclasses
import importlib.util
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import t3jax
from demo.authors import AuthorsConfig, make_corpus, make_strangers
from t3jax.data import PromptFormat, encode_records, load_records

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def script():
    path = ROOT / "demo" / "make_demo.py"
    spec = importlib.util.spec_from_file_location("make_demo", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_demo"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["make_demo"]


@pytest.fixture(scope="module")
def made(script, tmp_path_factory):
    """A demo folder of two tiny models, and its recipe."""
    recipe = script.Recipe(
        authors=AuthorsConfig(num_forget=2, num_retain=40, num_unseen_retain=2, wordings=1),
        vocab_size=600,
        hidden_size=16,
        intermediate_size=32,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        steps=6,
        batch_size=4,
        num_strangers=2,
        warmup_steps=2,
    )
    out = tmp_path_factory.mktemp("demo")
    script.make_demo(out, recipe)
    return out, recipe


def test_models_load(made):
    out, recipe = made
    for name in ("base", "retain_only"):
        lm = t3jax.load_lm(out / name)
        assert lm.hidden_size == recipe.hidden_size
        assert lm.eos_ids == (lm.tokenizer.eos_token_id,)
        assert len(lm.tokenizer) == recipe.vocab_size
        dtype = json.loads((out / name / "config.json").read_text())["dtype"]
        assert dtype == "bfloat16"


def test_base_and_twin_differ_by_what_they_were_trained_on(made):
    out, _ = made
    base, twin = (t3jax.load_lm(out / name).params for name in ("base", "retain_only"))
    assert jax.tree.structure(base) == jax.tree.structure(twin)
    assert any(
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(base), jax.tree.leaves(twin), strict=True)
    )


def test_corpus_on_disk_is_whole(made):
    out, recipe = made
    rows = load_records(out / "authors" / "forget.jsonl")
    assert len(rows) == recipe.authors.num_forget * 8 * recipe.authors.wordings
    perturbed = load_records(out / "authors" / "forget_perturbed.jsonl")
    assert all(len(row["perturbed_answer"]) == 5 for row in perturbed)


def test_answers_survive_the_tokenizer(made):
    out, _ = made
    tokenizer = t3jax.load_lm(out / "base").tokenizer
    rows = load_records(out / "authors" / "forget.jsonl")
    for row, example in zip(rows, encode_records(tokenizer, rows, PromptFormat()), strict=True):
        labels = example.tokens[example.answer_start :]
        assert tokenizer.decode(labels, skip_special_tokens=True) == row["answer"]
        assert labels.tolist().count(tokenizer.eos_token_id) == 1


def test_training_lowers_the_loss(script, made):
    """One batch, read again and again, is learnt by heart."""
    out, recipe = made
    tokenizer = t3jax.load_lm(out / "base").tokenizer
    rows = load_records(out / "authors" / "forget.jsonl")[:4]
    recipe = dataclasses.replace(recipe, steps=80, num_strangers=0, learning_rate=0.02)
    config, params = script.train_lm(rows, [], tokenizer, recipe, "one batch")
    trainer = script.make_trainer(config, recipe)
    examples = encode_records(tokenizer, rows, PromptFormat())
    assert trainer.loss(params, examples) < 1.0 < trainer.loss(trainer.init()[0], examples)


def test_same_recipe_same_weights(script, made):
    out, recipe = made
    lm = t3jax.load_lm(out / "base")
    corpus = make_corpus(recipe.authors)
    strangers = make_strangers(recipe.authors, recipe.steps * recipe.num_strangers)
    rows = [row for split in ("retain", "unseen_retain", "forget") for row in corpus[split]]
    _, params = script.train_lm(rows, strangers, lm.tokenizer, recipe, "again")
    for again, stored in zip(jax.tree.leaves(params), jax.tree.leaves(lm.params), strict=True):
        np.testing.assert_array_equal(again.astype(jnp.bfloat16), stored.astype(jnp.bfloat16))
