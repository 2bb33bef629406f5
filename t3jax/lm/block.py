"""A layer of the decoder: attention, a delta net or a convolution; an MLP or experts; their norms.

Axes: B batch, T time (new tokens), S cache slots, D features, P width of a layer's input vector.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from t3jax.lm.attention import Attention, Past
from t3jax.lm.cache import Borrowed, ConvState, DeltaState, KeyValues, LayerState
from t3jax.lm.config import LMConfig
from t3jax.lm.convolution import Order, ShortConv
from t3jax.lm.delta import DeltaNet
from t3jax.lm.experts import Experts
from t3jax.lm.layer_inputs import LayerInput
from t3jax.lm.layers import MLP, make_norm
from t3jax.lm.rotation import Rotation


class Shared(NamedTuple):
    """Inputs of a layer besides the residual stream, most of them the same for all of a kind.

    Attributes:
        rotation: The rotation of the new tokens; None: queries and keys are not rotated.
        seen: The slots that each query attends to, bool `[B, T, S]`.
        cursor: The cursor of the cache; None without a cache.
        order: The order of the real tokens, for recurrent layers; None if there are none.
        lent: Keys and values of the lending layer, new tokens included, for a borrowing layer.
        layer_input: The layer's input vector of each token, `[B, T, P]`; None without.
    """

    rotation: Rotation | None
    seen: Array
    cursor: Array | np.ndarray | None
    order: Order | None
    lent: KeyValues | None = None
    layer_input: Array | None = None


class Block(nnx.Module):
    """A layer; it also updates its state."""

    def __init__(self, config: LMConfig, layer: int):
        width = config.hidden_size
        before, after = config.norms != "post", config.norms in ("post", "both")
        self.attention_norm = make_norm(config, width, before)
        self.has_delta, self.has_conv = config.has_delta(layer), config.has_conv(layer)
        self.has_experts = config.has_experts(layer)
        self.lends = any(config.lender(i) == layer for i in range(config.num_layers))
        if self.has_delta:
            self.delta = DeltaNet(config)
        elif self.has_conv:
            self.conv = ShortConv(config)
        else:
            self.attention = Attention(config, layer)
        self.attention_post_norm = make_norm(config, width, after)
        self.mlp_norm = make_norm(config, width, before and config.norms != "shared")
        self.beside = self.has_experts and config.experts is not None and config.experts.beside
        if self.has_experts:
            self.experts = Experts(config)
        if self.beside or not self.has_experts:
            self.mlp = MLP(config, config.mlp_size(layer))
        self.experts_norm = make_norm(config, width, self.beside)
        self.experts_post_norm = make_norm(config, width, self.beside)
        self.beside_post_norm = make_norm(config, width, self.beside)
        self.mlp_post_norm = make_norm(config, width, after)
        if config.layer_inputs:
            self.input = LayerInput(config)
        if config.layer_multiplier:
            self.multiplier = nnx.Param(jnp.ones((1,)))
        self.config = config

    def __call__(
        self, x: Array, shared: Shared, past: LayerState | None, mesh: Mesh | None
    ) -> tuple[Array, LayerState | None]:
        """The residual stream `[B, T, D]` after the layer, and its state.

        Without a cache there is no state, except keys and values that other layers borrow.
        """
        normed = self.attention_norm(x)
        out, state = self._mix_tokens(normed, shared, past, mesh)
        attended = x + self._scale(self.attention_post_norm(out))
        stream = x if self.config.parallel else attended
        normed = normed if self.config.norms == "shared" else self.mlp_norm(stream)
        if self.beside:
            expert_out = self.experts(self.experts_norm(stream), mesh, routed=stream)
            out = self.beside_post_norm(self.mlp(normed)) + self.experts_post_norm(expert_out)
        else:
            out = self.experts(normed, mesh) if self.has_experts else self.mlp(normed)
        x = attended + self._scale(self.mlp_post_norm(out))
        if shared.layer_input is not None:
            x = self.input(x, shared.layer_input)
        if self.config.layer_multiplier:
            multiplier = jax.lax.stop_gradient(self.multiplier[...])
            x = x * jnp.broadcast_to(multiplier, x.shape)
        return x, state

    def _mix_tokens(
        self, normed: Array, shared: Shared, past: LayerState | None, mesh: Mesh | None
    ) -> tuple[Array, LayerState | None]:
        if self.has_delta:
            assert shared.order is not None
            assert past is None or isinstance(past, DeltaState)
            return self.delta(normed, shared.order, past, mesh)
        if self.has_conv:
            assert shared.order is not None
            assert past is None or isinstance(past, ConvState)
            return self.conv(normed, shared.order, past)
        before: Past | None = None
        if self.attention.borrows:
            assert shared.lent is not None
            before = (*shared.lent, shared.cursor)
        elif past is not None:
            assert isinstance(past, KeyValues)
            before = (*past, shared.cursor)
        out, k, v = self.attention(normed, shared.rotation, shared.seen, before, mesh)
        if self.attention.borrows:
            return out, None if past is None else Borrowed()
        return out, KeyValues(k, v) if past is not None or self.lends else None

    def _scale(self, branch: Array) -> Array:
        """Scales a branch's addition to the residual stream."""
        multiplier = self.config.residual_multiplier
        return branch if multiplier == 1 else branch * jnp.asarray(multiplier, branch.dtype)
