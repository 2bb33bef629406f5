"""The decoding loop: prefill once, then jitted chunks of a `lax.scan` with a donated state.

This module works on token ids alone. A draw depends on the row's key and the absolute step only, so
neither the chunk size nor the other rows change it, up to rounding. Axes: B batch, P prompt slots,
C steps of a chunk, S cache slots, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from t3jax import head as head_lib
from t3jax import pooling, sharding
from t3jax.head import HeadConfig, HeadParams
from t3jax.lm.cache import cache_shardings
from t3jax.refinements import PLAIN, Refinements, combine_heads
from t3jax.sampling.next_token import Controls, Logprobs, next_token, token_logprobs


@dataclasses.dataclass(frozen=True)
class Program:
    """The static part of the loop, fixed when it is compiled: the model's functions, and options.

    Attributes:
        heads: The shape of each head.
        truncate_on: The distribution that decides top-k, top-p and min-p: "guided", "base" or
            "tilted", see `next_token`.
        with_logprobs: Whether guided log-probabilities are computed, and base ones without a head;
            with a head base ones always are.
        mesh: The devices of the state.
    """

    apply: Callable[..., Any]
    unembed: Callable[..., Any]
    init_cache: Callable[..., Any]
    heads: tuple[HeadConfig, ...]
    truncate_on: str
    with_logprobs: bool
    mesh: Mesh
    refinements: Refinements = PLAIN


class Weights(NamedTuple):
    """Frozen arrays that the loop reads: the parameters of the model and of each head.

    Each of `prior_shifts` is added to the scores of its head; 0 in the paper.
    """

    params: PyTree
    heads: tuple[HeadParams, ...]
    prior_shifts: tuple[np.float32 | Array, ...]


# Faults of the numbers that a token was chosen by; see `Emitted`.
SOUND, BASE_FAULT, HEAD_FAULT = 0, 1, 2


class State(NamedTuple):
    """The state of decoding between two tokens; donated, so it is updated in place.

    Attributes:
        cache: The model's cache of the text up to, not including, `token`.
        pooled: Running mean of the hidden states of the same text.
        token: The last token chosen, not yet read by the model, `[B]`.
        done: True for a finished row, which chooses no more tokens, `[B]`.
        step: Number of tokens chosen so far, `[B]`.
        seen: True for a token of the prompt or of the answer so far, `[B, V]`.
        keys: A PRNG key for each row; a step's key is folded from it, `[B]`.
    """

    cache: PyTree
    pooled: pooling.RunningMean
    token: Int[Array, " B"]
    done: Bool[Array, " B"]
    step: Int[Array, " B"]
    seen: Bool[Array, "B V"]
    keys: Key[Array, " B"]


class Emitted(NamedTuple):
    """The output of prefill or of a chunk.

    Attributes:
        tokens: Chosen tokens, `[B, C]`; -1 after a row's end.
        logprobs: Their log-probabilities, `[B, C]` each, as `token_logprobs` gives them.
        done: True for a finished row, `[B]`.
        faults: `SOUND`; or `BASE_FAULT`, if no logit of the base was finite or one was NaN or
            infinite; or `HEAD_FAULT`, if a score was not finite, `[B, C]`. A token with a fault
            means nothing.
    """

    tokens: Int[Array, "B C"]
    logprobs: Logprobs | None
    done: Bool[Array, " B"]
    faults: Int[Array, "B C"]


@functools.partial(jax.jit, static_argnums=(0, 6))
def prefill(
    program: Program,
    weights: Weights,
    prompts: Int[Array, "B P"],
    mask: Bool[Array, "B P"],
    keys: Key[Array, " B"],
    controls: Controls,
    slots: int,
    stop_ids: Int[Array, " n"],
) -> tuple[State, Emitted]:
    """Reads the prompts and chooses the first token of each answer, `[B, 1]`.

    Prompts are padded on the left. `mask` is true at real tokens; a row without real tokens is
    finished from the start. The cache has `slots` S, for the prompt and the answer.
    """
    batch, _ = prompts.shape
    cache = _constrain_cache(program, program.init_cache(batch, slots))
    hidden, cache = program.apply(weights.params, prompts, None, mask, cache)
    pooled = pooling.running_mean(hidden, mask)
    # The last prompt token of every row is in the last slot: only its logits are computed.
    last = hidden[:, -1]
    logits = program.unembed(weights.params, last)
    seen = jax.vmap(lambda row, ids, real: row.at[ids].max(real))(
        jnp.zeros(logits.shape, bool), prompts, mask
    )
    state = State(
        cache=cache,
        pooled=pooled,
        token=jnp.zeros(batch, jnp.int32),
        done=~jnp.any(mask, axis=-1),
        step=jnp.zeros(batch, jnp.int32),
        seen=seen,
        keys=keys,
    )
    state, first = _choose(program, weights, state, last, logits, controls, stop_ids)
    token, logprobs, faults = jax.tree.map(lambda x: x[:, None], first)
    return state, sharding.replicate(program.mesh, Emitted(token, logprobs, state.done, faults))


@functools.partial(jax.jit, static_argnums=(0, 6), donate_argnums=2)
def decode_chunk(
    program: Program,
    weights: Weights,
    state: State,
    stopped: Bool[Array, " B"],
    controls: Controls,
    stop_ids: Int[Array, " n"],
    steps: int,
) -> tuple[State, Emitted]:
    """Chooses up to C = `steps` more tokens for every row that is not finished, `[B, C]`.

    The state of `prefill` or of the previous chunk is donated. `stopped` marks rows that the host
    has ended since (a stop string). The other arguments are as for `prefill`.
    """

    def step(state: State, _: None) -> tuple[State, tuple[Array, Logprobs | None, Array]]:
        reading = ~state.done[:, None]
        hidden, cache = program.apply(
            weights.params, state.token[:, None], None, reading, state.cache
        )
        state = state._replace(
            cache=_constrain_cache(program, cache),
            pooled=pooling.running_mean(hidden, reading, state.pooled),
        )
        last = hidden[:, 0]
        logits = program.unembed(weights.params, last)
        return _choose(program, weights, state, last, logits, controls, stop_ids)

    state = state._replace(done=state.done | stopped)
    # No branch for a batch of finished rows: it would copy the cache in each chunk.
    state, by_step = jax.lax.scan(step, state, None, length=steps)
    tokens, logprobs, faults = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), by_step)
    return state, sharding.replicate(program.mesh, Emitted(tokens, logprobs, state.done, faults))


def _choose(
    program: Program,
    weights: Weights,
    state: State,
    last: Array,
    logits: Array,
    controls: Controls,
    stop_ids: Array,
) -> tuple[State, tuple[Array, Logprobs | None, Array]]:
    """Chooses each row's next token, which the model has not read yet.

    With a split vocabulary each device reads its part of the logits: one number for each row, or
    one for each row and part, is exchanged.
    """
    split = functools.partial(sharding.constrain, mesh=program.mesh, spec=sharding.LOGITS)
    logits = split(logits)
    scores = None
    if program.heads:
        mean = state.pooled.mean
        served = zip(weights.heads, program.heads, weights.prior_shifts, strict=True)
        scores = combine_heads(
            [
                head_lib.head_scores(
                    params, pooling.prefix_features(mean, last, config.features), config.activation
                )
                + shift
                for params, config, shift in served
            ],
            program.refinements.combine,
        )
        scores = split(scores)
    faults = find_faults(logits, scores)
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.step)
    token, guided = next_token(
        logits,
        scores,
        controls,
        keys,
        state.seen,
        program.truncate_on,
        program.refinements,
        program.mesh,
    )
    logprobs = token_logprobs(
        logits, guided, token, has_head=bool(program.heads), with_logprobs=program.with_logprobs
    )
    ended = state.done | jnp.any(token[:, None] == stop_ids[None, :], axis=-1)
    chosen = jnp.where(state.done, -1, token)
    return advance(program.mesh, state, token, ended), (chosen, logprobs, faults)


def find_faults(logits: Float[Array, "B V"], scores: Float[Array, "B V"] | None) -> Array:
    """Faults of base logits and of the heads' scores, int8 `[B]`; see `Emitted`."""
    # The maximum shows NaN and infinity, and ignores banned tokens.
    faults = jnp.where(jnp.isfinite(jnp.max(logits, axis=-1)), SOUND, BASE_FAULT)
    if scores is not None:
        sound = jnp.all(jnp.isfinite(scores), axis=-1)
        faults = jnp.where(sound | (faults == BASE_FAULT), faults, HEAD_FAULT)
    return faults.astype(jnp.int8)


def advance(mesh: Mesh, state: State, token: Array, ended: Array) -> State:
    """Adds a token of each row, which the model has not read yet, to the state."""
    seen = jax.vmap(lambda row, id: row.at[id].set(True))(state.seen, token)
    state = state._replace(token=token, done=ended, step=state.step + 1, seen=seen)
    return constrain_state(mesh, state)


def state_shardings(mesh: Mesh, state: PyTree) -> PyTree:
    """Shardings of a state: all by rows, the cache's heads and the vocabulary over `model`."""
    by_rows = jax.tree.map(lambda x: sharding.batch_sharding(mesh, x.shape), state)
    return by_rows._replace(
        cache=cache_shardings(mesh, state.cache),
        seen=sharding.fit_sharding(mesh, sharding.LOGITS, state.seen.shape),
    )


def constrain_state(mesh: Mesh, state: State) -> State:
    """Constrains a state to its shardings, inside of jit."""
    if mesh.size == 1:
        return state
    return jax.lax.with_sharding_constraint(state, state_shardings(mesh, state))


def _constrain_cache(program: Program, cache: PyTree) -> PyTree:
    if program.mesh.size == 1:
        return cache
    return jax.lax.with_sharding_constraint(cache, cache_shardings(program.mesh, cache))
