"""One next token from base logits and classifier scores: the order of operations, in one place.

1. The repetition penalty changes the base logits of tokens already in the text.
2. Temper and tilt: `logits / T + s · log_sigmoid(scores)`, the paper's distribution. Of the
   refinements that are on (`t3jax.refinements`), several heads are one score before this step, the
   gate changes T by the base distribution of step 1, and protected tokens then get their tempered
   probability back.
3. Truncation decides the support, on the base distribution of step 1 (the default: tempering puts
   mass on the tail of the vocabulary, and the base knows what is fluent) or on the tilted one.
4. The sampling temperature divides the tilted logits; the support is masked last; one Gumbel draw.
   Temperature 0 is the limit: the likeliest token of the support.

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

from t3jax.refinements import PLAIN, Refinements, refined_logits
from t3jax.sampling import truncation


class Controls(NamedTuple):
    """What a caller may turn, one value for each row: traced, so that no change recompiles.

    Attributes:
        base_temperature: T of the method, >= 1; 1 leaves the base as it is.
        guidance_scale: s of the method, >= 0; 0 leaves the base as it is.
        temperature: Sampling temperature on the tilted distribution; 0 is greedy.
        top_k: Tokens kept; 0 keeps all.
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
        guided: Under the tempered and tilted distribution of step 2, before truncation and the
            sampling temperature.
    """

    base: Float[Array, " B"]
    guided: Float[Array, " B"]


def next_token(
    logits: Float[Array, "B V"],
    scores: Float[Array, "B V"] | None,
    controls: Controls,
    keys: Key[Array, " B"],
    seen: Bool[Array, "B V"],
    truncate_on: str = "base",
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
        truncate_on: "base" or "tilted": the distribution that decides the support.
        with_logprobs: Whether to compute log-probabilities of the choice: two more passes over V.
        refinements: Which are on.
        mesh: Where the arrays live; None is one device.

    Returns:
        The tokens, int32 `[B]`, and their log-probabilities (None unless asked for).
    """
    penalty = controls.repetition_penalty[:, None]
    penalised = jax.lax.cond(
        jnp.any(penalty != 1),
        lambda: jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits),
        lambda: logits,
    )
    if scores is None:
        guided = penalised / controls.base_temperature[:, None]
    else:
        guided = refined_logits(
            penalised, scores, controls.base_temperature, controls.guidance_scale, refinements
        )
    deciding = {"base": penalised, "tilted": guided}[truncate_on]
    rules = controls.top_k, controls.top_p, controls.min_p
    truncates = jnp.any((controls.top_k > 0) | (controls.top_p < 1) | (controls.min_p > 0))

    def from_few() -> tuple[Array, Array]:
        found = truncation.likeliest(deciding, *rules, mesh)
        values = jnp.where(found.kept, jnp.take_along_axis(guided, found.tokens, axis=-1), -jnp.inf)
        place = _draw(values, controls.temperature, lambda: _gumbel_of(keys, found.tokens))
        return jnp.take_along_axis(found.tokens, place[:, None], axis=-1)[:, 0], found.settled

    # As numbers: that a loop takes the key of another row each time JAX's check of keys cannot see.
    key_data = jax.random.key_data(keys)

    def from_all(rows: slice | Array = slice(None)) -> Array:
        """Draws of some rows from all tokens."""
        masked, base, limits, temperature, data = jax.tree.map(
            lambda x: x[rows], (guided, deciding, rules, controls.temperature, key_data)
        )
        own_keys = jax.random.wrap_key_data(data, impl=jax.random.key_impl(keys))
        masked = jax.lax.cond(
            truncates,
            lambda: jnp.where(truncation.support(base, *limits), masked, -jnp.inf),
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
    if not with_logprobs:
        return token, None

    def logprob(x: Array) -> Array:
        chosen = jnp.take_along_axis(x, token[:, None], axis=-1)[:, 0]
        return chosen - jax.nn.logsumexp(x, axis=-1)

    return token, Logprobs(base=logprob(logits), guided=logprob(guided))


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
