"""Int8 matrices: how they are rounded, multiplied, loaded, split over devices and planned."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from configs import default
from t3jax import Sampler, load_lm, make_mesh, plan
from t3jax.lm import init_params, save_hf
from t3jax.lm.decoder import apply, unembed
from t3jax.lm.quantized import product, quantize
from t3jax.lm.weights import load_params
from t3jax.plan.job import make_job
from t3jax.plan.programs import abstract_lm

UNTIED = dataclasses.replace(tiny.CONFIG, tied=False, attention_bias=True)


def exact(weight, scale):
    return np.asarray(weight, np.float32) * np.asarray(scale, np.float32)[..., None]


def dequantized(params):
    """The tree of floating-point weights that an int8 tree stands for."""
    if not isinstance(params, dict):
        return params
    if "scale" in params:
        rest = {name: params[name] for name in params if name not in ("weight", "scale")}
        return {"weight": jnp.asarray(exact(params["weight"], params["scale"])), **rest}
    return {name: dequantized(value) for name, value in params.items()}


@pytest.fixture
def folder(tmp_path):
    save_hf(tmp_path, UNTIED, tiny.make_params(UNTIED), [263])
    tiny.make_tokenizer().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_row_is_rounded_to_its_own_step(dtype):
    weight = np.random.default_rng(0).standard_normal((6, 40), np.float32)
    weight *= 10.0 ** np.arange(-3, 3)[:, None]
    weight[2] = 0
    numbers, scale = quantize(weight, jnp.dtype(dtype))
    assert (numbers.dtype, scale.dtype) == (np.int8, jnp.dtype(dtype))
    assert not numbers[2].any()
    # Half a step; the largest is cut where the scale was rounded down.
    step = np.asarray(scale, np.float32)[:, None]
    slack = 127 * 2**-8 * step if dtype == "bfloat16" else 1e-5 * step
    assert (np.abs(exact(numbers, scale) - weight) <= step / 2 + slack).all()
    largest = np.abs(numbers).max(axis=1)
    assert (np.delete(largest, 2) >= 126).all()


@pytest.mark.parametrize("shape", [(1, 96), (1, 40), (3, 96), (1, 1, 2112), (2, 3, 40)])
def test_products_are_those_of_the_matrix_it_stands_for(shape):
    generator = np.random.default_rng(1)
    x = generator.standard_normal(shape, np.float32)
    numbers, scale = quantize(generator.standard_normal((24, shape[-1]), np.float32), np.float32)
    expected = x.astype(np.float64) @ exact(numbers, scale).T.astype(np.float64)
    found = jax.jit(product)(x, numbers, scale)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    half = product(jnp.asarray(x, jnp.bfloat16), jnp.asarray(numbers), jnp.asarray(scale))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), expected, rtol=0.02, atol=0.1)


@pytest.mark.parametrize(
    "config", [UNTIED, tiny.CONFIG, tiny.ODD_CONFIG, tiny.MIXTURE, tiny.UNEQUAL]
)
def test_a_model_is_the_one_its_weights_stand_for(config, tmp_path):
    save_hf(tmp_path, config, tiny.make_params(config), [263])
    quantized = dataclasses.replace(config, quantized=True)
    params = load_params(tmp_path, quantized, jnp.float32)
    assert params["layers"][0]["mlp"]["up"]["weight"].dtype == jnp.int8
    tokens = jnp.asarray(np.random.default_rng(2).integers(config.vocab_size, size=(2, 9)))
    tokens = tokens.astype(jnp.int32)
    read = jax.jit(apply, static_argnums=0)
    hidden, _ = read(quantized, params, tokens)
    expected, _ = read(config, dequantized(params), tokens)
    np.testing.assert_allclose(hidden, expected, atol=1e-4)
    logits = unembed(quantized, params, hidden)
    np.testing.assert_allclose(logits, unembed(config, dequantized(params), expected), atol=1e-3)


def test_it_answers_and_keeps_float32_elsewhere(folder):
    lm = load_lm(folder, "int8")
    assert lm.init_cache(1, 4).layers[0].keys.dtype == jnp.float32
    assert lm.params["layers"][0]["attention"]["q"]["bias"].dtype == jnp.float32
    prompts = [np.array([5, 6, 7]), np.array([9, 8])]
    one, several = (
        Sampler(lm, batch_size=rows).generate(prompts, max_new_tokens=8) for rows in (1, 2)
    )
    assert [sample.tokens for sample in one] == [sample.tokens for sample in several]


@pytest.mark.parametrize("shape", [(1, 1, 8), (1, 8, 1), (2, 2, 2)])
def test_devices_hold_what_one_would(folder, shape):
    one, split = load_lm(folder, "int8"), load_lm(folder, "int8", make_mesh(shape))
    chex.assert_trees_all_equal(split.params, one.params)
    up = split.params["layers"][0]["mlp"]["up"]
    _, fsdp, model = shape
    assert up["weight"].sharding.shard_shape((64, 32)) == (64 // model, 32 // fsdp)
    assert up["scale"].sharding.shard_shape((64,)) == (64 // model,)
    tokens = np.arange(24, dtype=np.int32).reshape(8, 3)
    found, expected = (
        np.asarray(tiny.read(lm.apply, lm.unembed, lm.params, tokens, np.ones((8, 3), bool))[1])
        for lm in (split, one)
    )
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_the_plan_counts_half_of_bfloat16():
    weights = {}
    for dtype in ("bfloat16", "int8"):
        config = tiny.make_settings(default, {"model": "llama-3.1-8b", "dtype": dtype})
        job = make_job(config, make_mesh((1, 1, 1), jax.devices()[:1]))
        weights[dtype] = plan.shard_bytes(abstract_lm(job.config, job.dtype, job.mesh).params)
        job = dataclasses.replace(job, config=dataclasses.replace(job.config, num_layers=1))
        assert f"weights in {dtype} on" in plan.describe(job, capacity=1)
    assert 0.5 < weights["int8"] / weights["bfloat16"] < 0.501


def test_it_is_not_trained():
    quantized = dataclasses.replace(tiny.CONFIG, quantized=True)
    with pytest.raises(ValueError, match="int8 weights are not trained"):
        init_params(quantized, jax.random.key(0))
