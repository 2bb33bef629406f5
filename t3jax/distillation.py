"""Distillation of a head: the served distribution is trained to be a target (beyond the paper).

The paper trains the classifier on the tokens of its texts, which carry no information about other
candidates for the next token. Here the target in forget text is the next-token distribution of the
base model on a text without the secret (`t3jax.synthetic.targets`); in retain text it is the base
model's own. The head is trained so that the served distribution matches the target:

    minimise KL(target ‖ p(v)^(1/T) f(v)^s / Z)     over the positions of the answers, at s = 1

A position has C candidates, the likeliest tokens of target and base, and M tokens drawn from the
rest of the vocabulary as a sample of it: the cost is that of C + M tokens, not of 128,000. Axes:
`...` positions, C candidates, M tokens of the rest, E = C + M, V vocabulary.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from t3jax.refinements import gated_temperature

_LEAST = 1e-9  # a smaller target probability is taken for 0
_LOWEST = -60.0  # log-probabilities saturate here


class SoftTargets(NamedTuple):
    """The target of a position and the base model's log-probabilities, NumPy or JAX arrays.

    Attributes:
        tokens: Candidates, then tokens of the rest, int32 `[..., E]`.
        logprobs: Their log-probabilities under the base model, nats, `[..., E]`.
        log_weights: Log importance weights: 0 for candidates; for a token of the rest, minus the
            log of M times its probability of being drawn. A sum over the tokens with these weights
            estimates the sum over the vocabulary, `[..., E]`.
        probs: Target probability of each candidate and of the whole rest, `[..., C + 1]`.
    """

    tokens: Any
    logprobs: Any
    log_weights: Any
    probs: Any


def distillation_loss(
    scores: Float[Array, "*batch E"],
    logprobs: Float[Array, "*batch E"],
    log_weights: Float[Array, "*batch E"],
    probs: Float[Array, "*batch candidates"],
    temperature: float = 1.0,
) -> Float[Array, "*batch"]:
    """KL(target ‖ served) at each position, nats `[...]`, at guidance scale s = 1.

    `scores` are the classifier logits g(v) of the tokens, the next three arguments as in
    `SoftTargets`. At T > 1 tempering is gated, so that retain texts are not tempered:
    T_t = 1 + (T - 1)(1 - q), with q the probability of retain under base and head together
    (`refinements.gated_temperature`).
    """
    log_f = jax.nn.log_sigmoid(scores.astype(jnp.float32))
    if temperature != 1:
        # An estimate of q from the drawn tokens, which may exceed 1.
        retain = jnp.sum(jnp.exp(logprobs + log_weights + log_f), axis=-1)
        gated = gated_temperature(temperature, jnp.minimum(retain, 1.0))
        logprobs = logprobs / gated[..., None]
    served = jax.nn.log_softmax(logprobs + log_weights + log_f, axis=-1)
    candidates = probs.shape[-1] - 1
    rest = jax.nn.logsumexp(served[..., candidates:], axis=-1, keepdims=True)
    log_served = jnp.concatenate([served[..., :candidates], rest], axis=-1)
    target = jnp.where(probs > _LEAST, probs, 0.0)
    log_target = jnp.log(jnp.where(probs > _LEAST, probs, 1.0))
    return jnp.sum(target * (log_target - log_served), axis=-1)


def soft_targets(
    key: PRNGKeyArray,
    logits: Float[Array, "*batch V"],
    target: Float[Array, "*batch V"],
    num_candidates: int,
    num_rest: int,
    temperature: float = 1.0,
) -> SoftTargets:
    """Chooses the candidates of each position and draws a sample of the rest.

    Candidates are the `num_candidates` tokens with the largest probability under target or base, at
    most V - 1. The `num_rest` others are drawn in proportion to p(v)^(1/T). `logits` are the base
    model's, `target` are probabilities.
    """
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    _, candidates = jax.lax.top_k(
        jnp.maximum(jnp.exp(logprobs), target), min(num_candidates, logits.shape[-1] - 1)
    )
    rest = jnp.put_along_axis(logprobs / temperature, candidates, -jnp.inf, -1, inplace=False)
    rest = jax.nn.log_softmax(rest, axis=-1)
    # Drawn by the inverse distribution function: noise for each token would cost far more.
    cumulative = jnp.cumsum(jnp.exp(rest), axis=-1)
    uniform = jax.random.uniform(key, (*rest.shape[:-1], num_rest)) * cumulative[..., -1:]
    search = jnp.vectorize(
        functools.partial(jnp.searchsorted, side="right"), signature="(v),(m)->(m)"
    )
    drawn = jnp.minimum(search(cumulative, uniform), logits.shape[-1] - 1)
    # Rounding may hit a candidate, whose log-share is -inf: any finite number will do.
    drawn_logprobs = jnp.maximum(jnp.take_along_axis(rest, drawn, axis=-1), _LOWEST)
    tokens = jnp.concatenate([candidates, drawn], axis=-1).astype(jnp.int32)
    candidate_probs = jnp.take_along_axis(target, candidates, axis=-1)
    rest_prob = jnp.maximum(1.0 - jnp.sum(candidate_probs, axis=-1, keepdims=True), 0.0)
    return SoftTargets(
        tokens=tokens,
        logprobs=jnp.take_along_axis(logprobs, tokens, axis=-1),
        log_weights=jnp.concatenate(
            [jnp.zeros(candidates.shape, jnp.float32), -drawn_logprobs - jnp.log(float(num_rest))],
            axis=-1,
        ),
        probs=jnp.concatenate([candidate_probs, rest_prob], axis=-1),
    )


def overcorrect(
    logprobs: Float[Array, "*batch V"],
    target: Float[Array, "*batch V"],
    scale: Float[Array, ""] | float,
) -> Float[Array, "*batch V"]:
    """Moves a target away from the base model: p · (target / p)^scale, normalised; 1 leaves it.

    A head of few parameters reaches its target in part. A scale of 1.25 corrects for this in the
    forget texts alone, where a guidance scale of 1.25 would act on all texts.
    """
    log_target = jnp.log(jnp.maximum(target, _LEAST))
    return jax.nn.softmax(logprobs + scale * (log_target - logprobs), axis=-1)
