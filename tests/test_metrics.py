import math
import warnings
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import hmean, ks_2samp

from t3jax.evaluation import membership, metrics

LOSS = np.array([0.1, 2.0, 50.0])
WRONG = np.array([[1.0, 3.0], [2.0, 2.0], [40.0, 60.0]])


def test_probability_takes_numpy_and_jax():
    np.testing.assert_array_equal(metrics.probability(LOSS), np.exp(-LOSS))
    from_jax = metrics.probability(jnp.asarray(WRONG, jnp.float32))
    assert from_jax.dtype == np.float64
    np.testing.assert_allclose(from_jax, np.exp(-WRONG), rtol=1e-6)


def test_normalised_probability():
    got = metrics.normalised_probability(np.array([0.2, 0.0]), np.array([[0.1, 0.1], [0.0, 0.0]]))
    np.testing.assert_allclose(got, [0.2 / (0.4 + 1e-10), 0.0], rtol=1e-14)


def test_truth_ratio_averages_losses_not_probabilities():
    got = metrics.truth_ratio(LOSS, WRONG)
    want = [math.exp(-2) / (math.exp(-loss) + 1e-10) for loss in LOSS[:2]]
    np.testing.assert_allclose(got[:2], want, rtol=1e-14)
    # The 1e-10 decides where the true answer is all but impossible.
    assert got[2] == pytest.approx(math.exp(-50) / (math.exp(-50) + 1e-10), rel=1e-14)


def test_truth_ratio_needs_wrong_answers():
    with pytest.raises(ValueError, match="at least one wrong answer"):
        metrics.truth_ratio(LOSS, np.zeros((3, 0)))


def test_truth_ratio_aggregations():
    ratio = np.array([0.0, 0.5, 1.0, 4.0])
    np.testing.assert_allclose(metrics.closeness_to_one(ratio), [0, 0.5, 1, 0.25], rtol=1e-9)
    np.testing.assert_array_equal(metrics.preference_for_truth(ratio), [1, 0.5, 0, 0])


@pytest.mark.parametrize("call", [
    lambda bad: metrics.probability(bad),
    lambda bad: metrics.truth_ratio(bad, WRONG),
    lambda bad: metrics.closeness_to_one(bad),
    lambda bad: metrics.forget_quality(LOSS, bad),
    lambda bad: membership.membership_auc(LOSS, bad),
    lambda bad: metrics.bootstrap_interval(np.mean, bad),
])  # fmt: skip
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_named(call, value):
    with pytest.raises(ValueError, match=r"1 values that are not finite.* at index \(1,\)"):
        call(np.array([1.0, value, 2.0]))


@pytest.mark.parametrize(("rows", "floor"), [(400, 1.06e-239), (200, 1.94e-119), (40, 1.86e-23)])
def test_forget_quality_at_full_separation(rows, floor):
    ratio = np.linspace(0, 1, rows)
    test = metrics.forget_quality(ratio, ratio + 2)
    assert test.p_value == pytest.approx(floor, rel=5e-3, abs=0)  # twice that of one side
    assert test.statistic == 1.0


def test_forget_quality_of_the_retain_model_itself_is_one():
    test = metrics.forget_quality(LOSS, LOSS)
    assert (test.p_value, test.statistic) == (1.0, 0.0)


def test_forget_quality_catches_only_the_fallback_warning():
    ratio = np.arange(400.0)
    with pytest.warns(RuntimeWarning, match="Exact calculation unsuccessful"):
        want = ks_2samp(ratio, ratio + 5).pvalue  # scipy's exact p-value overflows 1 here
    assert metrics.forget_quality(ratio, ratio + 5).p_value == want


def test_forget_quality_lets_other_warnings_through(monkeypatch):
    def warns(*_):
        warnings.warn("something else", RuntimeWarning, stacklevel=1)

    monkeypatch.setattr("scipy.stats.ks_2samp", warns)
    with pytest.raises(RuntimeWarning, match="something else"):
        metrics.forget_quality(LOSS, LOSS)


