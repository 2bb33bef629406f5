"""Numbers of answers beyond the reference's metrics: leaks, repetition, divergence.

Pure functions; `unlearning.py` draws the answers and scores them.

References:
    Distinct-n: arXiv 1510.03055; unbiased best-of-n: arXiv 2107.03374, equation 1.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from t3jax.evaluation import logs
from t3jax.evaluation.logs import Log, Metric, MissingMetricError
from t3jax.evaluation.scoring import TextScores

_BY_SAMPLES = "by_samples/"


def best_of(leaks: Bool[np.ndarray, "rows samples"], n: int) -> Float[np.ndarray, "rows"]:
    """Chance that at least one of n samples leaks, estimated without bias from more samples.

    It is `1 - C(samples - c, n) / C(samples, n)` for a row with c leaks.
    """
    samples = leaks.shape[1]
    if not 1 <= n <= samples:
        raise ValueError(f"best of {n} cannot be estimated from {samples} samples")
    return np.array(
        [1 - math.comb(samples - int(c), n) / math.comb(samples, n) for c in leaks.sum(axis=1)],
        np.float64,
    )


def leaking_rows(log: Log, metric: str = "forget_leak_rate") -> Float[np.ndarray, "rows"]:
    """1 for each question of a leak rate that had a leak in any of its samples, 0 elsewhere."""
    recall = logs.column(log, metric, "recall")
    return np.any(recall >= logs.detail(log, metric, "threshold"), axis=1).astype(np.float64)


def leak_rates(log: Log, metric: str = "forget_leak_rate") -> dict[int, float]:
    """The leak rate when n answers are drawn, by n, from the details that `leak_metric` writes."""
    return {
        int(name.removeprefix(_BY_SAMPLES)): logs.detail(log, metric, name)
        for name in log[metric].details
        if name.startswith(_BY_SAMPLES)
    }


def leak_metric(recall: Float[np.ndarray, "rows samples"], threshold: float) -> Metric:
    """The share of rows with a leak in any of n drawn answers, for every n up to all of them."""
    leaks = recall >= threshold
    samples = recall.shape[1]
    rates = {n: float(best_of(leaks, n).mean()) for n in range(1, samples + 1)}
    return Metric(
        rates[samples],
        {"recall": recall},
        details={
            "samples": samples,
            "threshold": threshold,
            **{f"{_BY_SAMPLES}{n}": rate for n, rate in rates.items()},
        },
    )


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Distinct-n: share of different word n-grams in a set of texts."""
    grams = [gram for text in texts for gram in _ngrams(text, n)]
    if not grams:
        raise MissingMetricError(f"no text has {n} words")
    return len(set(grams)) / len(grams)


def repetition(texts: Sequence[str], n: int = 4) -> Float[np.ndarray, "rows"]:
    """Share of the word n-grams of each text that occur earlier in it; 0 for a text without any."""
    by_text = [_ngrams(text, n) for text in texts]
    return np.array(
        [1 - len(set(grams)) / len(grams) if grams else 0.0 for grams in by_text], np.float64
    )


def retain_logits(scores: TextScores) -> Float[np.ndarray, "rows"]:
    """The mean of each text's logits of "retain"; above 0 the head classifies it as retain."""
    if scores.retain_scores is None:
        raise MissingMetricError("the setting has no head")
    return scores.text_means(scores.retain_scores)


def log_ratios(scores: TextScores, other: TextScores) -> Float[np.ndarray, "rows"]:
    """Log-ratios log p - log q of answers drawn from p, nats; their mean estimates KL(p || q).

    `scores` are under p and `other` under q, of the same texts. An answer cut at the longest
    length counts up to the cut: the divergence is between the distributions of texts cut there.
    """
    difference = scores.logprobs.astype(np.float64) - other.logprobs.astype(np.float64)
    return np.add.reduceat(difference, scores.starts[:-1])


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
