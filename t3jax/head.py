"""The classifier: a small head on frozen features that scores every candidate next token.

    g_t(v) = W2[v] · act(U hbar_t)

is the logit of "retain" if token v came next after a prefix whose causal mean is `hbar_t`. A head
may read other features than the mean, see `pooling.prefix_features`. Axes: `...` batch, F features
(F = D for the mean), R rank, V vocabulary. Parameters are a plain dict of float32 arrays,

    {"hidden": ({"weight": [R, F], "bias": [R]}, ...), "output": [V, R]}

with one entry of "hidden" for each hidden layer; biases are optional. The functions are pure;
`t3jax.head_io` reads and writes files.

References:
    Temper-Then-Tilt, arXiv 2602.10217, head and training.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from t3jax.pooling import FEATURES, feature_size
from t3jax.ranges import RANK, Ranged, Words, whole

HeadParams = dict[str, Any]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "identity": lambda x: x,
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "tanh": jnp.tanh,
}


@dataclasses.dataclass(frozen=True)
class HeadConfig(Ranged):
    """Shape of the classifier.

    Attributes:
        hidden_size: D, width of the base model's hidden states.
        vocab_size: V, number of tokens the base model scores.
        rank: R, width of the hidden layers.
        activation: After each hidden layer: "identity" (the paper), "relu", "gelu" or "tanh".
        num_hidden_layers: 1 in the paper.
        bias: Whether hidden layers have a bias; the output layer never has one.
        features: The features of a prefix, one of `pooling.FEATURES`; "mean" is the paper's.
    """

    hidden_size: Annotated[int, whole(1)]
    vocab_size: Annotated[int, whole(1)]
    rank: Annotated[int, RANK] = 20
    activation: Annotated[str, Words(tuple(ACTIVATIONS))] = "identity"
    num_hidden_layers: Annotated[int, whole(1, 100)] = 1
    bias: bool = False
    features: Annotated[str, Words(FEATURES)] = "mean"

    @property
    def num_params(self) -> int:
        """Number of trained values; R (D + V) in the paper's shape."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(head_shapes(self)))

    @property
    def feature_size(self) -> int:
        """F, width of the features."""
        return feature_size(self.features, self.hidden_size)


@dataclasses.dataclass(frozen=True, eq=False)
class Head:
    """A trained classifier with its serving parameters.

    Attributes:
        config: Its shape.
        params: Its parameters, a tree as above.
        base_temperature: T, by which the base model's logits are divided.
        guidance_scale: s, the strength of the tilt.
        model: Folder or hub id of the base model whose features it was trained on; "" if unknown.
        prior_shift: Constant added to the scores, see `t3jax.head.class_prior_shift`.
        record: Record of the training: settings, numbers of tokens, final metrics, versions.
    """

    config: HeadConfig
    params: HeadParams
    base_temperature: float
    guidance_scale: float
    model: str
    prior_shift: float = 0.0
    record: dict[str, Any] = dataclasses.field(default_factory=dict)


def head_shapes(config: HeadConfig) -> HeadParams:
    """The parameter tree of a head as `jax.ShapeDtypeStruct` leaves."""
    widths = [config.feature_size] + [config.rank] * config.num_hidden_layers
    hidden = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layer = {"weight": jax.ShapeDtypeStruct((fan_out, fan_in), jnp.float32)}
        if config.bias:
            layer["bias"] = jax.ShapeDtypeStruct((fan_out,), jnp.float32)
        hidden.append(layer)
    output = jax.ShapeDtypeStruct((config.vocab_size, config.rank), jnp.float32)
    return {"hidden": tuple(hidden), "output": output}


def init_head(key: PRNGKeyArray, config: HeadConfig, zero_output: bool = False) -> HeadParams:
    """Draws a head as PyTorch's `nn.Linear` does: uniform in ±1/sqrt(fan_in), biases too.

    Args:
        key: A typed PRNG key.
        config: The shape of the head.
        zero_output: Initialise the output layer with zeros (an extension of the paper): tokens that
            never occur in training are then not tilted, where a random row tilts at random.

    Returns:
        The parameter tree, float32.

    Example:
        >>> config = t3jax.HeadConfig(hidden_size=4, vocab_size=10, rank=2)
        >>> params = t3jax.init_head(jax.random.key(0), config)
        >>> jax.tree.map(jnp.shape, params)
        {'hidden': ({'weight': (2, 4)},), 'output': (10, 2)}
    """
    shapes = head_shapes(config)
    keys = jax.random.split(key, len(jax.tree.leaves(shapes)))
    hidden = [dict.fromkeys(layer, layer["weight"].shape[1]) for layer in shapes["hidden"]]
    fan_ins = {"hidden": tuple(hidden), "output": config.rank}
    params = jax.tree.map(
        lambda leaf, k, fan_in: (
            jax.random.uniform(k, leaf.shape, jnp.float32, -1.0, 1.0) / math.sqrt(fan_in)
        ),
        shapes,
        jax.tree.unflatten(jax.tree.structure(shapes), keys),
        fan_ins,
    )
    if zero_output:
        params["output"] = jnp.zeros_like(params["output"])
    return params


