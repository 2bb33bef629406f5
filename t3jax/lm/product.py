"""Vectors times a matrix `[out, in]`: the product of all layers, with a program for CPUs.

XLA:CPU repacks the right factor of every matrix product. With few rows that takes longer than the
product: there the matrix is the left factor, and the rows are repacked. A single row needs no
repacking, but a small matrix is multiplied by one core unless it is split in two. Bfloat16 factors
use vector instructions if the result is float32 and there is more than one row.
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

_FEW = 256  # rows
_SMALL = 2**19  # weights of a matrix


@functools.partial(jax.jit, static_argnames="dtype", inline=True)  # traced once for all layers
def product(
    x: Float[Array, "*batch in"], weight: Float[Array, "out in"], dtype: DTypeLike | None = None
) -> Float[Array, "*batch out"]:
    """`x W^T` in a dtype, by default that of `x`; hardware does not round float32 factors.

    Sums are taken in float32. If the result is bfloat16, a GPU may round the terms of a single
    row's sums to that too.
    """
    programs = {
        platform: functools.partial(program, dtype=dtype or x.dtype)
        for platform, program in (("cpu", on_cpu), ("default", plain))
    }
    return jax.lax.platform_dependent(x, weight, **programs)


def full_precision(factor: Array) -> jax.lax.Precision | None:
    """The precision with which hardware does not round float32 factors."""
    return jax.lax.Precision.HIGHEST if factor.dtype == jnp.float32 else None


def plain(x: Array, weight: Array, dtype: DTypeLike) -> Array:
    """The product as one einsum."""
    return jnp.einsum(
        "...i,oi->...o",
        x,
        weight,
        precision=full_precision(weight),
        preferred_element_type=dtype,
    )


def on_cpu(x: Array, weight: Array, dtype: DTypeLike) -> Array:
    """The product in the forms that XLA:CPU computes fast."""
    rows = x.reshape(-1, x.shape[-1])
    count = len(rows)
    if x.dtype == jnp.bfloat16:
        rows = jnp.pad(rows, ((0, max(2 - count, 0)), (0, 0)))
        y = plain(rows, weight, jnp.float32)[:count]
    elif 1 < count <= _FEW:
        # The barrier keeps the compiler from exchanging the factors again.
        y = jax.lax.optimization_barrier(plain(weight, rows, jnp.float32)).T
    elif count == 1 and weight.size < _SMALL and len(weight) % 2 == 0:
        halves = weight.reshape(2, -1, weight.shape[1])
        y = jnp.einsum(
            "pi,poi->po",
            jnp.tile(rows, (2, 1)),
            halves,
            precision="highest",
            preferred_element_type=jnp.float32,
        )
    else:
        y = plain(rows, weight, jnp.float32)
    return y.astype(dtype).reshape(*x.shape[:-1], -1)
