"""Which tokens a draw may choose: top-k, top-p and min-p, without sorting the vocabulary.

All three keep the tokens at or above some probability, so each is a threshold. Those of top-k and
top-p are found by bisection over the bits of a float, which is exact after 30 rounds of one
reduction each: cheaper than a sort, and under a sharded vocabulary only one number per row is
exchanged in a round. Axes: B batch, V vocabulary.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_BITS = 30  # of floats in [0, 1]


def support(
    logits: Float[Array, "B V"],
    top_k: Int[Array, " B"],
    top_p: Float[Array, " B"],
    min_p: Float[Array, " B"],
) -> Bool[Array, "B V"]:
    """Tokens kept by top-k, top-p and min-p together.

    Each rule is decided on the same distribution `softmax(logits)` and a token must pass all three.
    Tokens tied at a threshold are all kept, so that the order of the vocabulary decides nothing.

    Args:
        logits: The distribution that decides, unnormalised, float32 `[B, V]`; -inf is never kept.
        top_k: Keep the k likeliest; 0 keeps all, `[B]`.
        top_p: Keep the smallest set of likeliest tokens whose probability reaches p; 1 keeps all,
            `[B]`.
        min_p: Keep tokens at least min_p times as likely as the likeliest; 0 keeps all, `[B]`.

    Returns:
        True where a token may be drawn, `[B, V]`. The likeliest token always may.
    """
    peak = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - jnp.where(jnp.isneginf(peak), 0.0, peak))  # peak 1, banned 0
    order = _ordered_bits(weights)
    wanted_mass = top_p * jnp.sum(weights, axis=-1)

    def threshold(enough: Callable[[Array], Array], wanted: Array) -> Array:
        """The largest threshold at which the tokens at or above it are enough, `[B]`."""

        def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = bounds  # the tokens at or above `low` suffice, those above `high` do not
            middle = low + (high - low + 1) // 2
            suffices = enough(order >= middle[:, None])
            return jnp.where(suffices, middle, low), jnp.where(suffices, high, middle - 1)

        low, high = jnp.zeros_like(order[:, 0]), jnp.max(order, axis=-1)
        # A rule that no row uses costs nothing.
        return jax.lax.cond(
            jnp.any(wanted),
            lambda: jax.lax.fori_loop(0, _BITS, halve, (low, high))[0],
            lambda: low,
        )

    by_k = threshold(lambda kept: jnp.sum(kept, axis=-1, dtype=jnp.int32) >= top_k, top_k > 0)
    by_p = threshold(
        lambda kept: jnp.sum(jnp.where(kept, weights, 0.0), axis=-1) >= wanted_mass, top_p < 1
    )
    keep_k = (order >= by_k[:, None]) | (top_k == 0)[:, None]
    keep_p = (order >= by_p[:, None]) | (top_p >= 1)[:, None]
    keep = keep_k & keep_p & (weights >= min_p[:, None])
    return keep & ~jnp.isneginf(logits)


def _ordered_bits(weights: Array) -> Array:
    """Int32 in the order of non-negative floats: their bits, read as an integer."""
    return jax.lax.bitcast_convert_type(weights, jnp.int32)
