"""The refinements: what each promises, off means the paper, their edges and gradients."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from t3jax.guidance import guided_logits, temper, tempered_logprobs
from t3jax.refinements import (
    Refinements,
    combine_heads,
    gated_temperature,
    protect,
    refined_logits,
    retain_probability,
    served_temperature,
    untempered_logits,
)

INF, MAX = np.inf, float(np.finfo(np.float32).max)
ROWS, VOCAB = 5, 16
STOP = (3, 11)
ALL = Refinements(gated=True, protected=STOP)


def draw(seed, shape=(ROWS, VOCAB), scale=3.0):
    values = np.random.default_rng(seed).standard_normal(shape) * scale
    return jnp.asarray(values.astype(np.float32))


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def softmax(x):
    weights = np.exp(np.asarray(x, np.float64))
    return weights / weights.sum(axis=-1, keepdims=True)


# --- protected tokens


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5, 40.0])
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 12.0])
def test_protected_tokens_keep_their_tempered_probabilities(temperature, scale):
    logits, scores = draw(0), draw(1)
    refined = refined_logits(logits, scores, temperature, scale, Refinements(protected=STOP))
    before = np.asarray(tempered_logprobs(logits, temperature))
    after = np.asarray(jax.nn.log_softmax(refined))
    np.testing.assert_allclose(after[:, STOP], before[:, STOP], atol=2e-5)  # each of them
    # Among the others, it is the paper's distribution.
    plain = np.asarray(guided_logits(logits, scores, temperature, scale))
    others = np.delete(np.arange(VOCAB), STOP)
    np.testing.assert_array_equal(np.asarray(refined)[:, others], plain[:, others])
    if scale > 0.5:
        assert np.abs(jax.nn.log_softmax(plain) - before)[:, STOP].max() > 0.1


def test_protected_tokens_are_tilted_by_the_mean_of_the_others():
    logits, scores = draw(0), draw(1)
    temperature, scale = 2.5, 0.7
    p = softmax(logits / temperature)
    others = np.delete(np.arange(VOCAB), STOP)
    mean = np.sum(p[:, others] * sigmoid(scores)[:, others] ** scale, -1) / np.sum(p[:, others], -1)
    refined = refined_logits(logits, scores, temperature, scale, Refinements(protected=STOP))
    expected = np.asarray(logits)[:, STOP] / temperature + np.log(mean)[:, None]
    np.testing.assert_allclose(np.asarray(refined)[:, STOP], expected, atol=1e-5)


def test_where_the_others_are_banned_the_protected_tokens_remain():
    logits = jnp.asarray([[0.0, 1.0, 2.0, 3.0], [-INF, -INF, 2.0, 3.0], [-INF] * 4])
    scores = jnp.asarray([[-INF, -INF, 1.0, -INF]] * 3)
    out = refined_logits(logits, scores, 2.0, 1.0, Refinements(protected=(2, 3)))
    np.testing.assert_array_equal(out[:, :2], -INF)
    np.testing.assert_allclose(out[:2, 2:], [[1.0, 1.5]] * 2)
    assert np.isneginf(out[2]).all()
    # All tokens protected: nothing is tilted.
    everything = protect(temper(logits, 2.0), guided_logits(logits, scores, 2.0, 1.0), range(4))
    np.testing.assert_array_equal(everything, temper(logits, 2.0))


@pytest.mark.parametrize("tokens", [(), (VOCAB,), (-1, 2)])
def test_protected_tokens_must_be_of_the_vocabulary(tokens):
    with pytest.raises(ValueError, match="protected tokens must lie in"):
        protect(draw(0), draw(1), tokens)


# --- gated tempering


def test_the_gate_is_shut_on_retain_text_and_open_on_forget_text():
    retain = jnp.asarray([0.0, 0.25, 1.0])
    np.testing.assert_array_equal(gated_temperature(2.5, retain), [2.5, 2.125, 1.0])
    by_row = gated_temperature(jnp.asarray([1.0, 5.0, 3.0]), retain)
    np.testing.assert_array_equal(by_row, [1.0, 4.0, 1.0])
    logits = draw(0)
    for score, temperature in ((80.0, 1.0), (-80.0, 2.5)):
        scores = jnp.full_like(logits, score)
        gated = refined_logits(logits, scores, 2.5, 0.3, Refinements(gated=True))
        plain = guided_logits(logits, scores, temperature, 0.3)
        np.testing.assert_allclose(gated, plain, rtol=1e-5, atol=1e-5)


def test_retain_probability_is_the_mean_of_the_heads_verdict():
    logits, scores = draw(0), draw(1)
    expected = np.sum(softmax(logits) * sigmoid(scores), axis=-1)
    np.testing.assert_allclose(retain_probability(logits, scores), expected, atol=1e-6)
    assert retain_probability(jnp.full(3, -INF), jnp.zeros(3)) == 0


def test_retain_probability_is_bayes_of_the_mixture():
    """A mixture of two known distributions, and its exact posterior: q is the mixture's weight."""
    retain, forget, weight = softmax(draw(2)[0]), softmax(draw(3)[0]), 0.85
    mixture = weight * retain + (1 - weight) * forget
    scores = np.log(weight * retain) - np.log((1 - weight) * forget)
    logits, scores = (jnp.asarray(x, jnp.float32) for x in (np.log(mixture), scores))
    np.testing.assert_allclose(retain_probability(logits, scores), weight, rtol=1e-5)


