"""Every form of the product is the same product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t3jax.lm.product import product


@pytest.mark.parametrize("rows", [(1,), (2,), (3, 5), (256,), (257,), ()])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rows_times_a_matrix(rows, dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((*rows, 40)), dtype)
    weight = jnp.asarray(rng.standard_normal((24, 40)), dtype)
    expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    found = jax.jit(product, static_argnums=2)(x, weight, jnp.float32)
    assert (found.shape, found.dtype) == (expected.shape, jnp.float32)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    rounded = product(x, weight)
    assert rounded.dtype == x.dtype
    np.testing.assert_allclose(
        np.asarray(rounded, np.float32), found, rtol=1e-6 if dtype == "float32" else 2**-8
    )


def test_gradients_are_those_of_the_plain_product():
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(rng.standard_normal(n), jnp.float32) for n in ((3, 8), (5, 8)))
    found = jax.grad(lambda *args: jnp.sum(product(*args) ** 2), (0, 1))(x, weight)
    expected = jax.grad(lambda x, w: jnp.sum((x @ w.T) ** 2), (0, 1))(x, weight)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
