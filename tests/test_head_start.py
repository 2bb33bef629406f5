"""A start for heads that is meta-learned on simulated requests."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from configs import default, paper
from t3jax.features import Features
from t3jax.head import HeadConfig, target_scores
from t3jax.head_io import Head
from t3jax.lora_ml import head_start
from t3jax.lora_ml.head_start import MetaConfig, meta_learn_head
from t3jax.training import TrainConfig, train_heads

SHAPE = HeadConfig(hidden_size=8, vocab_size=30, rank=4)
CONFIG = MetaConfig(requests=60, group=5, groups=1, steps=5, tokens=32, learning_rate=1e-2)


def make_features(authors, seed, rows=5):
    """Texts of 4 tokens; an author is a direction of the features, and noise is added."""
    rng = np.random.default_rng(seed)
    pooled = np.repeat(authors, rows * 4, axis=0) + 0.5 * rng.normal(size=(len(authors) * 20, 8))
    targets = rng.integers(0, 30, len(pooled)).astype(np.int32)
    return Features(pooled.astype(np.float32), targets, np.arange(0, len(pooled) + 1, 4))


def held_out_loss(head, retain, forget):
    losses = []
    for features, sign in ((retain, 1), (forget, -1)):
        scores = target_scores(
            head.params, jnp.asarray(features.pooled), jnp.asarray(features.targets)
        )
        losses.append(np.logaddexp(0, -sign * np.asarray(scores)).mean())
    return np.mean(losses)


def test_few_rows_are_enough_from_a_start_that_knows_what_tells_authors_apart():
    authors = 2 * np.random.default_rng(0).normal(size=(13, 8))
    retain, forget = make_features(authors[:12], 1), make_features(authors[12:], 2)
    tests = make_features(authors[:12], 3), make_features(authors[12:], 4)
    learned = Head(SHAPE, meta_learn_head(retain, SHAPE, CONFIG), 1.0, 1.0, "")
    few, recipe = forget.select([0, 1]), TrainConfig(epochs=20)
    plain, quick = (
        train_heads(retain, few, SHAPE, recipe, init=init)[0] for init in (None, learned)
    )
    assert held_out_loss(quick, *tests) < held_out_loss(plain, *tests) - 0.05


def test_the_seed_decides_the_start():
    retain = make_features(np.eye(8), 1)
    few = dataclasses.replace(CONFIG, requests=3)
    first, again, other = (
        meta_learn_head(retain, SHAPE, dataclasses.replace(few, seed=seed))["output"]
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.01


def test_what_cannot_be_simulated_is_refused():
    with pytest.raises(ValueError, match="5 retain rows are 1 groups of 5: expected more than the"):
        meta_learn_head(make_features(np.eye(8)[:1], 1), SHAPE, CONFIG)
    config = tiny.make_settings(default, dict.fromkeys(("model", "retain", "workdir"), "x"))
    with pytest.raises(ValueError, match="for the loss 'classifier' alone"):
        head_start.main(config)
    with pytest.raises(ValueError, match="retain"):
        head_start.main(tiny.make_settings(paper))
