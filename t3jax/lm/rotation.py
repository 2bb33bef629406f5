"""Rotary positions: the angles of each kind, and the rotation of queries and keys.

Axes: B batch, T time, h head width, r rotated width. Angles are computed in float32.
"""

import functools
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from t3jax.lm.config import RopeConfig


class Rotation(NamedTuple):
    """The rotation of queries and keys of new tokens.

    Attributes:
        cos: Cosines of the angles, float32 `[B, T, r/2]`.
        sin: Their sines.
        growth: A factor of queries, float32 `[B, T, 1]`; None for 1.
    """

    cos: Array
    sin: Array
    growth: Array | None


def make_rotation(rope: RopeConfig | None, head_dim: int, positions: Array) -> Rotation | None:
    """The rotation of tokens at positions `[B, T]`."""
    if rope is None:
        return None
    frequencies = inverse_wavelengths(rope, head_dim).reshape(1, 1, -1)
    positions = jnp.maximum(positions, 0)[..., None]
    angles = positions.astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if rope.attention_factor != 1:
        cos, sin = cos * rope.attention_factor, sin * rope.attention_factor
    growth = None
    if rope.query_growth:
        contexts = (positions // rope.original_max_position).astype(jnp.float32)
        growth = 1 + rope.query_growth * jnp.log1p(contexts)
    return Rotation(cos, sin, growth)


def rotate_queries(q: Array, rotation: Rotation, interleaved: bool) -> Array:
    """Rotates queries `[B, K, G, T, h]`, and multiplies them by their growth."""
    rotated = rotate_keys(q, rotation, interleaved)
    return rotated if rotation.growth is None else rotated * _spread(rotation.growth, q)


def rotate_keys(x: Array, rotation: Rotation, interleaved: bool) -> Array:
    """Rotates pairs of `[B, ..., T, h]`.

    The pairs are (x_i, x_{i+r/2}), i < r/2, or (x_2i, x_{2i+1}) if they are interleaved. Numbers
    beyond the first r of a head are not rotated.
    """
    cos, sin = _spread(rotation.cos, x), _spread(rotation.sin, x)
    rotated = 2 * cos.shape[-1]
    x, rest = (x, []) if rotated == x.shape[-1] else (x[..., :rotated], [x[..., rotated:]])
    first, second = (x[..., ::2], x[..., 1::2]) if interleaved else jnp.split(x, 2, -1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    if interleaved:
        turned = [jnp.stack(turned, axis=-1).reshape(x.shape)]
    return jnp.concatenate([*turned, *rest], axis=-1)


def _spread(part: Array, x: Array) -> Array:
    """Reshapes and casts `[B, T, ...]` to broadcast over the heads of `[B, ..., T, h]`."""
    middle = (1,) * (x.ndim - 3)
    return part.reshape(part.shape[0], *middle, *part.shape[1:]).astype(x.dtype)


@functools.cache
def inverse_wavelengths(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians per position of each rotary pair, float32 `[r/2]`."""
    if rope.kind == "proportional":
        pairs = np.zeros(head_dim // 2, np.float32)
        rotated = int(head_dim * rope.rotated) // 2
        exponents = np.arange(0, 2 * rotated, 2, dtype=np.float32) / np.float32(head_dim)
        pairs[:rotated] = 1.0 / np.float32(rope.theta) ** exponents / np.float32(rope.factor)
        return pairs
    width = int(head_dim * rope.rotated)
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    frequencies = (1.0 / np.float32(rope.theta) ** exponents).astype(np.float32)
    if rope.kind == "linear":
        return frequencies / np.float32(rope.factor)
    if rope.kind == "longrope":
        return frequencies / np.asarray(rope.short_factors, np.float32)
    if rope.kind == "yarn":
        keep = _yarn_ramp(rope, width)
        return ((1 - keep) * frequencies / rope.factor + keep * frequencies).astype(np.float32)
    if rope.kind in ("default", "dynamic"):
        return frequencies
    # Llama 3.1 stretches a pair by its turns over the original context: not at all from
    # `high_freq_factor` turns on, fully up to `low_freq_factor`.
    turns = rope.original_max_position * frequencies / np.float32(2 * math.pi)
    ramp = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = np.clip(ramp, 0.0, 1.0)
    return ((1 - keep) * frequencies / rope.factor + keep * frequencies).astype(np.float32)


def _yarn_ramp(rope: RopeConfig, width: int) -> np.ndarray:
    """How far each pair keeps its wavelength, from 1 (not stretched) to 0, float32 `[width/2]`."""

    def find_pair(turns: float) -> float:
        """The index, a real number, of the pair with `turns` over the original context."""
        length = rope.original_max_position / (turns * 2 * math.pi)
        return width * math.log(length) / (2 * math.log(rope.theta))

    low, high = find_pair(rope.beta_fast), find_pair(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = (np.arange(width // 2, dtype=np.float32) - low) / max(high - low, 0.001)
    return 1 - np.clip(ramp, 0.0, 1.0)
