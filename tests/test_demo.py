"""What is committed under `demo/` is what its script makes, and the demo's own functions."""

import json
import statistics

import numpy as np
import pytest

from t3jax.data import PromptFormat
from t3jax.data.authors import make_corpus


@pytest.fixture
def demo(repository, monkeypatch):
    monkeypatch.syspath_prepend(str(repository))
    from demo import make_demo, run_demo

    return make_demo, run_demo


def test_the_committed_corpus_is_the_generators(demo, repository):
    make_demo, _ = demo
    for split, rows in make_corpus(make_demo.Recipe().authors).items():
        path = repository / "demo" / "authors" / f"{split}.jsonl"
        assert [json.loads(line) for line in path.read_text().splitlines()] == rows


def test_both_models_together_are_small(repository):
    paths = [p for name in ("base", "retain_only") for p in (repository / "demo" / name).iterdir()]
    assert sum(path.stat().st_size for path in paths) < 6e6


def test_perplexity_is_that_of_the_answer_alone(demo, tiny_lm):
    _, run_demo = demo
    rng = np.random.default_rng(0)
    answers = ["".join(rng.choice(list("abcdef "), 12)) for _ in range(3)]
    found = run_demo.perplexities(tiny_lm, ["Who?"] * 3, answers, PromptFormat())
    alone = [run_demo.perplexities(tiny_lm, ["Who?"], [a], PromptFormat())[0] for a in answers]
    np.testing.assert_allclose(found, alone, rtol=1e-4)
    assert statistics.median(found) > 2  # a random model is surprised by everything


def test_rows_are_spread_over_the_set(demo):
    _, run_demo = demo
    assert run_demo._spread([{"i": i} for i in range(10)], 5) == [{"i": i} for i in (0, 2, 4, 6, 8)]
    with pytest.raises(ValueError, match="asks 11 questions"):
        run_demo._spread([{}] * 10, 11)
