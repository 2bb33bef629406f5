"""Heads that are added and removed while a program runs: a stack with a fixed number of places.

A place holds a head of any rank up to the stack's, of any features and activation, padded so that
all places have one shape: adding and removing heads compiles nothing. A place that no row uses
costs no computation. Axes: B batch, D features of one kind, R rank, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from t3jax import hosts
from t3jax.head import ACTIVATIONS, HeadConfig
from t3jax.head_io import Head, place_head
from t3jax.pooling import FEATURES

FEATURES_READ = "mean+last"  # the stack's input; a head of one kind has zeros for the other
_OFF = 1e30  # the score of a head that is off: P(retain) = 1
_ACTIVATIONS = tuple(ACTIVATIONS)


class Place(NamedTuple):
    """One place of a stack.

    Attributes:
        params: A head's parameters, padded with zeros to the stack's rank: hidden weights `[R, 2
            D]` and biases `[R]`, output `[V, R]`.
        activation: Index of the head's activation.
        prior_shift: Number added to every score.
    """

    params: Any
    activation: Any
    prior_shift: Any


Stack = tuple[Place, ...]


def make_stack(places: int, hidden_size: int, vocab_size: int, rank: int, mesh: Mesh) -> Stack:
    """An empty stack; its places share one array of zeros."""
    zeros = {
        "hidden": (
            {
                "weight": np.zeros((rank, 2 * hidden_size), np.float32),
                "bias": np.zeros(rank, np.float32),
            },
        ),
        "output": np.zeros((vocab_size, rank), np.float32),
    }
    empty = Place(place_head(zeros, mesh), np.int32(0), np.float32(0))
    return (empty,) * places


def put(stack: Stack, index: int, head: Head, mesh: Mesh) -> Stack:
    """A copy of a stack with a head in the place `index`, if `check_shape` allows it."""
    check_shape(stack, head.config)
    rank = stack[index].params["output"].shape[1]
    config = head.config
    fetched = hosts.fetch(head.params)
    (layer,) = fetched["hidden"]
    weight = np.zeros((rank, 2 * config.hidden_size), np.float32)
    start = config.hidden_size if config.features == "last" else 0
    weight[: config.rank, start : start + config.feature_size] = layer["weight"]
    bias = np.zeros(rank, np.float32)
    if "bias" in layer:
        bias[: config.rank] = layer["bias"]
    output = np.zeros((config.vocab_size, rank), np.float32)
    output[:, : config.rank] = fetched["output"]
    params = {"hidden": ({"weight": weight, "bias": bias},), "output": output}
    place = Place(
        place_head(params, mesh),
        np.int32(_ACTIVATIONS.index(config.activation)),
        np.float32(head.prior_shift),
    )
    return (*stack[:index], place, *stack[index + 1 :])


def check_shape(stack: Stack, config: HeadConfig) -> None:
    """Raises a ValueError unless a head of this shape fits into a place of the stack."""
    rank = stack[0].params["output"].shape[1]
    if config.rank > rank:
        raise ValueError(
            f"the head has rank {config.rank}, and the server has room for {rank}: start it with "
            f"--config.serve.rank={config.rank}"
        )
    if config.num_hidden_layers != 1:
        raise ValueError(
            f"the head has {config.num_hidden_layers} hidden layers; a server takes heads of one"
        )
    assert config.features in FEATURES


def combined_scores(
    stack: Stack, features: Float[Array, "B F"], on: Bool[Array, "B H"]
) -> tuple[Float[Array, "B V"], Float[Array, "H B R"]]:
    """One score of every next token, from the heads that are on in each row.

    g = -logsumexp_i(-g_i) over the heads i that are on, float32, as `refinements.combine_heads` for
    disjoint requests; 1e30 in a row without heads. The features are of the kind `FEATURES_READ`.
    Also returns the hidden layer of each head, an input of `blame`.
    """
    against = jnp.full((features.shape[0], stack[0].params["output"].shape[0]), -_OFF, jnp.float32)
    hiddens = []
    for i, place in enumerate(stack):
        hidden = _hidden(place, features)
        hiddens.append(hidden)

        def add(against: Array = against, i: int = i, place: Place = place, h: Array = hidden):
            scores = jnp.einsum("br,vr->bv", h, place.params["output"], precision="highest")
            scores = jnp.where(on[:, i, None], scores + place.prior_shift, _OFF)
            return jnp.logaddexp(against, -scores)

        against = jax.lax.cond(jnp.any(on[:, i]), add, lambda against=against: against)
    return -against, jnp.stack(hiddens)


def blame(
    stack: Stack, hiddens: Float[Array, "H B R"], on: Bool[Array, "B H"], token: Array
) -> Array:
    """The head that gives a token the lowest score in each row, int32 `[B]`; -1 if none is on."""
    scores = [
        jnp.einsum(
            "br,br->b", hidden, jnp.take(place.params["output"], token, axis=0), precision="highest"
        )
        + place.prior_shift
        for place, hidden in zip(stack, hiddens, strict=True)
    ]
    against = jnp.where(on, -jnp.stack(scores, axis=1), -jnp.inf)
    return jnp.where(jnp.any(on, axis=1), jnp.argmax(against, axis=1), -1).astype(jnp.int32)


def on_mask(rows: Sequence[Sequence[int]], places: int) -> np.ndarray:
    """The mask of the places that are on in each row, bool `[B, H]`."""
    mask = np.zeros((len(rows), places), bool)
    for row, indices in enumerate(rows):
        mask[row, list(indices)] = True
    return mask


def _hidden(place: Place, features: Array) -> Array:
    (layer,) = place.params["hidden"]
    x = jnp.einsum("bf,rf->br", features, layer["weight"], precision="highest")
    x = x + layer["bias"][None, :]
    return jax.lax.switch(place.activation, [ACTIVATIONS[name] for name in _ACTIVATIONS], x)
