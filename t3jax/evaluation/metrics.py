"""The TOFU metrics as pure functions on arrays, equal to the reference evaluator's definitions.

Axes: `rows` examples, `wrong` wrong answers of an example, `tokens` answer tokens. Arrays may be
numpy's or JAX's; everything is computed on the host in float64, since p-values and ratios here
span hundreds of orders of magnitude. Values that are not finite, no rows, and unequal numbers of
rows raise a ValueError. The aggregate of a metric is the mean over its rows, unless a function here
says otherwise; `aggregates.py` computes it. Membership scores are in `membership.py`. This module
runs no model and reads no file.

References:
    TOFU, arXiv 2401.06121; OpenUnlearning, arXiv 2506.12618.
"""

import dataclasses
import functools
import math
import types
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import scipy  # opens `stats`, which takes most of a second to import, when it is used
from jaxtyping import Array, Bool, Float

AnyArray = Array | np.ndarray

# The reference adds this to denominators that may be 0.
EPS = 1e-10


def probability(avg_loss: Float[AnyArray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Length-normalised probability of an answer, `exp(-avg_loss)`, end-of-turn included."""
    return np.exp(-finite("avg_loss", avg_loss))


def normalised_probability(
    prob: Float[AnyArray, "rows"], wrong_prob: Float[AnyArray, "rows wrong"]
) -> Float[np.ndarray, "rows"]:
    """Share of the right answer in all answers' probability, `p / (p + sum of wrong p + 1e-10)`."""
    prob = finite("prob", prob)
    return prob / (prob + finite("wrong_prob", wrong_prob).sum(axis=1) + EPS)


def truth_ratio(
    true_loss: Float[AnyArray, "rows"], wrong_loss: Float[AnyArray, "rows wrong"]
) -> Float[np.ndarray, "rows"]:
    """The probability of wrong answers over the true one's: 0 if it is known, 1 if it is guessed.

    `exp(-mean_j wrong_loss_j) / (exp(-true_loss) + 1e-10)`, of avg_loss. The true answer is the
    paraphrased one for forget and retain rows, the answer itself for real authors and world facts.
    """
    wrong_loss = finite("wrong_loss", wrong_loss)
    if wrong_loss.shape[1] == 0:
        raise ValueError("truth_ratio needs at least one wrong answer per row, got none")
    return np.exp(-wrong_loss.mean(axis=1)) / (np.exp(-finite("true_loss", true_loss)) + EPS)


def closeness_to_one(ratio: Float[AnyArray, "rows"]) -> Float[np.ndarray, "rows"]:
    """The terms of `forget_truth_ratio`, `min(r, 1 / (r + 1e-10))`: largest where r = 1."""
    ratio = finite("ratio", ratio)
    return np.minimum(ratio, 1 / (ratio + EPS))


def preference_for_truth(ratio: Float[AnyArray, "rows"]) -> Float[np.ndarray, "rows"]:
    """The terms of `Truth_Ratio` of retain, real authors and world facts, `max(0, 1 - r)`."""
    return np.maximum(0.0, 1 - finite("ratio", ratio))


@dataclasses.dataclass(frozen=True)
class ForgetQuality:
    """A two-sample Kolmogorov-Smirnov test between a model and the retain model.

    Attributes:
        p_value: The forget quality. Above 0.05 these rows do not separate the two models.
        statistic: D, the largest distance between the two distribution functions.
        critical: The D above which p falls under 0.05 at these numbers of rows.
    """

    p_value: float
    statistic: float
    critical: float


def forget_quality(
    ratio: Float[AnyArray, "rows"], retain_ratio: Float[AnyArray, "retain_rows"]
) -> ForgetQuality:
    """Tests whether the truth ratios of forget rows are distributed as the retain model's."""
    ratio, retain_ratio = finite("ratio", ratio), finite("retain_ratio", retain_ratio)
    critical = critical_statistic(len(ratio), len(retain_ratio))
    with warnings.catch_warnings():
        # With large samples the exact p-value may overflow; scipy then takes the asymptotic one.
        warnings.filterwarnings(
            "ignore", "ks_2samp: Exact calculation unsuccessful", RuntimeWarning
        )
        test = scipy.stats.ks_2samp(ratio, retain_ratio)
    return ForgetQuality(float(test.pvalue), float(test.statistic), critical)


def critical_statistic(rows: int, retain_rows: int) -> float:
    """The Kolmogorov-Smirnov D above which the p-value falls under 0.05 (asymptotic).

    It is `sqrt(-ln(0.05 / 2) / 2) · sqrt((n + m) / (n m))`.
    """
    if min(rows, retain_rows) < 1:
        raise ValueError(
            f"the Kolmogorov-Smirnov test needs rows on both sides, got {rows} and {retain_rows}"
        )
    return math.sqrt(-math.log(0.05 / 2) / 2 * (rows + retain_rows) / (rows * retain_rows))


def model_utility(values: Sequence[float]) -> float:
    """Harmonic mean of the nine utility aggregates, in any order; 0 if any is 0.

    They are {probability (normalised for real authors and world facts), ROUGE, truth ratio} of
    {retain, real authors, world facts}.
    """
    if len(values) != 9:
        raise ValueError(f"model_utility is the harmonic mean of nine values, got {len(values)}")
    array = finite("values", np.asarray(values, np.float64))
    if np.any(array < 0):
        raise ValueError(f"model_utility needs values >= 0, got {array.min()}")
    return 0.0 if np.any(array == 0) else float(len(array) / np.sum(1 / array))


def exact_memorization(
    correct: Bool[AnyArray, "rows tokens"], mask: Bool[AnyArray, "rows tokens"]
) -> Float[np.ndarray, "rows"]:
    """Share of answer tokens that are the teacher-forced argmax.

    A row without answer tokens is NaN; the reference leaves it out of the mean, and logs hold null.
    """
    correct, mask = np.asarray(correct), np.asarray(mask)
    tokens = mask.sum(axis=1)
    share = (correct & mask).sum(axis=1) / np.maximum(tokens, 1)
    return np.where(tokens > 0, share, np.nan)


def extraction_strength(
    correct: Bool[AnyArray, "rows tokens"], mask: Bool[AnyArray, "rows tokens"]
) -> Float[np.ndarray, "rows"]:
    """Share of an answer that follows correctly once its beginning is given.

    It is `1 - k/N`, k the start of the longest all-correct suffix of N tokens. As in the reference
    k = N - 1 when not even the last token is correct, and a row without answer tokens scores 0.
    """
    correct, mask = np.asarray(correct), np.asarray(mask)
    tokens = mask.sum(axis=1)
    # Walking from the end, the suffix lasts until the first wrong answer token.
    wrong_after = np.cumsum((mask & ~correct)[:, ::-1], axis=1)[:, ::-1]
    suffix = ((wrong_after == 0) & mask).sum(axis=1)
    start = tokens - np.maximum(suffix, 1)
    return np.where(tokens > 0, 1 - start / np.maximum(tokens, 1), 0.0)


def rouge_scores(
    ground_truths: Sequence[str], generations: Sequence[str]
) -> dict[str, Float[np.ndarray, "rows"]]:
    """ROUGE of generated answers, with the Porter stemmer: recall and F1 of L, recall of 1.

    TOFU reports `rougeL_recall`.
    """
    # Imported here: it imports nltk, which takes seconds.
    from rouge_score.rouge_scorer import RougeScorer

    if len(ground_truths) != len(generations):
        raise ValueError(
            f"rouge_scores got {len(ground_truths)} ground truths "
            f"but {len(generations)} generations"
        )
    scorer = RougeScorer(["rouge1", "rougeL"], tokenizer=_stemming_tokenizer())
    scores = [
        scorer.score(truth, generation)
        for truth, generation in zip(ground_truths, generations, strict=True)
    ]
    return {
        "rouge1_recall": np.array([s["rouge1"].recall for s in scores], np.float64),
        "rougeL_f1": np.array([s["rougeL"].fmeasure for s in scores], np.float64),
        "rougeL_recall": np.array([s["rougeL"].recall for s in scores], np.float64),
    }


@functools.cache
def _stemming_tokenizer() -> types.SimpleNamespace:
    """rouge-score's tokenizer with a cache of stems, since stemming takes most of the time."""
    from nltk.stem.porter import PorterStemmer
    from rouge_score.tokenize import tokenize

    stemmer = types.SimpleNamespace(stem=functools.cache(PorterStemmer().stem))
    return types.SimpleNamespace(tokenize=lambda text: tokenize(text, stemmer))


@dataclasses.dataclass(frozen=True)
class Interval:
    """A statistic of a sample, and the ends of its confidence interval."""

    estimate: float
    low: float
    high: float


def bootstrap_interval(
    statistic: Callable[..., float],
    *samples: Float[AnyArray, "..."],
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap: rows are drawn with replacement, separately within each sample.

    Values of the same rows are the columns of one sample, `[rows, columns]`, and are drawn
    together. An AUC takes two samples (forget, holdout); model utility takes three
    (retain, real authors, world facts), each `[rows, 3]`. `statistic` maps arrays shaped like the
    samples to a number.

    Raises:
        ValueError: If there is no sample, one has no rows or holds a value that is not finite, or
            an option is out of range.
    """
    if resamples < 1 or not 0 < level < 1:
        raise ValueError(
            f"need resamples >= 1 and level in (0, 1), got resamples={resamples}, level={level}"
        )
    arrays = [finite("sample", sample) for sample in samples]
    if not arrays or any(array.ndim == 0 or len(array) == 0 for array in arrays):
        raise ValueError("the bootstrap needs at least one sample, and rows in each")
    rng = np.random.default_rng(seed)
    estimates = [
        statistic(*(array[rng.integers(len(array), size=len(array))] for array in arrays))
        for _ in range(resamples)
    ]
    low, high = np.quantile(estimates, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(statistic(*arrays)), float(low), float(high))


def bootstrap_difference(
    first: Float[AnyArray, "rows"],
    second: Float[AnyArray, "rows"],
    *,
    resamples: int = 1000,
    level: float = 0.95,
) -> Interval:
    """Paired bootstrap of `mean(first) - mean(second)` over the same rows.

    Rows that both models find easy or hard cancel, so the interval is narrower than for two
    independent samples.
    """
    return bootstrap_interval(
        lambda pairs: float(np.mean(pairs[:, 0]) - np.mean(pairs[:, 1])),
        np.stack([np.asarray(first, np.float64), np.asarray(second, np.float64)], axis=1),
        resamples=resamples,
        level=level,
    )


def finite(name: str, values: AnyArray) -> np.ndarray:
    """Converts values to float64 on the host; a ValueError says where they are not finite."""
    array = np.asarray(values, np.float64)
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        where = tuple(int(i) for i in bad[0])
        raise ValueError(
            f"{name} holds {len(bad)} values that are not finite, the first is {array[where]} "
            f"at index {where}: the model or the log that gave them is broken"
        )
    return array
