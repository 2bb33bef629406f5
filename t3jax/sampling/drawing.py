"""One draw in each row of a distribution, within the support that truncation leaves.

A draw is the argmax of logits / temperature + Gumbel noise. On a CPU a row whose support lies among
its likeliest tokens is drawn from those: noise for a few tokens costs less than noise for a
vocabulary. The other rows are drawn from all tokens; a row's draw does not depend on the other
rows. On an accelerator noise costs less than finding the likeliest tokens: all rows draw from all.

Axes: B batch, b some of its rows, V vocabulary, F few.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from t3jax.sampling import truncation

Rows = slice | Array  # which rows of a batch
Limits = tuple[Array, Array, Array]  # top-k, top-p and min-p, `[B]` each


def draw(
    logits: Float[Array, "B V"],
    decide: Callable[[Rows], Array],
    limits: Limits,
    temperature: Float[Array, " B"],
    keys: Key[Array, " B"],
    mesh: Mesh | None = None,
) -> Int[Array, " B"]:
    """Draws a token in each row from unnormalised logits.

    `decide` takes rows and gives the distribution that decides their support, `[b, V]`; it is
    computed only if a row truncates. A temperature of 0 is greedy. A row's key is used up here.
    Without a mesh the arrays are on one device.
    """
    top_k, top_p, min_p = limits
    truncates = jnp.any((top_k > 0) | (top_p < 1) | (min_p > 0))

    def from_few() -> tuple[Array, Array]:
        few = truncation.likeliest(decide(slice(None)), *limits, mesh)
        return _draw_among(few, logits, temperature, keys), few.settled

    # Raw key data: JAX's check of keys cannot see that each step of a loop reads another row's key.
    key_data = jax.random.key_data(keys)

    def from_all(rows: Rows = slice(None)) -> Array:
        """Draws of some rows from all tokens."""
        masked, row_limits, row_temperature, data = jax.tree.map(
            lambda x: x[rows], (logits, limits, temperature, key_data)
        )
        row_keys = jax.random.wrap_key_data(data, impl=jax.random.key_impl(keys))
        masked = jax.lax.cond(
            truncates,
            lambda: jnp.where(truncation.support(decide(rows), *row_limits), masked, -jnp.inf),
            lambda: masked,
        )
        return _pick(masked, row_temperature, lambda: _gumbel(row_keys, masked))

    def from_none() -> tuple[Array, Array]:
        return jnp.zeros(logits.shape[0], jnp.int32), jnp.zeros(logits.shape[0], bool)

    few, settled = jax.lax.platform_dependent(
        cpu=lambda: jax.lax.cond(truncates, from_few, from_none), default=from_none
    )

    def together() -> Array:
        return jnp.where(settled, few, from_all())

    # One row needs no loop over rows, which would be compiled too.
    if len(logits) > 1 and (mesh is None or mesh.size == 1):
        most = 2 * jnp.sum(settled) >= len(settled)
        return jax.lax.cond(most, lambda: _draw_one_by_one(few, settled, from_all), together)
    return jax.lax.cond(jnp.all(settled), lambda: few, together)


def _draw_among(few: truncation.Likeliest, logits: Array, temperature: Array, keys: Array) -> Array:
    """Draws of all rows from their likeliest tokens."""
    values = jnp.where(few.kept, jnp.take_along_axis(logits, few.tokens, axis=-1), -jnp.inf)
    place = _pick(values, temperature, lambda: _gumbel_of(keys, few.tokens))
    return jnp.take_along_axis(few.tokens, place[:, None], axis=-1)[:, 0]


def _draw_one_by_one(tokens: Array, settled: Array, draw_rows: Callable[[Rows], Array]) -> Array:
    """The tokens, with those of the rows that are not settled drawn row by row."""
    order = jnp.argsort(settled)

    def choose(i: Array, tokens: Array) -> Array:
        row = order[i][None]
        return tokens.at[row].set(draw_rows(row))

    return jax.lax.fori_loop(0, jnp.sum(~settled), choose, tokens)


def _pick(logits: Array, temperature: Array, noise: Callable[[], Array]) -> Array:
    """The drawn index, int32 `[B]`: the argmax of logits / temperature + Gumbel noise."""
    greedy = temperature == 0
    divisor = jnp.where(greedy, 1.0, temperature)[:, None]
    return jax.lax.cond(
        jnp.all(greedy),
        lambda: jnp.argmax(logits, axis=-1),
        lambda: jnp.argmax(jnp.where(greedy[:, None], logits, logits / divisor + noise()), axis=-1),
    ).astype(jnp.int32)


def _gumbel(keys: Array, like: Array) -> Array:
    return jax.vmap(lambda key: jax.random.gumbel(key, like.shape[-1:], jnp.float32))(keys)


def _gumbel_of(keys: Array, tokens: Array) -> Array:
    """Gumbel noise of some tokens; a token's noise does not depend on its position among them."""

    def noise(key: Array, token: Array) -> Array:
        return jax.random.gumbel(jax.random.fold_in(key, token), (), jnp.float32)

    return jax.vmap(jax.vmap(noise, (None, 0)))(keys, tokens)
