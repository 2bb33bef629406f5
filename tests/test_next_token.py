import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from t3jax import guidance, make_mesh
from t3jax.refinements import PLAIN, Refinements
from t3jax.sampling import Controls, next_token, truncation
from t3jax.sampling.next_token import token_logprobs
from t3jax.sampling.truncation import support

V = 11


def draw(logits, scores, rows, seen=None, truncate_on="guided", refinements=PLAIN, **values):
    logits = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (rows, V))
    if scores is not None:
        scores = jnp.broadcast_to(jnp.asarray(scores, jnp.float32), (rows, V))
    seen = jnp.zeros((rows, V), bool) if seen is None else seen
    keys = jax.random.split(jax.random.key(0), rows)
    return jax.jit(choose, static_argnums=(5, 6, 7))(
        logits, scores, Controls.filled(rows, **values), keys, seen, truncate_on, refinements
    )


def choose(*arguments):
    return with_logprobs(*arguments, None, True)


def with_logprobs(logits, scores, *rest_and_asked):
    """The tokens and their log-probabilities, which the last argument asks for."""
    *rest, asked = rest_and_asked
    token, guided = next_token(logits, scores, *rest)
    has_head = scores is not None
    return token, token_logprobs(logits, guided, token, has_head=has_head, with_logprobs=asked)


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


def stated(logits, scores, temperature, scale, refinements):
    """Logits z + T_t · s · log f in NumPy, and T_t."""
    p = np.exp(logits - logits.max())
    if refinements.gated:
        retain = np.sum(p * np.exp(log_sigmoid(scores))) / p.sum()
        temperature = 1 + (temperature - 1) * (1 - retain)
    log_f = log_sigmoid(scores)
    if kept := list(refinements.protected):
        others = np.delete(np.arange(V), kept)
        tempered = np.exp((logits - logits.max()) / temperature)[others]
        mean = np.sum(tempered * np.exp(scale * log_f[others])) / tempered.sum()
        log_f[kept] = np.log(mean) / scale
    return logits + temperature * scale * log_f, temperature


def nucleus(logits, top_p):
    p = np.exp(logits - logits.max())
    p /= p.sum()
    order = np.argsort(-p)
    kept = np.zeros(V, bool)
    kept[order[: 1 + np.argmax(np.cumsum(p[order]) >= top_p)]] = True
    return kept


@pytest.fixture
def logits_and_scores():
    rng = np.random.default_rng(0)
    return rng.normal(size=V) * 2, rng.normal(size=V) * 3


@pytest.mark.parametrize("few", [10, 2])  # tokens looked at first: enough of them, or not
@pytest.mark.parametrize("truncate_on", ["guided", "base", "tilted"])
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
    decider = {"guided": 2 * tilted, "base": logits, "tilted": tilted}[truncate_on]
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
    options = {"guidance_scale": 1.0, "temperature": 1.0, "top_k": 1}
    on_base, on_tilted, on_guided = (
        draw(logits, scores, 1, truncate_on=name, **options)[0]
        for name in ("base", "tilted", "guided")
    )
    assert on_base[0] == 0
    assert on_tilted[0] == on_guided[0] != 0


@pytest.mark.parametrize(
    "refinements",
    [PLAIN, Refinements(gated=True), Refinements(gated=True, protected=(2, 5))],
    ids=lambda refinements: refinements.name,
)
def test_guided_truncation_is_decided_without_the_tempering(refinements):
    rng = np.random.default_rng(33)
    logits, scores = rng.normal(size=V) * 2, rng.normal(size=V) * 3
    rows, unlike_base, unlike_tilted = 3000, 0, 0
    settings = ((1, 0.5, 0.9), (2.5, 1, 0.9), (2.5, 0.3, 0.6), (6, 0.2, 0.95))
    for temperature, scale, top_p in settings:
        options = {"base_temperature": temperature, "guidance_scale": scale, "top_p": top_p}
        tokens, _ = draw(logits, scores, rows, refinements=refinements, temperature=1.0, **options)
        guided, served_temperature = stated(logits, scores, temperature, scale, refinements)
        kept = nucleus(guided, top_p)
        counts = np.bincount(np.asarray(tokens), minlength=V)
        assert counts[~kept].sum() == 0
        expected = np.exp((guided - guided.max()) / served_temperature)[kept]
        test = scipy.stats.chisquare(counts[kept], expected / expected.sum() * rows)
        assert test.pvalue > 1e-3
        unlike_base += (kept != nucleus(logits, top_p)).any()
        unlike_tilted += (kept != nucleus(guided / served_temperature, top_p)).any()
    # The test would be idle otherwise; at T = 1 nothing is tempered.
    assert (unlike_base, unlike_tilted) == (4, 3)