# --- without the tempering


@pytest.mark.parametrize("refinements", [Refinements(), Refinements(protected=STOP), ALL])
def test_untempered_logits_are_those_of_plain_guidance_of_strength_t_s(refinements):
    logits, scores = draw(0), draw(1)
    temperature = served_temperature(logits, scores, 2.5, refinements)
    served = refined_logits(logits, scores, 2.5, 0.4, refinements)
    found = np.asarray(untempered_logits(served, temperature))
    others = np.delete(np.arange(VOCAB), refinements.protected)
    strength = np.broadcast_to(np.asarray(temperature) * 0.4, ROWS)
    plain = np.asarray(guided_logits(logits, scores, 1.0, jnp.asarray(strength, jnp.float32)))
    np.testing.assert_allclose(found[:, others], plain[:, others], atol=1e-5)
    np.testing.assert_allclose(found, np.asarray(served) * strength[:, None] / 0.4, atol=1e-5)


def test_the_served_temperature_is_gated_where_the_gate_is_on():
    logits, scores = draw(0), draw(1)
    by_row = jnp.linspace(1, 3, ROWS)
    assert served_temperature(logits, scores, by_row, Refinements(protected=STOP)) is by_row
    expected = gated_temperature(by_row, retain_probability(logits, scores))
    np.testing.assert_array_equal(served_temperature(logits, scores, by_row, ALL), expected)
    assert np.ptp(expected) > 0.1


def test_untempered_logits_at_their_edges():
    served = jnp.asarray([[-INF, 1e30, -1e30, 0.0]] * 3)
    temperatures = jnp.asarray([1.0, 1e30, 1e-30])
    found = untempered_logits(served, temperatures)
    np.testing.assert_allclose(
        found, [[-INF, 1e30, -1e30, 0], [-INF, 1e30, -1e30, 0], [-INF, 1, -1, 0]]
    )
    for argument in (0, 1):
        gradient = jax.jacrev(untempered_logits, argument)(served, temperatures)
        assert not np.isnan(gradient).any()


# --- several heads


@pytest.mark.parametrize("count", [1, 2, 5])
def test_combined_heads_are_what_they_say(count):
    scores = [draw(seed) for seed in range(count)]
    disjoint, product = (sigmoid(combine_heads(scores, how)) for how in ("disjoint", "product"))
    g = np.asarray(scores, np.float64)
    np.testing.assert_allclose(disjoint, 1 / (1 + np.exp(-g).sum(axis=0)), rtol=1e-5)
    np.testing.assert_allclose(product, sigmoid(g).prod(axis=0), rtol=1e-5)


