"""Refinements of the method, each off by default: extensions of the paper, on the same arrays.

- Gated tempering: text that the head takes for retain text is not tempered.
- Protected tokens: the tilt does not change the probability of, say, ending the turn.
- Several forget requests, a head for each: trained, served and revoked separately.

Scorers call `refined_logits` for the served distribution, samplers its two halves. Without
refinements it is `guidance.guided_logits`, the paper's. Axes: `...` any batch axes, V vocabulary.
As in `guidance`, everything is float32, a logit of `-inf` bans a token and stays `-inf`, and values
and gradients are never NaN.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

from t3jax import guidance

_MAX = 1e30  # scores saturate here, as in `guidance`
_FLAT = 1e6  # a gated temperature saturates here, where the base distribution is flat
_SURE = 1e-30  # the least -log P(retain) of a product of heads


@dataclasses.dataclass(frozen=True)
class Refinements:
    """The refinements that are on, fixed when a program is compiled.

    Attributes:
        gated: Whether to temper by `gated_temperature` of `retain_probability`.
        protected: Tokens that are tempered and not tilted, see `protect`; mostly the model's stop
            tokens, which are labels in both sets: a head learns to suppress them in forget
            contexts, and answers do not end.
        combine: How the scores of several heads are combined, see `combine_heads`.
    """

    gated: bool = False
    protected: tuple[int, ...] = ()
    combine: str = "disjoint"

    @property
    def name(self) -> str:
        """The refinements that are on, as in `gated-protected`; `plain` is the paper's method."""
        flags = {
            "gated": self.gated,
            "protected": bool(self.protected),
            "product": self.combine == "product",
        }
        return "-".join(name for name, on in flags.items() if on) or "plain"


PLAIN = Refinements()  # the paper's method


@guidance.accept_old_keyword
def refined_logits(
    logits: Float[Array, "*batch V"],
    scores: Float[Array, "*batch V"],
    base_temperature: Num[Array, "*#batch"] | float,
    scale: Num[Array, "*#batch"] | float,
    refinements: Refinements = PLAIN,
) -> Float[Array, "*batch V"]:
    """Temper and tilt, with the refinements that are on; unnormalised.

    Args:
        logits: Logits of the base model, `[..., V]`.
        scores: Classifier logits g(v), those of several heads combined, `[..., V]`.
        base_temperature: The base temperature T > 0, scalar or `[...]`.
        scale: The guidance scale s >= 0, scalar or `[...]`.
        refinements: The refinements that are on.

    Returns:
        Unnormalised log-probabilities, float32 `[..., V]`.

    Raises:
        ValueError: As `guidance.guided_logits` and `protect`. A gated temperature is an array,
            which is not checked.
    """
    served = served_temperature(logits, scores, base_temperature, refinements)
    return served_logits(logits, scores, served, scale, refinements)


def served_temperature(
    logits: Float[Array, "*batch V"],
    scores: Float[Array, "*batch V"],
    base_temperature: Num[Array, "*#batch"] | float,
    refinements: Refinements = PLAIN,
) -> Num[Array, "*#batch"] | float:
    """The base temperature T_t of each row, `[...]`: `base_temperature` itself, or gated.

    The arguments are those of `refined_logits`.
    """
    if not refinements.gated:
        return base_temperature
    return gated_temperature(base_temperature, retain_probability(logits, scores))


def served_logits(
    logits: Float[Array, "*batch V"],
    scores: Float[Array, "*batch V"],
    base_temperature: Num[Array, "*#batch"] | float,
    scale: Num[Array, "*#batch"] | float,
    refinements: Refinements = PLAIN,
) -> Float[Array, "*batch V"]:
    """The second half of `refined_logits`; `base_temperature` is T_t of `served_temperature`."""
    tilted = guidance.guided_logits(logits, scores, base_temperature, scale)
    if not refinements.protected:
        return tilted
    return protect(guidance.temper(logits, base_temperature), tilted, refinements.protected)


def untempered_logits(
    served: Float[Array, "*batch V"], base_temperature: Num[Array, "*#batch"] | float
) -> Float[Array, "*batch V"]:
    """The served distribution without its tempering: `T_t · served = logits + T_t · s · log f`.

    It is plain guidance of the strength T_t · s, with the served distribution's order of the
    tokens. `base_temperature` is T_t of `served_temperature`.
    """
    banned = jnp.isneginf(served)
    product = jnp.where(banned, 0.0, served) * guidance.per_row(base_temperature, served)
    return jnp.where(banned, -jnp.inf, jnp.clip(product, -_MAX, _MAX))


def retain_probability(
    logits: Float[Array, "*batch V"], scores: Float[Array, "*batch V"]
) -> Float[Array, "*batch"]:
    """P(retain | prefix), from head and base model together (an extension of the paper).

        q = Σ_v p(v) sigmoid(g(v))

    It is exact where g is the posterior of the mixture p, with its class prior, see
    `head.class_prior_shift`. It is a heuristic where training was balanced.

    Args:
        logits: Logits of the base model, not tempered, `[..., V]`.
        scores: Classifier logits g(v), `[..., V]`.

    Returns:
        q in [0, 1], float32 `[...]`; 0 where all tokens are banned.
    """
    p = jnp.exp(guidance.tempered_logprobs(logits, 1.0))
    return jnp.sum(p * jax.nn.sigmoid(scores.astype(jnp.float32)), axis=-1)


