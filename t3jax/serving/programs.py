"""The device programs of a server: read a piece of a prompt, choose a token, decode a chunk.

A prompt is read alone, in pieces whose sizes follow from its length, and a batch is decoded with
one of two numbers of rows, whose steps give the same bits. So the results of a request do not
depend on the other requests.

Axes: as in `state`, and T tokens of a piece.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from t3jax import pooling
from t3jax.sampling.loop import State, advance, constrain_state, find_faults
from t3jax.sampling.next_token import Guided, choose_token, guide
from t3jax.serving.stack import FEATURES_READ, blame, combined_scores
from t3jax.serving.state import MOST_LIKELY, Emitted, Program, Scored, Settings, Weights
from t3jax.sharding import replicate

_SCORED_AT_ONCE = 32  # tokens of a prompt whose scores of the vocabulary are in memory together


@functools.partial(jax.jit, static_argnums=(0, 6), donate_argnums=2)
def read_piece(
    program: Program,
    weights: Weights,
    state: State,
    tokens: Int[Array, "B T"],
    following: Int[Array, "B T"],
    settings: Settings,
    scores_prompt: bool,
) -> tuple[State, Float[Array, "B D"], Scored | None]:
    """Reads the next piece of a prompt; `state` is donated.

    Tokens are padded with -1 on the right; `following` has the token after each, -1 after the last.
    Returns the state, the last real token's hidden state and, with `scores_prompt`, the scores of
    the following tokens `[B, T]`.
    """
    mask = tokens >= 0
    ids = jnp.where(mask, tokens, 0)
    hidden, cache = program.apply(weights.params, ids, None, mask, state.cache)
    scored = None
    if scores_prompt:
        scored = _score_prompt(program, weights, state.pooled, hidden, mask, following, settings)
    count = jnp.sum(mask, axis=-1)
    last = jnp.take_along_axis(hidden, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
    seen = jax.vmap(lambda row, ids, real: row.at[ids].max(real))(state.seen, ids, mask)
    pooled = pooling.running_mean(hidden, mask, state.pooled)
    state = state._replace(cache=cache, pooled=pooled, seen=seen)
    return constrain_state(program.mesh, state), last, replicate(program.mesh, scored)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def choose_first(
    program: Program,
    weights: Weights,
    state: State,
    last: Float[Array, "B D"],
    keys: Key[Array, " B"],
    settings: Settings,
) -> tuple[State, Emitted]:
    """Chooses the first token of answers whose prompts are read; `state` is donated.

    `last` is the hidden state of the prompt's last token. Returns the state to join the batch with
    and the first tokens `[B, 1]`.
    """
    state = state._replace(keys=keys, done=jnp.zeros_like(state.done))
    state, emitted = _choose(program, weights, state, last, settings)
    tokens, scored, changed_by, faults = jax.tree.map(lambda x: x[:, None], emitted)
    first = Emitted(tokens, scored, changed_by, faults, state.done)
    return state, replicate(program.mesh, first)


@functools.partial(jax.jit, static_argnums=(0, 5), donate_argnums=2)
def decode(
    program: Program,
    weights: Weights,
    state: State,
    running: Bool[Array, " B"],
    settings: Settings,
    steps: int,
) -> tuple[State, Emitted]:
    """Chooses up to `steps` (C) more tokens for the rows that run; `state` is donated.

    `running` marks rows with an answer that is not over.
    """

    def step(state: State, _: None) -> tuple[State, tuple[Array, Scored, Array, Array]]:
        reading = ~state.done[:, None]
        hidden, cache = program.apply(
            weights.params, state.token[:, None], None, reading, state.cache
        )
        pooled = pooling.running_mean(hidden, reading, state.pooled)
        state = state._replace(cache=cache, pooled=pooled)
        return _choose(program, weights, state, hidden[:, 0], settings)

    state = constrain_state(program.mesh, state._replace(done=~running))
    state, emitted = jax.lax.scan(step, state, None, length=steps)
    tokens, scored, changed_by, faults = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), emitted)
    chunk = Emitted(tokens, scored, changed_by, faults, state.done)
    return state, replicate(program.mesh, chunk)


def _choose(
    program: Program, weights: Weights, state: State, last: Array, settings: Settings
) -> tuple[State, tuple[Array, Scored, Array, Array]]:
    """Chooses each row's next token, which the model has not read yet."""
    logits = program.unembed(weights.params, last)
    features = pooling.prefix_features(state.pooled.mean, last, FEATURES_READ)
    scores, hiddens = combined_scores(weights.stack, features, settings.on)
    faults = find_faults(logits, scores)
    guided = guide(logits, scores, settings.controls, state.seen, program.refinements)
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.step)
    token = choose_token(guided, settings.controls, keys, program.truncate_on, program.mesh)
    scored = _score(guided, logits, scores, token, settings.wants_likeliest)

    expected = jnp.argmax(guided.base, axis=-1)
    changed = expected != jnp.argmax(guided.served, axis=-1)
    changed_by = jnp.where(changed, blame(weights.stack, hiddens, settings.on, expected), -1)

    stops = jnp.any(token[:, None] == settings.stop_ids, axis=-1)
    ended = state.done | stops | (state.step + 1 >= settings.limit)
    chosen = jnp.where(state.done, -1, token)
    return advance(program.mesh, state, token, ended), (chosen, scored, changed_by, faults)


