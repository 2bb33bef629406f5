"""Input vectors of layers beside the residual stream: each layer has its own of every token.

A table has a row of every token with a vector for each layer; a linear map of the token's embedding
gives as many. The layer multiplies their sum by a gate that it computes from the residual stream.

Axes: B batch, T time, D features, L layers, P width of such a vector, V vocabulary.
"""

from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from t3jax import sharding
from t3jax.lm.config import LMConfig
from t3jax.lm.layers import ACTIVATIONS, Linear, make_norm

Tables = tuple[Linear, Linear, Callable[[Array], Array]]


def make_tables(config: LMConfig) -> Tables:
    """The table, the map of embeddings, and the norm of its output."""
    width = config.num_layers * config.layer_inputs
    return (
        Linear(width, config.vocab_size, quantized=config.quantized),  # [V, L P]
        Linear(config.hidden_size, width, quantized=config.quantized),
        make_norm(config, config.layer_inputs),
    )


def read_tables(
    tables: Tables, config: LMConfig, tokens: Array, embeddings: Array, mesh: Mesh | None
) -> Array:
    """The vectors of all layers, `[B, T, L, P]`, for tokens `[B, T]` and their embeddings."""
    table, projection, norm = tables
    shape = (*tokens.shape, config.num_layers, config.layer_inputs)
    rows = table.rows(tokens, mesh).reshape(shape)
    rows = rows * jnp.sqrt(jnp.float32(config.layer_inputs)).astype(rows.dtype)
    projected = sharding.constrain(projection(embeddings), mesh, [sharding.ROWS])
    projected = projected * jnp.asarray(config.hidden_size**-0.5, rows.dtype)
    return (norm(projected.reshape(shape)) + rows) * jnp.asarray(0.5**0.5, rows.dtype)


class LayerInput(nnx.Module):
    """The gate of a layer's input vectors, and their map to the residual stream."""

    def __init__(self, config: LMConfig):
        width, inner = config.hidden_size, config.layer_inputs
        self.opening = Linear(width, inner, quantized=config.quantized)
        self.out = Linear(inner, width, quantized=config.quantized)
        self.norm = make_norm(config, width)
        self.activation = ACTIVATIONS[config.activation]

    def __call__(self, x: Array, vectors: Array) -> Array:
        """The residual stream `[B, T, D]` with the addition of vectors `[B, T, P]`."""
        gated = self.activation(self.opening(x)) * vectors
        return x + self.norm(self.out(gated))
