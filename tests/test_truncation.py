import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t3jax import make_mesh
from t3jax.sampling import support, truncation


def by_sorting(logits, top_k, top_p, min_p):
    """The definition, row by row, with a sort."""
    kept = np.zeros(logits.shape, bool)
    for b, row in enumerate(logits):
        p = np.exp(row.astype(np.float64) - row.max())
        descending = np.sort(p)[::-1]
        threshold = min_p[b]
        if top_k[b]:
            threshold = max(threshold, descending[min(top_k[b], len(p)) - 1])
        if top_p[b] < 1:
            enough = np.argmax(np.cumsum(descending) >= top_p[b] * p.sum())
            threshold = max(threshold, descending[enough])
        kept[b] = (p >= threshold * (1 - 1e-7)) & np.isfinite(row)
    return kept


def run(logits, top_k, top_p, min_p):
    return np.asarray(
        jax.jit(support)(
            jnp.asarray(logits, jnp.float32),
            jnp.asarray(top_k, jnp.int32),
            jnp.asarray(top_p, jnp.float32),
            jnp.asarray(min_p, jnp.float32),
        )
    )


@pytest.mark.parametrize("seed", range(4))
def test_equals_the_definition_by_sorting(seed):
    rng = np.random.default_rng(seed)
    rows = 12
    logits = rng.normal(size=(rows, 501)).astype(np.float32) * rng.uniform(0.5, 8, (rows, 1))
    logits = logits.astype(np.float32)
    logits[2, :100] = -np.inf
    top_k = rng.choice([0, 1, 3, 40, 501, 1000], rows)
    top_p = rng.choice([1.0, 0.05, 0.5, 0.9, 0.99], rows)
    min_p = rng.choice([0.0, 0.01, 0.2, 1.0], rows)
    np.testing.assert_array_equal(
        run(logits, top_k, top_p, min_p), by_sorting(logits, top_k, top_p, min_p)
    )


def test_ties_at_the_threshold_are_all_kept():
    kept = run([[0.0, 2.0, 2.0, 2.0, 1.0]], [2], [1.0], [0.0])
    assert kept.tolist() == [[False, True, True, True, False]]


def test_off_keeps_everything_but_banned_tokens():
    kept = run([[0.0, -np.inf, -80.0]], [0], [1.0], [0.0])
    assert kept.tolist() == [[True, False, True]]


def test_the_likeliest_token_is_always_kept():
    kept = run([[5.0, 1.0, 0.0]], [1], [1e-6], [1.0])
    assert kept.tolist() == [[True, False, False]]


@pytest.mark.parametrize("mesh", [None, (8, 1, 1), (2, 1, 4), (1, 1, 8)])
def test_the_likeliest_are_the_support_where_they_settle_it(monkeypatch, mesh):
    monkeypatch.setattr(truncation, "FEW", 24)
    rng = np.random.default_rng(0)
    rows = 64
    logits = rng.normal(size=(rows, 304)).astype(np.float32) * rng.uniform(0.5, 8, (rows, 1))
    logits = np.round(logits, 1).astype(np.float32)  # ties
    logits[5, 9:] = -np.inf
    logits[6] = -np.inf
    rules = (
        rng.choice([0, 3, 20, 1000], rows).astype(np.int32),
        rng.choice([1.0, 0.5, 0.9], rows).astype(np.float32),
        rng.choice([0.0, 0.01, 0.2], rows).astype(np.float32),
    )
    expected = run(logits, *rules)
    on = mesh and make_mesh(mesh)
    found = jax.jit(lambda *x: truncation.likeliest(*x, on))(logits, *rules)
    tokens, kept, settled = map(np.asarray, found)
    values = np.take_along_axis(logits, tokens, axis=1)
    np.testing.assert_array_equal(values, -np.sort(-logits, axis=1)[:, :24])
    assert all(len(set(row)) == 24 for row in tokens)
    among = np.zeros_like(expected)
    np.put_along_axis(among, tokens, kept, axis=1)
    np.testing.assert_array_equal(among[settled], expected[settled])
    wide = expected.sum(axis=1) >= 24
    assert not settled[wide].any()
    assert settled[~wide].all()
    assert 0 < wide.sum() < rows
