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
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from t3jax import sharding
from t3jax.lm import quantized
from t3jax.lm.config import LMConfig, RopeConfig
from t3jax.lm.product import product

Params = dict[str, Any]
Past = tuple[Array, Array, Array | np.ndarray]  # a layer's keys and values, and the cursor
Lora = dict[str, dict[str, Array]]  # path of a linear layer: "a" [R, in], "b" [out, R]
_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}
# So many queries attend at a time, but in no more parts than these; where no text came before, what
# is after them is not even looked at. An accelerator has less to save and is slow to compile many.
_QUERIES = {"cpu": 128, "default": 1024}
_PARTS = 8
_MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


class Cache(NamedTuple):
    """Keys and values of the text read so far, one array for each layer.

    New tokens of all rows are written at the same slots, so prompts of unequal length are padded on
    the left. A slot is seen by a query if it holds a real token at or before the query's position.
    Local layers keep the whole text too, and mask what has left their window.

    Attributes:
        keys: Per layer `[B, K, h, S]`, rotated.
        values: Per layer `[B, K, S, h]`. Both stand as the products of a decoding step read them:
            otherwise a CPU transposes the whole cache at every step.
        positions: Position of the token in each slot, `[B, S]`; -1 where there is none.
        cursor: Next slot to write, scalar. NumPy's is known when a program is traced: the 0 of an
            empty cache, whose first queries look at no slot after their own.
    """

    keys: tuple[Float[Array, "B K h S"], ...]
    values: tuple[Float[Array, "B K S h"], ...]
    positions: Int[Array, "B S"]
    cursor: Int[Array, ""] | Int[np.ndarray, ""]


def init_cache(config: LMConfig, batch: int, slots: int, dtype: Any) -> Cache:
    """An empty cache for `batch` texts of up to `slots` tokens, padding included."""
    rows, width, layers = (batch, config.num_kv_heads), config.head_dim, range(config.num_layers)
    return Cache(
        keys=tuple(jnp.zeros((*rows, width, slots), dtype) for _ in layers),
        values=tuple(jnp.zeros((*rows, slots, width), dtype) for _ in layers),
        positions=jnp.full((batch, slots), -1, jnp.int32),
        cursor=np.zeros((), np.int32),
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
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "B T D"], Cache | None]:
    """Reads tokens and returns the last hidden states, after the final norm.

    Args:
        config: Shape of the model; static under jit.
        params: The parameter tree.
        tokens: Token ids, `[B, T]`.
        positions: Positions in the text, `[B, T]`, none before that of the token before; None
            counts the attended tokens of each row, on from what the cache holds.
        mask: True where a token is real, `[B, T]`; None means all are. The others are attended by
            nobody; they themselves attend to the real ones up to their position.
        cache: What was read before; None for a text by itself.
        lora: Low-rank updates of linear layers, by path such as `layers/0/attention/q`: the layer
            multiplies by W + B A, which is never formed.
        remat: Keep only the blocks' inputs for the backward pass, which computes the rest again;
            static under jit.
        mesh: Where the arrays live; None leaves that to the compiler. Static under jit.

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
    return model(tokens, positions, key_positions, cache, remat, mesh)


def unembed(
    config: LMConfig,
    params: Params,
    hidden: Float[Array, "*batch D"],
    mesh: Mesh | None = None,
) -> Float[Array, "*batch V"]:
    """Logits of the next token from hidden states of `apply`, float32 `[..., V]`."""
    name = "embed" if config.tied else "lm_head"
    table = sharding.gather_weights(mesh, {name: params[name]}, after=hidden)[name]
    if config.quantized:
        logits = quantized.product(hidden, table["weight"], table["scale"], jnp.float32)
    else:
        logits = product(hidden, table["weight"], jnp.float32)
    if config.head_bias:
        bias = params["lm_head"]["bias"].astype(jnp.float32)
        logits = logits + jnp.broadcast_to(bias, logits.shape)
    return _capped(logits, config.logit_softcap)


def abstract_params(config: LMConfig, dtype: Any) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct` leaves of `dtype`, quantised ones of int8."""
    _, shapes = _split_abstract(config)

    def described(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, jnp.int8 if leaf.dtype == jnp.int8 else dtype)

    return jax.tree.map(described, shapes)


