"""The classifier's features: the causal mean of the base model's last hidden states.

`hbar_t` is the mean of the hidden states (after the final norm, the input of the LM head) over the
attended positions 1..t, prompt included. It has two forms: over a whole sequence, and running, for
decoding. `prefix_features` adds the last hidden state to the mean, or replaces it (an extension of
the paper): the mean has the subject of the text, the last state the next word. Axes: `...` batch, T
time, D width of the hidden states, F width of the features. Everything is computed in float32.

References:
    Temper-Then-Tilt, arXiv 2602.10217, features.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

FEATURES = ("mean", "last", "mean+last")  # the first is the paper's


def feature_size(kind: str, hidden_size: int) -> int:
    """F, the width of the features for hidden states of width D."""
    return hidden_size * len(kind.split("+"))


def prefix_features(
    mean: Float[Array, "*batch D"], last: Float[Array, "*batch D"], kind: str = "mean"
) -> Float[Array, "*batch F"]:
    """The features of a prefix, a head's input.

    Args:
        mean: Causal mean of the hidden states of the prefix, `[..., D]`.
        last: Hidden state of its last token, `[..., D]`, any float dtype.
        kind: "mean" (the paper), "last", or "mean+last" for both side by side.

    Returns:
        Float32 `[..., F]`, F = D or 2 D.

    Example:
        >>> t3jax.prefix_features(jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0]), "mean+last")
        Array([1., 2., 3., 4.], dtype=float32)
    """
    parts = {"mean": mean.astype(jnp.float32), "last": last.astype(jnp.float32)}
    features = [parts[name] for name in kind.split("+")]
    return features[0] if len(features) == 1 else jnp.concatenate(features, axis=-1)


def causal_mean(
    hidden: Float[Array, "*batch T D"], mask: Bool[Array, "*batch T"]
) -> Float[Array, "*batch T D"]:
    """Mean of the attended hidden states up to and including each position.

    One pass over a sequence gives the feature of every prefix. Padding may be anywhere: masked
    positions are never read, not even if they are NaN.

    Args:
        hidden: Last hidden states, `[..., T, D]`, any float dtype.
        mask: True where a position is attended, `[..., T]`.

    Returns:
        Float32 `[..., T, D]`. Before the first attended position it is 0; at a masked position
        after it, the mean so far.

    Example:
        >>> hidden = jnp.array([[[2.0], [4.0], [9.0]]])  # one text, three tokens, D = 1
        >>> t3jax.causal_mean(hidden, jnp.ones((1, 3), bool))[0, :, 0]
        Array([2., 3., 5.], dtype=float32)
    """
    summed = jnp.cumsum(_attended(hidden, mask), axis=-2)
    count = jnp.cumsum(mask.astype(jnp.float32), axis=-1)
    return summed / jnp.maximum(count, 1.0)[..., None]


class RunningMean(NamedTuple):
    """The causal mean while decoding, as sum and count.

    Attributes:
        total: Sum of the attended hidden states so far, float32 `[..., D]`.
        count: Number of attended positions so far, float32 `[...]`.
    """

    total: Float[Array, "*batch D"]
    count: Float[Array, "*batch"]  # type: ignore[assignment]  # hides tuple.count

    @property
    def mean(self) -> Float[Array, "*batch D"]:
        """The feature of the prefix so far, float32 `[..., D]`; 0 for an empty prefix."""
        return self.total / jnp.maximum(self.count, 1.0)[..., None]


def running_mean(
    hidden: Float[Array, "*batch T D"],
    mask: Bool[Array, "*batch T"],
    past: RunningMean | None = None,
) -> RunningMean:
    """Adds the attended states of new positions to a running mean.

    Args:
        hidden: Last hidden states of the new positions, `[..., T, D]`; T = 1 while decoding.
        mask: True where a new position is attended, `[..., T]`.
        past: The mean of the earlier text; None if there is none.

    Returns:
        The `RunningMean` after these positions: its `.mean` equals the last row of `causal_mean`
        over the whole text, up to rounding.

    Example:
        >>> past = t3jax.running_mean(jnp.array([[2.0], [4.0]]), jnp.ones(2, bool))
        >>> t3jax.running_mean(jnp.array([[9.0]]), jnp.ones(1, bool), past).mean
        Array([5.], dtype=float32)
    """
    total = jnp.sum(_attended(hidden, mask), axis=-2)
    count = jnp.sum(mask.astype(jnp.float32), axis=-1)
    if past is None:
        return RunningMean(total, count)
    return RunningMean(past.total + total, past.count + count)


def _attended(hidden: Array, mask: Array) -> Array:
    return jnp.where(mask[..., None], hidden.astype(jnp.float32), 0.0)
