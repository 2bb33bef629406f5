"""Tempering and tilting: their definition, their edges, their identities, their gradients."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from t3jax.guidance import guided_logits, tempered_logprobs, tilt
from t3jax.head import HeadConfig, head_scores, init_head

INF, MAX = np.inf, float(np.finfo(np.float32).max)
ROWS, VOCAB = 5, 16
# Rows with every edge: plain, some banned, all banned, huge, only one left and +inf among them.
EDGES = np.array(
    [
        [0.3, -1.2, 2.0, 0.0],
        [-INF, 1.0, -INF, 0.5],
        [-INF, -INF, -INF, -INF],
        [MAX, -MAX, 1e38, -3e38],
        [-INF, INF, -INF, -INF],
        [1e30, 1e30, -1e30, 1e30],
    ],
    np.float32,
)
SCORES = np.array(
    [
        [1.0, -2.0, 0.0, 5.0],
        [-INF, INF, 1.0, -INF],
        [-INF, -INF, -INF, -INF],
        [INF, INF, INF, INF],
        [MAX, -MAX, 1e20, -1e20],
    ],
    np.float32,
)


def draw(seed, shape=(ROWS, VOCAB), scale=3.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def columns(cases):
    """Each argument of a list of cases as one array, a row for each case."""
    return [jnp.asarray(np.array(part, np.float32)) for part in zip(*cases, strict=True)]


def log_softmax(x):
    """In float64, of rows of which something is not banned."""
    x = np.asarray(x, np.float64)
    shifted = x - x.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def log_sigmoid(x):
    return -np.logaddexp(0.0, -np.asarray(x, np.float64))


def close(found, expected, atol=1e-5):
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(found), expected, atol=atol, rtol=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5, 100.0])
@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0, 7.0])
def test_definition(temperature, scale):
    logits, scores = draw(0), draw(1)
    banned = draw(2) > 3
    logits = np.where(banned, -INF, logits)
    base = log_softmax(logits / temperature)
    guided = logits / temperature + scale * log_sigmoid(scores)
    tempered = tempered_logprobs(jnp.asarray(logits), temperature)
    close(tempered, base)
    close(tilt(tempered, jnp.asarray(scores), scale), log_softmax(guided))
    close(guided_logits(jnp.asarray(logits), jnp.asarray(scores), temperature, scale), guided)


def test_default_scale_is_one():
    logprobs, scores = jnp.asarray(draw(0)), jnp.asarray(draw(1))
    np.testing.assert_array_equal(tilt(logprobs, scores), tilt(logprobs, scores, 1.0))
    np.testing.assert_array_equal(
        guided_logits(logprobs, scores, 2.0), guided_logits(logprobs, scores, 2.0, 1.0)
    )


def test_guided_logits_are_the_two_steps_up_to_a_constant():
    logits, scores = jnp.asarray(draw(0)), jnp.asarray(draw(1))
    fused = guided_logits(logits, scores, 2.5, 1.5)
    steps = tilt(tempered_logprobs(logits, 2.5), scores, 1.5)
    difference = np.asarray(fused - steps)
    close(jnp.asarray(difference - difference[:, :1]), np.zeros_like(difference))
    close(jax.nn.log_softmax(fused), np.asarray(steps))


def test_strength_times_temperature_read_at_the_temperature():
    """T3 at (T, s) is plain guidance of strength T·s, read at softmax temperature T."""
    logits, scores = jnp.asarray(draw(0)), jnp.asarray(draw(1))
    plain = guided_logits(logits, scores, 1.0, 2.5 * 0.8)
    tempered = guided_logits(logits, scores, 2.5, 0.8)
    close(tempered, np.asarray(plain / 2.5))
    np.testing.assert_array_equal(jnp.argmax(plain, -1), jnp.argmax(tempered, -1))


def test_scale_zero_leaves_the_distribution_as_it_is():
    logits = jnp.asarray(np.concatenate([EDGES[:3], draw(3, (2, 4))]))
    scores = jnp.broadcast_to(jnp.asarray([[-INF, INF, -40.0, 3.0]]), logits.shape)
    logprobs = tempered_logprobs(logits, 2.5)
    close(tilt(logprobs, scores, 0.0), np.asarray(logprobs))
    np.testing.assert_array_equal(guided_logits(logits, scores, 1.0, 0.0), logits)


def test_a_tilt_moves_mass_to_tokens_that_score_higher():
    logprobs = tempered_logprobs(jnp.zeros((1, 3)), 1.0)
    tilted = np.asarray(tilt(logprobs, jnp.asarray([[4.0, 0.0, -4.0]]), 1.0))[0]
    sigmoid = 1 / (1 + np.exp([-4.0, 0.0, 4.0]))
    np.testing.assert_allclose(np.exp(tilted), sigmoid / sigmoid.sum(), rtol=1e-5)


def test_a_constant_added_to_the_logits_changes_nothing():
    logits, scores = jnp.asarray(draw(0)), jnp.asarray(draw(1))
    moved = tilt(tempered_logprobs(logits + 50.0, 2.5), scores)
    close(moved, np.asarray(tilt(tempered_logprobs(logits, 2.5), scores)), atol=2e-5)


def test_banned_tokens_stay_banned_and_all_banned_rows_are_all_banned():
    logits = jnp.asarray(EDGES)
    scores = jnp.broadcast_to(jnp.asarray([0.5, -1.0, 3.0, 0.0]), logits.shape)
    banned = np.isneginf(EDGES)
    for out in (
        tempered_logprobs(logits, 2.5),
        tilt(logits, scores, 1.0),
        guided_logits(logits, scores, 2.5, 1.0),
    ):
        np.testing.assert_array_equal(np.isneginf(out), banned)
    assert np.isneginf(tempered_logprobs(logits, 2.5)[2]).all()
    # The one token left has all the mass.
    assert tempered_logprobs(logits, 2.5)[4, 1] == 0.0


def test_a_token_that_surely_belongs_to_the_forget_set_is_banned():
    logprobs = tempered_logprobs(jnp.zeros((1, 3)), 1.0)
    out = np.exp(np.asarray(tilt(logprobs, jnp.asarray([[-INF, INF, 0.0]]), 1.0))[0])
    np.testing.assert_allclose(out, [0.0, 2 / 3, 1 / 3], rtol=1e-6)


def test_probabilities_sum_to_one_at_every_edge():
    cases = list(itertools.product(EDGES, SCORES, (0.0, 1.0, 1e30)))
    logits, scores, scale = columns(cases)
    out = np.asarray(tilt(tempered_logprobs(logits, 2.5), scores, scale))
    empty = np.isneginf(out).all(axis=-1)
    np.testing.assert_allclose(np.exp(out[~empty]).sum(axis=-1), 1.0, atol=1e-5)
    assert not np.isposinf(guided_logits(logits, scores, 2.5, scale)).any()
    # Nothing is left only where every token is banned, by its logit or by its score.
    banned = np.isneginf(logits) | (np.isneginf(scores) & (np.asarray(scale)[:, None] > 0))
    np.testing.assert_array_equal(empty, banned.all(axis=-1))


@pytest.mark.parametrize("form", ["two steps", "fused"])
def test_no_nan_in_values_and_gradients(form):
    """Every edge of logits and scores with every temperature and scale, one row for each."""
    temperatures, scales = (1e-30, 0.1, 1.0, 2.5, 1e30), (0.0, 1.0, 1e30)
    cases = list(itertools.product(EDGES, SCORES, temperatures, scales))
    logits, scores, t, s = columns(cases)
    function = {
        "two steps": lambda x, g, t, s: tilt(tempered_logprobs(x, t), g, s),
        "fused": guided_logits,
    }[form]

    def readings(x, g, t, s):
        """A token's value, the sum of all, a sum of what is not banned: whatever reads them."""
        out = function(x, g, t, s)
        finite = jnp.tanh(jnp.where(jnp.isfinite(out), out, 0.0) / 10)
        return jnp.stack([jnp.sum(out[..., 1]), jnp.sum(out), jnp.sum(finite)])

    assert not np.isnan(function(logits, scores, t, s)).any()
    by_row = jax.jit(jax.jacrev(readings, (0, 1, 2, 3)))(logits, scores, t, s)
    # One temperature and scale for all rows: their gradients are sums over the rows.
    by_scalar = jax.jit(jax.jacrev(readings, (0, 1, 2, 3)))(logits, scores, t[7], s[7])
    for grads in (by_row, by_scalar):
        for argument, grad in zip(("logits", "scores", "T", "s"), grads, strict=True):
            assert not np.isnan(grad).any(), f"gradient in {argument}"


