"""Temper, then tilt: the paper's equations on next-token distributions.

    p_hat(v) ∝ p(v)^(1/T) · f(v)^s,    f(v) = sigmoid(g(v)) = P(retain | prefix, v)

Axes: `...` any batch axes, V vocabulary. Everything is computed in float32. A token whose logit
is `-inf` is banned and stays `-inf`; a row where every token is banned is all `-inf`. Values and
gradients are never NaN: the arithmetic that prevents it follows the equations.

References:
    Temper-Then-Tilt, arXiv 2602.10217.
"""

import functools
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

# Larger logits and scores saturate at the first, smaller temperatures at the second: far from any
# value of a model, and small enough that no sum or product below is inf - inf or 0 · inf.
_MAX = 1e30
_MIN_TEMPERATURE = 1e-18

P = ParamSpec("P")
R = TypeVar("R")


def accept_old_keyword(function: Callable[P, R]) -> Callable[P, R]:
    """Takes `temperature=`, the name of `base_temperature` in version 0.1, with a warning."""

    @functools.wraps(function)
    def renamed(*args: P.args, **kwargs: P.kwargs) -> R:
        if "temperature" in kwargs:
            warnings.warn(
                f"{function.__name__}: temperature is called base_temperature now",
                DeprecationWarning,
                stacklevel=2,
            )
            kwargs["base_temperature"] = kwargs.pop("temperature")
        return function(*args, **kwargs)

    return renamed


@accept_old_keyword
def tempered_logprobs(
    logits: Float[Array, "*batch V"], base_temperature: Num[Array, "*#batch"] | float
) -> Float[Array, "*batch V"]:
    """Log-probabilities of the tempered base distribution, `p(v)^(1/T)` normalised.

    Args:
        logits: Unnormalised log-probabilities of the base model, `[..., V]`, any float dtype.
        base_temperature: T > 0: a scalar, or one per row, `[...]`. The method uses T >= 1, which
            flattens; T = 1 does not change the base model.

    Returns:
        `log_softmax(logits / T)`, float32 `[..., V]`, in nats.

    Raises:
        ValueError: If `base_temperature` is a Python number that is not positive.

    Example:
        >>> t3jax.tempered_logprobs(jnp.log(jnp.array([0.8, 0.2])), base_temperature=2.0)
        Array([-0.4054651, -1.0986123], dtype=float32)

    References:
        Temper-Then-Tilt, arXiv 2602.10217, tempering.
    """
    return _log_softmax(temper(logits, base_temperature))


def tilt(
    logprobs: Float[Array, "*batch V"],
    scores: Float[Array, "*batch V"],
    scale: Num[Array, "*#batch"] | float = 1.0,
) -> Float[Array, "*batch V"]:
    """Multiplies a distribution by f(v)^s, the classifier's probability of "retain" for each token.

    Args:
        logprobs: Log-probabilities (or any unnormalised ones) to tilt, `[..., V]`.
        scores: Classifier logits g(v) of "retain" if v came next, `[..., V]`.
        scale: The guidance scale s >= 0: a scalar, or one per row, `[...]`. 0 does not change the
            distribution.

    Returns:
        `log_softmax(logprobs + s · log_sigmoid(scores))`, float32 `[..., V]`, in nats.

    Raises:
        ValueError: If `scale` is a Python number that is negative.

    Example:
        >>> t3jax.tilt(jnp.log(jnp.array([0.5, 0.5])), jnp.array([-jnp.inf, 0.0]))
        Array([-inf,   0.], dtype=float32)

    References:
        Temper-Then-Tilt, arXiv 2602.10217, tilting.
    """
    return _log_softmax(_add(_saturate(logprobs), _weight(scale, _log_f(scores))))


@accept_old_keyword
def guided_logits(
    logits: Float[Array, "*batch V"],
    scores: Float[Array, "*batch V"],
    base_temperature: Num[Array, "*#batch"] | float,
    scale: Num[Array, "*#batch"] | float = 1.0,
) -> Float[Array, "*batch V"]:
    """Temper and tilt in one fused expression, without the normaliser.

    `tilt(tempered_logprobs(logits, T), scores, s)` differs from this by a constant per row, which
    neither an argmax nor a Gumbel draw needs.

    Args:
        logits: Logits of the base model, `[..., V]`.
        scores: Classifier logits g(v), `[..., V]`.
        base_temperature: T > 0, scalar or `[...]`.
        scale: The guidance scale s >= 0, scalar or `[...]`.

    Returns:
        `logits / T + s · log_sigmoid(scores)`, float32 `[..., V]`.

    Raises:
        ValueError: If `base_temperature` or `scale` is a Python number out of range.

    Example:
        >>> logits, scores = jnp.log(jnp.array([0.8, 0.2])), jnp.array([-2.0, 2.0])
        >>> guided = t3jax.guided_logits(logits, scores, base_temperature=2.0)
        >>> [round(float(p), 3) for p in jax.nn.softmax(guided)]
        [0.213, 0.787]
    """
    return _add(temper(logits, base_temperature), _weight(scale, _log_f(scores)))


@accept_old_keyword
def temper(
    logits: Float[Array, "*batch V"], base_temperature: Num[Array, "*#batch"] | float
) -> Float[Array, "*batch V"]:
    """`tempered_logprobs` without the normaliser: `logits / T`, the same arguments."""
    return _divide(_saturate(logits), base_temperature)


# The arithmetic of the equations above, on numbers of which -inf is the only infinity.


def _divide(logits: Array, temperature: Array | float) -> Array:
    """`logits / temperature`."""
    if isinstance(temperature, int | float) and not temperature > 0:
        raise ValueError(
            f"base_temperature must be positive (the method uses T >= 1), got {temperature}"
        )
    banned = jnp.isneginf(logits)
    # The product must not see -inf: its derivative in T there would be 0 · inf. One reciprocal for
    # each row, so that the derivative sums over the row before it multiplies by a huge 1 / T^2.
    inverse = 1.0 / jnp.maximum(per_row(temperature, logits), _MIN_TEMPERATURE)
    quotient = jnp.where(banned, 0.0, logits) * inverse
    return jnp.where(banned, -jnp.inf, jnp.clip(quotient, -_MAX, _MAX))


def _log_f(scores: Array) -> Array:
    """`log_sigmoid(scores)`; f = 0 is -inf."""
    scores = scores.astype(jnp.float32)
    impossible = jnp.isneginf(scores)
    log_f = jax.nn.log_sigmoid(jnp.clip(jnp.where(impossible, 0.0, scores), -_MAX, _MAX))
    return jnp.where(impossible, -jnp.inf, log_f)


def _weight(scale: Array | float, log_f: Array) -> Array:
    """`scale · log_f`, where 0 · -inf is 0, since 0^0 = 1."""
    if isinstance(scale, int | float) and not scale >= 0:
        raise ValueError(f"the guidance scale must not be negative, got {scale}")
    scale = per_row(scale, log_f)
    impossible = jnp.isneginf(log_f)
    product = jnp.maximum(scale * jnp.where(impossible, 0.0, log_f), -_MAX)
    return jnp.where(impossible & (scale > 0), -jnp.inf, product)


def _add(logits: Array, weighted: Array) -> Array:
    """`logits + weighted`."""
    banned = jnp.isneginf(logits) | jnp.isneginf(weighted)
    total = jnp.where(banned, 0.0, logits) + jnp.where(banned, 0.0, weighted)
    return jnp.where(banned, -jnp.inf, jnp.maximum(total, -_MAX))


def _saturate(logits: Array) -> Array:
    """Float32 logits of which -inf is the only infinity."""
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