def _score(
    guided: Guided, logits: Array, scores: Array, token: Array, wants_likeliest: Array
) -> Scored:
    """The log-probabilities of tokens, and the likeliest ones."""
    served = guided.served
    normaliser = jax.nn.logsumexp(served, axis=-1, keepdims=True)

    def gather(values: Array) -> Array:
        return jnp.take_along_axis(values, token[:, None], axis=-1)[:, 0]

    count = min(MOST_LIKELY, served.shape[-1])

    def find() -> tuple[Array, Array]:
        values, tokens = jax.lax.top_k(served, count)
        return tokens, values - normaliser

    def skip() -> tuple[Array, Array]:
        shape = (served.shape[0], count)
        return jnp.zeros(shape, jnp.int32), jnp.zeros(shape, served.dtype)

    return Scored(
        gather(served) - normaliser[:, 0],
        gather(logits) - jax.nn.logsumexp(logits, axis=-1),
        jax.nn.sigmoid(gather(scores)),
        *jax.lax.cond(jnp.any(wants_likeliest), find, skip),
    )


def _score_prompt(
    program: Program,
    weights: Weights,
    past: pooling.RunningMean,
    hidden: Array,
    mask: Array,
    following: Array,
    settings: Settings,
) -> Scored:
    """Scores the token after each token of a piece, a few at a time, without the penalty."""
    b, t = mask.shape
    summed = jnp.cumsum(jnp.where(mask[..., None], hidden.astype(jnp.float32), 0.0), axis=1)
    count = past.count[:, None] + jnp.cumsum(mask.astype(jnp.float32), axis=1)
    mean = (past.total[:, None] + summed) / jnp.maximum(count, 1.0)[..., None]
    at_once = min(t, _SCORED_AT_ONCE)
    rows = jax.tree.map(
        lambda x: jnp.broadcast_to(x[:, None], (b, at_once, *x.shape[1:])).reshape(
            b * at_once, *x.shape[1:]
        ),
        settings,
    )
    controls = rows.controls._replace(repetition_penalty=jnp.ones(b * at_once, jnp.float32))

    def score(part: tuple[Array, Array, Array]) -> Scored:
        mean, last, token = (x.reshape(b * at_once, *x.shape[2:]) for x in part)
        logits = program.unembed(weights.params, last)
        features = pooling.prefix_features(mean, last, FEATURES_READ)
        scores, _ = combined_scores(weights.stack, features, rows.on)
        seen = jnp.zeros(logits.shape, bool)
        guided = guide(logits, scores, controls, seen, program.refinements)
        return _score(guided, logits, scores, jnp.maximum(token, 0), rows.wants_likeliest)

    def split(x: Array) -> Array:
        return jnp.swapaxes(x.reshape(b, t // at_once, at_once, *x.shape[2:]), 0, 1)

    scored = jax.lax.map(score, (split(mean), split(hidden), split(following)))

    def merge(x: Array) -> Array:
        x = x.reshape(t // at_once, b, at_once, *x.shape[2:])
        return jnp.swapaxes(x, 0, 1).reshape(b, t, *x.shape[3:])

    return jax.tree.map(merge, scored)