def compute_dtype(params: Params) -> Any:
    """The dtype of activations and cache: that of all weights but int8 ones."""
    embed = params["embed"]
    return embed.get("scale", embed["weight"]).dtype


def init_params(config: LMConfig, key: PRNGKeyArray, dtype: Any = jnp.float32) -> Params:
    """Random weights, to train a model from nothing: normal with deviation 0.02, norms at 1.

    Raises:
        ValueError: If the config is quantised.
    """
    if config.quantized:
        raise ValueError("int8 weights are not trained; take a config with quantized=False")
    leaves, treedef = jax.tree.flatten_with_path(abstract_params(config, dtype))
    keys = jax.random.split(key, len(leaves))

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct, key: Array) -> Array:
        names = [str(getattr(part, "key", part)) for part in path]
        if names[-1] == "bias":
            return jnp.zeros(leaf.shape, dtype)
        if "norm" in names[-2]:
            return jnp.full(leaf.shape, 0.0 if config.norm == "rms_offset" else 1.0, dtype)
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

    def __init__(self, fan_in: int, fan_out: int, bias: bool = False, quantized: bool = False):
        self.weight = nnx.Param(jnp.zeros((fan_out, fan_in), jnp.int8 if quantized else None))
        if quantized:
            self.scale = nnx.Param(jnp.ones((fan_out,)))
        if bias:
            self.bias = nnx.Param(jnp.zeros((fan_out,)))
        self.has_bias = bias
        self.quantized = quantized

    def __call__(self, x: Array) -> Array:
        # Rows on one axis: a CPU is slow at a weight's gradient when that sums over two.
        rows = x.reshape(-1, x.shape[-1])
        if self.quantized:
            y = quantized.product(rows, self.weight[...], self.scale[...])
        else:
            y = product(rows, self.weight[...])
        if self.lora_a is not None and self.lora_b is not None:
            y = y + product(product(rows, self.lora_a), self.lora_b)
        if self.has_bias:
            y = y + jnp.broadcast_to(self.bias[...], y.shape)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def rows(self, ids: Array, mesh: Mesh | None) -> Array:
        """Rows `[B, T, in]` of the matrix, as a table of embeddings."""
        found = sharding.lookup(mesh, self.weight[...], ids)
        if not self.quantized:
            return found
        scale = sharding.lookup(mesh, self.scale[...][:, None], ids)
        return found.astype(scale.dtype) * jnp.broadcast_to(scale, found.shape)