def test_gradients_are_those_of_the_definition():
    logits, scores = jnp.asarray(draw(0)), jnp.asarray(draw(1))
    weights = jnp.asarray(draw(2))

    def ours(x, g, t, s):
        return jnp.sum(weights * tilt(tempered_logprobs(x, t), g, s))

    def plain(x, g, t, s):
        return jnp.sum(weights * jax.nn.log_softmax(x / t + s * jax.nn.log_sigmoid(g)))

    arguments = (logits, scores, jnp.float32(2.5), jnp.float32(1.3))
    expected = jax.grad(plain, (0, 1, 2, 3))(*arguments)
    for found, value in zip(jax.grad(ours, (0, 1, 2, 3))(*arguments), expected, strict=True):
        np.testing.assert_allclose(found, value, rtol=1e-4, atol=1e-4)


def test_temperature_and_scale_broadcast():
    logits, scores = jnp.asarray(draw(0)), jnp.asarray(draw(1))
    temperatures = np.linspace(1, 3, ROWS, dtype=np.float32)
    scales = np.linspace(0, 2, ROWS, dtype=np.float32)
    fused = guided_logits(logits, scores, jnp.asarray(temperatures), jnp.asarray(scales))
    steps = tilt(tempered_logprobs(logits, jnp.asarray(temperatures)), scores, jnp.asarray(scales))
    for row in range(ROWS):
        t, s = float(temperatures[row]), float(scales[row])
        close(fused[row], np.asarray(guided_logits(logits[row], scores[row], t, s)))
        close(steps[row], np.asarray(tilt(tempered_logprobs(logits[row], t), scores[row], s)))
    scalar = guided_logits(logits, scores, jnp.float32(2.5), jnp.asarray(2, jnp.int32))
    close(scalar, np.asarray(guided_logits(logits, scores, 2.5, 2.0)))


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (2, 1, 3)])
def test_any_leading_axes(batch):
    logits, scores = draw(0, (*batch, VOCAB)), draw(1, (*batch, VOCAB))

    @jax.jit
    def everything(logits, scores):
        tempered = tempered_logprobs(logits, 2.5)
        return guided_logits(logits, scores, 2.5, 1.0), tempered, tilt(tempered, scores)

    guided = logits / 2.5 + log_sigmoid(scores)
    expected = guided, log_softmax(logits / 2.5), log_softmax(guided)
    for found, value in zip(everything(logits, scores), expected, strict=True):
        close(found, value)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_inputs_are_computed_in_float32(dtype):
    logits, scores = jnp.asarray(draw(0)).astype(dtype), jnp.asarray(draw(1)).astype(dtype)
    wide = logits.astype(jnp.float32), scores.astype(jnp.float32)
    for found, expected in (
        (guided_logits(logits, scores, 2.5, 1.0), guided_logits(*wide, 2.5, 1.0)),
        (tempered_logprobs(logits, 2.5), tempered_logprobs(wide[0], 2.5)),
        (tilt(logits, scores, 1.0), tilt(*wide, 1.0)),
    ):
        assert found.dtype == jnp.float32
        np.testing.assert_array_equal(found, expected)
    assert np.isneginf(tempered_logprobs(jnp.full((2,), -INF, dtype), 2.0)).all()


