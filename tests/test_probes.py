"""Probes: the gate read from scores, and answers cut in two."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from t3jax.data import Example
from t3jax.evaluation import BASE, Setting, probes, score_texts
from t3jax.guidance import temper
from t3jax.head import head_scores
from t3jax.pooling import causal_mean
from t3jax.refinements import retain_probability


def test_the_gate_is_read_from_the_scores_of_what_was_said(tiny_lm):
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, tiny_lm.vocab_size, 24).astype(np.int32)
    head = tiny.make_head(tiny_lm)
    base, tilted = score_texts(
        tiny_lm, [Example(tokens, 8)], [BASE, Setting("tilted", 1.0, 1.0, (0,))], [head]
    )
    mask = jnp.ones((1, 24), bool)
    hidden, _ = tiny_lm.apply(tiny_lm.params, jnp.asarray(tokens)[None], None, mask, None)
    logits = temper(tiny_lm.unembed(tiny_lm.params, hidden), 1.0)
    scores = head_scores(head.params, causal_mean(hidden, mask), head.config.activation)
    q = retain_probability(logits, scores + head.prior_shift)[0, 7:23]
    np.testing.assert_allclose(probes.retain_probabilities(base, tilted), q, rtol=1e-4)
    found = probes.probe(base, tilted, tilted)
    assert found.texts == 1
    assert found.retain_prob == found.lowest == pytest.approx(float(q.mean()), rel=1e-4)
    assert found.below_half == float(q.mean() < 0.5)
    assert found.change == pytest.approx(float((tilted.logprobs - base.logprobs).mean()), abs=1e-5)


def test_answers_are_cut_in_two():
    rows = [{"question": "Who?", "answer": "a b c d e"}, {"question": "What?", "answer": "one"}]
    (row,) = probes.split_answers(rows)
    assert row == {"question": "Please continue this text: a b", "answer": "c d e"}