@pytest.mark.parametrize("rule", [{"top_p": 0.9}, {"min_p": 0.1}])
def test_the_nucleus_of_a_sure_base_is_the_token_to_forget_and_that_of_guided_is_not(rule):
    logits = np.zeros(V)
    logits[4] = 6.0  # .976 of the base
    scores = np.full(V, 6.0)
    scores[4] = -8.0
    options = {"base_temperature": 2.5, "guidance_scale": 0.5, "temperature": 1.0, **rule}
    on_base, _ = draw(logits, scores, 200, truncate_on="base", **options)
    on_guided, _ = draw(logits, scores, 200, **options)
    assert set(on_base.tolist()) == {4}
    assert set(on_guided.tolist()) == set(range(V)) - {4}


def test_without_a_head_guided_truncation_is_that_of_the_base(logits_and_scores):
    logits, _ = logits_and_scores
    tokens, _ = draw(logits, None, 200, base_temperature=2.5, temperature=1.0, top_p=0.9)
    kept = nucleus(logits, 0.9)
    assert set(tokens.tolist()) == set(np.flatnonzero(kept))
    assert kept.sum() < nucleus(logits / 2.5, 0.9).sum()


def test_banned_tokens_stay_banned_where_guided_decides():
    logits, scores = np.zeros(V), np.zeros(V)
    logits[:4], scores[4] = -np.inf, -np.inf
    refinements = Refinements(gated=True, protected=(5,))
    options = {"base_temperature": 3.0, "guidance_scale": 1.0, "temperature": 1.0, "top_p": 0.99}
    tokens, logprobs = draw(logits, scores, 500, refinements=refinements, **options)
    assert set(tokens.tolist()) == set(range(5, V))
    assert all(np.isfinite(part).all() for part in logprobs)


@pytest.mark.parametrize("refinements", [PLAIN, Refinements(gated=True, protected=(2, 5))])
def test_truncation_does_not_change_a_greedy_choice(refinements):
    rng = np.random.default_rng(0)
    logits, scores = rng.normal(size=(2, 50, V)) * 3
    options = {"base_temperature": 2.5, "guidance_scale": 0.7, "refinements": refinements}
    whole, _ = draw(logits, scores, 50, **options)
    assert (whole != np.argmax(logits, axis=-1)).any()
    for rule in ({"top_p": 0.5}, {"min_p": 0.3}, {"top_k": 2}):
        np.testing.assert_array_equal(draw(logits, scores, 50, **options, **rule)[0], whole)


@pytest.mark.parametrize("shape", [(2, 1, 4), (1, 1, 8)])
def test_guided_truncation_on_a_mesh_draws_as_one_device_does(monkeypatch, shape):
    monkeypatch.setattr(truncation, "FEW", 24)
    rng = np.random.default_rng(0)
    logits, scores = (jnp.asarray(x, jnp.float32) for x in rng.normal(size=(2, 64, 304)) * 4)
    values = {"base_temperature": 2.5, "guidance_scale": 0.4, "temperature": 0.7, "top_p": 0.95}
    controls = jax.device_put(Controls.filled(64, **values))
    keys, seen = jax.random.split(jax.random.key(0), 64), jnp.zeros(logits.shape, bool)
    refinements = Refinements(gated=True, protected=(7,))
    mesh = make_mesh(shape)
    expected, found = (
        jax.jit(with_logprobs, static_argnums=(5, 6, 7, 8))(
            logits, scores, controls, keys, seen, "guided", refinements, on, False
        )
        for on in (None, mesh)
    )
    np.testing.assert_array_equal(found[0], expected[0])
    for ours, theirs in zip(found[1][:2], expected[1][:2], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


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
    entropy = scipy.stats.entropy(np.exp(np.asarray(logits, np.float64)))
    np.testing.assert_allclose(logprobs.base_entropy, entropy, rtol=1e-5)


def test_the_base_s_logprobs_come_with_a_head_alone_unless_asked_for(logits_and_scores):
    logits, scores = (jnp.asarray(x, jnp.float32)[None] for x in logits_and_scores)
    controls, keys = jax.device_put(Controls.filled(1)), jax.random.split(jax.random.key(0), 1)
    rest = controls, keys, jnp.zeros((1, V), bool), False
    token, logprobs = with_logprobs(logits, scores, *rest)
    np.testing.assert_allclose(logprobs.base, jax.nn.log_softmax(logits)[0, token], atol=1e-6)
    assert logprobs.guided is None
    assert with_logprobs(logits, None, *rest)[1] is None


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
