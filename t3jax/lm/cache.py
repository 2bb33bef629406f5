"""What a decoder keeps of the text it has read: a state for each layer.

A layer of attention keeps keys and values of every token, unless it borrows those of another, a
gated delta net a memory of fixed size and the last inputs of its convolution, a layer that is a
convolution those alone. Each kind of state says here which axes of its arrays are rows and slots,
and how a mesh splits them; what moves rows and slots asks `cache_axes`.

Axes: B batch, S cache slots, K key-value heads, or heads of a delta net's keys, G heads of its
values for each of these, h width of an attention head, d width of a delta net's keys, e of its
values, C channels of its convolution, W taps of that.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from t3jax import sharding
from t3jax.lm.config import LMConfig


class KeyValues(NamedTuple):
    """State of a layer of attention. Local ones keep the whole text too, and mask what is far.

    Attributes:
        keys: Rotated.
        values: Both stand as the products of a decoding step read them: otherwise a CPU transposes
            the whole cache at every step.
    """

    keys: Float[Array, "B K h S"]
    values: Float[Array, "B K S h"]


class DeltaState(NamedTuple):
    """State of a gated delta net after the real tokens so far; padding leaves it as it is.

    Attributes:
        tail: Inputs of the convolution, the last of them; 0 before the text.
        memory: What maps a key to its value.
    """

    tail: Float[Array, "B W-1 C"]
    memory: Float[Array, "B K G d e"]


class ConvState(NamedTuple):
    """State of a short convolution after the real tokens so far; padding leaves it as it is.

    Attributes:
        tail: Its last inputs; 0 before the text.
    """

    tail: Float[Array, "B W-1 C"]


class Borrowed(NamedTuple):
    """State of a layer that attends to the keys and values of another one: nothing."""


LayerState = KeyValues | DeltaState | ConvState | Borrowed


class Cache(NamedTuple):
    """The text read so far.

    With one cursor, new tokens of all rows are written at the same slots, so prompts of unequal
    length are padded on the left. With a cursor for each row they are padded on the right, and the
    next tokens overwrite the padding. A slot is seen by a query if it holds a real token at or
    before the query's position.

    Attributes:
        layers: The state of each layer.
        positions: Position of the token in each slot, `[B, S]`; -1 where there is none.
        cursor: Next slot to write: a scalar, or one for each row, `[B]`; there must be room for
            all new tokens, padding included. NumPy's is known when a program is traced: the 0 of
            an empty cache, whose first queries look at no slot after their own.
    """

    layers: tuple[LayerState, ...]
    positions: Int[Array, "B S"]
    cursor: Int[Array, ""] | Int[np.ndarray, ""] | Int[Array, " B"]


@dataclasses.dataclass(frozen=True)
class Axes:
    """Which axes of an array of a cache are rows and slots; None where there is no such axis."""

    rows: int | None
    slots: int | None


def init_cache(config: LMConfig, batch: int, slots: int, dtype: Any) -> Cache:
    """An empty cache for `batch` texts of up to `slots` tokens, padding included."""
    return Cache(
        layers=tuple(
            _empty_state(config, layer, batch, slots, dtype) for layer in range(config.num_layers)
        ),
        positions=jnp.full((batch, slots), -1, jnp.int32),
        cursor=np.zeros((), np.int32),
    )


def cache_axes(cache: Cache) -> Any:
    """The axes of each array of a cache, a tree of its structure."""
    keys: Any = Axes(0, 3)
    positions: Any = Axes(0, 1)
    values: Any = Axes(0, 2)
    whole: Any = Axes(0, None)  # what does not grow with the text
    cursor: Any = Axes(0 if cache.cursor.ndim else None, None)
    by_kind: Any = {
        KeyValues: KeyValues(keys, values),
        DeltaState: DeltaState(whole, whole),
        ConvState: ConvState(whole),
        Borrowed: Borrowed(),
    }
    return Cache(tuple(by_kind[type(state)] for state in cache.layers), positions, cursor)


def cache_shardings(mesh: Mesh, cache: Any) -> Any:
    """Shardings of a cache: rows; of a decoder's also heads over `model`, or the width of keys."""
    shardings = jax.tree.map(lambda x: sharding.batch_sharding(mesh, x.shape), cache)
    if not isinstance(cache, Cache):
        return shardings
    layers = tuple(_state_shardings(mesh, state) for state in cache.layers)
    return shardings._replace(layers=layers)


def _empty_state(config: LMConfig, layer: int, batch: int, slots: int, dtype: Any) -> LayerState:
    if config.has_delta(layer):
        return _empty_delta(config, batch, dtype)
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


def _empty_delta(config: LMConfig, batch: int, dtype: Any) -> DeltaState:
    delta = config.delta
    assert delta is not None
    group = delta.value_heads // delta.key_heads
    memory = (batch, delta.key_heads, group, delta.key_dim, delta.value_dim)
    # The memory adds up what thousands of tokens give it.
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
    placed: Any = map(functools.partial(sharding.fit_sharding, mesh), specs, shapes)
    return type(state)(*placed)
