"""A decoder-only language model: NNX modules, split once into a pure function and a frozen tree.

`apply` and `unembed` are what everything else uses: pure functions of a plain-dict parameter tree.
The modules only exist while one of them is traced. The forward pass returns hidden states, not
logits: features need no logits at all and decoding needs only the last position's.

Axes: B batch, T time (new tokens), S cache slots, D features, H query heads, K key-value heads,
G queries for each key head (H = K G), h head width, F MLP width, R rank, V vocabulary. Weights
stand as Hugging Face stores them, [out, in]: that is also the layout in which a CPU reads a matrix
once, row after row, when it multiplies a single vector.

Norms, rotary angles, softmax and logits are computed in float32 whatever the weights' dtype.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from t3jax.lm.config import LMConfig, RopeConfig

Params = dict[str, Any]
Lora = dict[str, dict[str, Array]]  # path of a linear layer: "a" [R, in], "b" [out, R]
_MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


class Cache(NamedTuple):
    """Keys and values of the text read so far, one array for each layer.

    New tokens of all rows are written at the same slots, so prompts of unequal length are padded on
    the left. A slot is seen by a query if it holds a real token at or before the query's position.

    Attributes:
        keys: Per layer `[B, K, S, h]`, rotated.
        values: Per layer `[B, K, S, h]`.
        positions: Position of the token in each slot, `[B, S]`; -1 where there is none.
        cursor: Next slot to write, scalar.
    """

    keys: tuple[Float[Array, "B K S h"], ...]
    values: tuple[Float[Array, "B K S h"], ...]
    positions: Int[Array, "B S"]
    cursor: Int[Array, ""]


def init_cache(config: LMConfig, batch: int, slots: int, dtype: Any) -> Cache:
    """An empty cache for `batch` texts of up to `slots` tokens, padding included."""
    shape = (batch, config.num_kv_heads, slots, config.head_dim)
    return Cache(
        keys=tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers)),
        values=tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers)),
        positions=jnp.full((batch, slots), -1, jnp.int32),
        cursor=jnp.zeros((), jnp.int32),
    )


def apply(
    config: LMConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"] | None = None,
    mask: Bool[Array, "B T"] | None = None,
    cache: Cache | None = None,
    lora: Lora | None = None,
    remat: bool = False,
) -> tuple[Float[Array, "B T D"], Cache | None]:
    """Reads tokens and returns the last hidden states, after the final norm.

    Args:
        config: Shape of the model; static under jit.
        params: The parameter tree.
        tokens: Token ids, `[B, T]`.
        positions: Positions in the text, `[B, T]`; None counts the attended tokens of each row, on
            from what the cache holds.
        mask: True where a token is real, `[B, T]`; None means all are. The others are attended by
            nobody; they themselves attend to the real ones up to their position.
        cache: What was read before; None for a text by itself.
        lora: Low-rank updates of linear layers, by path such as `layers/0/attention/q`: the layer
            multiplies by W + B A, which is never formed.
        remat: Keep only the blocks' inputs for the backward pass, which computes the rest again;
            static under jit.

    Returns:
        The hidden states `[B, T, D]` in the weights' dtype, and the cache with the new tokens
        appended (None if none was given).
    """
    if mask is None:
        mask = jnp.ones(tokens.shape, bool)
    if positions is None:
        positions = jnp.cumsum(mask.astype(jnp.int32), axis=-1) - 1
        if cache is not None:
            positions = positions + jnp.max(cache.positions, axis=-1, keepdims=True) + 1
    key_positions = jnp.where(mask, positions, -1)
    model = _merge(config, params)
    for path, factors in (lora or {}).items():
        module: Any = model
        for name in path.split("/"):
            module = module[int(name)] if name.isdigit() else getattr(module, name)
        module.lora_a, module.lora_b = factors["a"], factors["b"]
    return model(tokens, positions, key_positions, cache, remat)


def unembed(
    config: LMConfig, params: Params, hidden: Float[Array, "*batch D"]
) -> Float[Array, "*batch V"]:
    """Logits of the next token from hidden states of `apply`, float32 `[..., V]`."""
    table = params["embed"]["weight"] if config.tied else params["lm_head"]["weight"]
    return jnp.einsum(
        "...d,vd->...v",
        hidden,
        table,
        precision=_precision(table),
        preferred_element_type=jnp.float32,
    )


def abstract_params(config: LMConfig, dtype: Any) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct` leaves of `dtype`."""
    _, shapes = _split_abstract(config)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)


