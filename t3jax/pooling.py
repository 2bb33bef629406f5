"""The classifier's features: the causal mean of the base model's last hidden states.

`hbar_t` is the mean of the hidden states (after the final norm, what the LM head sees) over the
attended positions 1..t, prompt included. Two forms: over a whole sequence, and running, for
decoding. Axes: `...` batch, T time, D features. Everything is computed in float32.

References:
    Temper-Then-Tilt, arXiv 2602.10217, features.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def causal_mean(
    hidden: Float[Array, "*batch T D"], mask: Bool[Array, "*batch T"]
) -> Float[Array, "*batch T D"]:
    """Mean of the attended hidden states up to and including each position.

    One pass over a sequence gives the feature of every prefix. Padding may stand left or right, or
    anywhere: what `mask` leaves out is never read, not even if it is NaN.

    Args:
        hidden: Last hidden states, `[..., T, D]`, any float dtype.
        mask: True where a position is attended, `[..., T]`.

    Returns:
        Float32 `[..., T, D]`. Before the first attended position it is 0; at a masked position
        after it, the mean so far.
    """
    summed = jnp.cumsum(_attended(hidden, mask), axis=-2)
    count = jnp.cumsum(mask.astype(jnp.float32), axis=-1)
    return summed / jnp.maximum(count, 1.0)[..., None]


class RunningMean(NamedTuple):
    """The causal mean while decoding: what has been summed, and how many states that was.

    Attributes:
        total: Sum of the attended hidden states so far, float32 `[..., D]`.
        count: Number of attended positions so far, float32 `[...]`.
    """

    total: Float[Array, "*batch D"]
    count: Float[Array, "*batch"]  # type: ignore[assignment]  # hides tuple.count

    @property
    def mean(self) -> Float[Array, "*batch D"]:
        """The feature of the prefix read so far, float32 `[..., D]`; 0 if nothing was read."""
        return self.total / jnp.maximum(self.count, 1.0)[..., None]


def running_mean(
    hidden: Float[Array, "*batch T D"],
    mask: Bool[Array, "*batch T"],
    past: RunningMean | None = None,
) -> RunningMean:
    """Adds the attended states of a stretch of text to a running mean.

    Args:
        hidden: Last hidden states of the new positions, `[..., T, D]`; T = 1 while decoding.
        mask: True where a new position is attended, `[..., T]`.
        past: What was read before; None if nothing.

    Returns:
        The `RunningMean` after these positions: its `.mean` equals the last row of `causal_mean`
        over the whole text, up to rounding.
    """
    total = jnp.sum(_attended(hidden, mask), axis=-2)
    count = jnp.sum(mask.astype(jnp.float32), axis=-1)
    if past is None:
        return RunningMean(total, count)
    return RunningMean(past.total + total, past.count + count)


def _attended(hidden: Array, mask: Array) -> Array:
    return jnp.where(mask[..., None], hidden.astype(jnp.float32), 0.0)
