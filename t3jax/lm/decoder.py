"""A decoder-only language model: NNX modules, split once into a pure function and a frozen tree.

Everything else uses `apply` and `unembed`, pure functions of a plain-dict parameter tree. The
modules only exist while one of them is traced. The forward pass returns hidden states, not logits:
features need no logits at all and decoding needs only the last position's.

Axes: B batch, T time (new tokens), S cache slots, D features, H query heads, K key-value heads,
G queries for each key head (H = K G), h head width, F MLP width, R rank, V vocabulary. Weights are
[out, in], as Hugging Face stores them.

Norms, rotary angles, softmax and logits are computed in float32 whatever the weights' dtype.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
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
        positions: Positions in the text, `[B, T]`, which never fall; None counts the real tokens of
            each row, on from those in the cache.
        mask: True where a token is real, `[B, T]`; None means all are. No token attends to padding;
            padding attends to the real tokens up to its position.
        cache: The text read before; None for a text by itself.
        lora: Low-rank updates of linear layers, by path such as `layers/0/attention/q`: the layer
            multiplies by W + B A, which is never formed.
        remat: Keep only the blocks' inputs for the backward pass, which computes the rest again;
            static under jit.
        mesh: The mesh that splits the arrays; None leaves that to the compiler. Static under jit.

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


def abstract_params(config: LMConfig, dtype: DTypeLike) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct` leaves of `dtype`; see `cast_params`."""
    _, shapes = _split_abstract(config)

    def describe(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        is_int8 = leaf.dtype == jnp.int8
        return jax.ShapeDtypeStruct(leaf.shape, jnp.int8 if is_int8 else _leaf_dtype(path, dtype))

    return jax.tree.map_with_path(describe, shapes)


def cast_params(params: Any, dtype: DTypeLike) -> Any:
    """Casts a tree with weights in it; corrections of a router's choice stay float32."""
    return jax.tree.map_with_path(lambda path, leaf: leaf.astype(_leaf_dtype(path, dtype)), params)


def _leaf_dtype(path: tuple, dtype: DTypeLike) -> DTypeLike:
    """A leaf's dtype: float32 for a router's correction, whose rounding changes its choices."""
    return jnp.float32 if getattr(path[-1], "key", None) == "correction" else dtype


def compute_dtype(params: Params) -> np.dtype:
    """The dtype of activations, of the cache and of all weights but int8 ones."""
    embed = params["embed"]
    return embed.get("scale", embed["weight"]).dtype


def init_params(config: LMConfig, key: PRNGKeyArray, dtype: DTypeLike = jnp.float32) -> Params:
    """Random weights for training from scratch: normal with deviation 0.02, norms at 1.

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
        # Projections into the residual stream start smaller, as in GPT-2.
        shrink = math.sqrt(2 * config.num_layers) if names[-2] in ("o", "down") else 1.0
        return (jax.random.normal(key, leaf.shape) * (0.02 / shrink)).astype(dtype)

    weights = [draw(path, leaf, k) for (path, leaf), k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(treedef, weights)


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
        x = self._embed(tokens, positions, mesh)
        layer_inputs = None  # [B, T, L, P]
        if c.layer_inputs:
            tables = self.layer_embed, self.layer_projection, self.layer_projection_norm
            layer_inputs = read_tables(tables, c, tokens, x, mesh)
        whole_heads = c.whole_heads or c.heads(0)
        rotation = make_rotation(c.rope, whole_heads.head_dim, positions)
        recurrent = c.delta is not None or c.conv is not None
        order = order_tokens(key_positions >= 0) if recurrent else None
        if cache is not None:
            real = jnp.sum(key_positions >= 0, axis=-1, dtype=jnp.int32)
            key_positions = write_slots(cache.positions, key_positions, cache.cursor, 1)  # [B, S]
        seen = _mask_keys(positions, key_positions)
        cursor = None if cache is None else cache.cursor
        whole = local = Shared(rotation, seen, cursor, order)
        if c.local:
            near = key_positions[:, None, :] > positions[:, :, None] - c.window
            rotation = make_rotation(c.local_rope or c.rope, c.head_dim, positions)
            local = Shared(rotation, seen & near, cursor, order)
        states = []
        lent: dict[int, KeyValues] = {}  # by layer
        before = x  # the input of the layer before
        for i, block in enumerate(self.layers):
            past = None if cache is None else cache.layers[i]
            shared = local if c.local and c.local[i] else whole
            if c.unrotated and c.unrotated[i]:
                shared = shared._replace(rotation=None)
            if (lender := c.lender(i)) is not None:
                shared = shared._replace(lent=lent[lender])
            if layer_inputs is not None:
                shared = shared._replace(layer_input=layer_inputs[:, :, i])
            run: Callable[..., Any] = functools.partial(_run_block, mesh, block)
            if remat:
                run = jax.checkpoint(run)
            elif mesh is not None and mesh.shape[sharding.FSDP] > 1:
                run = jax.checkpoint(run, policy=_is_saved)
            before, (x, state) = x, run(before, x, shared, past)
            if block.lends:
                lent[i] = state
            states.append(state)
        x = self.final_norm(x)
        if cache is None:
            return x, None
        new = real if cache.cursor.ndim else jnp.asarray(tokens.shape[1], jnp.int32)
        return x, Cache(tuple(states), key_positions, cache.cursor + new)

    def _embed(self, tokens: Array, positions: Array, mesh: Mesh | None) -> Array:
        """The embeddings of tokens, with their positions if these are learned, `[B, T, D]`."""
        c = self.config
        x = self.embed.rows(tokens, mesh)
        if c.scaled_embedding:
            x = x * jnp.sqrt(jnp.float32(c.hidden_size)).astype(x.dtype)
        if c.embedding_multiplier != 1:
            x = x * jnp.asarray(c.embedding_multiplier, x.dtype)
        x = self.embedding_norm(x)
        if c.rope is None and not c.alibi:
            within = jnp.clip(positions, 0, c.max_position - 1)
            x = x + self.positions.rows(within + c.first_position, mesh)
        return x


def _is_saved(primitive: jax.extend.core.Primitive, *_: object, **__: object) -> bool:
    """Whether the backward pass keeps a value; it reshards again, for example gathers weights."""
    return primitive.name not in ("sharding_constraint", "optimization_barrier")


def _run_block(
    mesh: Mesh | None,
    block: Block,
    before: Array,
    x: Array,
    shared: Shared,
    past: LayerState | None,
) -> tuple[Array, LayerState | None]:
    """Runs a layer on a mesh: rows stay sharded, and the weights are gathered.

    Otherwise the compiler may gather the rows instead, or sum [B, V] logits over devices. The
    gather overlaps the layer before, whose input is `before`.
    """
    graphdef, params = nnx.split(block)
    params = sharding.gather_weights(mesh, nnx.to_pure_dict(params), after=before)
    block = nnx.merge(graphdef, params)
    x, state = block(x, shared, past, mesh)
    # Otherwise XLA sums the layers' outputs at the end, and keeps all of them until then.
    x = jax.lax.optimization_barrier(x)
    return sharding.constrain(x, mesh, [sharding.ROWS]), state


def _mask_keys(query_positions: Array, key_positions: Array) -> Array:
    """True for the keys that each query attends to: real ones, not after it; bool `[B, T, S]`."""
    keys = key_positions[:, None, :]
    return (keys >= 0) & (keys <= query_positions[:, :, None])
