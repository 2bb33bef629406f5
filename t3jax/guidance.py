"""Temper, then tilt: the paper's equations on next-token distributions.

    p_hat(v) ∝ p(v)^(1/T) · f(v)^s,    f(v) = sigmoid(g(v)) = P(retain | prefix, v)

Axes: `...` any batch axes, V vocabulary. Everything is computed in float32. A token whose logit
is `-inf` is banned and stays `-inf`; a row where every token is banned is all `-inf`. Values and
gradients are never NaN. This module knows nothing of models, heads or sampling.

References:
    Temper-Then-Tilt, arXiv 2602.10217.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

# Larger logits and scores saturate here, and smaller temperatures there: far from anything a model
# says, and near enough that no sum or product below, or in a gradient, is inf - inf or 0 · inf.
_MAX = 1e30
_MIN_TEMPERATURE = 1e-18


def tempered_logprobs(
    logits: Float[Array, "*batch V"], temperature: Num[Array, "*#batch"] | float
) -> Float[Array, "*batch V"]:
    """Log-probabilities of the tempered base distribution, `p(v)^(1/T)` normalised.

    Args:
        logits: Unnormalised log-probabilities of the base model, `[..., V]`, any float dtype.
        temperature: The base temperature T > 0: a scalar, or one per row, `[...]`. The method uses
            T >= 1, which flattens; T = 1 leaves the base model as it is.

    Returns:
        `log_softmax(logits / T)`, float32 `[..., V]`, in nats.

    Raises:
        ValueError: If `temperature` is a Python number that is not positive.

    References:
        Temper-Then-Tilt, arXiv 2602.10217, tempering.
    """
    return _log_softmax(temper(logits, temperature))


def tilt(
    logprobs: Float[Array, "*batch V"],
    scores: Float[Array, "*batch V"],
    scale: Num[Array, "*#batch"] | float = 1.0,
) -> Float[Array, "*batch V"]:
    """Multiplies a distribution by what the classifier thinks of each candidate token.

    Args:
        logprobs: Log-probabilities (or any unnormalised ones) to tilt, `[..., V]`.
        scores: Classifier logits g(v) of "retain" if v came next, `[..., V]`.
        scale: The guidance scale s >= 0: a scalar, or one per row, `[...]`. 0 leaves the
            distribution as it is.

    Returns:
        `log_softmax(logprobs + s · log_sigmoid(scores))`, float32 `[..., V]`, in nats.

    Raises:
        ValueError: If `scale` is a Python number that is negative.

    References:
        Temper-Then-Tilt, arXiv 2602.10217, tilting.
    """
    return _log_softmax(_tilt(_finite_or_banned(logprobs), scores, scale))


def guided_logits(
    logits: Float[Array, "*batch V"],
    scores: Float[Array, "*batch V"],
    temperature: Num[Array, "*#batch"] | float,
    scale: Num[Array, "*#batch"] | float = 1.0,
) -> Float[Array, "*batch V"]:
    """Temper and tilt in one fused expression, without the normaliser.

    `tilt(tempered_logprobs(logits, T), scores, s)` differs from this by a constant per row, which
    neither an argmax nor a Gumbel draw needs.

    Args:
        logits: Logits of the base model, `[..., V]`.
        scores: Classifier logits g(v), `[..., V]`.
        temperature: The base temperature T > 0, scalar or `[...]`.
        scale: The guidance scale s >= 0, scalar or `[...]`.

    Returns:
        `logits / T + s · log_sigmoid(scores)`, float32 `[..., V]`.

    Raises:
        ValueError: If `temperature` or `scale` is a Python number out of range.
    """
    return _tilt(temper(logits, temperature), scores, scale)


def temper(
    logits: Float[Array, "*batch V"], temperature: Num[Array, "*#batch"] | float
) -> Float[Array, "*batch V"]:
    """`tempered_logprobs` without the normaliser: `logits / T`, the same arguments."""
    if isinstance(temperature, int | float) and not temperature > 0:
        raise ValueError(
            f"temperature must be positive (the method uses T >= 1), got {temperature}"
        )
    logits = _finite_or_banned(logits)
    banned = jnp.isneginf(logits)
    # The product must not see -inf: its derivative in T there would be 0 · inf. One reciprocal for
    # each row, so that the derivative sums over the row before it multiplies by a huge 1 / T^2.
    inverse = 1.0 / jnp.maximum(per_row(temperature, logits), _MIN_TEMPERATURE)
    tempered = jnp.where(banned, 0.0, logits) * inverse
    return jnp.where(banned, -jnp.inf, jnp.clip(tempered, -_MAX, _MAX))


def _tilt(logits: Array, scores: Array, scale: Array | float) -> Array:
    if isinstance(scale, int | float) and not scale >= 0:
        raise ValueError(f"the guidance scale must not be negative, got {scale}")
    scores = scores.astype(jnp.float32)
    scale = per_row(scale, logits)
    # f = 0 bans a token, unless s = 0, where 0^0 = 1 and the tilt does nothing.
    impossible = jnp.isneginf(scores)
    log_f = jax.nn.log_sigmoid(jnp.clip(jnp.where(impossible, 0.0, scores), -_MAX, _MAX))
    banned = jnp.isneginf(logits) | (impossible & (scale > 0))
    tilted = jnp.where(banned, 0.0, logits) + jnp.maximum(scale * log_f, -_MAX)
    return jnp.where(banned, -jnp.inf, jnp.maximum(tilted, -_MAX))


def _finite_or_banned(logits: Array) -> Array:
    """Float32 logits in which -inf is the only infinity."""
    logits = logits.astype(jnp.float32)
    return jnp.where(jnp.isneginf(logits), -jnp.inf, jnp.clip(logits, -_MAX, _MAX))


def per_row(value: Array | float, like: Array) -> Array:
    """A scalar, or one value per row of `like` `[..., V]`, as float32 that broadcasts with it."""
    value = jnp.asarray(value, jnp.float32)
    return value if value.ndim == 0 else value[..., None]


def _log_softmax(logits: Array) -> Array:
    """`log_softmax` whose banned tokens stay -inf, an all-banned row included, without NaNs."""
    banned = jnp.isneginf(logits)
    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    shifted = jnp.where(banned, 0.0, logits) - jnp.where(jnp.isneginf(peak), 0.0, peak)
    shifted = jnp.maximum(shifted, -_MAX)
    total = jnp.sum(jnp.where(banned, 0.0, jnp.exp(shifted)), axis=-1, keepdims=True)
    normaliser = jnp.log(jnp.where(total > 0, total, 1.0))
    return jnp.where(banned, -jnp.inf, shifted - normaliser)
