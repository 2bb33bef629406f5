"""Attention of a layer, over a text by itself or over the cache of earlier tokens.

Axes: B batch, T time (new tokens), S cache slots, D features, H query heads, K key-value heads,
G queries for each key head (H = K G), h head width. The softmax is computed in float32.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from t3jax import sharding
from t3jax.lm.config import LMConfig
from t3jax.lm.layers import Linear, cap, make_norm, normalize
from t3jax.lm.product import full_precision
from t3jax.lm.rotation import Rotation, rotate_keys, rotate_queries

# Keys, values and cursor; the cursor is None for another layer's keys of this text alone.
Past = tuple[Array, Array, Array | np.ndarray | None]
# Queries of a block, and the most blocks of a text. At the start of a text a block skips the keys
# after it. An accelerator saves less by that, and is slow to compile many blocks.
_QUERIES = {"cpu": 128, "default": 1024}
_MAX_BLOCKS = 8
_MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


def write_slots(old: Array, new: Array, cursor: Array | np.ndarray, axis: int) -> Array:
    """Writes new tokens `[B, ...]` into the slots of `old` from the cursor on.

    Rows are the first axis, slots are `axis`. The cursor is one for all rows, or `[B]`.
    """
    if cursor.ndim:
        return jax.vmap(functools.partial(write_slots, axis=axis - 1))(old, new, cursor)
    start: list[Array | np.ndarray] = [jnp.zeros_like(cursor)] * old.ndim
    start[axis] = cursor
    return jax.lax.dynamic_update_slice(old, new, start)


class Attention(nnx.Module):
    """Attention with grouped queries; it writes its keys and values into the cache."""

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
        normed, h = config.qk_norm is not None, heads.head_dim
        self.q_norm = make_norm(config, _norm_shape(config, config.num_heads, h), normed)
        k_shape = _norm_shape(config, heads.num_kv_heads, h)
        self.k_norm = make_norm(config, k_shape, normed and not self.borrows)
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
        """The output for `x`, `[B, T, D]`, and the keys and values of all tokens.

        `seen`, bool `[B, T, S]`, says which slots each query attends to. `past` is None for a text
        by itself; in a layer that borrows keys and values it already includes the new tokens.
        """
        c, kv_heads = self.config, self.heads.num_kv_heads
        b, t, _ = x.shape
        interleaved = c.rope is not None and c.rope.interleaved
        q = self._split_heads(
            self._gather_heads(self.q(x), mesh), self.q_norm, kv_heads, c.num_heads // kv_heads
        ).transpose(0, 2, 3, 1, 4)
        if rotation is not None:
            q = self._gather_heads(rotate_queries(q, rotation, interleaved), mesh)  # [B,K,G,T,h]
        if c.qk_norm_after:
            q = self.q_norm(q)
        if self.borrows:
            assert past is not None
            k, v, _ = past
        else:
            k, v = self._project_keys_and_values(x, rotation, mesh)
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
            starts = past is None or past[2] is None or isinstance(past[2], np.ndarray)
            programs = {
                platform: functools.partial(
                    self._attend_in_blocks, max(queries, -(-t // _MAX_BLOCKS)), starts
                )
                for platform, queries in _QUERIES.items()
            }
            out = jax.lax.platform_dependent(q, k, v, seen, **programs)
        out = out.transpose(0, 3, 1, 2, 4).reshape(b, t, c.num_heads * self.heads.head_dim)
        out = self._gather_heads(out, mesh)
        if c.output_gate:
            out = out * jax.nn.sigmoid(self._gather_heads(self.gate(x), mesh))
        return self.o(out), k, v

    def _project_keys_and_values(
        self, x: Array, rotation: Rotation | None, mesh: Mesh | None
    ) -> tuple[Array, Array]:
        """Keys `[B, K, h, T]` and values `[B, K, T, h]` of the new tokens."""
        c, heads = self.config, self.heads
        projected = self._gather_heads(self.k(x), mesh)
        v = projected if heads.values_are_keys else self._gather_heads(self.v(x), mesh)
        k = self._split_heads(projected, self.k_norm, heads.num_kv_heads).transpose(0, 2, 1, 3)
        v = self._clip(v).reshape(*v.shape[:2], heads.num_kv_heads, heads.head_dim)
        if c.value_norm:
            v = normalize(v, c.norm_eps).astype(v.dtype)
        if rotation is not None:
            interleaved = c.rope is not None and c.rope.interleaved
            k = self._gather_heads(rotate_keys(k, rotation, interleaved), mesh)
        if c.qk_norm_after:
            k = self.k_norm(k)
        return k.swapaxes(2, 3), v.transpose(0, 2, 1, 3)

    def _attend_in_blocks(
        self, size: int, starts: bool, q: Array, k: Array, v: Array, seen: Array
    ) -> Array:
        """`_attend` for `size` queries at a time; at the start of a text each skips later keys."""
        blocks = []
        for first in range(0, q.shape[3], size):
            end = first + size
            last = end if starts else k.shape[-1]
            queries = q[..., first:end, :]
            blocks.append(
                self._attend(queries, k[..., :last], v[..., :last, :], seen[:, first:end, :last])
            )
        return jnp.concatenate(blocks, axis=3)

    def _attend(self, q: Array, k: Array, v: Array, seen: Array) -> Array:
        """The weighted values of queries `[B, K, G, T, h]`, of the same shape."""
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
        # The weights of padding, which sees no key, become uniform, never NaN.
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

    def _gather_heads(self, x: Array, mesh: Mesh | None) -> Array:
        """Gathers `[B, T, heads h]` over `model`, unless that splits whole heads."""
        if self._splits_heads(mesh):
            return x
        return sharding.constrain(x, mesh, [sharding.ROWS])

    def _clip(self, x: Array) -> Array:
        c = self.config.qkv_clip
        return x if c is None else jnp.clip(x, -c, c)

    def _split_heads(self, x: Array, norm: Callable[[Array], Array], *heads: int) -> Array:
        """Splits `[B, T, heads h]` into `[B, T, *heads, h]`, and norms it before or after."""
        c = self.config
        if c.qk_norm == "width":
            x = norm(x)
        x = self._clip(x)
        if c.qk_norm == "each":
            x = norm(x.reshape(*x.shape[:2], -1, self.heads.head_dim))
        x = x.reshape(*x.shape[:2], *heads, self.heads.head_dim)
        return norm(x) if c.qk_norm == "head" and not c.qk_norm_after else x


def _norm_shape(config: LMConfig, heads: int, width: int) -> tuple[int, ...]:
    """Shape of the weight of a norm of queries or keys."""
    return {"width": (heads * width,), "each": (heads, width)}.get(config.qk_norm or "", (width,))


def _distance_penalties(config: LMConfig, seen: Array) -> Array:
    """ALiBi's penalties, which are subtracted from the scores, float32 `[B, K, G, T, S]`.

    The distance of a key is the number of keys after it that the query sees.

    References:
        Train Short, Test Long, arXiv 2108.12409, section 3.
    """
    counts = seen.astype(jnp.int32)
    distance = jnp.sum(counts, axis=-1, keepdims=True) - jnp.cumsum(counts, axis=-1)
    slopes = jnp.asarray(alibi_slopes(config.num_heads))
    slopes = slopes.reshape(1, config.num_kv_heads, -1, 1, 1)
    return slopes * distance.astype(jnp.float32)[:, None, None]


def alibi_slopes(heads: int) -> np.ndarray:
    """Slopes of the heads, float32 `[H]`: a geometric series down to 2^-8.

    If their number is no power of two, the remaining heads take every second slope of the series
    for twice as many heads.
    """
    power = 1 << (heads.bit_length() - 1)
    slopes = 2.0 ** (-8.0 / power * np.arange(1, power + 1))
    between = 2.0 ** (-4.0 / power * np.arange(1, 2 * power, 2))
    return np.concatenate([slopes, between])[:heads].astype(np.float32)