class _RMSNorm(nnx.Module):
    def __init__(self, width: int, eps: float, offset: bool):
        self.weight = nnx.Param(jnp.ones((width,)))
        self.eps = eps
        self.offset = offset

    def __call__(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        # The product with the weight happens in the model's dtype, as transformers does it; where
        # the weight is an offset, in float32.
        if self.offset:
            weight = 1 + self.weight[...].astype(jnp.float32)
            return (x32 * scale * jnp.broadcast_to(weight, x.shape)).astype(x.dtype)
        return (x32 * scale).astype(x.dtype) * jnp.broadcast_to(self.weight[...], x.shape)


class _LayerNorm(nnx.Module):
    def __init__(self, width: int, eps: float):
        self.weight = nnx.Param(jnp.ones((width,)))
        self.bias = nnx.Param(jnp.zeros((width,)))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        weight, bias = (
            jnp.broadcast_to(part[...].astype(jnp.float32), x.shape)
            for part in (self.weight, self.bias)
        )
        return (x32 * scale * weight + bias).astype(x.dtype)


def _identity(x: Array) -> Array:
    return x


def _norm(config: LMConfig, width: int, wanted: bool = True) -> Any:
    """The family's norm over vectors of a width; where it is not wanted, nothing."""
    if not wanted:
        return _identity
    if config.norm == "layer":
        return _LayerNorm(width, config.norm_eps)
    return _RMSNorm(width, config.norm_eps, offset=config.norm == "rms_offset")


class _Attention(nnx.Module):
    def __init__(self, config: LMConfig):
        width, bias = config.hidden_size, config.attention_bias
        q_width = config.num_heads * config.head_dim
        k_width = config.num_kv_heads * config.head_dim
        self.q = _Linear(width, q_width, bias or config.qkv_bias, config.quantized)
        self.k = _Linear(width, k_width, bias or config.qkv_bias, config.quantized)
        self.v = _Linear(width, k_width, bias or config.qkv_bias, config.quantized)
        self.o = _Linear(q_width, width, bias, config.quantized)
        by_head, wanted = config.qk_norm == "head", config.qk_norm is not None
        self.q_norm = _norm(config, config.head_dim if by_head else q_width, wanted)
        self.k_norm = _norm(config, config.head_dim if by_head else k_width, wanted)
        self.config = config

    def __call__(
        self,
        x: Array,
        rotation: tuple[Array, Array] | None,
        seen: Array,
        past: Past | None,
        mesh: Mesh | None,
    ) -> tuple[Array, Array, Array]:
        c = self.config
        b, t, _ = x.shape
        group = c.num_heads // c.num_kv_heads
        q, k, v = (self._whole(part, mesh) for part in (self.q(x), self.k(x), self.v(x)))
        q = self._heads(q, self.q_norm, c.num_kv_heads, group).transpose(0, 2, 3, 1, 4)
        k = self._heads(k, self.k_norm, c.num_kv_heads).transpose(0, 2, 1, 3)
        v = v.reshape(b, t, c.num_kv_heads, c.head_dim).transpose(0, 2, 1, 3)
        if rotation is not None:
            q = self._whole(_rotate(q, rotation), mesh)  # [B, K, G, T, h]
            k = self._whole(_rotate(k, rotation), mesh)  # [B, K, T, h]
        k = k.swapaxes(2, 3)
        if past is not None:
            keys, values, cursor = past
            zero = jnp.zeros_like(cursor)
            k = jax.lax.dynamic_update_slice(keys, k, (zero, zero, zero, cursor))
            v = jax.lax.dynamic_update_slice(values, v, (zero, zero, cursor, zero))
        if mesh is not None:
            specs = sharding.attention_specs(mesh, c.num_kv_heads, t)
            q, k, v = (
                sharding.constrain(x, mesh, spec) for x, spec in zip((q, k, v), specs, strict=True)
            )
        if t == 1 or not self._splits_heads(mesh):
            out = self._attend(q, k, v, seen)
        else:
            sizes = {name: max(queries, -(-t // _PARTS)) for name, queries in _QUERIES.items()}
            alone = past is None or isinstance(past[2], np.ndarray)
            ways = {
                name: functools.partial(self._attend_in_parts, size, alone)
                for name, size in sizes.items()
            }
            out = jax.lax.platform_dependent(q, k, v, seen, **ways)
        out = out.transpose(0, 3, 1, 2, 4).reshape(b, t, c.num_heads * c.head_dim)
        return self.o(self._whole(out, mesh)), k, v

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
            precision=_precision(k),
            preferred_element_type=jnp.float32,
        )
        scores = scores * ((c.query_pre_attn_scalar or c.head_dim) ** -0.5)
        scores = _capped(scores, c.attention_softcap)
        # Where nothing is seen (padding) the weights become uniform, never NaN.
        scores = jnp.where(seen[:, None, None], scores, _MASKED)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        return jnp.einsum(
            "bkgts,bksh->bkgth",
            weights,
            v,
            precision=_precision(v),
            preferred_element_type=jnp.float32,
        ).astype(v.dtype)

    def _splits_heads(self, mesh: Mesh | None) -> bool:
        """Whether `model` splits whole heads, so that each device attends by itself."""
        return mesh is None or self.config.num_kv_heads % mesh.shape[sharding.MODEL] == 0

    def _whole(self, x: Array, mesh: Mesh | None) -> Array:
        """`[B, T, heads h]` before it is split into heads that `model` does not divide."""
        if self._splits_heads(mesh):
            return x
        return sharding.constrain(x, mesh, [sharding.ROWS])

    def _heads(self, x: Array, norm: Any, *heads: int) -> Array:
        """Splits `[B, T, heads h]` into `[B, T, *heads, h]`, normed before or after."""
        if self.config.qk_norm == "width":
            x = norm(x)
        x = x.reshape(*x.shape[:2], *heads, self.config.head_dim)
        return norm(x) if self.config.qk_norm == "head" else x


class _MLP(nnx.Module):
    def __init__(self, config: LMConfig):
        width, inner = config.hidden_size, config.intermediate_size
        if config.gated:
            self.gate = _Linear(width, inner, config.mlp_bias, config.quantized)
        self.up = _Linear(width, inner, config.mlp_bias, config.quantized)
        self.down = _Linear(inner, width, config.mlp_bias, config.quantized)
        self.activation = _ACTIVATIONS[config.activation]
        self.gated = config.gated

    def __call__(self, x: Array) -> Array:
        if self.gated:
            return self.down(self.activation(self.gate(x)) * self.up(x))
        return self.down(self.activation(self.up(x)))


class _Block(nnx.Module):
    def __init__(self, config: LMConfig):
        width = config.hidden_size
        before, after = config.norms != "post", config.norms in ("post", "both")
        self.attention_norm = _norm(config, width, before)
        self.attention = _Attention(config)
        self.attention_post_norm = _norm(config, width, after)
        self.mlp_norm = _norm(config, width, before and config.norms != "shared")
        self.mlp = _MLP(config)
        self.mlp_post_norm = _norm(config, width, after)
        self.config = config

    def __call__(
        self,
        x: Array,
        rotation: tuple[Array, Array] | None,
        seen: Array,
        past: Past | None,
        mesh: Mesh | None,
    ) -> tuple[Array, Array, Array]:
        normed = self.attention_norm(x)
        out, k, v = self.attention(normed, rotation, seen, past, mesh)
        attended = x + self.attention_post_norm(out)
        read = x if self.config.parallel else attended
        normed = normed if self.config.norms == "shared" else self.mlp_norm(read)
        return attended + self.mlp_post_norm(self.mlp(normed)), k, v


class _Decoder(nnx.Module):
    def __init__(self, config: LMConfig):
        width, quantized = config.hidden_size, config.quantized
        self.embed = _Linear(width, config.vocab_size, quantized=quantized)  # [V, D]
        if config.rope is None:
            self.positions = _Linear(width, config.max_position, quantized=quantized)
        self.layers = nnx.List([_Block(config) for _ in range(config.num_layers)])
        self.final_norm = _norm(config, width)
        if not config.tied:
            self.lm_head = _Linear(width, config.vocab_size, config.head_bias, quantized)
        self.config = config

    def __call__(
        self,
        tokens: Array,
        positions: Array,
        key_positions: Array,
        cache: Cache | None,
        remat: bool,
        mesh: Mesh | None,
    ) -> tuple[Array, Cache | None]:
        c = self.config
        x = self.embed.rows(tokens, mesh)  # [B, T, D]
        if c.scaled_embedding:
            x = x * jnp.sqrt(jnp.float32(c.hidden_size)).astype(x.dtype)
        if c.rope is None:
            within = jnp.clip(positions, 0, c.max_position - 1)
            x = x + self.positions.rows(within, mesh)
        rotation = _rotation(c.rope, c.head_dim, positions)
        if cache is not None:
            key_positions = jax.lax.dynamic_update_slice(  # [B, S]
                cache.positions, key_positions, (jnp.zeros_like(cache.cursor), cache.cursor)
            )
        seen = _seen(positions, key_positions)
        # What the layers share: angles, and which keys are attended to. Local ones have their own.
        whole = local = rotation, seen
        if c.local:
            near = key_positions[:, None, :] > positions[:, :, None] - c.window
            local = _rotation(c.local_rope or c.rope, c.head_dim, positions), seen & near
        keys, values = [], []
        before = x
        for i, block in enumerate(self.layers):
            past = None if cache is None else (cache.keys[i], cache.values[i], cache.cursor)
            rotation, attended = local if c.local and c.local[i] else whole
            read: Callable[..., Any] = functools.partial(_read_block, mesh, block)
            if remat:
                read = jax.checkpoint(read)
            elif mesh is not None and mesh.shape[sharding.FSDP] > 1:
                read = jax.checkpoint(read, policy=_not_gathered)
            before, (x, k, v) = x, read(before, x, rotation, attended, past)
            keys.append(k)
            values.append(v)
        x = self.final_norm(x)
        if cache is None:
            return x, None
        cursor = cache.cursor + jnp.asarray(tokens.shape[1], jnp.int32)
        return x, Cache(tuple(keys), tuple(values), key_positions, cursor)


def _not_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """What the backward pass keeps of a layer: all but what moved, such as gathered weights."""
    return primitive.name not in ("sharding_constraint", "optimization_barrier")


def _read_block(
    mesh: Mesh | None,
    block: _Block,
    before: Array,
    x: Array,
    rotation: tuple[Array, Array] | None,
    seen: Array,
    past: Past | None,
) -> tuple[Array, Array, Array]:
    """One layer on a mesh: rows stay where they are, and the weights come to them.

    Left to itself, the compiler may gather the rows instead, or sum [B, V] logits over devices.
    The weights come while the layer before, which reads `before`, is at work.
    """
    graphdef, params = nnx.split(block)
    params = sharding.gather_weights(mesh, nnx.to_pure_dict(params), after=before)
    block = nnx.merge(graphdef, params)
    x, k, v = block(x, rotation, seen, past, mesh)
    # Else XLA adds the layers' outputs up at the end only, and keeps all of them until then.
    x = jax.lax.optimization_barrier(x)
    return sharding.constrain(x, mesh, [sharding.ROWS]), k, v


def _seen(query_positions: Array, key_positions: Array) -> Array:
    """Which keys each query attends to, bool `[B, T, S]`: real ones, not after it."""
    keys = key_positions[:, None, :]
    return (keys >= 0) & (keys <= query_positions[:, :, None])


def _capped(x: Array, cap: float | None) -> Array:
    """Values held softly between -cap and cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def _rotation(
    rope: RopeConfig | None, head_dim: int, positions: Array
) -> tuple[Array, Array] | None:
    """Cosine and sine of the rotary angles, float32 `[B, T, r/2]`, r the rotated width."""
    if rope is None:
        return None
    frequencies = _inverse_wavelengths(rope, head_dim).reshape(1, 1, -1)
    angles = jnp.maximum(positions, 0)[..., None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if rope.attention_factor != 1:
        cos, sin = cos * rope.attention_factor, sin * rope.attention_factor
    return cos, sin


def _rotate(x: Array, rotation: tuple[Array, Array]) -> Array:
    """Rotates the pairs (x_i, x_{i+r/2}) of `[B, ..., T, h]`, i < r/2, by the angles `[B, T, r/2]`.

    What lies beyond the first r of a head stays as it is.
    """
    middle = (1,) * (x.ndim - 3)
    cos, sin = (
        part.reshape(part.shape[0], *middle, *part.shape[1:]).astype(x.dtype) for part in rotation
    )
    rotated = 2 * cos.shape[-1]
    x, rest = (x, []) if rotated == x.shape[-1] else (x[..., :rotated], [x[..., rotated:]])
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, *rest], axis=-1)


@functools.cache
def _inverse_wavelengths(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians per position of each rotary pair, float32 `[r/2]`."""
    width = int(head_dim * rope.rotated)
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    frequencies = (1.0 / np.float32(rope.theta) ** exponents).astype(np.float32)
    if rope.kind == "linear":
        return frequencies / np.float32(rope.factor)
    if rope.kind == "longrope":
        return frequencies / np.asarray(rope.short_factors, np.float32)
    if rope.kind == "yarn":
        keep = _yarn_ramp(rope, width)
        return ((1 - keep) * frequencies / rope.factor + keep * frequencies).astype(np.float32)
    if rope.kind in ("default", "dynamic"):
        return frequencies
    # Llama 3.1: how many turns a pair makes over the original context decides how far it is
    # stretched: at least `high_freq_factor` turns not at all, at most `low_freq_factor` fully.
    turns = rope.original_max_position * frequencies / np.float32(2 * math.pi)
    ramp = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = np.clip(ramp, 0.0, 1.0)
    return ((1 - keep) * frequencies / rope.factor + keep * frequencies).astype(np.float32)


def _yarn_ramp(rope: RopeConfig, width: int) -> np.ndarray:
    """How far each pair keeps its wavelength, from 1 (all turns) to 0, float32 `[width/2]`."""

    def pair(turns: float) -> float:
        """The pair, a real number, that makes this number of turns over the original context."""
        length = rope.original_max_position / (turns * 2 * math.pi)
        return width * math.log(length) / (2 * math.log(rope.theta))

    low, high = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = (np.arange(width // 2, dtype=np.float32) - low) / max(high - low, 0.001)
    return 1 - np.clip(ramp, 0.0, 1.0)


def _precision(weight: Array) -> jax.lax.Precision | None:
    # Float32 means float32, also where the hardware's default would round the factors.
    return jax.lax.Precision.HIGHEST if weight.dtype == jnp.float32 else None
