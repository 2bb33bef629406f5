"""What each layer is given of a token beside the residual stream: embeddings of its own.

A table has a row of every token with a vector for each layer; a linear map makes as many of the
token's embedding. Their sum goes through a gate that the layer opens by what it has read so far.

Axes: B batch, T time, D features, L layers, P width of such a vector, V vocabulary.
"""

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from t3jax import sharding
from t3jax.lm.config import LMConfig
from t3jax.lm.layers import ACTIVATIONS, Linear, make_norm


def make_tables(config: LMConfig) -> tuple[Linear, Linear, nnx.Module]:
    """The table, the map of embeddings, and the norm of what that gives."""
    width = config.num_layers * config.layer_inputs
    return (
        Linear(width, config.vocab_size, quantized=config.quantized),  # [V, L P]
        Linear(config.hidden_size, width, quantized=config.quantized),
        make_norm(config, config.layer_inputs),
    )


def read_tables(
    tables: tuple[Linear, Linear, nnx.Module],
    config: LMConfig,
    tokens: Array,
    embedded: Array,
    mesh: Mesh | None,
) -> Array:
    """The vectors of all layers.

    Args:
        tables: From `make_tables`.
        config: The model's shape.
        tokens: Ids, `[B, T]`.
        embedded: Their embeddings, `[B, T, D]`.
        mesh: Where the arrays live.

    Returns:
        `[B, T, L, P]`.
    """
    table, projection, norm = tables
    shape = (*tokens.shape, config.num_layers, config.layer_inputs)
    own = table.rows(tokens, mesh).reshape(shape)
    own = own * jnp.sqrt(jnp.float32(config.layer_inputs)).astype(own.dtype)
    projected = sharding.constrain(projection(embedded), mesh, [sharding.ROWS])
    projected = projected * jnp.asarray(config.hidden_size**-0.5, own.dtype)
    return (norm(projected.reshape(shape)) + own) * jnp.asarray(0.5**0.5, own.dtype)


class LayerInput(nnx.Module):
    """What a layer adds of the vector that it is given."""

    def __init__(self, config: LMConfig):
        width, inner = config.hidden_size, config.layer_inputs
        self.opening = Linear(width, inner, quantized=config.quantized)
        self.out = Linear(inner, width, quantized=config.quantized)
        self.norm = make_norm(config, width)
        self.activation = ACTIVATIONS[config.activation]

    def __call__(self, x: Array, given: Array) -> Array:
        """The sum for `[B, T, D]` and vectors `[B, T, P]`, `[B, T, D]`."""
        opened = self.activation(self.opening(x)) * given
        return x + self.norm(self.out(opened))