def test_ten_heads_that_are_fairly_sure():
    scores = [jnp.full(1, 2.0)] * 10
    np.testing.assert_allclose(sigmoid(combine_heads(scores)), 0.42, atol=0.005)
    np.testing.assert_allclose(sigmoid(combine_heads(scores, "product")), 0.28, atol=0.005)


@pytest.mark.parametrize(("how", "sure_of_both"), [("disjoint", -90.0), ("product", -92.127)])
def test_combined_heads_at_their_edges(how, sure_of_both):
    g, h = jnp.asarray([[0.5, 50.0, -90.0, -INF, INF, 3e38], [60.0, 50.0, -2.0, 1.0, 1.0, 60.0]])
    expected = [0.5, 50 - np.log(2), sure_of_both, -INF, 1.0, 60.0]
    np.testing.assert_allclose(combine_heads([g, h], how), expected, rtol=1e-5)


def test_one_head_is_as_it_is_and_an_unknown_way_is_refused():
    scores = draw(0)
    assert combine_heads([scores]) is scores
    with pytest.raises(ValueError, match="got 'sum'"):
        combine_heads([scores, scores], "sum")


# --- all of them


@pytest.mark.parametrize("refinements", [Refinements(gated=True), Refinements(protected=STOP), ALL])
def test_refinements_leave_the_base_as_it_is(refinements):
    logits, scores = draw(0), draw(1)
    np.testing.assert_allclose(
        refined_logits(logits, scores, 1.0, 0.0, refinements), logits, atol=1e-5
    )


def test_without_refinements_it_is_the_paper():
    logits, scores = draw(0), draw(1)
    paper = jax.make_jaxpr(guided_logits)(logits, scores, jnp.float32(2), jnp.float32(1))
    ours = jax.make_jaxpr(refined_logits)(logits, scores, jnp.float32(2), jnp.float32(1))
    assert str(ours) == str(paper)


def test_names_tell_what_is_on():
    assert Refinements().name == "plain"
    assert Refinements(True, (1,), "product").name == "gated-protected-product"


LOGITS = [
    [0.3, -1.2, 2.0, 0.0],
    [-INF, 1.0, -INF, 0.5],
    [-INF, -INF, -INF, -INF],
    [MAX, -MAX, 1e38, -3e38],
    [-INF, INF, -INF, -INF],
    [1e30, 1e30, -1e30, 1e30],
]
SCORES = [
    [1.0, -2.0, 0.0, 5.0],
    [-INF, INF, 1.0, -INF],
    [-INF, -INF, -INF, -INF],
    [INF, INF, INF, INF],
    [MAX, -MAX, 1e20, -1e20],
]


@pytest.mark.parametrize(
    "refinements",
    [
        Refinements(gated=True),
        Refinements(protected=(1,)),
        Refinements(True, (1, 2)),
        Refinements(combine="product"),
    ],
    ids=lambda refinements: refinements.name,
)
def test_no_nan_in_values_and_gradients(refinements):
    """Every edge of logits and of two heads' scores with every T and s, one row for each."""
    cases = list(
        itertools.product(LOGITS, SCORES, SCORES, (1e-30, 1.0, 2.5, 1e30), (0.0, 1.0, 1e30))
    )
    columns = [jnp.asarray(np.array(part, np.float32)) for part in zip(*cases, strict=True)]

    def function(logits, g, h, t, s):
        scores = combine_heads([g, h], refinements.combine)
        return refined_logits(logits, scores, t, s, refinements)

    def readings(*arguments):
        out = function(*arguments)
        finite = jnp.tanh(jnp.where(jnp.isfinite(out), out, 0.0) / 10)
        return jnp.stack([jnp.sum(out[..., 1]), jnp.sum(out), jnp.sum(finite)])

    out = np.asarray(jax.jit(function)(*columns))
    assert not np.isnan(out).any()
    assert not np.isposinf(out).any()
    assert np.isneginf(out[np.isneginf(columns[0])]).all()
    for argument, gradient in zip(
        ("logits", "g", "h", "T", "s"),
        jax.jit(jax.jacrev(readings, range(5)))(*columns),
        strict=True,
    ):
        assert not np.isnan(gradient).any(), f"gradient in {argument}"


