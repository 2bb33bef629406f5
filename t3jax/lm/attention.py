"""Attention of a layer, over a text by itself or over the cache of what was read before.

Axes: B batch, T time (new tokens), S cache slots, D features, H query heads, K key-value heads,
G queries for each key head (H = K G), h head width. The softmax is computed in float32.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from t3jax import sharding
from t3jax.lm.config import LMConfig
from t3jax.lm.layers import Linear, cap, full_precision, make_norm, normalize
from t3jax.lm.rotation import Rotation, rotate_keys, rotate_queries

# A layer's keys and values, and the cursor; None: keys of another layer, of this text alone.
Past = tuple[Array, Array, Array | np.ndarray | None]
# So many queries attend at a time, but in no more parts than these; where no text came before, what
# is after them is not even looked at. An accelerator has less to save and is slow to compile many.
_QUERIES = {"cpu": 128, "default": 1024}
_PARTS = 8
_MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


def write_slots(old: Array, new: Array, cursor: Array | np.ndarray, axis: int) -> Array:
    """Writes new tokens into slots from the cursor on.

    Args:
        old: Rows and slots among its axes, rows first, `[B, ...]`.
        new: The same with T slots.
        cursor: First slot, the same for all rows, or `[B]`.
        axis: Which axis is slots.

    Returns:
        As `old`.
    """
    if cursor.ndim:
        return jax.vmap(functools.partial(write_slots, axis=axis - 1))(old, new, cursor)
    start: list[Any] = [jnp.zeros_like(cursor)] * old.ndim
    start[axis] = cursor
    return jax.lax.dynamic_update_slice(old, new, start)


class Attention(nnx.Module):
    """Attention with grouped queries; it also writes the cache, if it has keys of its own."""

    def __init__(self, config: LMConfig, layer: int):
        width, bias, heads = config.hidden_size, config.attention_bias, config.heads(layer)
        q_width = config.num_heads * heads.head_dim
        k_width = heads.num_kv_heads * heads.head_dim
        self.borrows = bool(config.borrows) and config.borrows[layer]
        self.q = Linear(width, q_width, bias or config.qkv_bias, config.quantized)
        if not self.borrows:
            self.k = Linear(width, k_width, bias or config.qkv_bias, config.quantized)
        if not self.borrows and not heads.values_are_keys:
            self.v = Linear(width, k_width, bias or config.qkv_bias, config.quantized)
        self.o = Linear(q_width, width, bias or config.o_bias, config.quantized)
        if config.output_gate:
            self.gate = Linear(width, q_width, bias, config.quantized)
        wanted, h = config.qk_norm is not None, heads.head_dim
        self.q_norm = make_norm(config, _norm_shape(config, config.num_heads, h), wanted)
        own = wanted and not self.borrows
        self.k_norm = make_norm(config, _norm_shape(config, heads.num_kv_heads, h), own)
        if config.sinks:
            self.sinks = nnx.Param(jnp.zeros((config.num_heads,)))
        self.config, self.heads = config, heads

    def __call__(
        self,
        x: Array,
        rotation: Rotation | None,
        seen: Array,
        past: Past | None,
        mesh: Mesh | None,
    ) -> tuple[Array, Array, Array]:
        """What a layer adds for its inputs.

        Args:
            x: Inputs, `[B, T, D]`.
            rotation: That of the new tokens; None leaves queries and keys as they are.
            seen: Which slots each query attends to, bool `[B, T, S]`.
            past: The layer's keys and values so far, and the cursor; None for a text by itself. Of
                a layer that borrows them, those of the other with the new ones.
            mesh: Where the arrays live.

        Returns:
            Outputs `[B, T, D]`, and keys and values with the new ones.
        """
        c, kv_heads = self.config, self.heads.num_kv_heads
        b, t, _ = x.shape
        interleaved = c.rope is not None and c.rope.interleaved
        q = self._whole(self.q(x), mesh)
        q = self._split(q, self.q_norm, kv_heads, c.num_heads // kv_heads).transpose(0, 2, 3, 1, 4)
        if rotation is not None:
            q = self._whole(rotate_queries(q, rotation, interleaved), mesh)  # [B, K, G, T, h]
        if c.qk_norm_after:
            q = self.q_norm(q)
        if self.borrows:
            assert past is not None
            k, v, _ = past
        else:
            k, v = self._keys_and_values(x, rotation, mesh)
            if past is not None:
                keys, values, cursor = past
                assert cursor is not None
                k = write_slots(keys, k, cursor, axis=3)
                v = write_slots(values, v, cursor, axis=2)
        if mesh is not None:
            specs = sharding.attention_specs(mesh, kv_heads, t)
            q, k, v = (
                sharding.constrain(x, mesh, spec) for x, spec in zip((q, k, v), specs, strict=True)
            )
        if t == 1 or not self._splits_heads(mesh):
            out = self._attend(q, k, v, seen)
        else:
            sizes = {name: max(queries, -(-t // _PARTS)) for name, queries in _QUERIES.items()}
            alone = past is None or past[2] is None or isinstance(past[2], np.ndarray)
            ways = {
                name: functools.partial(self._attend_in_parts, size, alone)
                for name, size in sizes.items()
            }
            out = jax.lax.platform_dependent(q, k, v, seen, **ways)
        out = out.transpose(0, 3, 1, 2, 4).reshape(b, t, c.num_heads * self.heads.head_dim)
        out = self._whole(out, mesh)
        if c.output_gate:
            out = out * jax.nn.sigmoid(self._whole(self.gate(x), mesh))
        return self.o(out), k, v

    def _keys_and_values(
        self, x: Array, rotation: Rotation | None, mesh: Mesh | None
    ) -> tuple[Array, Array]:
        """Those of the new tokens, `[B, K, h, T]` and `[B, K, T, h]`."""
        c, heads = self.config, self.heads
        stated = self._whole(self.k(x), mesh)
        v = stated if heads.values_are_keys else self._whole(self.v(x), mesh)
        k = self._split(stated, self.k_norm, heads.num_kv_heads).transpose(0, 2, 1, 3)
        v = self._clipped(v).reshape(*v.shape[:2], heads.num_kv_heads, heads.head_dim)
        if c.value_norm:
            v = normalize(v, c.norm_eps).astype(v.dtype)
        if rotation is not None:
            interleaved = c.rope is not None and c.rope.interleaved
            k = self._whole(rotate_keys(k, rotation, interleaved), mesh)
        if c.qk_norm_after:
            k = self.k_norm(k)
        return k.swapaxes(2, 3), v.transpose(0, 2, 1, 3)

    def _attend_in_parts(
        self, size: int, alone: bool, q: Array, k: Array, v: Array, seen: Array
    ) -> Array:
        """So many queries at a time; those of a text alone look at nothing after them."""
        parts = []
        for first in range(0, q.shape[3], size):
            end = first + size
            last = end if alone else k.shape[-1]
            these = q[..., first:end, :], k[..., :last], v[..., :last, :]
            parts.append(self._attend(*these, seen[:, first:end, :last]))
        return jnp.concatenate(parts, axis=3)

    def _attend(self, q: Array, k: Array, v: Array, seen: Array) -> Array:
        """What queries `[B, K, G, T, h]` find, `[B, K, G, T, h]`."""
        c = self.config
        scores = jnp.einsum(
            "bkgth,bkhs->bkgts",
            q,
            k,
            precision=full_precision(k),
            preferred_element_type=jnp.float32,
        )
        if c.attention_multiplier is None:
            scores = scores * ((c.query_pre_attn_scalar or self.heads.head_dim) ** -0.5)
        else:
            scores = scores * c.attention_multiplier
        scores = cap(scores, c.attention_softcap)
        if c.alibi:
            scores = scores - _distance_penalties(c, seen)
        # Where nothing is seen (padding) the weights become uniform, never NaN.
        scores = jnp.where(seen[:, None, None], scores, _MASKED)
        weights = self._softmax(scores).astype(v.dtype)
        return jnp.einsum(
            "bkgts,bksh->bkgth",
            weights,
            v,
            precision=full_precision(v),
            preferred_element_type=jnp.float32,
        ).astype(v.dtype)

    def _softmax(self, scores: Array) -> Array:
        """Weights of the keys, `[B, K, G, T, S]`; a sink takes its share of 1."""
        if not self.config.sinks:
            return jax.nn.softmax(scores, axis=-1)
        sinks = self.sinks[...].astype(jnp.float32).reshape(1, *scores.shape[1:3], 1, 1)
        largest = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), sinks)
        exp = jnp.exp(scores - largest)
        return exp / (jnp.sum(exp, axis=-1, keepdims=True) + jnp.exp(sinks - largest))

    def _splits_heads(self, mesh: Mesh | None) -> bool:
        """Whether `model` splits whole heads, so that each device attends by itself."""
        return mesh is None or self.heads.num_kv_heads % mesh.shape[sharding.MODEL] == 0

    def _whole(self, x: Array, mesh: Mesh | None) -> Array:
        """`[B, T, heads h]` before it is split into heads that `model` does not divide."""
        if self._splits_heads(mesh):
            return x
        return sharding.constrain(x, mesh, [sharding.ROWS])

    def _clipped(self, x: Array) -> Array:
        c = self.config.qkv_clip
        return x if c is None else jnp.clip(x, -c, c)

    def _split(self, x: Array, norm: Any, *heads: int) -> Array:
        """Splits `[B, T, heads h]` into `[B, T, *heads, h]`, normed before or after."""
        c = self.config
        if c.qk_norm == "width":
            x = norm(x)
        x = self._clipped(x)
        if c.qk_norm == "each":
            x = norm(x.reshape(*x.shape[:2], -1, self.heads.head_dim))
        x = x.reshape(*x.shape[:2], *heads, self.heads.head_dim)
        return norm(x) if c.qk_norm == "head" and not c.qk_norm_after else x


def _norm_shape(config: LMConfig, heads: int, width: int) -> tuple[int, ...]:
    """Shape of the weight of a norm of queries or keys."""
    return {"width": (heads * width,), "each": (heads, width)}.get(config.qk_norm or "", (width,))


def _distance_penalties(config: LMConfig, seen: Array) -> Array:
    """What ALiBi subtracts from the scores, float32 `[B, K, G, T, S]`.

    The distance of a key is the number of keys after it that the query sees.

    References:
        Train Short, Test Long, arXiv 2108.12409, section 3.
    """
    counted = seen.astype(jnp.int32)
    distance = jnp.sum(counted, axis=-1, keepdims=True) - jnp.cumsum(counted, axis=-1)
    slopes = jnp.asarray(alibi_slopes(config.num_heads))
    slopes = slopes.reshape(1, config.num_kv_heads, -1, 1, 1)
    return slopes * distance.astype(jnp.float32)[:, None, None]


def alibi_slopes(heads: int) -> np.ndarray:
    """Slopes of the heads, float32 `[H]`: a geometric series down to 2^-8.

    Where their number is no power of two, the further heads have every second slope of a series
    twice as long.
    """
    power = 1 << (heads.bit_length() - 1)
    slopes = 2.0 ** (-8.0 / power * np.arange(1, power + 1))
    between = 2.0 ** (-4.0 / power * np.arange(1, 2 * power, 2))
    return np.concatenate([slopes, between])[:heads].astype(np.float32)