def init_params(config: LMConfig, key: PRNGKeyArray, dtype: Any = jnp.float32) -> Params:
    """Random weights, to train a model from nothing: normal with deviation 0.02, norms 1."""
    leaves, treedef = jax.tree.flatten_with_path(abstract_params(config, dtype))
    keys = jax.random.split(key, len(leaves))

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct, key: Array) -> Array:
        names = [str(getattr(part, "key", part)) for part in path]
        if names[-1] == "bias":
            return jnp.zeros(leaf.shape, dtype)
        if "norm" in names[-2]:
            return jnp.ones(leaf.shape, dtype)
        # What is added to the residual stream starts smaller, as in GPT-2.
        shrink = math.sqrt(2 * config.num_layers) if names[-2] in ("o", "down") else 1.0
        return (jax.random.normal(key, leaf.shape) * (0.02 / shrink)).astype(dtype)

    drawn = [draw(path, leaf, k) for (path, leaf), k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(treedef, drawn)


@functools.cache
def _split_abstract(config: LMConfig) -> tuple[nnx.GraphDef, Params]:
    graphdef, state = nnx.split(nnx.eval_shape(lambda: _Decoder(config)))
    return graphdef, nnx.to_pure_dict(state)


def _merge(config: LMConfig, params: Params) -> "_Decoder":
    return nnx.merge(_split_abstract(config)[0], params)


class _Linear(nnx.Module):
    lora_a: Array | None = None
    lora_b: Array | None = None

    def __init__(self, fan_in: int, fan_out: int, bias: bool = False):
        self.weight = nnx.Param(jnp.zeros((fan_out, fan_in)))
        if bias:
            self.bias = nnx.Param(jnp.zeros((fan_out,)))
        self.has_bias = bias

    def __call__(self, x: Array) -> Array:
        # Rows on one axis: a CPU is slow at a weight's gradient when that sums over two.
        rows = x.reshape(-1, x.shape[-1])
        y = _product(rows, self.weight[...])
        if self.lora_a is not None and self.lora_b is not None:
            y = y + _product(_product(rows, self.lora_a), self.lora_b)
        if self.has_bias:
            y = y + jnp.broadcast_to(self.bias[...], y.shape)
        return y.reshape(*x.shape[:-1], y.shape[-1])


class _RMSNorm(nnx.Module):
    def __init__(self, width: int, eps: float):
        self.weight = nnx.Param(jnp.ones((width,)))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        # The product with the weight happens in the model's dtype, as transformers does it.
        return (x32 * scale).astype(x.dtype) * jnp.broadcast_to(self.weight[...], x.shape)


class _Attention(nnx.Module):
    def __init__(self, config: LMConfig):
        width, bias = config.hidden_size, config.attention_bias
        self.q = _Linear(width, config.num_heads * config.head_dim, bias)
        self.k = _Linear(width, config.num_kv_heads * config.head_dim, bias)
        self.v = _Linear(width, config.num_kv_heads * config.head_dim, bias)
        self.o = _Linear(config.num_heads * config.head_dim, width, bias)
        self.config = config

    def __call__(
        self,
        x: Array,
        rotation: tuple[Array, Array],
        seen: Array,
        past: tuple[Array, Array, Array] | None,
    ) -> tuple[Array, Array, Array]:
        c = self.config
        b, t, _ = x.shape
        group = c.num_heads // c.num_kv_heads
        q = self.q(x).reshape(b, t, c.num_kv_heads, group, c.head_dim).transpose(0, 2, 3, 1, 4)
        k = self.k(x).reshape(b, t, c.num_kv_heads, c.head_dim).transpose(0, 2, 1, 3)
        v = self.v(x).reshape(b, t, c.num_kv_heads, c.head_dim).transpose(0, 2, 1, 3)
        q = _rotate(q, rotation)  # [B, K, G, T, h]
        k = _rotate(k, rotation)  # [B, K, T, h]
        if past is not None:
            keys, values, cursor = past
            zero = jnp.zeros_like(cursor)
            k = jax.lax.dynamic_update_slice(keys, k, (zero, zero, cursor, zero))
            v = jax.lax.dynamic_update_slice(values, v, (zero, zero, cursor, zero))
        scores = jnp.einsum(
            "bkgth,bksh->bkgts",
            q,
            k,
            precision=_precision(k),
            preferred_element_type=jnp.float32,
        )
        scores = scores * (c.head_dim**-0.5)
        # Where nothing is seen (padding) the weights become uniform, never NaN.
        scores = jnp.where(seen[:, None, None], scores, _MASKED)
        weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        out = jnp.einsum("bkgts,bksh->btkgh", weights, v, precision=_precision(v))
        return self.o(out.reshape(b, t, c.num_heads * c.head_dim)), k, v


class _MLP(nnx.Module):
    def __init__(self, config: LMConfig):
        self.gate = _Linear(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.up = _Linear(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.down = _Linear(config.intermediate_size, config.hidden_size, config.mlp_bias)

    def __call__(self, x: Array) -> Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class _Block(nnx.Module):
    def __init__(self, config: LMConfig):
        self.attention_norm = _RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = _Attention(config)
        self.mlp_norm = _RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = _MLP(config)

    def __call__(
        self,
        x: Array,
        rotation: tuple[Array, Array],
        seen: Array,
        past: tuple[Array, Array, Array] | None,
    ) -> tuple[Array, Array, Array]:
        out, k, v = self.attention(self.attention_norm(x), rotation, seen, past)
        x = x + out
        return x + self.mlp(self.mlp_norm(x)), k, v


class _Decoder(nnx.Module):
    def __init__(self, config: LMConfig):
        self.embed = _Linear(config.hidden_size, config.vocab_size)  # [V, D]
        self.layers = nnx.List([_Block(config) for _ in range(config.num_layers)])
        self.final_norm = _RMSNorm(config.hidden_size, config.norm_eps)
        if not config.tied:
            self.lm_head = _Linear(config.hidden_size, config.vocab_size)
        self.config = config

    def __call__(
        self,
        tokens: Array,
        positions: Array,
        key_positions: Array,
        cache: Cache | None,
        remat: bool,
    ) -> tuple[Array, Cache | None]:
        table = self.embed.weight[...]
        x = jnp.take(table, tokens, axis=0)  # [B, T, D]
        rotation = _rotation(self.config, jnp.maximum(positions, 0))
        if cache is not None:
            key_positions = jax.lax.dynamic_update_slice(  # [B, S]
                cache.positions, key_positions, (jnp.zeros_like(cache.cursor), cache.cursor)
            )
        seen = _seen(positions, key_positions)
        keys, values = [], []
        for i, block in enumerate(self.layers):
            past = None if cache is None else (cache.keys[i], cache.values[i], cache.cursor)
            read = jax.checkpoint(block.__call__) if remat else block
            x, k, v = read(x, rotation, seen, past)
            keys.append(k)
            values.append(v)
        x = self.final_norm(x)
        if cache is None:
            return x, None
        cursor = cache.cursor + jnp.asarray(tokens.shape[1], jnp.int32)
        return x, Cache(tuple(keys), tuple(values), key_positions, cursor)


def _seen(query_positions: Array, key_positions: Array) -> Array:
    """Which keys each query attends to, bool `[B, T, S]`: real ones, not after it."""
    keys = key_positions[:, None, :]
    return (keys >= 0) & (keys <= query_positions[:, :, None])


def _rotation(config: LMConfig, positions: Array) -> tuple[Array, Array]:
    """Cosine and sine of the rotary angles, float32 `[B, T, h/2]`."""
    angles = positions[..., None].astype(jnp.float32) * _inverse_wavelengths(
        config.rope, config.head_dim
    ).reshape(1, 1, -1)
    return jnp.cos(angles), jnp.sin(angles)


def _rotate(x: Array, rotation: tuple[Array, Array]) -> Array:
    """Rotates the pairs (x_i, x_{i+h/2}) of `[B, ..., T, h]` by the angles `[B, T, h/2]`."""
    middle = (1,) * (x.ndim - 3)
    cos, sin = (
        part.reshape(part.shape[0], *middle, *part.shape[1:]).astype(x.dtype) for part in rotation
    )
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


@functools.cache
def _inverse_wavelengths(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians per position of each rotary pair, float32 `[h/2]`."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = (1.0 / np.float32(rope.theta) ** exponents).astype(np.float32)
    if rope.kind == "linear":
        return frequencies / np.float32(rope.factor)
    if rope.kind == "default":
        return frequencies
    # Llama 3.1: how many turns a pair makes over the original context decides how far it is
    # stretched: at least `high_freq_factor` turns not at all, at most `low_freq_factor` fully.
    turns = rope.original_max_position * frequencies / np.float32(2 * math.pi)
    ramp = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = np.clip(ramp, 0.0, 1.0)
    return ((1 - keep) * frequencies / rope.factor + keep * frequencies).astype(np.float32)


def _product(rows: Array, weight: Array) -> Array:
    """`[N, in]` times `[out, in]`."""
    return jnp.einsum("ni,oi->no", rows, weight, precision=_precision(weight))


def _precision(weight: Array) -> jax.lax.Precision | None:
    # Float32 means float32, also where the hardware's default would round the factors.
    return jax.lax.Precision.HIGHEST if weight.dtype == jnp.float32 else None
