"""The cache of a decoder: a state for each layer.

A layer of attention keeps keys and values of every token, unless it borrows another layer's. A
gated delta net keeps a memory of fixed size and the last inputs of its convolution, a short
convolution its last inputs. `cache_axes` says which axes of the arrays are rows and slots.

Axes: B batch, S cache slots, K key-value heads (of a delta net: key heads), G value heads of a
delta net for each key head, h width of an attention head, d and e widths of a delta net's keys and
values, C channels and W taps of a convolution.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from t3jax import sharding
from t3jax.lm.config import LMConfig


class KeyValues(NamedTuple):
    """Rotated keys, and values, of a layer of attention; local layers keep the whole text too.

    The layouts are those that the products of a decoding step read: in any other, a CPU transposes
    the whole cache at every step.
    """

    keys: Float[Array, "B K h S"]
    values: Float[Array, "B K S h"]


class DeltaState(NamedTuple):
    """State of a gated delta net after the real tokens so far; padding does not change it.

    Attributes:
        tail: Last inputs of the convolution; 0 before the text.
        memory: Linear maps from keys to values.
    """

    tail: Float[Array, "B W-1 C"]
    memory: Float[Array, "B K G d e"]


class ConvState(NamedTuple):
    """Last inputs of a short convolution, 0 before the text; padding does not change it."""

    tail: Float[Array, "B W-1 C"]


class Borrowed(NamedTuple):
    """State of a layer that attends to the keys and values of another one: nothing."""


LayerState = KeyValues | DeltaState | ConvState | Borrowed


class Cache(NamedTuple):
    """The text read so far.

    With one cursor, new tokens of all rows are written at the same slots, so prompts of unequal
    length are padded on the left. With a cursor for each row they are padded on the right, and the
    next tokens overwrite the padding. A query attends to slots with a real token at or before its
    position.

    Attributes:
        layers: The state of each layer.
        positions: Position of the token in each slot, `[B, S]`; -1 in empty slots and padding.
        cursor: Next slot to write, one for all rows or `[B]`; all new tokens, padding included,
            must fit. A NumPy scalar is static under jit: the 0 of an empty cache, with which
            attention skips the slots after each block of queries.
    """

    layers: tuple[LayerState, ...]
    positions: Int[Array, "B S"]
    cursor: Int[Array, ""] | Int[np.ndarray, ""] | Int[Array, " B"]


@dataclasses.dataclass(frozen=True)
class Axes:
    """The axes of rows and slots of an array of a cache; None if it has no such axis."""

    rows: int | None
    slots: int | None


def init_cache(config: LMConfig, batch: int, slots: int, dtype: DTypeLike) -> Cache:
    """An empty cache for `batch` texts of up to `slots` tokens, padding included."""
    return Cache(
        layers=tuple(
            _make_state(config, layer, batch, slots, dtype) for layer in range(config.num_layers)
        ),
        positions=jnp.full((batch, slots), -1, jnp.int32),
        cursor=np.zeros((), np.int32),
    )


def cache_axes(cache: Cache) -> Any:
    """The axes of each array of a cache, a tree of its structure."""
    keys: Any = Axes(0, 3)
    positions: Any = Axes(0, 1)
    values: Any = Axes(0, 2)
    fixed: Any = Axes(0, None)  # does not grow with the text
    cursor: Any = Axes(0 if cache.cursor.ndim else None, None)
    by_kind: Any = {
        KeyValues: KeyValues(keys, values),
        DeltaState: DeltaState(fixed, fixed),
        ConvState: ConvState(fixed),
        Borrowed: Borrowed(),
    }
    return Cache(tuple(by_kind[type(state)] for state in cache.layers), positions, cursor)


def cache_shardings(mesh: Mesh, cache: Any) -> Any:
    """Shardings of a cache over rows; of a decoder's, `model` also splits heads or key width."""
    shardings = jax.tree.map(lambda x: sharding.batch_sharding(mesh, x.shape), cache)
    if not isinstance(cache, Cache):
        return shardings
    layers = tuple(_state_shardings(mesh, state) for state in cache.layers)
    return shardings._replace(layers=layers)


def _make_state(
    config: LMConfig, layer: int, batch: int, slots: int, dtype: DTypeLike
) -> LayerState:
    if config.has_delta(layer):
        return _make_delta_state(config, batch, dtype)
    if config.has_conv(layer):
        assert config.conv is not None
        shape = batch, config.conv.taps - 1, config.conv.channels
        return ConvState(jnp.zeros(shape, dtype))
    if config.borrows and config.borrows[layer]:
        return Borrowed()
    heads = config.heads(layer)
    rows, width = (batch, heads.num_kv_heads), heads.head_dim
    return KeyValues(
        jnp.zeros((*rows, width, slots), dtype), jnp.zeros((*rows, slots, width), dtype)
    )


def _make_delta_state(config: LMConfig, batch: int, dtype: DTypeLike) -> DeltaState:
    delta = config.delta
    assert delta is not None
    group = delta.value_heads // delta.key_heads
    memory = (batch, delta.key_heads, group, delta.key_dim, delta.value_dim)
    # Float32, since the memory sums updates of thousands of tokens.
    return DeltaState(
        jnp.zeros((batch, delta.taps - 1, delta.channels), dtype), jnp.zeros(memory, jnp.float32)
    )


def _state_shardings(mesh: Mesh, state: LayerState) -> Any:
    specs: Any = (P(sharding.ROWS), P(sharding.ROWS, sharding.MODEL))
    if isinstance(state, KeyValues):
        specs = sharding.attention_specs(mesh, state.keys.shape[1], length=1)[1:]
    if isinstance(state, ConvState):
        specs = (P(sharding.ROWS, None, sharding.MODEL),)
    shapes = (leaf.shape for leaf in state)
    shardings: Any = map(functools.partial(sharding.fit_sharding, mesh), specs, shapes)
    return type(state)(*shardings)
