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
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from t3jax import sharding
from t3jax.lm import quantized
from t3jax.lm.attention import write_slots
from t3jax.lm.block import Block, Shared
from t3jax.lm.cache import Cache, KeyValues, LayerState
from t3jax.lm.config import LMConfig
from t3jax.lm.convolution import order_tokens
from t3jax.lm.layer_inputs import make_tables, read_tables
from t3jax.lm.layers import Linear, cap, make_norm
from t3jax.lm.product import product
from t3jax.lm.rotation import make_rotation

Params = dict[str, Any]
Lora = dict[str, dict[str, Array]]  # path of a linear layer: "a" [R, in], "b" [out, R]


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
    if config.logit_scale != 1:
        logits = logits * config.logit_scale
    return cap(logits, config.logit_softcap)


def abstract_params(config: LMConfig, dtype: Any) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct` leaves of `dtype`; see `cast_params`."""
    _, shapes = _split_abstract(config)

    def describe(path: tuple, leaf: Any) -> jax.ShapeDtypeStruct:
        kept = jnp.int8 if leaf.dtype == jnp.int8 else _dtype(path, dtype)
        return jax.ShapeDtypeStruct(leaf.shape, kept)

    return jax.tree.map_with_path(describe, shapes)


def cast_params(params: Any, dtype: Any) -> Any:
    """Weights, or a tree with weights in it, in a dtype; what corrects a router's choice stays."""
    return jax.tree.map_with_path(lambda path, leaf: leaf.astype(_dtype(path, dtype)), params)


def _dtype(path: tuple, dtype: Any) -> Any:
    """What a leaf is kept in: float32 where, rounded, it would choose other experts."""
    return jnp.float32 if getattr(path[-1], "key", None) == "correction" else dtype


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
        if names[-1] in ("bias", "correction", "sinks", "alpha_p", "alpha_n"):
            return jnp.zeros(leaf.shape, leaf.dtype)
        if names[-1] in ("fading_bias", "multiplier", "input_scale", "expert_scale"):
            return jnp.ones(leaf.shape, dtype)
        if names[-1] == "log_rate":
            rates = jax.random.uniform(key, leaf.shape, minval=0.01, maxval=16.0)
            return jnp.log(rates).astype(dtype)
        if "norm" in names[-2]:
            offset = config.norm.endswith("_offset") and "delta" not in names
            return jnp.full(leaf.shape, 0.0 if offset else 1.0, dtype)
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


class _Decoder(nnx.Module):
    def __init__(self, config: LMConfig):
        width, quantized = config.hidden_size, config.quantized
        self.embed = Linear(width, config.vocab_size, quantized=quantized)  # [V, D]
        self.embedding_norm = make_norm(config, width, config.embedding_norm)
        if config.rope is None and not config.alibi:
            positions = config.first_position + config.max_position
            self.positions = Linear(width, positions, quantized=quantized)
        if config.layer_inputs:
            tables = make_tables(config)
            self.layer_embed, self.layer_projection, self.layer_projection_norm = tables
        self.layers = nnx.List([Block(config, layer) for layer in range(config.num_layers)])
        self.final_norm = make_norm(config, width)
        if not config.tied:
            self.lm_head = Linear(width, config.vocab_size, config.head_bias, quantized)
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
        if c.embedding_multiplier != 1:
            x = x * jnp.asarray(c.embedding_multiplier, x.dtype)
        x = self.embedding_norm(x)
        if c.rope is None and not c.alibi:
            within = jnp.clip(positions, 0, c.max_position - 1)
            x = x + self.positions.rows(within + c.first_position, mesh)
        given = None  # [B, T, L, P]
        if c.layer_inputs:
            tables = self.layer_embed, self.layer_projection, self.layer_projection_norm
            given = read_tables(tables, c, tokens, x, mesh)
        whole_heads = c.whole_heads or c.heads(0)
        rotation = make_rotation(c.rope, whole_heads.head_dim, positions)
        remembers = c.delta is not None or c.conv is not None
        order = order_tokens(key_positions >= 0) if remembers else None
        if cache is not None:
            attended = jnp.sum(key_positions >= 0, axis=-1, dtype=jnp.int32)
            key_positions = write_slots(cache.positions, key_positions, cache.cursor, 1)  # [B, S]
        seen = _seen(positions, key_positions)
        # Local layers have other angles, and attend to other keys.
        cursor = None if cache is None else cache.cursor
        whole = local = Shared(rotation, seen, cursor, order)
        if c.local:
            near = key_positions[:, None, :] > positions[:, :, None] - c.window
            rotation = make_rotation(c.local_rope or c.rope, c.head_dim, positions)
            local = Shared(rotation, seen & near, cursor, order)
        states = []
        lent: dict[int, KeyValues] = {}  # by layer
        before = x
        for i, block in enumerate(self.layers):
            past = None if cache is None else cache.layers[i]
            shared = local if c.local and c.local[i] else whole
            if c.unrotated and c.unrotated[i]:
                shared = shared._replace(rotation=None)
            if (lender := c.lender(i)) is not None:
                shared = shared._replace(lent=lent[lender])
            if given is not None:
                shared = shared._replace(given=given[:, :, i])
            read: Callable[..., Any] = functools.partial(_read_block, mesh, block)
            if remat:
                read = jax.checkpoint(read)
            elif mesh is not None and mesh.shape[sharding.FSDP] > 1:
                read = jax.checkpoint(read, policy=_not_gathered)
            before, (x, state) = x, read(before, x, shared, past)
            if block.lends:
                lent[i] = state
            states.append(state)
        x = self.final_norm(x)
        if cache is None:
            return x, None
        cursor = cache.cursor + (
            attended if cache.cursor.ndim else jnp.asarray(tokens.shape[1], jnp.int32)
        )
        return x, Cache(tuple(states), key_positions, cursor)


def _not_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """What the backward pass keeps of a layer: all but what moved, such as gathered weights."""
    return primitive.name not in ("sharding_constraint", "optimization_barrier")


def _read_block(
    mesh: Mesh | None,
    block: Block,
    before: Array,
    x: Array,
    shared: Shared,
    past: LayerState | None,
) -> tuple[Array, LayerState | None]:
    """One layer on a mesh: rows stay where they are, and the weights come to them.

    Left to itself, the compiler may gather the rows instead, or sum [B, V] logits over devices.
    The weights come while the layer before, which reads `before`, is at work.
    """
    graphdef, params = nnx.split(block)
    params = sharding.gather_weights(mesh, nnx.to_pure_dict(params), after=before)
    block = nnx.merge(graphdef, params)
    x, state = block(x, shared, past, mesh)
    # Else XLA adds the layers' outputs up at the end only, and keeps all of them until then.
    x = jax.lax.optimization_barrier(x)
    return sharding.constrain(x, mesh, [sharding.ROWS]), state


def _seen(query_positions: Array, key_positions: Array) -> Array:
    """Which keys each query attends to, bool `[B, T, S]`: real ones, not after it."""
    keys = key_positions[:, None, :]
    return (keys >= 0) & (keys <= query_positions[:, :, None])
