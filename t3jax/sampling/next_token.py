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

On a CPU a row whose support lies among its likeliest tokens is drawn from those: noise for a few
tokens costs less than noise for a vocabulary. The others are drawn from all tokens; a row's draw is
the same whoever is beside it. An accelerator has the noise sooner than it has found the likeliest,
and draws from all.

Axes: B batch, V vocabulary, F few.
"""

from collections.abc import Callable
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
from t3jax.sampling import truncation


class Controls(NamedTuple):
    """What a caller may turn, one value for each row: traced, so that no change recompiles.

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
        """The same for every row, on the host.

        Args:
            rows: B.
            **values: By name; what is not given changes nothing, and the choice is greedy.

        Returns:
            NumPy arrays `[B]`, to be placed.
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
        base: Under the base model as it is.
        base_entropy: Entropy of the base model: the mean of `-base` over its own draws.
        guided: Under the tempered and tilted distribution of step 2, before truncation and the
            sampling temperature; None unless asked for.
    """

    base: Float[Array, " B"]
    base_entropy: Float[Array, " B"]
    guided: Float[Array, " B"] | None


def next_token(
    logits: Float[Array, "B V"],
    scores: Float[Array, "B V"] | None,
    controls: Controls,
    keys: Key[Array, " B"],
    seen: Bool[Array, "B V"],
    truncate_on: str = "guided",
    with_logprobs: bool = False,
    refinements: Refinements = PLAIN,
    mesh: Mesh | None = None,
) -> tuple[Int[Array, " B"], Logprobs | None]:
    """Chooses the next token of each row.

    Args:
        logits: Base logits, float32 `[B, V]`.
        scores: Classifier logits g(v), `[B, V]`; None for the base model without a head, which
            refinements then do not change.
        controls: The knobs, one value for each row.
        keys: A PRNG key for each row, used up here.
        seen: Tokens already in the text, for the repetition penalty, `[B, V]`.
        truncate_on: "guided", "base" or "tilted": the distribution that decides the support.
            Without a head "guided" is "base".
        with_logprobs: Whether to compute the guided log-probability of the choice too, and those
            under the base without a head.
        refinements: Which are on.
        mesh: Where the arrays live; None is one device.

    Returns:
        The tokens, int32 `[B]`, and their log-probabilities: None without a head, unless they are
        asked for.
    """
    penalty = controls.repetition_penalty[:, None]
    penalised = jax.lax.cond(
        jnp.any(penalty != 1),
        lambda: jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits),
        lambda: logits,
    )
    if scores is None:
        tempering = controls.base_temperature
        guided = penalised / tempering[:, None]
    else:
        tempering = jnp.asarray(
            served_temperature(penalised, scores, controls.base_temperature, refinements)
        )
        guided = served_logits(penalised, scores, tempering, controls.guidance_scale, refinements)

    def deciding(base: Array, guided: Array, tempering: Array) -> Array:
        """The distribution that decides the support; formed only where something is truncated."""
        untempered = base if scores is None else untempered_logits(guided, tempering)
        return {"guided": untempered, "base": base, "tilted": guided}[truncate_on]

    rules = controls.top_k, controls.top_p, controls.min_p
    truncates = jnp.any((controls.top_k > 0) | (controls.top_p < 1) | (controls.min_p > 0))

    def from_few() -> tuple[Array, Array]:
        found = truncation.likeliest(deciding(penalised, guided, tempering), *rules, mesh)
        values = jnp.where(found.kept, jnp.take_along_axis(guided, found.tokens, axis=-1), -jnp.inf)
        place = _draw(values, controls.temperature, lambda: _gumbel_of(keys, found.tokens))
        return jnp.take_along_axis(found.tokens, place[:, None], axis=-1)[:, 0], found.settled

    # As numbers: that a loop takes the key of another row each time JAX's check of keys cannot see.
    key_data = jax.random.key_data(keys)

    def from_all(rows: slice | Array = slice(None)) -> Array:
        """Draws of some rows from all tokens."""
        masked, base, tempered_by, limits, temperature, data = jax.tree.map(
            lambda x: x[rows], (guided, penalised, tempering, rules, controls.temperature, key_data)
        )
        own_keys = jax.random.wrap_key_data(data, impl=jax.random.key_impl(keys))
        masked = jax.lax.cond(
            truncates,
            lambda: jnp.where(
                truncation.support(deciding(base, masked, tempered_by), *limits), masked, -jnp.inf
            ),
            lambda: masked,
        )
        return _draw(masked, temperature, lambda: _gumbel(own_keys, masked))

    def from_none() -> tuple[Array, Array]:
        return jnp.zeros(logits.shape[0], jnp.int32), jnp.zeros(logits.shape[0], bool)

    few, settled = jax.lax.platform_dependent(
        cpu=lambda: jax.lax.cond(truncates, from_few, from_none), default=from_none
    )

    def one_by_one() -> Array:
        """The rows that are not settled, each by itself."""
        order = jnp.argsort(settled)

        def choose(i: Array, tokens: Array) -> Array:
            row = order[i][None]
            return tokens.at[row].set(from_all(row))

        return jax.lax.fori_loop(0, jnp.sum(~settled), choose, few)

    def together() -> Array:
        return jnp.where(settled, few, from_all())

    if mesh is None or mesh.size == 1:
        token = jax.lax.cond(2 * jnp.sum(settled) >= len(settled), one_by_one, together)
    else:
        token = jax.lax.cond(jnp.all(settled), lambda: few, together)
    if scores is None and not with_logprobs:
        return token, None
    base, entropy = _logprob_and_entropy(logits, token)
    logprobs = Logprobs(base, entropy, None)
    if with_logprobs:
        logprobs = logprobs._replace(guided=_logprob_and_entropy(guided, token)[0])
    return token, logprobs


def _logprob_and_entropy(logits: Array, token: Array) -> tuple[Array, Array]:
    """Of one token in each row, and of the row's distribution: nats, `[B]` each."""
    peak = jnp.max(logits, axis=-1, keepdims=True)
    shifted = logits - jnp.where(jnp.isneginf(peak), 0.0, peak)
    weights = jnp.exp(shifted)
    mass = jnp.sum(weights, axis=-1)
    # A banned token has no share: 0 · -inf would be NaN.
    mean = jnp.sum(jnp.where(weights > 0, weights * shifted, 0.0), axis=-1) / mass
    chosen = jnp.take_along_axis(shifted, token[:, None], axis=-1)[:, 0]
    return chosen - jnp.log(mass), jnp.log(mass) - mean


def _draw(logits: Array, temperature: Array, noise: Callable[[], Array]) -> Array:
    """Where the draw falls, int32 `[B]`: the largest of logits / temperature + Gumbel noise."""
    greedy = temperature == 0
    divisor = jnp.where(greedy, 1.0, temperature)[:, None]
    return jax.lax.cond(
        jnp.all(greedy),
        lambda: jnp.argmax(logits, axis=-1),
        lambda: jnp.argmax(jnp.where(greedy[:, None], logits, logits / divisor + noise()), axis=-1),
    ).astype(jnp.int32)


def _gumbel(keys: Array, like: Array) -> Array:
    return jax.vmap(lambda key: jax.random.gumbel(key, like.shape[-1:], jnp.float32))(keys)


def _gumbel_of(keys: Array, tokens: Array) -> Array:
    """Noise of some tokens: a token's own, whatever its place among them."""

    def noise(key: Array, token: Array) -> Array:
        return jax.random.gumbel(jax.random.fold_in(key, token), (), jnp.float32)

    return jax.vmap(jax.vmap(noise, (None, 0)))(keys, tokens)