@pytest.mark.parametrize("rows", [40, 200, 400])
def test_critical_statistic_divides_where_p_does(rows):
    critical = metrics.critical_statistic(rows, rows)
    below = math.floor(critical * rows)
    grid = np.arange(rows, dtype=np.float64)
    assert metrics.forget_quality(grid, grid + below).p_value > 0.05
    assert metrics.forget_quality(grid, grid + below + 1).p_value < 0.05
    assert metrics.forget_quality(grid, grid + below).critical == critical


def test_forget_quality_needs_rows():
    with pytest.raises(ValueError, match="needs rows on both sides"):
        metrics.forget_quality(np.zeros(0), LOSS)


def test_model_utility():
    values = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    assert metrics.model_utility(values) == pytest.approx(hmean(values), rel=1e-14)
    assert metrics.model_utility([*values[:8], 0.0]) == 0.0
    with pytest.raises(ValueError, match="nine values, got 8"):
        metrics.model_utility(values[:8])
    with pytest.raises(ValueError, match=r"values >= 0, got -0\.9"):
        metrics.model_utility([*values[:8], -0.9])


# Left- and right-padded rows; what lies under the padding must not count.
CORRECT = np.array([
    [1, 0, 1, 1, 0],  # all four tokens answer tokens: suffix starts at 2
    [1, 1, 1, 0, 1],  # last answer token wrong: k = N - 1
    [0, 0, 1, 1, 1],  # left padding, all correct
    [1, 1, 1, 1, 1],  # no answer token
    [0, 0, 0, 0, 1],  # nothing correct
], dtype=bool)  # fmt: skip
MASK = np.array([
    [1, 1, 1, 1, 0],
    [1, 1, 1, 1, 0],
    [0, 0, 1, 1, 1],
    [0, 0, 0, 0, 0],
    [1, 1, 1, 0, 0],
], dtype=bool)  # fmt: skip


def _strength_as_defined(correct):
    """Tries every start of the suffix, as the definition reads."""
    tokens = len(correct)
    start = next((k for k in range(tokens) if all(correct[k:])), tokens - 1)
    return 1 - start / tokens if tokens else 0.0


def test_memorization():
    np.testing.assert_array_equal(
        metrics.exact_memorization(CORRECT, MASK), [0.75, 0.75, 1.0, np.nan, 0.0]
    )
    got = metrics.extraction_strength(jnp.asarray(CORRECT), jnp.asarray(MASK))
    np.testing.assert_array_equal(got, [0.5, 0.25, 1.0, 0.0, 1 - 2 / 3])


def test_extraction_strength_equals_its_definition():
    rng = np.random.default_rng(0)
    correct = rng.random((200, 8)) < 0.7
    mask = np.arange(8) < rng.integers(0, 9, size=(200, 1))
    want = [_strength_as_defined(list(c[m])) for c, m in zip(correct, mask, strict=True)]
    np.testing.assert_array_equal(metrics.extraction_strength(correct, mask), want)


def test_zlib_score():
    answers = ["short", "long " * 50, ""]
    want = LOSS / [len(zlib.compress(answer.encode())) for answer in answers]
    np.testing.assert_array_equal(membership.zlib_score(LOSS, answers), want)
    with pytest.raises(ValueError, match="3 losses but 2 answers"):
        membership.zlib_score(LOSS, answers[:2])


