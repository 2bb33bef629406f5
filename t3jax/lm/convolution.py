"""Short convolutions of each channel over the last real tokens, and layers made of one.

Such a layer multiplies its inputs by a gate, convolves them, and multiplies the result by another
gate. Its state is the last inputs of the convolution. Padding at any position leaves the state
unchanged, since the real tokens of each row are read first.

Axes: B batch, T time, D features, C channels, W taps of the convolution.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool

from t3jax.lm.cache import ConvState
from t3jax.lm.config import LMConfig
from t3jax.lm.layers import Linear


class Order(NamedTuple):
    """The order in which new tokens are read: the real tokens of each row first.

    Attributes:
        real: Number of real tokens, `[B]`.
        sources: The token that is read at each step, `[B, T]`.
        steps: The step at which each token is read, `[B, T]`.
    """

    real: Array
    sources: Array
    steps: Array


def order_tokens(mask: Bool[Array, "B T"]) -> Order:
    """The order of tokens of which some are padding (False)."""
    sources = jnp.argsort(~mask, axis=1, stable=True)
    return Order(jnp.sum(mask, axis=1, dtype=jnp.int32), sources, jnp.argsort(sources, axis=1))


def convolve(window: Array, weight: Array) -> Array:
    """Convolves inputs `[B, W-1+T, C]` with taps `[C, W]`, in float32, to `[B, T, C]`."""
    taps = weight.shape[1]
    length = window.shape[1] - taps + 1
    convolved = jnp.zeros((window.shape[0], length, window.shape[2]), jnp.float32)
    for i in range(taps):
        tap = weight[:, i].astype(jnp.float32)
        convolved = convolved + window[:, i : i + length] * jnp.broadcast_to(tap, convolved.shape)
    return convolved.astype(window.dtype)


def last_inputs(window: Array, real: Array, count: int) -> Array:
    """The inputs before the next real token, `[B, count, C]` of `[B, count+T, C]`."""
    return jax.vmap(lambda row, n: jax.lax.dynamic_slice_in_dim(row, n, count))(window, real)


class ShortConv(nnx.Module):
    """A short convolution between two gates; it also updates its state."""

    def __init__(self, config: LMConfig):
        conv = config.conv
        assert conv is not None
        width, channels = config.hidden_size, conv.channels
        self.gate = Linear(width, channels, quantized=config.quantized)
        self.out_gate = Linear(width, channels, quantized=config.quantized)
        self.v = Linear(width, channels, quantized=config.quantized)
        self.taps = Linear(conv.taps, channels)
        self.o = Linear(channels, width, quantized=config.quantized)
        self.conv = conv

    def __call__(
        self, x: Array, order: Order, past: ConvState | None
    ) -> tuple[Array, ConvState | None]:
        """The output for inputs `[B, T, D]`, and the state after them; see `DeltaNet`."""
        count = self.conv.taps - 1
        if x.shape[1] > 1:
            x = jnp.take_along_axis(x, order.sources[..., None], axis=1)
        inputs = self.gate(x) * self.v(x)
        before = jnp.zeros((len(x), count, self.conv.channels), x.dtype)
        window = jnp.concatenate([before if past is None else past.tail, inputs], axis=1)
        out = self.o(self.out_gate(x) * convolve(window, self.taps.weight[...]))
        if x.shape[1] > 1:
            out = jnp.take_along_axis(out, order.steps[..., None], axis=1)
        return out, None if past is None else ConvState(last_inputs(window, order.real, count))
