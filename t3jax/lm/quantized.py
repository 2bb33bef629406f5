"""Matrices of int8 with a scale for each row: a quarter of float32's bytes, half of bfloat16's.

    W[o, i] ≈ scale[o] q[o, i],   scale[o] = max_i |W[o, i]| / 127,   q = round(W / scale)

Activations stay as they are; the scale multiplies what a row's product gives. A product reads the
int8 numbers and casts them on its way: accelerators do so inside of a matrix product, a CPU for a
single vector.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8

from t3jax.lm.product import on_cpu, plain

_LARGEST = 127
_LANES = 32  # columns that a CPU multiplies at once
_TERMS = 64  # products that it adds up in one pass


def quantize(weight: np.ndarray, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """The nearest int8 matrix, row by row.

    Args:
        weight: Any floating matrix, `[out, in]`, or several, `[E, out, in]`; whole rows.
        dtype: Dtype of the scales; they are rounded to it first, so that this adds no error.

    Returns:
        The int8 numbers, from -127 to 127, and the scales `[out]` or `[E, out]`.
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
    dtype: Any = None,
) -> Float[Array, "*batch out"]:
    """`x W^T` for the matrix that `weight` and `scale` stand for.

    Args:
        x: Vectors, `[..., in]`.
        weight: The int8 numbers, `[out, in]`.
        scale: The rows' scales, `[out]`.
        dtype: Dtype of the result; None means that of `x`. Sums are taken in float32.

    Returns:
        The products, `[..., out]`.
    """
    # A loop would otherwise cast what it does not change before its first step, and read that.
    weight, x = jax.lax.optimization_barrier((weight, x))
    y = jax.lax.platform_dependent(x, weight, cpu=_on_cpu, default=_cast_on_the_way)
    y = y * jnp.broadcast_to(scale.astype(jnp.float32), y.shape)
    return y.astype(dtype or x.dtype)


def _cast_on_the_way(x: Array, weight: Array) -> Array:
    return plain(x, weight.astype(x.dtype), jnp.float32)


def _on_cpu(x: Array, weight: Array) -> Array:
    """A single vector in one pass over the int8 numbers; otherwise these are cast beforehand."""
    if x.size == x.shape[-1] and x.size % _LANES == 0:
        return _by_lanes(x.reshape(-1), weight).reshape(*x.shape[:-1], -1)
    return on_cpu(x, jax.lax.optimization_barrier(weight.astype(x.dtype)), jnp.float32)


def _by_lanes(x: Array, weight: Array) -> Array:
    """Sums of every 32nd product first: what XLA makes vector instructions of."""
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
