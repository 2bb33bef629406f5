"""The head's pure functions: scores, initialisation, loss."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t3jax.head import (
    ACTIVATIONS,
    HeadConfig,
    class_prior_shift,
    classifier_loss,
    head_scores,
    init_head,
    target_scores,
)

D, R, V = 6, 4, 11
CONFIGS = [HeadConfig(D, V, R, activation) for activation in ACTIVATIONS] + [
    HeadConfig(D, V, R, "relu", num_hidden_layers=3, bias=True),
    HeadConfig(D, V, R, "gelu", num_hidden_layers=2),
]


def reference_scores(params, pooled, activation):
    """The head in numpy, float64, one prefix."""
    erf = np.vectorize(math.erf)
    act = {
        "identity": lambda x: x,
        "relu": lambda x: np.maximum(x, 0),
        "gelu": lambda x: x * (1 + erf(x / np.sqrt(2))) / 2,
        "tanh": np.tanh,
    }[activation]
    x = np.asarray(pooled, np.float64)
    for layer in params["hidden"]:
        x = act(np.asarray(layer["weight"], np.float64) @ x + np.asarray(layer.get("bias", 0.0)))
    return np.asarray(params["output"], np.float64) @ x


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("wrap", [lambda f: f, lambda f: jax.jit(f, static_argnums=2)])
def test_scores_equal_a_plain_statement(config, wrap):
    params = init_head(jax.random.key(0), config)
    pooled = jax.random.normal(jax.random.key(1), (2, 3, D)) * 3
    scores = wrap(head_scores)(params, pooled, config.activation)
    assert scores.shape == (2, 3, V)
    assert scores.dtype == jnp.float32
    expected = [
        [reference_scores(params, x, config.activation) for x in row] for row in np.asarray(pooled)
    ]
    np.testing.assert_allclose(scores, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_target_scores_are_those_of_the_targets(config):
    params = init_head(jax.random.key(0), config)
    pooled = jax.random.normal(jax.random.key(1), (2, 3, D))
    targets = jnp.asarray([[0, 5, V - 1], [3, 3, 1]])
    scores = target_scores(params, pooled, targets, config.activation)
    every = head_scores(params, pooled, config.activation)
    np.testing.assert_allclose(
        scores, np.take_along_axis(np.asarray(every), np.asarray(targets)[..., None], -1)[..., 0],
        rtol=1e-6, atol=1e-6,
    )  # fmt: skip


def test_target_scores_never_form_the_vocabulary():
    vocabulary = 50_000
    params = jax.eval_shape(lambda: init_head(jax.random.key(0), HeadConfig(D, vocabulary, R)))
    pooled = jax.ShapeDtypeStruct((7, D), jnp.float32)
    targets = jax.ShapeDtypeStruct((7,), jnp.int32)
    jaxpr = jax.make_jaxpr(target_scores)(params, pooled, targets)
    shapes = [var.aval.shape for eqn in jaxpr.eqns for var in eqn.outvars]
    assert shapes
    assert all(vocabulary not in shape for shape in shapes)


def test_bfloat16_features_are_computed_in_float32():
    params = init_head(jax.random.key(0), HeadConfig(D, V, R))
    pooled = jax.random.normal(jax.random.key(1), (5, D)).astype(jnp.bfloat16)
    exact = head_scores(params, pooled.astype(jnp.float32))
    np.testing.assert_array_equal(head_scores(params, pooled), exact)


def test_head_size_of_the_paper():
    # R = 20 on an 8B Llama: 2.65 M.
    assert HeadConfig(hidden_size=4096, vocab_size=128_256, rank=20).num_params == 2_647_040


@pytest.mark.parametrize("config", [HeadConfig(400, 900, 25, "relu", 2, bias=True)], ids=str)
def test_init_is_uniform_as_pytorch_draws_linear_layers(config):
    params = init_head(jax.random.key(3), config)
    for leaf, fan_in in (
        (params["hidden"][0]["weight"], 400),
        (params["hidden"][1]["weight"], 25),
        (params["output"], 25),
    ):
        bound = fan_in**-0.5
        assert np.abs(leaf).max() <= bound
        assert np.abs(leaf).max() > 0.98 * bound
        # The deviation of a uniform distribution is its half width by sqrt(3).
        np.testing.assert_allclose(np.std(leaf), bound / 3**0.5, rtol=0.05)
    for layer, fan_in in zip(params["hidden"], (400, 25), strict=True):
        assert 0 < np.abs(layer["bias"]).max() <= fan_in**-0.5
    leaves = [np.asarray(leaf).ravel()[:20] for leaf in jax.tree.leaves(params)]
    signs = {tuple(leaf > 0) for leaf in leaves}
    assert len(signs) == len(leaves), "two leaves were drawn with one key"


def test_zero_output_scores_nothing_and_keeps_the_rest():
    config = HeadConfig(D, V, R)
    params = init_head(jax.random.key(0), config)
    zero = init_head(jax.random.key(0), config, zero_output=True)
    assert not np.any(zero["output"])
    np.testing.assert_array_equal(zero["hidden"][0]["weight"], params["hidden"][0]["weight"])


def test_loss_is_the_mean_over_the_answer_tokens_of_both_sets():
    scores = jnp.asarray([[2.0, -1.0, 9.0], [0.5, 3.0, -3.0]])
    retain = jnp.asarray([[True] * 3, [False] * 3])
    mask = jnp.asarray([[True, True, False], [True, False, True]])
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    expected = -np.mean(
        [np.log(sigmoid(2.0)), np.log(sigmoid(-1.0)), np.log(1 - sigmoid(0.5)),
         np.log(1 - sigmoid(-3.0))]
    )  # fmt: skip
    np.testing.assert_allclose(classifier_loss(scores, retain, mask), expected, rtol=1e-6)


def test_loss_gradient_is_sigmoid_minus_label_over_the_count():
    scores = jax.random.normal(jax.random.key(0), (12,)) * 4
    retain = jnp.arange(12) < 5
    mask = jnp.arange(12) % 3 != 0
    grad = jax.grad(classifier_loss)(scores, retain, mask)
    expected = (jax.nn.sigmoid(scores) - retain.astype(jnp.float32)) * mask.astype(jnp.float32) / 8
    np.testing.assert_allclose(grad, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_what_the_mask_leaves_out_touches_neither_loss_nor_gradient(bad):
    scores = jnp.asarray([1.0, 2.0])
    retain = jnp.asarray([True, False])
    mask = jnp.asarray([True, False])
    loss, grad = jax.value_and_grad(classifier_loss)(scores.at[1].set(bad), retain, mask)
    np.testing.assert_array_equal(loss, classifier_loss(scores, retain, mask))
    assert grad[1] == 0
    assert np.isfinite(grad[0])


def test_loss_without_tokens_is_zero_and_large_scores_stay_finite():
    none = jnp.zeros(3, bool)
    assert classifier_loss(jnp.ones(3), none, none) == 0
    all_ = ~none
    np.testing.assert_allclose(classifier_loss(jnp.full(3, -1e30), all_, all_), 1e30, rtol=1e-6)


def test_prior_shift():
    assert class_prior_shift(0.5) == 0
    np.testing.assert_allclose(class_prior_shift(0.05), np.log(19))
    for fraction in (0.0, 1.0, -0.1):
        with pytest.raises(ValueError, match="forget_fraction"):
            class_prior_shift(fraction)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("activation", "id", "activation = 'id': expected one of"),
        ("rank", 0, "rank = 0: expected a whole number"),
    ],
)
def test_config_refuses(field, value, message):
    with pytest.raises(ValueError, match=message):
        HeadConfig(D, V, **{field: value})
