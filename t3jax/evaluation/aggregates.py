"""The aggregates of a TOFU log, computed from its per-example values.

`aggregate` alone turns a log's rows into a metric's number: the evaluation fills its logs with it,
and `recompute.py` compares its numbers with the stored ones. The results of the model's forward
pass (losses, token-wise scores, generated text) are inputs. Numbers are computed once and cached
with the log.
"""

import itertools

import numpy as np
from jaxtyping import Float

from t3jax.evaluation import logs, membership, metrics
from t3jax.evaluation.logs import Log, Metric, MissingMetricError, compute_once

# Sets of rows, by the prefix of their metrics, with the metric that holds the true answer's loss.
TRUE_ANSWER = {
    "forget": "forget_Q_A_PARA_Prob",
    "retain": "retain_Q_A_PARA_Prob",
    "ra": "ra_Q_A_Prob",
    "wf": "wf_Q_A_Prob",
}
TRUTH_RATIOS = {
    "forget_truth_ratio": "forget",
    "retain_Truth_Ratio": "retain",
    "ra_Truth_Ratio": "ra",
    "wf_Truth_Ratio": "wf",
}
NORMALISED = {"ra_Q_A_Prob_normalised": "ra", "wf_Q_A_Prob_normalised": "wf"}
# The metrics of model utility by set: probability, truth ratio, ROUGE.
UTILITY = {
    "retain": ("retain_Q_A_Prob", "retain_Truth_Ratio", "retain_Q_A_ROUGE"),
    "ra": ("ra_Q_A_Prob_normalised", "ra_Truth_Ratio", "ra_Q_A_ROUGE"),
    "wf": ("wf_Q_A_Prob_normalised", "wf_Truth_Ratio", "wf_Q_A_ROUGE"),
}
# In the reference's order, which the last bit of their harmonic mean depends on.
_UTILITY_METRICS = tuple(itertools.chain(*map(sorted, UTILITY.values())))
# The reference averages these scores in float32, whose rounding shows in the eighth digit.
_FLOAT32_MEANS = ("mia_gradnorm", "mia_min_k", "mia_min_k_plus_plus")


def aggregate(log: Log, metric: str, retain_log: Log | None = None) -> float:
    """A metric's aggregate, in float64, from per-example values; never from a stored aggregate.

    `forget_quality` needs the retain model's log; without it `privleak` compares with an AUC of
    0.5. Missing data raises a MissingMetricError, and a retain log of other rows a ValueError.
    """
    if metric == "forget_quality":
        return forget_quality(log, retain_log).p_value
    if metric == "privleak":
        auc = aggregate(log, "mia_min_k")
        if retain_log is None:
            return membership.privleak(auc)
        try:
            return membership.privleak(auc, aggregate(retain_log, "mia_min_k"))
        except MissingMetricError as error:
            raise MissingMetricError(f"the retain log cannot be used: {error}") from error
    if metric == "model_utility":
        return metrics.model_utility([aggregate(log, part) for part in _UTILITY_METRICS])
    if metric.startswith("mia_"):
        return _membership_auc(log, metric)
    return float(np.mean(rows(log, metric)))


@compute_once
def rows(log: Log, metric: str) -> Float[np.ndarray, "rows"]:
    """The per-row numbers whose mean is a metric's aggregate, ordered by index.

    A row with several wrong answers gives their mean. Rows without an answer token are left out of
    exact memorization. A metric that is not a mean over rows raises a MissingMetricError.
    """
    if metric == "forget_truth_ratio":
        return metrics.closeness_to_one(logs.column(log, metric, "score"))
    if metric in TRUTH_RATIOS:
        return metrics.preference_for_truth(logs.column(log, metric, "score"))
    if metric in ("exact_memorization", "extraction_strength"):
        scores = logs.column(log, metric, "score")
        scores = scores[~np.isnan(scores)]
        if not len(scores):
            raise MissingMetricError(f"no row of {metric} has an answer token")
        return scores
    if metric.endswith("_ROUGE"):
        return logs.column(log, metric, "rougeL_recall")
    if metric.endswith(("_Prob", "_Prob_normalised")):
        prob = logs.column(log, metric, "prob")
        return prob.mean(axis=1) if prob.ndim == 2 else prob
    raise MissingMetricError(f"a rule for {metric} from per-example values is not known")


@compute_once
def interval(log: Log, metric: str) -> metrics.Interval:
    """The mean of `rows` with its 95 % bootstrap interval."""
    return metrics.bootstrap_interval(np.mean, rows(log, metric))


@compute_once
def forget_quality(log: Log, retain_log: Log | None) -> metrics.ForgetQuality:
    """The Kolmogorov-Smirnov test of forget rows against a retain log, which must have the same."""
    if retain_log is None:
        raise MissingMetricError("it needs the retain model's log")
    logs.check_retain_log(log, retain_log)
    return metrics.forget_quality(
        logs.column(log, "forget_truth_ratio", "score"),
        logs.column(retain_log, "forget_truth_ratio", "score"),
    )


def truth_ratios(log: Log, metric: str) -> Float[np.ndarray, "rows"]:
    """The truth ratios of a set of rows, from the losses of its true and wrong answers."""
    return metrics.truth_ratio(*_read_true_and_wrong(log, TRUTH_RATIOS[metric], "avg_loss"))


def normalised_probabilities(log: Log, metric: str) -> Float[np.ndarray, "rows"]:
    """The normalised probabilities of a set of rows, from the probabilities of its answers."""
    return metrics.normalised_probability(*_read_true_and_wrong(log, NORMALISED[metric], "prob"))


def membership_metric(
    metric: str, forget: Float[np.ndarray, "forget"], holdout: Float[np.ndarray, "holdout"]
) -> dict[str, Metric]:
    """A membership metric, e.g. `mia_loss`, and the metric of each set, by name, from scores."""
    auc = membership.membership_auc(forget, holdout)
    sets = {
        f"{metric}/{name}": Metric(mean_score(metric, scores), {"score": scores})
        for name, scores in (("forget", forget), ("holdout", holdout))
    }
    return {metric: Metric(auc, details={"auc": auc}), **sets}


def mean_score(metric: str, scores: Float[np.ndarray, "rows"]) -> float:
    """The mean of a set's membership scores, in the reference's precision."""
    dtype = np.float32 if metric in _FLOAT32_MEANS else np.float64
    return float(np.mean(scores.astype(dtype)))


@compute_once
def _membership_auc(log: Log, metric: str) -> float:
    return membership.membership_auc(
        logs.column(log, f"{metric}/forget", "score"),
        logs.column(log, f"{metric}/holdout", "score"),
    )


def _read_true_and_wrong(log: Log, prefix: str, field: str) -> tuple[np.ndarray, np.ndarray]:
    true, wrong = TRUE_ANSWER[prefix], f"{prefix}_Q_A_PERT_Prob"
    logs.check_same_rows(log, true, wrong)
    # The reference holds a single wrong answer as a number rather than a list of one.
    wrong_values = logs.column(log, wrong, field)
    return logs.column(log, true, field), wrong_values.reshape(len(wrong_values), -1)
