"""LoRA-ML of a language model: a base and an adapter for each task, trained together."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from test_finetuning import CONFIG, RECIPE, examples, write_model

from configs import default
from t3jax import make_mesh, pipeline
from t3jax.finetuning import Trainer, finetune, merge_lora
from t3jax.settings import replace

META = dataclasses.replace(RECIPE, lora_rank=4, lora_layers=("q", "down"), tasks=2)
REPTILE = dataclasses.replace(META, reptile=True, inner_steps=3)
TASKS = [examples(16, seed=1), examples(8, seed=2)]


def run(folder=None, recipe=META, tasks=TASKS):
    return finetune(CONFIG, tiny.make_params(CONFIG), tasks, recipe, workdir=folder)


def make_trainer(recipe=META):
    return Trainer(
        CONFIG, tiny.make_params(CONFIG), recipe, 4, make_mesh(devices=jax.devices()[:1])
    )


def test_the_loss_of_a_step_is_the_mean_over_the_base_with_each_adapter():
    trainer = make_trainer()
    plain = make_trainer(dataclasses.replace(RECIPE, lora_rank=0))
    state = trainer.init()
    rows = [each[:8] for each in TASKS]
    for _ in range(3):
        merged = [
            merge_lora(state[0]["base"], state[0]["adapters"][task], META.lora_scale)
            for task in ("0", "1")
        ]
        expected = [plain.loss(w, each) for w, each in zip(merged, rows, strict=True)]
        before = jax.device_get(state[0])
        state, loss, _ = trainer.step(state, *rows)
        np.testing.assert_allclose(loss, np.mean(expected), rtol=1e-4)
    # A held-out loss is the base's, without an adapter.
    found = trainer.loss(state[0], rows[0])
    np.testing.assert_allclose(found, plain.loss(state[0]["base"], rows[0]), rtol=1e-5)
    down = "layers/0/mlp/down"
    adapters = state[0]["adapters"]
    assert np.abs(adapters["0"][down]["b"] - adapters["1"][down]["b"]).max() > 1e-3
    weights = [tree["base"]["layers"][0]["mlp"]["up"]["weight"] for tree in (before, state[0])]
    assert np.abs(weights[0] - weights[1]).max() > 1e-4


def test_the_gradient_of_the_base_is_the_mean_over_tasks():
    """Adapters of product 0 change nothing; clipping, by the norm of all gradients, is far away."""
    rows = examples(8, seed=5)
    joint = make_trainer(dataclasses.replace(META, clip_norm=1e3))
    alone = make_trainer(dataclasses.replace(RECIPE, clip_norm=1e3))
    found, _, _ = joint.step(joint.init(), rows, rows)
    expected, _, _ = alone.step(alone.init(), rows)
    found, expected = (optax.tree.get(state[1], "mu") for state in (found, expected))
    chex.assert_trees_all_close(found["base"], expected, rtol=1e-2, atol=1e-6)


def test_an_interrupted_joint_run_ends_with_the_same_bits(tmp_path, monkeypatch):
    expected = run(tmp_path / "whole")
    step, calls = Trainer.step, []

    def stop(self, state, *rows):
        calls.append([len(each) for each in rows])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(self, state, *rows)

    monkeypatch.setattr(Trainer, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped")
    chex.assert_trees_all_equal(run(tmp_path / "stopped"), expected)
    assert calls == [[8, 8]] * 6  # the smaller task begins anew in each step
    assert set(expected) == set(tiny.make_params(CONFIG))  # no adapter is left
    with pytest.raises(ValueError, match=r"\.lora_rank: 4 there, 2 asked for"):
        run(tmp_path / "whole", dataclasses.replace(META, lora_rank=2))


def test_a_round_of_reptile_moves_the_base_by_the_mean_of_the_adapters():
    trainer = make_trainer(REPTILE)
    rows = [each[:8] for each in TASKS]
    start = trainer.init()
    first, factors = jax.tree.map(jnp.array, (start[0]["base"], start[0]["adapters"]))
    state, losses = start, []
    for _ in range(3):
        state, loss, norm = trainer.step(state, *rows)
        losses.append(loss)
    assert losses[2] < losses[0]
    assert norm > 0
    chex.assert_trees_all_equal(state[0]["base"], first)
    adapters = jax.tree.map(jnp.array, state[0]["adapters"])
    ended, _ = trainer.end_round(state, 3)
    expected = jax.tree.map(
        lambda *leaves: np.mean(leaves, axis=0),
        *(merge_lora(first, adapters[task], REPTILE.lora_scale) for task in ("0", "1")),
    )
    chex.assert_trees_all_close(ended["base"], expected, rtol=1e-5, atol=1e-6)
    down = "layers/0/mlp/down"
    assert not np.any(ended["adapters"]["0"][down]["b"])
    assert np.abs(ended["adapters"]["0"][down]["a"] - factors["0"][down]["a"]).max() > 1e-3
    # A held-out loss is the base's, without an adapter.
    plain = make_trainer(dataclasses.replace(RECIPE, lora_rank=0))
    expected_loss = plain.loss(ended["base"], rows[0])
    np.testing.assert_allclose(trainer.loss(ended, rows[0]), expected_loss, rtol=1e-5)


def test_a_stopped_run_of_reptile_ends_with_the_same_bits(tmp_path, monkeypatch):
    expected = run(tmp_path / "whole", REPTILE)
    end_round, calls = Trainer.end_round, []

    def stop(self, state, step):
        calls.append(step)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return end_round(self, state, step)

    monkeypatch.setattr(Trainer, "end_round", stop)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", REPTILE)
    chex.assert_trees_all_equal(run(tmp_path / "stopped", REPTILE), expected)
    assert calls == [3, 4, 3, 4]  # resumed within a round; the last round may be a short one
    assert set(expected) == set(tiny.make_params(CONFIG))


def test_a_config_asks_for_it(tmp_path, monkeypatch):
    write_model(tmp_path / "base")
    for name, count in (("a", 2), ("b", 3)):
        rows = [{"question": f"Who is {name}?", "answer": f"{name} is {name}."}] * count
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {
        "model": str(tmp_path / "base"),
        "finetune.workdir": str(tmp_path / "run"),
        "finetune.data": tuple(str(tmp_path / f"{name}.jsonl") for name in ("a", "b")),
        "finetune.meta": "joint",
    }
    config = tiny.make_settings(default, fields)
    with pytest.raises(ValueError, match="give a lora_rank of 1 or more"):
        pipeline.finetune_config(config)
    config = replace(config, **{"finetune.lora_rank": 2})

    assert not pipeline.finetune_config(config).reptile
    assert pipeline.finetune_config(replace(config, **{"finetune.meta": "reptile"})).reptile

    def asked(lm_config, params, tasks, recipe, **options):
        assert [len(each) for each in tasks] == [2, 3]
        assert recipe.tasks == 2
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
        raise InterruptedError("as asked")

    monkeypatch.setattr(pipeline.models, "train_weights", asked)
    with pytest.raises(InterruptedError, match="as asked"):
        pipeline.finetune_once(config, make_mesh(devices=jax.devices()[:1]))


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="need 2 tasks or more"):
        dataclasses.replace(META, tasks=1)
    with pytest.raises(ValueError, match="Reptile needs tasks"):
        dataclasses.replace(RECIPE, reptile=True)
    with pytest.raises(ValueError, match="expected the texts of 2 tasks, got those of 1"):
        run(tasks=TASKS[:1])
    with pytest.raises(ValueError, match="no examples"):
        run(tasks=[TASKS[0], []])