@guidance.accept_old_keyword
def gated_temperature(
    base_temperature: Num[Array, "*#batch"] | float, retain: Float[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """The base temperature, gated by P(retain) of the text (an extension of the paper).

    It is T for forget text and 1 for retain text. Tempering flattens the peaks of forget text; on
    retain text it is only bias. The tilt, whose strength relative to the base is T · s, is thereby
    gated too.

    Args:
        base_temperature: The base temperature T: a scalar, or one per row, `[...]`.
        retain: q = P(retain | prefix) of each row, `[...]`.

    Returns:
        `1 + (T - 1)(1 - q)`, float32 `[...]`.

    Example:
        >>> t3jax.gated_temperature(2.5, jnp.array([0.0, 0.5, 1.0]))
        Array([2.5 , 1.75, 1.  ], dtype=float32)
    """
    base_temperature = jnp.minimum(jnp.asarray(base_temperature, jnp.float32), _FLAT)
    return 1.0 + (base_temperature - 1.0) * (1.0 - retain)


def protect(
    tempered: Float[Array, "*batch V"], tilted: Float[Array, "*batch V"], tokens: Sequence[int]
) -> Float[Array, "*batch V"]:
    """Restores the probabilities of tokens S to those before the tilt (an extension of the paper).

    All of S is tilted by the mean tilt of the other tokens, so that `P_tilted(S) = P_tempered(S)`:

        log f_S = (1/s) log[Σ_{v∉S} p_T(v) f(v)^s / Σ_{v∉S} p_T(v)]

    Args:
        tempered: Log-probabilities before the tilt, unnormalised, `[..., V]`.
        tilted: The same after the tilt, with the same normaliser: `guided_logits` of `temper`.
        tokens: S, at least one token id, in [0, V).

    Returns:
        `tilted`, and `tempered + s log f_S` in S, float32 `[..., V]`. Where no other token has a
        probability before or after the tilt, S alone remains.

    Raises:
        ValueError: If a token is not in the vocabulary.

    Example:
        >>> before = jnp.log(jnp.array([0.5, 0.3, 0.2]))
        >>> after = t3jax.guided_logits(before, jnp.array([9.0, -9.0, -9.0]), 1.0)
        >>> jax.nn.softmax(t3jax.protect(before, after, [2]))[2].round(3)  # as before the tilt
        Array(0.2, dtype=float32)
    """
    size = tilted.shape[-1]
    if not tokens or not all(0 <= token < size for token in tokens):
        raise ValueError(f"protected tokens must lie in [0, {size}), at least one; got {tokens}")
    vocabulary = jax.lax.broadcasted_iota(jnp.int32, tilted.shape, tilted.ndim - 1)
    vocabulary = vocabulary + jnp.zeros_like(tilted, jnp.int32)  # sharded as the logits are
    protected = functools.reduce(jnp.logical_or, [vocabulary == token for token in tokens])
    before, after = (_logsumexp(x, ~protected) for x in (tempered, tilted))
    others_remain = ~jnp.isneginf(before) & ~jnp.isneginf(after)
    shift = jnp.where(others_remain, after, 0.0) - jnp.where(others_remain, before, 0.0)
    return jnp.where(protected, tempered + shift, tilted)


def combine_heads(
    scores: Sequence[Float[Array, "*batch V"]], how: str = "disjoint"
) -> Float[Array, "*batch V"]:
    """One score for several forget requests, a head for each (an extension of the paper).

    The forget texts of different requests are disjoint, so their odds against "retain" add up:

        P(retain) = 1 / (1 + Σ_i exp(-g_i)),  that is  g = -logsumexp_i(-g_i)

    The product of the sigmoids, the other choice, multiplies the probability of "retain" once for
    each head: ten heads of g = 2 make .28 where this makes .42.

    Args:
        scores: Classifier logits g_i(v) of each head, `[..., V]` each, at least one.
        how: "disjoint", or "product" for `sigmoid(g) = Π_i sigmoid(g_i)`.

    Returns:
        The logits g of "retain" under all requests, float32 `[..., V]`; the scores of a single head
        are unchanged. `-inf` of one head bans a token.

    Raises:
        ValueError: If `how` is unknown.

    Example:
        >>> t3jax.combine_heads([jnp.array([0.0]), jnp.array([0.0])])  # 1 / (1 + 1 + 1)
        Array([-0.6931472], dtype=float32)
    """
    if how not in ("disjoint", "product"):
        raise ValueError(f"heads are combined as 'disjoint' or by 'product', got {how!r}")
    if len(scores) == 1:
        return scores[0]
    impossible = functools.reduce(jnp.logical_or, [jnp.isneginf(g) for g in scores])
    against = [-jnp.clip(g.astype(jnp.float32), -_MAX, _MAX) for g in scores]
    if how == "product":
        # log(exp(x) - 1), where x = -log f.
        x = functools.reduce(jnp.add, [jax.nn.softplus(g) for g in against])
        x = jnp.maximum(x, _SURE)
        combined = x + jnp.log(-jnp.expm1(-x))
    else:
        peak = jax.lax.stop_gradient(functools.reduce(jnp.maximum, against))
        combined = peak + jnp.log(functools.reduce(jnp.add, [jnp.exp(g - peak) for g in against]))
    return jnp.where(impossible, -jnp.inf, -combined)


def _logsumexp(logits: Array, among: Bool[Array, "..."]) -> Array:
    """Logsumexp over the tokens `among`, `[..., 1]`; -inf, without NaNs, if there are none."""
    among = among & ~jnp.isneginf(logits)
    masked = jnp.where(among, logits, -jnp.inf)
    peak = jax.lax.stop_gradient(jnp.max(masked, axis=-1, keepdims=True))
    empty = jnp.isneginf(peak)
    peak = jnp.where(empty, 0.0, peak)
    weights = jnp.where(among, jnp.exp(jnp.where(among, logits, peak) - peak), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return jnp.where(empty, -jnp.inf, peak + jnp.log(jnp.where(empty, 1.0, total)))
