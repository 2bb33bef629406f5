"""Vectors times a matrix `[out, in]`: the product of all layers, as each device does it best.

A CPU's matrix products bring their right factor into an order of their own at every call. Where
rows are few that takes longer than the product: there the matrix is the left factor, and the rows
are what is brought into order. For a single row nothing is, but one core multiplies a small matrix
alone unless it comes in two. Bfloat16 factors are multiplied by its vector instructions if the
result is float32 and they are more than one row.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_FEW = 256  # rows
_SMALL = 2**19  # weights of a matrix


@functools.partial(jax.jit, static_argnames="dtype", inline=True)  # traced once for all layers
def product(
    x: Float[Array, "*batch in"], weight: Float[Array, "out in"], dtype: Any = None
) -> Float[Array, "*batch out"]:
    """`x W^T`; float32 factors are multiplied as such, also where the hardware would round them.

    Args:
        x: Vectors, `[..., in]`.
        weight: W, of the same dtype, `[out, in]`.
        dtype: Dtype of the result; None means that of `x`. Sums are taken in float32. Where the
            result is bfloat16, a GPU may round the terms of a single row's sums to that too.

    Returns:
        The products, `[..., out]`.
    """
    ways = {
        name: functools.partial(way, dtype=dtype or x.dtype)
        for name, way in (("cpu", on_cpu), ("default", plain))
    }
    return jax.lax.platform_dependent(x, weight, **ways)


def plain(x: Array, weight: Array, dtype: Any) -> Array:
    """The product as a compiler knows it."""
    return jnp.einsum(
        "...i,oi->...o",
        x,
        weight,
        precision="highest" if weight.dtype == jnp.float32 else None,
        preferred_element_type=dtype,
    )


def on_cpu(x: Array, weight: Array, dtype: Any) -> Array:
    """The product in the form that a CPU is fast at."""
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
