"""What is committed under `demo/` is what its script makes, and the demo's own functions."""

import json
import statistics

import numpy as np

from demo import make_demo, run_demo
from demo.authors import make_corpus
from t3jax.data import PromptFormat
from t3jax.evaluation.store import Store


def test_the_committed_corpus_is_the_generators(repository):
    for split, rows in make_corpus(make_demo.Recipe().authors).items():
        path = repository / "demo" / "authors" / f"{split}.jsonl"
        assert [json.loads(line) for line in path.read_text().splitlines()] == rows


def test_both_models_together_are_small(repository):
    paths = [p for name in ("base", "retain_only") for p in (repository / "demo" / name).iterdir()]
    assert sum(path.stat().st_size for path in paths) < 6e6


def test_perplexity_is_that_of_the_answer_alone(tiny_lm, tmp_path):
    store = Store(tiny_lm, folder=tmp_path)
    rng = np.random.default_rng(0)
    answers = ["".join(rng.choice(list("abcdef "), 12)) for _ in range(3)]
    found = run_demo.perplexities(store, ["Who?"] * 3, answers, PromptFormat())
    alone = [run_demo.perplexities(store, ["Who?"], [a], PromptFormat())[0] for a in answers]
    np.testing.assert_allclose(found, alone, rtol=1e-4)
    assert statistics.median(found) > 2  # a random model is surprised by everything
