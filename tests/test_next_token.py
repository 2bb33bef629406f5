import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from t3jax import guidance
from t3jax.sampling import Controls, next_token, truncation
from t3jax.sampling.truncation import support

V = 11


def draw(logits, scores, rows, seen=None, truncate_on="base", **values):
    logits = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (rows, V))
    if scores is not None:
        scores = jnp.broadcast_to(jnp.asarray(scores, jnp.float32), (rows, V))
    seen = jnp.zeros((rows, V), bool) if seen is None else seen
    keys = jax.random.split(jax.random.key(0), rows)
    return jax.jit(next_token, static_argnums=(5, 6))(
        logits, scores, Controls.filled(rows, **values), keys, seen, truncate_on, True
    )


@pytest.fixture
def logits_and_scores():
    rng = np.random.default_rng(0)
    return rng.normal(size=V) * 2, rng.normal(size=V) * 3


@pytest.mark.parametrize("few", [10, 2])  # tokens looked at first: enough of them, or not
@pytest.mark.parametrize("truncate_on", ["base", "tilted"])
def test_draws_follow_the_stated_order_of_operations(
    monkeypatch, logits_and_scores, truncate_on, few
):
    monkeypatch.setattr(truncation, "FEW", few)
    jax.clear_caches()
    logits, scores = (jnp.asarray(x, jnp.float32) for x in logits_and_scores)
    rows = 20_000
    tokens, _ = draw(
        logits,
        scores,
        rows,
        truncate_on=truncate_on,
        base_temperature=2.0,
        guidance_scale=0.7,
        temperature=0.8,
        top_k=6,
        top_p=0.95,
    )
    tilted = guidance.tilt(guidance.tempered_logprobs(logits, 2.0), scores, 0.7)
    decider = logits if truncate_on == "base" else tilted
    k, p, m = jnp.full(1, 6, jnp.int32), jnp.full(1, 0.95, jnp.float32), jnp.zeros(1, jnp.float32)
    kept = support(decider[None], k, p, m)[0]
    expected = jax.nn.softmax(jnp.where(kept, tilted / 0.8, -jnp.inf))
    counts = np.bincount(np.asarray(tokens), minlength=V)
    assert counts[~np.asarray(kept)].sum() == 0
    inside = np.asarray(kept)
    expected = np.asarray(expected, np.float64)[inside]
    test = scipy.stats.chisquare(counts[inside], expected / expected.sum() * rows)
    assert test.pvalue > 1e-3


def test_truncation_on_the_base_can_exclude_what_the_tilt_prefers(logits_and_scores):
    logits = np.zeros(V)
    logits[0] = 5.0
    scores = np.full(V, 20.0)
    scores[0] = -40.0
    on_base, _ = draw(logits, scores, 1, guidance_scale=1.0, temperature=1.0, top_k=1)
    on_tilted, _ = draw(
        logits, scores, 1, truncate_on="tilted", guidance_scale=1.0, temperature=1.0, top_k=1
    )
    assert on_base[0] == 0
    assert on_tilted[0] != 0


def test_greedy_is_the_argmax_of_the_tilted_distribution(logits_and_scores):
    logits, scores = logits_and_scores
    token, _ = draw(logits, scores, 1, base_temperature=2.5, guidance_scale=1.0)
    log_f = -np.logaddexp(0, -scores)
    assert token[0] == np.argmax(logits / 2.5 + log_f)
    assert token[0] != np.argmax(logits)  # the test would be idle otherwise


def test_logprobs_are_those_of_base_and_tilted_distribution(logits_and_scores):
    logits, scores = (jnp.asarray(x, jnp.float32) for x in logits_and_scores)
    token, logprobs = draw(
        logits, scores, 3, base_temperature=2.0, guidance_scale=0.5, temperature=0.9, top_k=3
    )
    tilted = guidance.tilt(guidance.tempered_logprobs(logits, 2.0), scores, 0.5)
    np.testing.assert_allclose(logprobs.base, jax.nn.log_softmax(logits)[token], atol=1e-6)
    np.testing.assert_allclose(logprobs.guided, tilted[token], atol=1e-6)


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    logits = np.full(V, -9.0)
    logits[:3] = [2.0, 1.5, -1.0]
    seen = jnp.zeros((1, V), bool).at[0, 0].set(True)
    assert draw(logits, None, 1, seen=seen, repetition_penalty=1.2)[0][0] == 0
    assert draw(logits, None, 1, seen=seen, repetition_penalty=1.5)[0][0] == 1
    both = jnp.ones((1, V), bool).at[0, 2].set(False)
    negative = np.full(V, -1.0)
    assert draw(negative, None, 1, seen=both, repetition_penalty=1.1)[0][0] == 2


def test_rows_have_their_own_controls():
    logits = jnp.broadcast_to(jnp.arange(V, dtype=jnp.float32), (2, V))
    scores = jnp.zeros((2, V)).at[:, V - 1].set(-50.0)
    mixed = jax.device_put(Controls.filled(2))._replace(
        guidance_scale=jnp.asarray([0.0, 1.0], jnp.float32)
    )
    keys = jax.random.split(jax.random.key(0), 2)
    token, _ = next_token(logits, scores, mixed, keys, jnp.zeros((2, V), bool))
    assert token.tolist() == [V - 1, V - 2]


def test_a_row_is_drawn_alike_beside_rows_whose_support_is_wide(monkeypatch):
    monkeypatch.setattr(truncation, "FEW", 4)
    rng = np.random.default_rng(0)
    rows = 64
    logits = jnp.asarray(rng.normal(size=(rows, 300)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), rows)
    seen = jnp.zeros(logits.shape, bool)
    narrow = jax.device_put(Controls.filled(rows, temperature=1.0, top_k=3))
    alone, _ = next_token(logits, None, narrow, keys, seen)
    ranks = np.argsort(np.argsort(-np.asarray(logits)))[np.arange(rows), alone]
    assert set(ranks) == {0, 1, 2}
    wide = np.arange(rows) % 2 == 1
    mixed = narrow._replace(top_k=jnp.where(wide, 200, 3).astype(jnp.int32))
    beside, _ = next_token(logits, None, mixed, keys, seen)
    np.testing.assert_array_equal(beside[~wide], alone[~wide])
    everything, _ = next_token(logits, None, narrow._replace(top_k=mixed.top_k * 0), keys, seen)
    kept = support(logits, mixed.top_k, mixed.top_p, mixed.min_p)
    inside = np.asarray(kept)[np.arange(rows), everything]
    assert inside[wide].sum() > 10  # whose noise is the same, and so is their draw
    np.testing.assert_array_equal(beside[wide & inside], everything[wide & inside])
