"""Matrices of int8 with a scale for each row: a quarter of float32's bytes, half of bfloat16's.

    W[o, i] ≈ scale[o] q[o, i],   scale[o] = max_i |W[o, i]| / 127,   q = round(W / scale)

Activations are not quantised; the product with a row is multiplied by its scale. A product reads
the int8 numbers and casts them on the way: accelerators do so inside of a matrix product, a CPU for
a single vector.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8

from t3jax.lm.product import on_cpu, plain

_LARGEST = 127
_LANES = 32  # columns that a CPU multiplies at once
_TERMS = 64  # products that it sums in one pass


def quantize(weight: np.ndarray, dtype: DTypeLike) -> tuple[np.ndarray, np.ndarray]:
    """The nearest int8 matrix, row by row, for `[out, in]` or `[E, out, in]`.

    Returns the numbers, from -127 to 127, and the scales `[out]` or `[E, out]` in `dtype`, to which
    they are rounded first, so that the rounding adds no error.
    """
    exact = weight.astype(np.float32)
    scale = (np.abs(exact).max(axis=-1) / _LARGEST).astype(dtype)
    divisor = np.where(scale == 0, 1, scale).astype(np.float32)[..., None]
    numbers = np.clip(np.rint(exact / divisor), -_LARGEST, _LARGEST)
    return numbers.astype(np.int8), scale


def product(
    x: Float[Array, "*batch in"],
    weight: Int8[Array, "out in"],
    scale: Float[Array, " out"],
    dtype: DTypeLike | None = None,
) -> Float[Array, "*batch out"]:
    """`x W^T` in a dtype, by default that of `x`; sums are taken in float32."""
    # Without the barrier XLA casts the matrix before a loop, and reads the larger one at each step.
    weight, x = jax.lax.optimization_barrier((weight, x))
    y = jax.lax.platform_dependent(x, weight, cpu=_on_cpu, default=_cast_and_multiply)
    y = y * jnp.broadcast_to(scale.astype(jnp.float32), y.shape)
    return y.astype(dtype or x.dtype)


def _cast_and_multiply(x: Array, weight: Array) -> Array:
    return plain(x, weight.astype(x.dtype), jnp.float32)


def _on_cpu(x: Array, weight: Array) -> Array:
    """Multiplies a single vector in one pass over the int8 numbers; casts them first for more."""
    if x.size == x.shape[-1] and x.size % _LANES == 0:
        return _multiply_by_lanes(x.reshape(-1), weight).reshape(*x.shape[:-1], -1)
    return on_cpu(x, jax.lax.optimization_barrier(weight.astype(x.dtype)), jnp.float32)


def _multiply_by_lanes(x: Array, weight: Array) -> Array:
    """Sums every 32nd product first, which XLA compiles to vector instructions."""
    count = len(x) // _LANES
    x = x.astype(jnp.float32).reshape(count, _LANES)
    weight = weight.reshape(-1, count, _LANES)
    sums = jnp.zeros(weight[:, 0].shape, jnp.float32)
    for first in range(0, count, _TERMS):
        for i in range(first, min(first + _TERMS, count)):
            lanes = weight[:, i].astype(jnp.float32)
            sums = sums + lanes * jnp.broadcast_to(x[i], lanes.shape)
        sums = jax.lax.optimization_barrier(sums)
    return jnp.einsum("ol,l->o", sums, jnp.ones(_LANES), precision="highest")