def test_gradients_are_those_of_the_definition():
    logits, g, h, weights = (draw(seed) for seed in range(4))

    def ours(logits, g, h, t, s):
        return jnp.sum(weights * refined_logits(logits, combine_heads([g, h]), t, s, ALL))

    def stated(logits, g, h, t, s):
        f = 1 / (1 + jnp.exp(-g) + jnp.exp(-h))
        q = jnp.sum(jax.nn.softmax(logits) * f, axis=-1, keepdims=True)
        tempered = jax.nn.softmax(logits / (1 + (t - 1) * (1 - q)))
        kept = jnp.ones(VOCAB).at[jnp.asarray(STOP)].set(0.0)[None]
        mean = jnp.sum(kept * tempered * f**s, -1) / jnp.sum(kept * tempered, -1)
        log_f = jnp.where(kept > 0, s * jnp.log(f), jnp.log(mean)[:, None])
        return jnp.sum(weights * (logits / (1 + (t - 1) * (1 - q)) + log_f))

    arguments = (logits, g, h, jnp.float32(2.5), jnp.float32(1.3))
    expected = jax.jit(jax.grad(stated, range(5)))(*arguments)
    found = jax.jit(jax.grad(ours, range(5)))(*arguments)
    for ours_, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours_, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_any_leading_axes_under_jit_and_vmap(batch):
    logits, g, h = (draw(seed, (*batch, VOCAB)) for seed in range(3))

    def function(logits, g, h, t):
        return refined_logits(logits, combine_heads([g, h]), t, 1.0, ALL)

    flat = [x.reshape(-1, VOCAB) for x in (logits, g, h)]
    temperatures = jnp.linspace(1, 3, flat[0].shape[0])
    expected = np.asarray(jax.jit(jax.vmap(function))(*flat, temperatures))
    found = jax.jit(function)(logits, g, h, temperatures.reshape(batch))
    np.testing.assert_allclose(found, expected.reshape(logits.shape), atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_inputs_are_computed_in_float32(dtype):
    logits, g, h = (draw(seed).astype(dtype) for seed in range(3))
    for how in ("disjoint", "product"):
        found = refined_logits(logits, combine_heads([g, h], how), 2.5, 1.0, ALL)
        wide = combine_heads([g.astype(jnp.float32), h.astype(jnp.float32)], how)
        assert found.dtype == jnp.float32
        np.testing.assert_array_equal(found, refined_logits(logits, wide, 2.5, 1.0, ALL))


@pytest.mark.parametrize("shape", [(2, 4), (1, 8)])
def test_explicit_mesh_axes_with_the_vocabulary_sharded(shape):
    mesh = jax.make_mesh(shape, ("data", "model"), (AxisType.Explicit,) * 2)
    arrays = [draw(seed, (8, VOCAB)) for seed in range(3)]
    arrays[0] = arrays[0].at[0].set(-INF).at[1, :5].set(-INF)
    temperatures, scales = jnp.linspace(1, 3, 8), jnp.linspace(0, 2, 8)

    @jax.jit
    def function(logits, g, h, t, s):
        results = []
        for how in ("disjoint", "product"):
            scores = combine_heads([g, h], how)
            results += [refined_logits(logits, scores, t, s, ALL)]
            results += [refined_logits(logits, scores, 2.5, 1.0, ALL)]
        return results

    expected = function(*arrays, temperatures, scales)
    with jax.set_mesh(mesh):
        specs = (*[P("data", "model")] * 3, P("data"), P("data"))
        found = function(*jax.tree.map(jax.device_put, (*arrays, temperatures, scales), specs))
    for ours, value in zip(found, expected, strict=True):
        assert ours.sharding.spec == P("data", "model")
        np.testing.assert_allclose(ours, np.asarray(value), atol=1e-5)
