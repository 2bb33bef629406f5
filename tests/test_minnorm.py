"""MinNorm-OG: the projection, its theorems, the sine wave, and fine-tuning that projects."""

import dataclasses

import chex
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_finetuning import examples

from configs import default
from t3jax import pipeline
from t3jax.finetuning import FinetuneConfig, finetune
from t3jax.finetuning.batches import choose_outputs
from t3jax.minnorm import MinNormConfig, exactness, project, sine, span_coefficients

CONFIG = dataclasses.replace(tiny.CONFIG, num_layers=1)
RECIPE = FinetuneConfig(
    epochs=3,
    batch_size=8,
    warmup_steps=1,
    seed=3,
    checkpoint_every=1,
    minnorm=MinNormConfig(n_pert=6, share=0.5, decay=0.5, last_epochs=2),
)


def value(params, frozen, row):
    return jnp.tanh(row @ params["in"]) @ params["out"] + frozen


@pytest.mark.parametrize("block_bytes", [2**30, 1])
def test_what_is_taken_away_is_at_right_angles_to_every_gradient(block_bytes):
    rng = np.random.default_rng(0)
    params = {
        "in": jnp.asarray(rng.normal(size=(5, 7)), jnp.float32),
        "out": jnp.asarray(rng.normal(size=7), jnp.float32),
    }
    rows = jnp.asarray(rng.normal(size=(4, 5)), jnp.float32)
    frozen = jnp.float32(1)
    found = project(value, params, rows, 0.3, frozen, block_bytes)
    gradients = np.stack(
        [jax.flatten_util.ravel_pytree(jax.grad(value)(params, frozen, row))[0] for row in rows]
    ).astype(np.float64)
    theta, moved = (
        np.asarray(jax.flatten_util.ravel_pytree(tree)[0], np.float64) for tree in (params, found)
    )
    off = theta - gradients.T @ np.linalg.lstsq(gradients.T, theta, rcond=None)[0]
    np.testing.assert_allclose(moved, theta - 0.3 * off, atol=1e-6)
    assert np.linalg.norm(off) > 1


def test_gradients_that_depend_on_each_other_span_what_they_span():
    rng = np.random.default_rng(1)
    few, theta = rng.normal(size=(2, 30)), rng.normal(size=30)
    gradients = np.concatenate([few, few[:1] - few[1:], np.zeros((1, 30))])
    blocks = [(gradients[:, i : i + 7], theta[i : i + 7]) for i in range(0, 30, 7)]
    expected = few.T @ np.linalg.lstsq(few.T, theta, rcond=None)[0]
    np.testing.assert_allclose(gradients.T @ span_coefficients(blocks), expected, atol=1e-12)


def test_bad_numbers_are_refused():
    with pytest.raises(FloatingPointError, match="infinite or NaN gradient"):
        span_coefficients([(np.full((1, 2), np.nan), np.ones(2))])
    with pytest.raises(ValueError, match="no weights to project"):
        span_coefficients([])
    with pytest.raises(ValueError, match=r"share = 2.0: expected a number in \[0, 1\]"):
        MinNormConfig(share=2.0)
    with pytest.raises(ValueError, match=r"n_pert = 0: expected a whole number in \[1"):
        MinNormConfig(n_pert=0)
    with pytest.raises(ValueError, match=r"last_epochs = -1: expected a whole number in \[0"):
        MinNormConfig(last_epochs=-1)


def test_the_share_shrinks_after_each_projection_and_ends():
    config = MinNormConfig(share=0.8, decay=0.5, every=2, last_epochs=2)
    shares = [config.share_at(step, steps_per_epoch=2, epochs=5) for step in range(10)]
    np.testing.assert_allclose(shares, [0.8, 0.4, 0, 0, 0.2, 0.1, 0, 0, 0, 0])


@pytest.mark.parametrize("theorem", exactness.THEOREMS)
def test_theorems_hold_up_to_rounding(theorem):
    assert exactness.largest_deviation(theorem, 20) < 1e-9


# The sine wave.


def test_reduced_gradients_project_as_the_whole_ones_do():
    params = sine.init_perceptron(jax.random.key(0), width=12)
    x = np.linspace(-3, 3, 5).astype(np.float32)
    whole = jax.jacobian(sine.predict)(params, jnp.asarray(x))
    gradients = np.concatenate([leaf.reshape(5, -1) for leaf in jax.tree.leaves(whole)], axis=1)
    theta = np.asarray(jax.flatten_util.ravel_pytree(params)[0])
    found = jax.flatten_util.ravel_pytree(sine.project_one(params, x, 1.0))[0]
    expected = gradients.T @ span_coefficients([(gradients, theta)])
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("stale", [False, True])
def test_minnorm_alone_keeps_outputs_and_makes_weights_smaller(stale, monkeypatch):
    monkeypatch.setattr(
        sine, "init_perceptron", lambda key, draw=sine.init_perceptron: draw(key, 60)
    )
    (params, _), x, y = sine.init_fit([1, 2])
    # A rate of 0 leaves the projection alone, and AdamW's decay is a part of the rate.
    config = sine.SineConfig("minnorm", 3, 0.0, 0.01, 1.0, 1, 1, stale)
    found = sine.unlearn(config, params, x, y, [1, 2])
    kept = [jax.vmap(sine.predict)(tree, x[:, : sine.RETAIN]) for tree in (params, found)]
    np.testing.assert_allclose(kept[1], kept[0], atol=2e-3)
    norms = [float(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(t))) for t in (params, found)]
    assert 0.93 < norms[1] / norms[0] < 0.99  # two projections of 1 %


# Fine-tuning that projects.


def run(workdir=None, recipe=RECIPE):
    return finetune(CONFIG, tiny.make_params(CONFIG), examples(16), recipe, workdir=workdir)


def test_a_run_that_projects_resumes_to_the_same_bits(tmp_path, monkeypatch):
    from t3jax.finetuning import trainer

    whole = run()
    plain = run(recipe=dataclasses.replace(RECIPE, minnorm=None))
    assert not np.allclose(whole["embed"]["weight"], plain["embed"]["weight"], atol=1e-3)
    calls = []

    def stop(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return project(*args)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "project", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    chex.assert_trees_all_equal(run(tmp_path), whole)


def test_outputs_are_answer_tokens_of_each_text_alike():
    rows = examples(4)
    chosen = choose_outputs(rows, 10, 256, seed=1, step=2)
    again = choose_outputs(rows, 10, 256, seed=1, step=2)
    np.testing.assert_array_equal(chosen["place"], again["place"])
    counts = np.zeros(4, int)
    for tokens, place in zip(chosen["tokens"], chosen["place"], strict=True):
        (index,) = [
            i for i, r in enumerate(rows) if np.array_equal(tokens[: len(r.tokens)], r.tokens)
        ]
        counts[index] += 1
        assert rows[index].answer_start - 1 <= place < len(rows[index].tokens) - 1
    assert sorted(counts) == [2, 2, 3, 3]


def test_a_config_asks_for_projections():
    config = tiny.make_settings(default)
    assert pipeline.finetune_config(config).minnorm is None
    config = tiny.make_settings(default, {"minnorm.share": 0.2})
    assert pipeline.finetune_config(config).minnorm == MinNormConfig(share=0.2)
