"""Layers of the decoder: linear maps, norms and the MLP.

Axes: B batch, T time, D features, F MLP width, R rank. Weights are [out, in], as Hugging Face
stores them: in this layout a CPU reads a matrix once, row after row, when it multiplies a single
vector. Norms are computed in float32 whatever the weights' dtype.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from t3jax import sharding
from t3jax.lm import quantized
from t3jax.lm.config import LMConfig
from t3jax.lm.product import product

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


class Linear(nnx.Module):
    """A linear map or a table of embeddings, int8 or not, with or without a low-rank update."""

    lora_a: Array | None = None
    lora_b: Array | None = None

    def __init__(self, fan_in: int, fan_out: int, bias: bool = False, quantized: bool = False):
        self.weight = nnx.Param(jnp.zeros((fan_out, fan_in), jnp.int8 if quantized else None))
        if quantized:
            self.scale = nnx.Param(jnp.ones((fan_out,)))
        if bias:
            self.bias = nnx.Param(jnp.zeros((fan_out,)))
        self.has_bias = bias
        self.quantized = quantized

    def __call__(self, x: Array) -> Array:
        """The map of vectors `[..., in]`, `[..., out]`."""
        # Rows on one axis: a CPU is slow at a weight's gradient when that sums over two.
        rows = x.reshape(-1, x.shape[-1])
        if self.quantized:
            y = quantized.product(rows, self.weight[...], self.scale[...])
        else:
            y = product(rows, self.weight[...])
        if self.lora_a is not None and self.lora_b is not None:
            y = y + product(product(rows, self.lora_a), self.lora_b)
        if self.has_bias:
            y = y + jnp.broadcast_to(self.bias[...], y.shape)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def rows(self, ids: Array, mesh: Mesh | None) -> Array:
        """Looks up rows `[B, T, in]` of the matrix, as a table of embeddings."""
        rows = sharding.lookup(mesh, self.weight[...], ids)
        if not self.quantized:
            return rows
        scale = sharding.lookup(mesh, self.scale[...][:, None], ids)
        return rows.astype(scale.dtype) * jnp.broadcast_to(scale, rows.shape)


def normalize(x: Array, eps: float) -> Array:
    """Vectors divided by the root of their mean square, float32."""
    x32 = x.astype(jnp.float32)
    return x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)


class _RMSNorm(nnx.Module):
    def __init__(self, shape: tuple[int, ...], eps: float, kind: str):
        self.weight = nnx.Param(jnp.ones(shape))
        self.eps = eps
        self.kind = kind

    def __call__(self, x: Array) -> Array:
        normed = normalize(x, self.eps)
        # The product with the weight is in the model's dtype, as in transformers.
        if self.kind == "rms":
            return normed.astype(x.dtype) * jnp.broadcast_to(self.weight[...], x.shape)
        weight = self.weight[...].astype(jnp.float32)
        weight = 1 + weight if self.kind == "rms_offset" else weight
        return (normed * jnp.broadcast_to(weight, x.shape)).astype(x.dtype)


class _LayerNorm(nnx.Module):
    def __init__(self, shape: tuple[int, ...], eps: float, weight: bool, bias: bool, offset: bool):
        if weight:
            self.weight = nnx.Param(jnp.ones(shape))
        if bias:
            self.bias = nnx.Param(jnp.zeros(shape))
        self.has_weight = weight
        self.has_bias = bias
        self.offset = offset
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        y = x32 * scale
        if self.has_weight:
            weight = self.weight[...].astype(jnp.float32)
            y = y * jnp.broadcast_to(1 + weight if self.offset else weight, x.shape)
        if self.has_bias:
            y = y + jnp.broadcast_to(self.bias[...].astype(jnp.float32), x.shape)
        return y.astype(x.dtype)


def _identity(x: Array) -> Array:
    return x


def make_norm(
    config: LMConfig, shape: int | tuple[int, ...], enabled: bool = True
) -> Callable[[Array], Array]:
    """The family's norm over the last axis, with a weight of a shape; the identity if disabled."""
    if not enabled:
        return _identity
    shape = shape if isinstance(shape, tuple) else (shape,)
    if config.norm.startswith("layer"):
        offset = config.norm.endswith("_offset")
        return _LayerNorm(shape, config.norm_eps, config.norm_weight, config.norm_bias, offset)
    return _RMSNorm(shape, config.norm_eps, config.norm)


class MLP(nnx.Module):
    """The MLP of a layer, with a gate or without; `inner` overrides the config's width."""

    def __init__(self, config: LMConfig, inner: int | None = None):
        width, inner = config.hidden_size, inner or config.intermediate_size
        if config.gated:
            self.gate = Linear(width, inner, config.mlp_bias, config.quantized)
        self.up = Linear(width, inner, config.mlp_bias, config.quantized)
        self.down = Linear(inner, width, config.mlp_bias, config.quantized)
        self.learned = config.activation == "xielu"
        if self.learned:
            self.alpha_p, self.alpha_n = (nnx.Param(jnp.zeros((1,))) for _ in range(2))
        else:
            self.activation = ACTIVATIONS[config.activation]
        self.gated = config.gated

    def __call__(self, x: Array) -> Array:
        """The MLP's output, `[..., D]`."""
        if self.gated:
            return self.down(self._activate(self.gate(x)) * self.up(x))
        return self.down(self._activate(self.up(x)))

    def _activate(self, x: Array) -> Array:
        if self.learned:
            return xielu(x, self.alpha_p[...], self.alpha_n[...])
        return self.activation(x)


def xielu(x: Array, alpha_p: Array, alpha_n: Array) -> Array:
    """A parabola above 0 and an exponential that nears a line below it, both learned.

    References:
        Deriving Activation Functions Using Integration, arXiv 2411.13010, section 3.
    """
    positive = jnp.broadcast_to(jax.nn.softplus(alpha_p), x.shape)
    negative = jnp.broadcast_to(0.5 + jax.nn.softplus(alpha_n), x.shape)
    below = jnp.minimum(x, -1e-6)
    return 0.5 * x + jnp.where(x > 0, positive * x * x, (jnp.expm1(below) - x) * negative)


def cap(x: Array, cap: float | None) -> Array:
    """Bounds values softly between -cap and cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)
