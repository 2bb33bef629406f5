"""The state of a server's batch: what it holds, and how rows and slots are made and moved.

Every row has a cursor of its own and starts at slot 0, and all shapes are fixed. All that differs
from row to row is traced: settings, heads that are on, stop tokens, longest answer.

Axes: B batch, b rows that join or are left, S cache slots, D features, H places for heads, V
vocabulary, n stop tokens, K likeliest tokens, C steps of a chunk.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, PyTree

from t3jax import pooling
from t3jax.lm.cache import Axes, cache_axes
from t3jax.refinements import Refinements
from t3jax.sampling.loop import State, placed
from t3jax.sampling.next_token import Controls
from t3jax.serving.stack import Stack

MOST_LIKELY = 20  # tokens whose log-probabilities a request may ask for, at each place


@dataclasses.dataclass(frozen=True)
class Program:
    """The static part of the programs, fixed when they are compiled.

    Attributes:
        apply: The model's `apply`.
        unembed: The model's `unembed`.
        init_cache: The model's `init_cache`; its caches take a cursor for each row.
        truncate_on: What decides top-k, top-p and min-p, see `next_token`.
        refinements: Which are on.
        mesh: Where the state lives.
    """

    apply: Any
    unembed: Any
    init_cache: Any
    truncate_on: str
    refinements: Refinements
    mesh: Mesh


class Weights(NamedTuple):
    """Frozen arrays that the programs read: the model's parameters, and the heads."""

    params: Any
    stack: Stack


class Settings(NamedTuple):
    """The settings of each row.

    Attributes:
        controls: As for `next_token`.
        on: Which heads are on, `[B, H]`.
        stop_ids: Tokens that end an answer, -1 where there are fewer, `[B, n]`.
        limit: Longest answer, tokens, `[B]`.
        wants_likeliest: Whether the likeliest tokens are asked for, `[B]`.
    """

    controls: Controls
    on: Bool[Array, "B H"]
    stop_ids: Int[Array, "B n"]
    limit: Int[Array, " B"]
    wants_likeliest: Bool[Array, " B"]


class Scored(NamedTuple):
    """Log-probabilities under the served distribution, before truncation and temperature.

    Attributes:
        chosen: Of the token that stands there, nats, `[...]`.
        base: The same under the base model.
        retain: P(retain) that the heads give this token.
        likeliest: The likeliest tokens, `[..., K]`.
        logprobs: Theirs, `[..., K]`. Both are zeros in rows that did not ask.
    """

    chosen: Float[Array, "..."]
    base: Float[Array, "..."]
    retain: Float[Array, "..."]
    likeliest: Int[Array, "... K"]
    logprobs: Float[Array, "... K"]


class Emitted(NamedTuple):
    """The output of a chunk, `[B, C, ...]` each.

    Attributes:
        tokens: Chosen tokens; -1 after a row's end.
        scored: Their log-probabilities.
        changed_by: The head that speaks most against the base's likeliest token, where that is not
            the served distribution's; else -1.
        faults: As in `sampling.loop.Emitted`.
        done: Rows whose answer ended by a stop token or by its length, `[B]`.
    """

    tokens: Int[Array, "B C"]
    scored: Scored
    changed_by: Int[Array, "B C"]
    faults: Int[Array, "B C"]
    done: Bool[Array, " B"]


def everywhere(mesh: Mesh, tree: PyTree) -> PyTree:
    """Whole on every device, so that every host reads it; inside of jit."""
    if mesh.size == 1:
        return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, P()))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def empty_state(
    program: Program, vocab_size: int, hidden_size: int, rows: int, slots: int
) -> State:
    """The state of a batch without requests."""
    cache = program.init_cache(rows, slots)
    state = State(
        cache=cache._replace(cursor=jnp.zeros(rows, jnp.int32)),
        pooled=pooling.RunningMean(
            jnp.zeros((rows, hidden_size), jnp.float32), jnp.zeros(rows, jnp.float32)
        ),
        token=jnp.zeros(rows, jnp.int32),
        done=jnp.ones(rows, bool),
        step=jnp.zeros(rows, jnp.int32),
        seen=jnp.zeros((rows, vocab_size), bool),
        keys=jax.random.split(jax.random.key(0), rows),
    )
    return _settle(program.mesh, state)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def join(program: Program, state: State, new: State, row: Int[Array, " b"]) -> State:
    """Gives a row of the batch to an answer that has begun; `state`, the batch's, is donated.

    `new` comes from `choose_first` and has as many slots. A row that the batch does not have drops
    the answer.
    """
    joined = jax.tree.map(lambda old, own: old.at[row].set(own, mode="drop"), state, new)
    return placed(program.mesh, joined)


@functools.partial(jax.jit, static_argnums=(0, 3))
def resize(program: Program, state: State, order: Int[Array, " b"], slots: int) -> State:
    """The same answers with other numbers of rows and slots.

    `order` has the old row of each new one. Slots that are dropped hold nothing that is needed.
    """

    def change(axes: Axes, old: Array, empty: np.ndarray | Array) -> Array:
        if axes.slots is None or old.shape[axes.slots] == slots:
            return old[order]
        kept = jax.lax.slice_in_dim(old, 0, min(slots, old.shape[axes.slots]), axis=axes.slots)
        return jax.lax.dynamic_update_slice_in_dim(empty, kept[order], 0, axes.slots)

    empty = program.init_cache(order.shape[0], slots)
    cache = jax.tree.map(change, cache_axes(state.cache), state.cache, empty)
    rest = jax.tree.map(lambda old: old[order], state._replace(cache=None))
    return placed(program.mesh, rest._replace(cache=cache))


@functools.partial(jax.jit, static_argnums=0)
def duplicate(program: Program, state: State) -> State:
    """A copy of a state, so that one of both can be donated."""
    return placed(program.mesh, jax.tree.map(jnp.copy, state))


@functools.partial(jax.jit, static_argnums=0)
def made_up_state(program: Program, state: State, filled: Int[Array, ""]) -> State:
    """A state of the same shape full of unlike numbers, to compare programs on.

    Each row has read `filled` tokens.
    """

    def make_up(leaf: Array) -> Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        numbers = jnp.sin(jnp.arange(leaf.size, dtype=jnp.float32) * 0.7)
        return numbers.reshape(leaf.shape).astype(leaf.dtype)

    made = jax.tree.map(make_up, state)
    positions = state.cache.positions
    slots = jnp.arange(positions.shape[1], dtype=jnp.int32)
    cache = made.cache._replace(
        positions=jnp.broadcast_to(jnp.where(slots < filled, slots, -1), positions.shape),
        cursor=jnp.full_like(state.cache.cursor, filled),
    )
    pooled = made.pooled._replace(count=jnp.full_like(state.pooled.count, filled))
    return _settle(program.mesh, made._replace(cache=cache, pooled=pooled))


def _settle(mesh: Mesh, state: State) -> State:
    """Places a state where programs leave theirs; another sharding would compile them anew."""
    if mesh.size == 1:
        return jax.lax.with_sharding_constraint(state, NamedSharding(mesh, P()))
    return placed(mesh, state)