def head_scores(
    params: HeadParams, pooled: Float[Array, "*batch F"], activation: str = "identity"
) -> Float[Array, "*batch V"]:
    """Scores of every token as the next one.

    Args:
        params: The head's parameters.
        pooled: Features of the prefixes: their causal means `hbar_t` in the paper, `[..., F]`.
        activation: The head's activation.

    Returns:
        `g_t(v)` for all v, float32 `[..., V]`: logits of "retain".

    Example:
        >>> config = t3jax.HeadConfig(hidden_size=4, vocab_size=10, rank=2)
        >>> params = t3jax.init_head(jax.random.key(0), config)
        >>> t3jax.head_scores(params, jnp.ones((3, 4))).shape
        (3, 10)

    References:
        Temper-Then-Tilt, arXiv 2602.10217, head.
    """
    hidden = _hidden(params, pooled, activation)
    return jnp.einsum("...r,vr->...v", hidden, params["output"], precision="highest")


def target_scores(
    params: HeadParams,
    pooled: Float[Array, "*batch F"],
    targets: Int[Array, "*batch"],
    activation: str = "identity",
) -> Float[Array, "*batch"]:
    """Scores of given next tokens only; no array over the vocabulary is computed.

    Args:
        params: The head's parameters.
        pooled: Features of the prefixes, `[..., F]`.
        targets: The token that came next after each prefix, `[...]`, in [0, V).
        activation: The head's activation.

    Returns:
        `g_t(x_{t+1})`, float32 `[...]`, for training and for scoring given text.
    """
    hidden = _hidden(params, pooled, activation)
    products = hidden * jnp.take(params["output"], targets, axis=0)
    # A product with ones: on a CPU a sum over an axis this short costs as much as the hidden layer.
    ones = jnp.ones(products.shape[-1], products.dtype)
    return jnp.einsum("...r,r->...", products, ones, precision="highest")


def candidate_scores(
    params: HeadParams,
    pooled: Float[Array, "*batch F"],
    tokens: Int[Array, "*batch E"],
    activation: str = "identity",
) -> Float[Array, "*batch E"]:
    """Scores `g_t(v)` of a few candidates for the next token, float32 `[..., E]`.

    No array over the vocabulary is computed. The other arguments are as for `target_scores`.
    """
    hidden = _hidden(params, pooled, activation)
    rows = jnp.take(params["output"], tokens, axis=0)
    return jnp.einsum("...r,...er->...e", hidden, rows, precision="highest")


def classifier_loss(
    scores: Float[Array, "*batch"], retain: Bool[Array, "*batch"], mask: Bool[Array, "*batch"]
) -> Float[Array, ""]:
    """Binary cross-entropy of the answer tokens of a batch of retain and forget sequences.

    Args:
        scores: Logits of "retain" of the tokens that came next, `[...]`.
        retain: True for a token of a retain sequence (label 1), False for one of a forget sequence
            (label 0), `[...]`.
        mask: True for a token of an answer, the closing end-of-turn token included; prompts and
            padding do not count, `[...]`.

    Returns:
        The sum over both sets divided by the number of answer tokens, in nats; 0 if there are none.

    Example:
        >>> scores, retain = jnp.array([2.0, -2.0, 9.0]), jnp.array([True, False, False])
        >>> t3jax.classifier_loss(scores, retain, mask=jnp.array([True, True, False]))
        Array(0.126928, dtype=float32)

    References:
        Temper-Then-Tilt, arXiv 2602.10217, training.
    """
    scores = scores.astype(jnp.float32)
    # -log sigmoid(g) for label 1, -log sigmoid(-g) for label 0. A masked score may be anything.
    signed = jnp.where(retain, scores, -scores)
    losses = jnp.where(mask, jax.nn.softplus(-jnp.where(mask, signed, 0.0)), 0.0)
    return jnp.sum(losses) / jnp.maximum(jnp.sum(mask.astype(jnp.float32)), 1.0)


def class_prior_shift(forget_fraction: float) -> float:
    """The constant to add to scores for the true class prior (an extension of the paper).

    Training pairs one retain sequence with each forget sequence, which gives the posterior of a
    balanced mixture. For a base model that is the mixture `(1 - γ) p_r + γ p_f` the posterior's
    logit is larger by this constant.

    Args:
        forget_fraction: γ, the forget set's share of the mixture, in (0, 1).

    Returns:
        `log((1 - γ) / γ)`, in nats.

    Raises:
        ValueError: If γ is not in (0, 1).

    Example:
        >>> round(t3jax.class_prior_shift(0.1), 3)
        2.197
    """
    if not 0 < forget_fraction < 1:
        raise ValueError(f"forget_fraction must lie in (0, 1), got {forget_fraction}")
    return math.log1p(-forget_fraction) - math.log(forget_fraction)


def _hidden(params: HeadParams, pooled: Array, activation: str) -> Array:
    """`act(U hbar)` and further hidden layers, float32 `[..., R]`."""
    x = pooled.astype(jnp.float32)
    for layer in params["hidden"]:
        x = jnp.einsum("...d,rd->...r", x, layer["weight"], precision="highest")
        if "bias" in layer:
            x = x + jnp.broadcast_to(layer["bias"], x.shape)
        x = ACTIVATIONS[activation](x)
    return x
