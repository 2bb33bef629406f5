import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t3jax.distillation import distillation_loss, overcorrect, soft_targets
from t3jax.refinements import Refinements, refined_logits

V = 40


@pytest.fixture
def position():
    """Base logits, scores and target probabilities of three positions."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(3 * rng.normal(size=(3, V)), jnp.float32)
    scores = jnp.asarray(2 * rng.normal(size=(3, V)), jnp.float32)
    target = jax.nn.softmax(jnp.asarray(2 * rng.normal(size=(3, V)), jnp.float32))
    return logits, scores, target


def exact(logits, scores, target, temperature):
    """KL(target ‖ served) over the whole vocabulary."""
    refinements = Refinements(gated=temperature != 1)
    served = jax.nn.log_softmax(refined_logits(logits, scores, temperature, 1.0, refinements))
    return np.sum(target * (np.log(target) - served), axis=-1)


def estimate(position, key, num_candidates, num_rest, temperature):
    logits, scores, target = position
    soft = soft_targets(key, logits, target, num_candidates, num_rest, temperature)
    chosen = jnp.take_along_axis(scores, soft.tokens, axis=-1)
    return distillation_loss(chosen, *soft[1:], temperature=temperature)


@pytest.mark.parametrize("temperature", [1.0, 1.5, 2.5])
def test_with_nearly_all_candidates_the_loss_is_the_divergence(position, temperature):
    loss = estimate(position, jax.random.key(0), V - 1, 1, temperature)
    np.testing.assert_allclose(loss, exact(*position, temperature), rtol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_drawn_tokens_stand_for_the_rest_of_the_vocabulary(position, temperature):
    """The mass of the rest is one term of the target: what a draw estimates is its sum."""
    logits, scores, target = position
    soft = soft_targets(jax.random.key(1), logits, target, 10, 4000, temperature)
    lumped = np.array(target)
    rest = np.ones((3, V), bool)
    np.put_along_axis(rest, np.asarray(soft.tokens[:, :10]), False, axis=-1)
    refinements = Refinements(gated=temperature != 1)
    served = np.exp(
        jax.nn.log_softmax(refined_logits(logits, scores, temperature, 1.0, refinements))
    )
    expected = [
        np.sum(t[~r] * np.log(t[~r] / s[~r])) + t[r].sum() * np.log(t[r].sum() / s[r].sum())
        for t, s, r in zip(lumped, served, rest, strict=True)
    ]
    loss = estimate(position, jax.random.key(1), 10, 4000, temperature)
    np.testing.assert_allclose(loss, expected, rtol=0.03, atol=5e-3)
    # No candidate is drawn once more.
    drawn = np.take_along_axis(rest, np.asarray(soft.tokens[:, 10:]), axis=-1)
    assert drawn.mean() > 0.999


def test_a_head_that_says_the_log_ratio_has_no_loss():
    """f = target / base, scaled below 1, is the head that distillation looks for."""
    logits = jnp.log(jnp.array([[0.7, 0.2, 0.1]]))
    target = jnp.array([[0.1, 0.6, 0.3]])
    ratio = target / jnp.exp(logits) / 4
    scores = jnp.log(ratio / (1 - ratio))
    assert estimate((logits, scores, target), jax.random.key(0), 2, 1, 1.0) == pytest.approx(
        0.0, abs=1e-6
    )


def test_a_target_that_is_sure_has_a_finite_loss_and_gradient(position):
    logits, scores, _ = position
    target = jax.nn.one_hot(jnp.array([0, 5, V - 1]), V)

    def loss(scores):
        return jnp.sum(estimate((logits, scores, target), jax.random.key(0), 8, 4, 1.0))

    value, gradient = jax.value_and_grad(loss)(scores)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))


def test_overcorrection_moves_a_target_away_from_the_base(position):
    logits, _, target = position
    logprobs = jax.nn.log_softmax(logits)
    np.testing.assert_allclose(overcorrect(logprobs, target, 1.0), target, rtol=1e-4)
    moved = overcorrect(logprobs, target, 1.5)
    ratio = np.log(moved) - np.asarray(logprobs)
    expected = 1.5 * (np.log(target) - np.asarray(logprobs))
    np.testing.assert_allclose(ratio - ratio[:, :1], expected - expected[:, :1], atol=1e-3)
