"""Which tokens a draw may choose: top-k, top-p and min-p, without sorting the vocabulary.

All three keep the tokens at or above some probability, so each is a threshold. Those of top-k and
top-p are found by bisection over the bits of a float, which is exact after 30 rounds of one
reduction each: cheaper than a sort, and under a sharded vocabulary only one number per row is
exchanged in a round. Where a row's support lies among its `FEW` likeliest tokens, only those are
read. Axes: B batch, V vocabulary, F few.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from t3jax import sharding

FEW = 512

_BITS = 30  # of floats in [0, 1]


class Likeliest(NamedTuple):
    """The likeliest tokens of each row, and which of them may be drawn.

    Attributes:
        tokens: Token ids, the likeliest first, int32 `[B, F]`.
        kept: True where a token may be drawn, `[B, F]`.
        settled: True for a row in which no other token may be drawn, `[B]`.
    """

    tokens: Int[Array, "B F"]
    kept: Bool[Array, "B F"]
    settled: Bool[Array, " B"]


def likeliest(
    logits: Float[Array, "B V"],
    top_k: Int[Array, " B"],
    top_p: Float[Array, " B"],
    min_p: Float[Array, " B"],
    mesh: Mesh | None = None,
) -> Likeliest:
    """The support of a draw, as far as it lies among the `FEW` likeliest tokens.

    The arguments are those of `support`; rows and vocabulary of the logits may be split over a
    mesh. In a settled row the kept tokens are all that `support` keeps.
    """
    values, tokens = _largest(logits, mesh)
    mass = jnp.sum(_weights(logits), axis=-1)
    drawable = support(values, top_k, top_p, min_p, mass)
    # Each rule is a threshold: if it drops the least likely token here, it drops all below it.
    return Likeliest(tokens, drawable, ~drawable[:, -1])


def support(
    logits: Float[Array, "B V"],
    top_k: Int[Array, " B"],
    top_p: Float[Array, " B"],
    min_p: Float[Array, " B"],
    mass: Float[Array, " B"] | None = None,
) -> Bool[Array, "B V"]:
    """Tokens kept by top-k, top-p and min-p together.

    Each rule is decided on the same distribution `softmax(logits)`; a token must pass all three.
    Tokens tied at a threshold are all kept, so that the order of the vocabulary decides nothing.

    Args:
        logits: The distribution that decides, unnormalised, float32 `[B, V]`; -inf is never kept.
        top_k: Keep the k likeliest; 0 keeps all, `[B]`.
        top_p: Keep the smallest set of likeliest tokens whose probability reaches p; 1 keeps all,
            `[B]`.
        min_p: Keep tokens at least min_p times as likely as the likeliest; 0 keeps all, `[B]`.
        mass: Sum of `exp(logit - largest logit)` over the whole vocabulary, of which top-p is a
            share, `[B]`; needed where `logits` hold only the likeliest tokens. None: the sum over
            `logits`.

    Returns:
        True where a token may be drawn, `[B, V]`. The likeliest token always may.
    """
    weights = _weights(logits)
    order = _ordered_bits(weights)
    wanted_mass = top_p * (jnp.sum(weights, axis=-1) if mass is None else mass)

    def threshold(enough: Callable[[Array], Array], wanted: Array) -> Array:
        """The largest threshold at or above which there are enough tokens, `[B]`."""

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

    by_k = threshold(lambda mask: jnp.sum(mask, axis=-1, dtype=jnp.int32) >= top_k, top_k > 0)
    by_p = threshold(
        lambda mask: jnp.sum(jnp.where(mask, weights, 0.0), axis=-1) >= wanted_mass, top_p < 1
    )
    keep_k = (order >= by_k[:, None]) | (top_k == 0)[:, None]
    keep_p = (order >= by_p[:, None]) | (top_p >= 1)[:, None]
    keep = keep_k & keep_p & (weights >= min_p[:, None])
    return keep & ~jnp.isneginf(logits)


def _largest(logits: Array, mesh: Mesh | None) -> tuple[Array, Array]:
    """The largest logits and their tokens, `[B, F]` each.

    With a split vocabulary each device searches its part, and the results are gathered.
    """
    if mesh is None or mesh.size == 1:
        values, tokens = jax.lax.top_k(logits, min(FEW, logits.shape[-1]))
        return values, tokens
    split = sharding.fit_sharding(mesh, sharding.LOGITS, logits.shape).spec
    rows, vocabulary = [*split, None, None][:2]
    parts = 1 if vocabulary is None else mesh.shape[vocabulary]

    def find(part: Array) -> tuple[Array, Array]:
        size = part.shape[-1]
        values, tokens = jax.lax.top_k(part, min(FEW, size))
        if parts == 1:
            return values, tokens
        tokens = tokens + size * jax.lax.axis_index(vocabulary)
        values, tokens = (
            jax.lax.all_gather(x, vocabulary, axis=1, tiled=True) for x in (values, tokens)
        )
        values, order = jax.lax.top_k(values, min(FEW, values.shape[-1]))
        return values, jnp.take_along_axis(tokens, order, axis=-1)

    return jax.shard_map(
        find, mesh=mesh, in_specs=P(rows, vocabulary), out_specs=P(rows), check_vma=False
    )(logits)


def _weights(logits: Array) -> Array:
    """Probability of each token over the largest one: 1 for the likeliest, 0 for banned tokens."""
    peak = jnp.max(logits, axis=-1, keepdims=True)
    return jnp.exp(logits - jnp.where(jnp.isneginf(peak), 0.0, peak))


def _ordered_bits(weights: Array) -> Array:
    """Int32 in the order of non-negative floats: their bits, read as an integer."""
    return jax.lax.bitcast_convert_type(weights, jnp.int32)
