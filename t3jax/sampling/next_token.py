"""One next token from base logits and classifier scores: the order of operations, in one place.

1. The repetition penalty changes the base logits of tokens already in the text.
2. Temper and tilt: `logits / T + s · log_sigmoid(scores)`, the paper's distribution. Of the
   refinements that are on (`t3jax.refinements`), several heads are one score before this step, the
   gate changes T by the base distribution of step 1, and protected tokens then get their tempered
   probability back.
3. Truncation decides the support, on one of three distributions.
   - "guided", the default: the one of step 2 without its tempering, `logits + T · s ·
     log_sigmoid(scores)`. It is T times the logits of step 2, with the T of the gate and with
     protected tokens where those are on. It has the order of "tilted", so top-k is the same on
     both. Its tail is as light as the base's, so top-p and min-p keep text fluent.
   - "base": the one of step 1. Where the base is sure of a token to forget, its nucleus is that
     token: a tight top-p or min-p brings the forgotten text back.
   - "tilted": the one of step 2. Tempering puts mass on the tail of the vocabulary, and top-p and
     min-p keep much of it.
4. The sampling temperature divides the tilted logits; the support is masked last; one Gumbel draw.
   Temperature 0 is the limit: the likeliest token of the support. Drawing from all tokens at the
   sampling temperature 1 / T is plain guidance of the strength T · s: tempering is undone.

`t3jax.sampling.drawing` makes step 4 fast on a CPU. Axes: B batch, V vocabulary.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from t3jax.refinements import (
    PLAIN,
    Refinements,
    served_logits,
    served_temperature,
    untempered_logits,
)
from t3jax.sampling.drawing import Rows, draw


class Controls(NamedTuple):
    """The caller's settings, one value for each row: traced, so that no change recompiles.

    Attributes:
        base_temperature: T of the method, >= 1; 1 leaves the base as it is.
        guidance_scale: s of the method, >= 0; 0 leaves the base as it is.
        temperature: Sampling temperature on the tilted distribution; 0 is greedy, 1 / T undoes the
            tempering.
        top_k: Tokens kept; 0 keeps all. This and the next two are decided on one distribution:
            the untempered guided one, unless a program says otherwise.
        top_p: Probability kept; 1 keeps all.
        min_p: Kept if at least this share of the likeliest; 0 keeps all.
        repetition_penalty: Divides positive and multiplies negative base logits of tokens already
            in the text; 1 changes nothing.
    """

    base_temperature: Float[Array, " B"]
    guidance_scale: Float[Array, " B"]
    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]
    repetition_penalty: Float[Array, " B"]

    @classmethod
    def filled(cls, rows: int, **values: int | float) -> "Controls":
        """The same values for every row: NumPy arrays `[B]`, to be placed.

        A control that `values` lacks changes nothing; without a temperature the draw is greedy.
        """
        neutral = {
            "base_temperature": 1.0,
            "guidance_scale": 0.0,
            "temperature": 0.0,
            "top_k": 0,
            "top_p": 1.0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        }
        arrays: dict[str, Any] = {
            name: np.full(rows, value, np.int32 if name == "top_k" else np.float32)
            for name, value in (neutral | values).items()
        }
        return cls(**arrays)


class Logprobs(NamedTuple):
    """Log-probabilities of the chosen token, in nats.

    Attributes:
        base: Log-probability under the base model.
        base_entropy: Entropy of the base model: the mean of `-base` over its own draws.
        guided: Log-probability under the distribution of step 2, before truncation and the sampling
            temperature; None unless asked for.
    """

    base: Float[Array, " B"]
    base_entropy: Float[Array, " B"]
    guided: Float[Array, " B"] | None


class Guided(NamedTuple):
    """The distributions of a step; all logits are unnormalised.

    Attributes:
        base: Logits of the base model after the repetition penalty, `[B, V]`.
        served: Tempered and tilted logits of step 2, `[B, V]`.
        base_temperature: T_t of each row, `[B]`.
    """

    base: Float[Array, "B V"]
    served: Float[Array, "B V"]
    base_temperature: Float[Array, " B"]


def guide(
    logits: Float[Array, "B V"],
    scores: Float[Array, "B V"] | None,
    controls: Controls,
    seen: Bool[Array, "B V"],
    refinements: Refinements = PLAIN,
) -> Guided:
    """Steps 1 and 2: the repetition penalty, then tempering and tilting; as for `next_token`."""
    penalty = controls.repetition_penalty[:, None]
    penalised = jax.lax.cond(
        jnp.any(penalty != 1),
        lambda: jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits),
        lambda: logits,
    )
    if scores is None:
        tempering = controls.base_temperature
        return Guided(penalised, penalised / tempering[:, None], tempering)
    tempering = jnp.asarray(
        served_temperature(penalised, scores, controls.base_temperature, refinements)
    )
    served = served_logits(penalised, scores, tempering, controls.guidance_scale, refinements)
    return Guided(penalised, served, tempering)


def next_token(
    logits: Float[Array, "B V"],
    scores: Float[Array, "B V"] | None,
    controls: Controls,
    keys: Key[Array, " B"],
    seen: Bool[Array, "B V"],
    truncate_on: str = "guided",
    refinements: Refinements = PLAIN,
    mesh: Mesh | None = None,
) -> tuple[Int[Array, " B"], Guided]:
    """Chooses the next token of each row; also returns the distributions of the step.

    `logits` are the base model's, `scores` the classifier's, g(v). Without scores, for the base
    model without a head, refinements change nothing and "guided" is "base". A row's key is used up
    here. `seen` marks tokens already in the text, for the repetition penalty. `truncate_on` is the
    distribution that decides the support: "guided", "base" or "tilted". Without a mesh the arrays
    are on one device.
    """
    guided = guide(logits, scores, controls, seen, refinements)
    if scores is None and truncate_on == "guided":
        truncate_on = "base"
    return choose_token(guided, controls, keys, truncate_on, mesh), guided


def token_logprobs(
    logits: Float[Array, "B V"],
    guided: Guided,
    token: Int[Array, " B"],
    *,
    has_head: bool,
    with_logprobs: bool,
) -> Logprobs | None:
    """Log-probabilities of the chosen tokens; None without a head, unless `with_logprobs`.

    The served ones are computed only `with_logprobs`.
    """
    if not has_head and not with_logprobs:
        return None
    base, entropy = _logprob_and_entropy(logits, token)
    served = _logprob_and_entropy(guided.served, token)[0] if with_logprobs else None
    return Logprobs(base, entropy, served)


def choose_token(
    guided: Guided,
    controls: Controls,
    keys: Key[Array, " B"],
    truncate_on: str = "guided",
    mesh: Mesh | None = None,
) -> Int[Array, " B"]:
    """Steps 3 and 4: decides the support, then draws from the served distribution within it.

    `guided` is the result of `guide`; the other arguments are as for `next_token`.
    """
    base, served, base_temperature = guided

    def decide(rows: Rows) -> Array:
        """The distribution that decides the support."""
        if truncate_on == "guided":
            return untempered_logits(served[rows], base_temperature[rows])
        return {"base": base, "tilted": served}[truncate_on][rows]

    limits = controls.top_k, controls.top_p, controls.min_p
    return draw(served, decide, limits, controls.temperature, keys, mesh)


def _logprob_and_entropy(logits: Array, token: Array) -> tuple[Array, Array]:
    """Log-probability of a token in each row, and entropy of the row, nats, `[B]` each."""
    peak = jnp.max(logits, axis=-1, keepdims=True)
    shifted = logits - jnp.where(jnp.isneginf(peak), 0.0, peak)
    weights = jnp.exp(shifted)
    mass = jnp.sum(weights, axis=-1)
    # A banned token has no share: 0 · -inf would be NaN.
    mean = jnp.sum(jnp.where(weights > 0, weights * shifted, 0.0), axis=-1) / mass
    chosen = jnp.take_along_axis(shifted, token[:, None], axis=-1)[:, 0]
    return chosen - jnp.log(mass), jnp.log(mass) - mean
