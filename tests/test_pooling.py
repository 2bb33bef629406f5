"""The causal mean: its definition, padding anywhere, and the running form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t3jax import pooling
from t3jax.pooling import causal_mean, running_mean

TIME, WIDTH = 7, 3
MASKS = {
    "none": [1, 1, 1, 1, 1, 1, 1],
    "left": [0, 0, 1, 1, 1, 1, 1],
    "right": [1, 1, 1, 1, 0, 0, 0],
    "inner": [0, 1, 0, 0, 1, 1, 0],
    "all": [0, 0, 0, 0, 0, 0, 0],
}


def draw(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def by_loop(hidden, mask):
    """The mean of the attended rows up to each position, one at a time, in float64."""
    out = np.zeros_like(hidden, np.float64)
    for t in range(len(hidden)):
        attended = hidden[: t + 1][mask[: t + 1]].astype(np.float64)
        out[t] = attended.mean(axis=0) if len(attended) else 0.0
    return out


@pytest.mark.parametrize("padding", MASKS)
def test_definition(padding):
    hidden, mask = draw(TIME, WIDTH), np.array(MASKS[padding], bool)
    found = causal_mean(jnp.asarray(hidden), jnp.asarray(mask))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, by_loop(hidden, mask), atol=1e-6)


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("garbage", [np.nan, np.inf])
def test_what_is_masked_is_never_read(padding, garbage):
    hidden, mask = draw(TIME, WIDTH), np.array(MASKS[padding], bool)
    spoilt = np.where(mask[:, None], hidden, garbage)
    clean = causal_mean(jnp.asarray(hidden), jnp.asarray(mask))
    np.testing.assert_array_equal(causal_mean(jnp.asarray(spoilt), jnp.asarray(mask)), clean)
    running = running_mean(jnp.asarray(spoilt), jnp.asarray(mask))
    np.testing.assert_allclose(running.mean, clean[-1], atol=1e-6)
    grad = jax.grad(lambda x: jnp.sum(causal_mean(x, jnp.asarray(mask)) ** 2))(jnp.asarray(spoilt))
    assert np.isfinite(grad).all()
    assert not np.asarray(grad)[~mask].any()


def test_left_and_right_padding_agree():
    hidden = draw(4, WIDTH)
    padding = np.full((3, WIDTH), 9.0, np.float32)
    mask = np.ones(4, bool)
    no = np.zeros(3, bool)
    left = causal_mean(
        jnp.asarray(np.concatenate([padding, hidden])), jnp.asarray(np.concatenate([no, mask]))
    )
    right = causal_mean(
        jnp.asarray(np.concatenate([hidden, padding])), jnp.asarray(np.concatenate([mask, no]))
    )
    np.testing.assert_allclose(left[3:], right[:4], atol=1e-6)


def test_it_is_causal():
    hidden = draw(TIME, WIDTH)
    mask = jnp.ones(TIME, bool)
    later = hidden.copy()
    later[4:] += 100
    before, after = (causal_mean(jnp.asarray(x), mask) for x in (hidden, later))
    np.testing.assert_array_equal(before[:4], after[:4])
    assert (np.abs(before[4:] - after[4:]) > 1).all()


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_any_leading_axes(batch):
    hidden = draw(*batch, TIME, WIDTH)
    mask = np.random.default_rng(1).random((*batch, TIME)) < 0.6
    found = causal_mean(jnp.asarray(hidden), jnp.asarray(mask))
    running = running_mean(jnp.asarray(hidden), jnp.asarray(mask))
    assert found.shape == hidden.shape
    assert running.total.shape == (*batch, WIDTH)
    assert running.count.shape == batch
    for index in np.ndindex(*batch):
        np.testing.assert_allclose(found[index], by_loop(hidden[index], mask[index]), atol=1e-6)
    np.testing.assert_allclose(running.mean, found[..., -1, :], atol=1e-6)


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("prompt", [1, 3])
def test_running_form_follows_the_whole_one(padding, prompt):
    """A prompt, then one position at a time, as in decoding."""
    hidden, mask = (
        jnp.asarray(draw(2, TIME, WIDTH)),
        np.array([MASKS[padding], MASKS["left"]], bool),
    )
    mask = jnp.asarray(mask)
    whole = causal_mean(hidden, mask)
    state = running_mean(hidden[:, :prompt], mask[:, :prompt])
    step = jax.jit(running_mean)
    for t in range(prompt, TIME):
        np.testing.assert_allclose(state.mean, whole[:, t - 1], atol=1e-6)
        state = step(hidden[:, t : t + 1], mask[:, t : t + 1], state)
    np.testing.assert_allclose(state.mean, whole[:, -1], atol=1e-6)
    np.testing.assert_array_equal(state.count, jnp.sum(mask, axis=-1).astype(jnp.float32))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_states_are_summed_in_float32(dtype):
    """4,000 ones in bfloat16 would stop at 256."""
    hidden, mask = jnp.ones((4000, 2), dtype), jnp.ones(4000, bool)
    running = running_mean(hidden, mask)
    assert running.total.dtype == jnp.float32
    np.testing.assert_array_equal(running.total, 4000.0)
    np.testing.assert_allclose(causal_mean(hidden, mask), 1.0, rtol=1e-6)


def test_jit_and_vmap_change_nothing():
    hidden, mask = jnp.asarray(draw(4, TIME, WIDTH)), jnp.asarray(draw(4, TIME) > 0)
    expected = causal_mean(hidden, mask)
    np.testing.assert_allclose(jax.jit(causal_mean)(hidden, mask), expected, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(causal_mean)(hidden, mask), expected, atol=1e-6)


def test_features_of_a_prefix_are_the_mean_the_last_state_or_both():
    mean, last = jnp.zeros((2, 3)), jnp.ones((2, 3), jnp.bfloat16)
    assert pooling.prefix_features(mean, last).shape == (2, 3)
    np.testing.assert_array_equal(pooling.prefix_features(mean, last, "last"), np.ones((2, 3)))
    both = pooling.prefix_features(mean, last, "mean+last")
    assert both.dtype == jnp.float32
    assert both.shape[-1] == pooling.feature_size("mean+last", 3)
    np.testing.assert_array_equal(both, np.tile([0, 0, 0, 1, 1, 1], (2, 1)))