def test_jit_and_vmap_change_nothing():
    logits, scores = jnp.asarray(draw(0)), jnp.asarray(draw(1))
    logits = logits.at[0].set(-INF).at[1, 3].set(-INF)
    temperatures, scales = jnp.linspace(1, 3, ROWS), jnp.linspace(0, 2, ROWS)

    def both(x, g, t, s):
        return guided_logits(x, g, t, s), tilt(tempered_logprobs(x, t), g, s)

    plain = both(logits, scores, temperatures, scales)
    for transform in (jax.jit(both), jax.vmap(both), jax.jit(jax.vmap(both))):
        for found, expected in zip(
            transform(logits, scores, temperatures, scales), plain, strict=True
        ):
            close(found, np.asarray(expected))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    x = jnp.zeros((2, 3))
    with pytest.raises(ValueError, match="temperature must be positive"):
        tempered_logprobs(x, temperature)
    with pytest.raises(ValueError, match="temperature must be positive"):
        guided_logits(x, x, temperature)


@pytest.mark.parametrize("scale", [-0.5, float("nan")])
def test_a_negative_scale_is_refused(scale):
    x = jnp.zeros((2, 3))
    with pytest.raises(ValueError, match="guidance scale"):
        tilt(x, x, scale)
    with pytest.raises(ValueError, match="guidance scale"):
        guided_logits(x, x, 2.0, scale)