def test_min_k_scores_equal_their_definition():
    rng = np.random.default_rng(1)
    tokens = np.array([0, 1, 2, 5, 7, 12])
    mask = np.arange(12) < tokens[:, None]
    log_probs, mean = -rng.exponential(size=(2, 6, 12))
    variance = rng.exponential(size=(6, 12)) * (rng.random((6, 12)) < 0.7)  # some are 0
    # Nothing under the padding is read.
    log_probs, mean, variance = (
        np.where(mask, values, np.nan) for values in (log_probs, mean, variance)
    )

    def lowest(values):
        return -np.mean(np.sort(values)[: max(1, int(0.4 * len(values)))]) if len(values) else 0.0

    want = [lowest(row[:n]) for row, n in zip(log_probs, tokens, strict=True)]
    np.testing.assert_allclose(membership.min_k_score(log_probs, mask), want, rtol=1e-12)

    standardised = (log_probs - mean) / np.sqrt(np.maximum(variance, 1e-6))
    want = [lowest(row[:n]) for row, n in zip(standardised, tokens, strict=True)]
    got = membership.min_k_plus_plus_score(log_probs, mean, variance, mask)
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_membership_auc():
    forget, holdout = np.array([0.0, 1.0, 2.0]), np.array([1.0, 3.0])
    wins = np.mean([(h > f) + 0.5 * (h == f) for f in forget for h in holdout])
    assert membership.membership_auc(forget, holdout) == pytest.approx(wins, rel=1e-14)
    with pytest.raises(ValueError, match="got 3 and 0"):
        membership.membership_auc(forget, np.zeros(0))


def test_privleak():
    assert membership.privleak(0.9, 0.4) == pytest.approx(100 * (0.1 - 0.6) / 0.6, rel=1e-9)
    assert membership.privleak(0.4) == pytest.approx(20.0, rel=1e-9)


def test_rouge_scores_stem_and_survive_empty_text():
    got = metrics.rouge_scores(
        ["The cats were running", "a b c d", "a", ""], ["cat runs", "d c b a", "", "a"]
    )
    np.testing.assert_array_equal(got["rougeL_recall"], [0.5, 0.25, 0, 0])
    np.testing.assert_array_equal(got["rouge1_recall"], [0.5, 1, 0, 0])
    np.testing.assert_allclose(got["rougeL_f1"], [2 / 3, 0.25, 0, 0])
    with pytest.raises(ValueError, match="1 ground truths but 2 generations"):
        metrics.rouge_scores(["a"], ["a", "b"])


def test_a_model_of_empty_answers_has_no_utility():
    rouge = metrics.rouge_scores(["some", "answers"], ["", ""])["rougeL_recall"].mean()
    assert metrics.model_utility([0.9] * 8 + [float(rouge)]) == 0.0


def test_bootstrap_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(2)
    covered = 0
    for seed in range(200):
        interval = metrics.bootstrap_interval(
            np.mean, rng.normal(3.0, 2.0, 60), resamples=200, level=0.9, seed=seed
        )
        covered += interval.low <= 3.0 <= interval.high
    assert 0.83 <= covered / 200 <= 0.96


def test_bootstrap_is_seeded_and_draws_each_sample_on_its_own():
    forget, holdout = np.linspace(0, 1, 30), np.linspace(0.3, 1.5, 20)
    first, again, other = (
        metrics.bootstrap_interval(
            membership.membership_auc, forget, holdout, resamples=100, seed=seed
        )
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other
    assert first.low < first.estimate == membership.membership_auc(forget, holdout) < first.high


def test_bootstrap_difference_pairs_rows():
    rng = np.random.default_rng(3)
    easy = rng.normal(0, 10, 100)  # what both models share dwarfs their difference
    interval = metrics.bootstrap_difference(easy + 1, easy, resamples=200)
    assert interval.estimate == pytest.approx(1)
    assert interval.high - interval.low < 1e-9


@pytest.mark.parametrize(("samples", "options", "message"), [
    ((), {}, "at least one sample"),
    ((np.zeros((0, 3)),), {}, "rows in each"),
    ((LOSS,), {"resamples": 0}, "resamples=0"),
    ((LOSS,), {"level": 95.0}, "level=95"),
])  # fmt: skip
def test_bootstrap_refuses(samples, options, message):
    with pytest.raises(ValueError, match=message):
        metrics.bootstrap_interval(np.mean, *samples, **options)
