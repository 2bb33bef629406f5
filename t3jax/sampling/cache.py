"""Changes of a cache between two chunks: resizing, compaction, admission of new prompts.

All rows write to the same slot, so a new prompt ends before the slot that the others write next;
slots at the beginning that no row needs are dropped. A decoder's cache has named axes. The cache of
a user's own model is a tree of arrays from `init_cache(rows, slots)`: its axes are inferred from
shapes, and a scalar counts slots. Axes: B batch, b new prompts, P their slots, S cache slots.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from t3jax.batching import round_up
from t3jax.lm.cache import Axes, Cache, cache_axes
from t3jax.sampling.loop import Program, State, constrain_state

_SLOT_STEP = 64  # slots of the cache, which grows as answers do, by half at least


def cache_slots(length: int, max_new_tokens: int, chunk: int) -> list[int]:
    """Slots of the cache in `prefill` and in each chunk: it grows as it is filled."""
    chunks = -(-(max_new_tokens - 1) // chunk)
    most = length + 1 + chunks * chunk
    slots = [min(most, round_up(length + 1 + chunk, _SLOT_STEP))]
    for i in range(chunks):
        needed, last = length + 1 + (i + 1) * chunk, slots[-1]
        grown = min(most, round_up(max(needed, last * 3 // 2), _SLOT_STEP))
        slots.append(grown if needed > last else last)
    return slots


def _move(program: Program, state: State, shift: Int[Array, ""], slots: int) -> State:
    """Moves a state to a cache of `slots` slots, without the first `shift`, which no row needs."""

    def move(axes: Axes, old: Array, empty: np.ndarray | Array) -> Array:
        if axes.rows is None:
            return old - shift
        if axes.slots is None:
            return old
        longer = jnp.concatenate([old, empty], axes.slots)
        return jax.lax.dynamic_slice_in_dim(longer, shift, slots, axes.slots)

    empty = program.init_cache(state.token.shape[0], slots)
    cache = jax.tree.map(move, _axes(program, state.cache), state.cache, empty)
    return constrain_state(program.mesh, state._replace(cache=cache))


# Compaction works in place. Resizing cannot: both caches are in memory for a moment.
compact = jax.jit(_move, static_argnums=(0, 3), donate_argnums=1)
resize = jax.jit(_move, static_argnums=(0, 3))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def admit(
    program: Program, state: State, new: State, rows: Int[Array, " b"], start: Int[Array, ""]
) -> State:
    """Gives finished rows to new prompts; `state` is donated.

    `new` is the state of `prefill` on the new prompts, with P slots. A prompt whose entry of `rows`
    is no row of the batch is dropped. Slot `start` of the first token is P slots before the next
    slot that is written.
    """

    def take(axes: Axes, old: Array, new: Array, empty: np.ndarray | Array) -> Array:
        if axes.rows is None:
            return old
        if axes.slots is not None:  # the rows' former contents are dropped
            new = jax.lax.dynamic_update_slice_in_dim(empty, new, start, axes.slots)
        return replace(old, new, axes.rows)

    def replace(old: Array, new: Array, axis: int = 0) -> Array:
        return old.at[(slice(None),) * axis + (rows,)].set(new, mode="drop")

    axes = _axes(program, state.cache)
    empty = program.init_cache(rows.shape[0], _num_slots(axes, state.cache))
    cache = jax.tree.map(take, axes, state.cache, new.cache, empty)
    rest = jax.tree.map(replace, state._replace(cache=None), new._replace(cache=None))
    return constrain_state(program.mesh, rest._replace(cache=cache))


def _axes(program: Program, cache: PyTree) -> PyTree:
    """The axes of each array of a cache, a tree of its structure."""
    if isinstance(cache, Cache):
        return cache_axes(cache)
    few, more_rows, more_slots = (
        jax.eval_shape(functools.partial(program.init_cache, rows, slots))
        for rows, slots in ((2, 3), (5, 3), (2, 7))
    )

    def find_axis(one: jax.ShapeDtypeStruct, other: jax.ShapeDtypeStruct) -> int | None:
        return next((i for i, n in enumerate(one.shape) if n != other.shape[i]), None)

    return jax.tree.map(
        lambda x, by_rows, by_slots: Axes(find_axis(x, by_rows), find_axis(x, by_slots)),
        few,
        more_rows,
        more_slots,
    )


def _num_slots(axes: PyTree, cache: PyTree) -> int:
    """Number of slots S; 1, which is not used, for a cache without slots."""
    pairs = zip(jax.tree.leaves(axes), jax.tree.leaves(cache), strict=True)
    return next((leaf.shape[axis.slots] for axis, leaf in pairs if axis.slots is not None), 1)