@pytest.mark.parametrize(("shape", "jit"), [((2, 4), True), ((1, 8), True), ((2, 4), False)])
def test_explicit_mesh_axes_with_the_vocabulary_sharded(shape, jit):
    """Also the head's scores: W2 is split over the vocabulary, and nothing is gathered."""
    mesh = jax.make_mesh(shape, ("data", "model"), (AxisType.Explicit,) * 2)
    logits = draw(0, (8, VOCAB))
    logits[0], logits[1, :5] = -INF, -INF
    pooled = draw(1, (8, 6), scale=1.0)
    params = init_head(jax.random.key(0), HeadConfig(6, VOCAB, rank=3, bias=True))
    temperatures = np.linspace(1, 3, 8, dtype=np.float32)
    scales = np.linspace(0, 2, 8, dtype=np.float32)

    def everything(params, pooled, logits, t, s):
        scores = head_scores(params, pooled, "gelu")
        logprobs = tempered_logprobs(logits, t)
        by_scalars = guided_logits(logits, scores, 2.5, 1.0)
        return (
            scores,
            logprobs,
            tilt(logprobs, scores, s),
            guided_logits(logits, scores, t, s),
            by_scalars,
        )

    expected = everything(params, *map(jnp.asarray, (pooled, logits, temperatures, scales)))
    with jax.set_mesh(mesh):
        specs = (
            {"hidden": ({"weight": P(), "bias": P()},), "output": P("model", None)},
            P("data", None),
            P("data", "model"),
            P("data"),
            P("data"),
        )
        sharded = jax.tree.map(
            jax.device_put, (params, pooled, logits, temperatures, scales), specs
        )
        found = (jax.jit(everything) if jit else everything)(*sharded)
    for ours, value in zip(found, expected, strict=True):
        assert ours.sharding.spec == P("data", "model")
        close(jnp.asarray(np.asarray(ours)), np.asarray(value))


def test_the_old_name_of_the_base_temperature_works_and_warns():
    logits, scores = jnp.asarray(draw(0)), jnp.asarray(draw(1))
    with pytest.warns(DeprecationWarning, match="tempered_logprobs: temperature is called"):
        old = tempered_logprobs(logits, temperature=2.5)
    np.testing.assert_array_equal(old, tempered_logprobs(logits, base_temperature=2.5))
    with pytest.warns(DeprecationWarning, match="guided_logits"):
        old = guided_logits(logits, scores, temperature=2.5)
    np.testing.assert_array_equal(old, guided_logits(logits, scores, base_temperature=2.5))
