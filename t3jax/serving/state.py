"""The state of a server's batch, and programs that make, resize and copy it.

Every row has its own cursor and starts at slot 0, and all shapes are fixed. Values that differ
between rows are traced: settings, heads that are on, stop tokens, longest answer.

Axes: B batch, b rows that join or remain, S cache slots, D features, H places for heads, V
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
from jaxtyping import Array, Bool, Float, Int

from t3jax import pooling
from t3jax.lm.cache import Axes, cache_axes
from t3jax.refinements import Refinements
from t3jax.sampling.loop import State, constrain_state
from t3jax.sampling.next_token import Controls
from t3jax.serving.stack import Stack

MOST_LIKELY = 20  # tokens whose log-probabilities a request may ask for, at each place


@dataclasses.dataclass(frozen=True)
class Program:
    """The static part of the programs, fixed when they are compiled.

    The first three are functions of the model; its caches take a cursor for each row. The other
    fields are as in `sampling.loop.Program`.
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
    """The settings of each row; `controls` as for `next_token`.

    `on` marks the heads that are on, and `limit` is the longest answer; `stop_ids` are padded with
    -1.
    """

    controls: Controls
    on: Bool[Array, "B H"]
    stop_ids: Int[Array, "B n"]
    limit: Int[Array, " B"]
    wants_likeliest: Bool[Array, " B"]


class Scored(NamedTuple):
    """Log-probabilities under the served distribution, before truncation and temperature.

    Attributes:
        chosen: Log-probability of the token, nats, `[...]`.
        base: The same under the base model.
        retain: P(retain) of the token by the heads.
        likeliest: The likeliest tokens, `[..., K]`; zeros in rows that did not ask for them.
        logprobs: Log-probabilities of `likeliest`, `[..., K]`; zeros likewise.
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
        changed_by: The head with the lowest score of the base's likeliest token, where the served
            distribution has another likeliest token; else -1.
        faults: As in `sampling.loop.Emitted`.
        done: True for a row whose answer ended by a stop token or by its length, `[B]`.
    """

    tokens: Int[Array, "B C"]
    scored: Scored
    changed_by: Int[Array, "B C"]
    faults: Int[Array, "B C"]
    done: Bool[Array, " B"]


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
    """Writes an answer that has begun to a row of the batch; `state`, the batch's, is donated.

    `new` is the state of `choose_first` and has as many slots. An answer for a row that the batch
    does not have is dropped.
    """
    joined = jax.tree.map(lambda old, value: old.at[row].set(value, mode="drop"), state, new)
    return constrain_state(program.mesh, joined)


@functools.partial(jax.jit, static_argnums=(0, 3))
def resize(program: Program, state: State, order: Int[Array, " b"], slots: int) -> State:
    """The same answers with other numbers of rows and slots.

    `order` has the old row of each new one. Dropped slots are not needed any more.
    """

    def change(axes: Axes, old: Array, empty: np.ndarray | Array) -> Array:
        if axes.slots is None or old.shape[axes.slots] == slots:
            return old[order]
        old_slots = jax.lax.slice_in_dim(old, 0, min(slots, old.shape[axes.slots]), axis=axes.slots)
        return jax.lax.dynamic_update_slice_in_dim(empty, old_slots[order], 0, axes.slots)

    empty = program.init_cache(order.shape[0], slots)
    cache = jax.tree.map(change, cache_axes(state.cache), state.cache, empty)
    rest = jax.tree.map(lambda old: old[order], state._replace(cache=None))
    return constrain_state(program.mesh, rest._replace(cache=cache))


@functools.partial(jax.jit, static_argnums=0)
def duplicate(program: Program, state: State) -> State:
    """Copies a state, so that one of the two can be donated."""
    return constrain_state(program.mesh, jax.tree.map(jnp.copy, state))


@functools.partial(jax.jit, static_argnums=0)
def made_up_state(program: Program, state: State, filled: Int[Array, ""]) -> State:
    """A state of the same shape full of different numbers, as if each row had read `filled` tokens.

    Programs are compared on it.
    """

    def make_up(leaf: Array) -> Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        numbers = jnp.sin(jnp.arange(leaf.size, dtype=jnp.float32) * 0.7)
        return numbers.reshape(leaf.shape).astype(leaf.dtype)

    numbers = jax.tree.map(make_up, state)
    positions = state.cache.positions
    slots = jnp.arange(positions.shape[1], dtype=jnp.int32)
    cache = numbers.cache._replace(
        positions=jnp.broadcast_to(jnp.where(slots < filled, slots, -1), positions.shape),
        cursor=jnp.full_like(state.cache.cursor, filled),
    )
    pooled = numbers.pooled._replace(count=jnp.full_like(state.pooled.count, filled))
    return _settle(program.mesh, numbers._replace(cache=cache, pooled=pooled))


def _settle(mesh: Mesh, state: State) -> State:
    """Gives a state the sharding of the programs' results; another would compile them again."""
    if mesh.size == 1:
        return jax.lax.with_sharding_constraint(state, NamedSharding(mesh, P()))
    return constrain_state(mesh, state)
