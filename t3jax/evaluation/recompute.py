"""Which per-example values make which aggregate of a TOFU log, and the check of a whole log.

`aggregate` is the one place that turns a log's rows into a metric's number: the evaluation fills
its logs with it, and `recompute` compares its numbers with those stored in any log. What only the
model's forward pass gives (losses, token-wise scores, generated text) is taken as it is.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float

from t3jax.evaluation import logs, metrics
from t3jax.evaluation.logs import Log, MissingMetricError

# Sets of rows, by the prefix of their metrics, with the metric that holds the true answer's loss.
_TRUE_ANSWER = {
    "forget": "forget_Q_A_PARA_Prob",
    "retain": "retain_Q_A_PARA_Prob",
    "ra": "ra_Q_A_Prob",
    "wf": "wf_Q_A_Prob",
}
_TRUTH_RATIOS = {
    "forget_truth_ratio": "forget",
    "retain_Truth_Ratio": "retain",
    "ra_Truth_Ratio": "ra",
    "wf_Truth_Ratio": "wf",
}
_NORMALISED = {"ra_Q_A_Prob_normalised": "ra", "wf_Q_A_Prob_normalised": "wf"}
UTILITY_METRICS = (
    "retain_Q_A_Prob",
    "retain_Q_A_ROUGE",
    "retain_Truth_Ratio",
    "ra_Q_A_Prob_normalised",
    "ra_Q_A_ROUGE",
    "ra_Truth_Ratio",
    "wf_Q_A_Prob_normalised",
    "wf_Q_A_ROUGE",
    "wf_Truth_Ratio",
)
# The reference averages these scores in float32, whose rounding shows in the eighth digit.
_FLOAT32_MEANS = ("mia_gradnorm", "mia_min_k", "mia_min_k_plus_plus")

TOLERANCE = 1e-9
# The reference exponentiates losses in float32.
_FLOAT32_TOLERANCE = 1e-6


def aggregate(log: Log, metric: str, retain_log: Log | None = None) -> float:
    """A metric's aggregate from per-example values.

    Args:
        log: A checked log; only its per-example values are read, never a stored aggregate.
        metric: The metric.
        retain_log: The retain model's log, which `forget_quality` needs. Without it `privleak`
            compares with an AUC of 0.5.

    Returns:
        The aggregate, computed in float64.

    Raises:
        MissingMetricError: If data is missing; the message says which.
        ValueError: If data which is combined row by row is not of the same rows.
    """
    if metric == "forget_quality":
        return forget_quality(log, retain_log).p_value
    if metric == "privleak":
        auc = aggregate(log, "mia_min_k")
        if retain_log is None:
            return metrics.privleak(auc)
        try:
            return metrics.privleak(auc, aggregate(retain_log, "mia_min_k"))
        except MissingMetricError as error:
            raise MissingMetricError(f"the retain log cannot be used: {error}") from error
    if metric == "model_utility":
        return metrics.model_utility([aggregate(log, each) for each in UTILITY_METRICS])
    if metric.startswith("mia_"):
        return metrics.membership_auc(
            logs.column(log, metric, "score", "forget"),
            logs.column(log, metric, "score", "holdout"),
        )
    return float(np.mean(rows(log, metric)))


def rows(log: Log, metric: str) -> Float[np.ndarray, "rows"]:
    """The per-row numbers whose mean is a metric's aggregate, for intervals and comparisons.

    Args:
        log: A checked log.
        metric: A probability, ROUGE, truth ratio or memorization metric.

    Returns:
        `[rows]`, ordered by index; of wrong answers, the mean over them; of exact memorization,
        without the rows that have no answer token.

    Raises:
        MissingMetricError: If data is missing, or the metric is not a mean over rows.
    """
    if metric == "forget_truth_ratio":
        return metrics.closeness_to_one(logs.column(log, metric, "score"))
    if metric in _TRUTH_RATIOS:
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
    raise MissingMetricError(f"how {metric} comes from per-example values is not known")


def forget_quality(log: Log, retain_log: Log | None) -> metrics.ForgetQuality:
    """The Kolmogorov-Smirnov test of a log's forget rows against the retain model's.

    Args:
        log: A checked log.
        retain_log: The retain model's log.

    Returns:
        p-value, D and the critical D.

    Raises:
        MissingMetricError: If there is no retain log, or either log lacks `forget_truth_ratio`.
        ValueError: If the retain log is of other forget rows.
    """
    if retain_log is None:
        raise MissingMetricError("it needs the retain model's log")
    logs.check_retain_log(log, retain_log)
    return metrics.forget_quality(
        logs.column(log, "forget_truth_ratio", "score"),
        logs.column(retain_log, "forget_truth_ratio", "score"),
    )


def truth_ratios(log: Log, metric: str) -> Float[np.ndarray, "rows"]:
    """The truth ratios of a set of rows, from the losses of its true and wrong answers.

    Args:
        log: A checked log.
        metric: The truth ratio metric, e.g. `forget_truth_ratio`.

    Returns:
        `[rows]`, ordered by index.

    Raises:
        MissingMetricError: If losses are missing.
        ValueError: If true and wrong answers are not of the same rows.
    """
    true, wrong = _true_and_wrong(log, _TRUTH_RATIOS[metric], "avg_loss")
    return metrics.truth_ratio(true, wrong)


def normalised_probabilities(log: Log, metric: str) -> Float[np.ndarray, "rows"]:
    """The normalised probabilities of a set of rows, from those of its right and wrong answers.

    Args:
        log: A checked log.
        metric: `ra_Q_A_Prob_normalised` or `wf_Q_A_Prob_normalised`.

    Returns:
        `[rows]`, ordered by index.

    Raises:
        MissingMetricError: If probabilities are missing.
        ValueError: If right and wrong answers are not of the same rows.
    """
    return metrics.normalised_probability(*_true_and_wrong(log, _NORMALISED[metric], "prob"))


def membership_entry(
    metric: str, forget: Float[np.ndarray, "forget"], holdout: Float[np.ndarray, "holdout"]
) -> dict[str, object]:
    """A membership metric's entry of a log.

    Args:
        metric: The metric, e.g. `mia_loss`.
        forget: Scores of the forget rows.
        holdout: Scores of the holdout rows.

    Returns:
        `{"forget": ..., "holdout": ..., "auc": ..., "agg_value": ...}`.
    """
    auc = metrics.membership_auc(forget, holdout)
    return {
        "forget": logs.per_example(_mean_score(metric, forget), score=forget),
        "holdout": logs.per_example(_mean_score(metric, holdout), score=holdout),
        "auc": auc,
        "agg_value": auc,
    }


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A stored number beside the recomputed one.

    Attributes:
        name: The metric, and which of its numbers.
        stored: What the log holds; None if null.
        recomputed: What per-example values give; None if they do not determine it.
        note: Why it could not be recomputed, or how it was; may be empty.
        tolerance: The largest relative difference that is no difference.
    """

    name: str
    stored: float | None
    recomputed: float | None
    note: str = ""
    tolerance: float = TOLERANCE

    @property
    def relative_difference(self) -> float | None:
        """The difference relative to the larger of the two; None if there are not two."""
        if self.stored is None or self.recomputed is None:
            return None
        if self.stored == self.recomputed:
            return 0.0
        larger = max(abs(self.stored), abs(self.recomputed))
        return abs(self.stored - self.recomputed) / larger

    @property
    def differs(self) -> bool:
        """Whether the two numbers are there and disagree."""
        difference = self.relative_difference
        return difference is not None and difference > self.tolerance


def recompute(log: Log, retain_log: Log | None = None) -> list[Comparison]:
    """Recomputes every aggregate of a log, and every per-example value that others determine.

    Args:
        log: A checked log.
        retain_log: The retain model's log.

    Returns:
        Comparisons in the order of the log's metrics. Of per-example values, the row that differs
        most stands for all.

    Raises:
        ValueError: If the retain log is of other rows, or metrics combined row by row are.
    """
    if retain_log is not None:
        # A retain log without truth ratios is reported by metric, one of other rows is an error.
        with contextlib.suppress(MissingMetricError):
            logs.check_retain_log(log, retain_log)
    comparisons = []
    for metric in log:
        if metric == logs.MISSING:
            continue
        comparisons.append(_compare_aggregate(log, metric, retain_log))
        comparisons.extend(_compare_parts(log, metric))
        comparisons.extend(_compare_rows(log, metric))
    return comparisons


def compare_summary(log: Log, summary: dict[str, float]) -> list[Comparison]:
    """Compares a `TOFU_SUMMARY.json` with the aggregates of the log beside it.

    Args:
        log: A checked log.
        summary: Aggregates by metric.

    Returns:
        A comparison per metric of the summary, whose `recomputed` is what the log holds.
    """
    return [
        Comparison(
            f"summary, {metric}",
            float(value),
            log.get(metric, {}).get("agg_value"),
            "beside the log" if metric in log else "the log lacks it",
        )
        for metric, value in summary.items()
    ]


def compare_files(path: pathlib.Path, retain_path: pathlib.Path | None = None) -> tuple[str, bool]:
    """Compares a log, and the summary beside it if there is one, with what its rows give.

    Args:
        path: A `TOFU_EVAL.json` or its folder.
        retain_path: That of the retain model.

    Returns:
        The comparison as text, and whether any number differs.

    Raises:
        FileNotFoundError: If a log is not there.
        ValueError: If a log is broken, or the retain log is of other rows.
    """
    log = logs.read_log(path)
    retain_log = None if retain_path is None else logs.read_log(retain_path)
    try:
        comparisons = recompute(log, retain_log)
    except ValueError as error:
        beside = "" if retain_path is None else f", compared with {retain_path}"
        raise ValueError(f"{path}{beside}: {error}") from error
    summary_path = (path if path.is_dir() else path.parent) / logs.SUMMARY_NAME
    if summary_path.exists():
        comparisons += compare_summary(log, logs.read_summary(summary_path))
    text = table(comparisons)
    with contextlib.suppress(MissingMetricError):
        test = forget_quality(log, retain_log)
        text += (
            "\ntruth ratios of the forget rows against the retain model's: "
            f"D = {test.statistic:.4f} (p < 0.05 above D = {test.critical:.4f})"
        )
    return text, any(comparison.differs for comparison in comparisons)


def table(comparisons: list[Comparison]) -> str:
    """The comparisons as text, one per line, and a count of how they came out.

    Args:
        comparisons: What `recompute` found.

    Returns:
        Lines of name, stored number, recomputed number, relative difference, verdict and note.
    """
    lines = [("metric", "stored", "recomputed", "difference", "")]
    for each in comparisons:
        difference = each.relative_difference
        verdict = "" if difference is None else ("DIFFERS" if each.differs else "same")
        if each.recomputed is None:
            verdict = "not recomputed"
        lines.append(
            (
                each.name,
                "-" if each.stored is None else repr(float(each.stored)),
                "-" if each.recomputed is None else repr(float(each.recomputed)),
                "-" if difference is None else f"{difference:.1e}",
                ": ".join(part for part in (verdict, each.note) if part),
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    text = [
        f"{name:<{widths[0]}}  {stored:>{widths[1]}}  {recomputed:>{widths[2]}}  "
        f"{difference:>{widths[3]}}  {verdict}".rstrip()
        for name, stored, recomputed, difference, verdict in lines
    ]
    differing = sum(each.differs for each in comparisons)
    unknown = sum(each.recomputed is None for each in comparisons)
    same = sum(each.relative_difference is not None for each in comparisons) - differing
    return "\n".join([*text, f"{same} same, {differing} differ, {unknown} not recomputed"])


def _compare_aggregate(log: Log, metric: str, retain_log: Log | None) -> Comparison:
    stored, note = log[metric]["agg_value"], ""
    if metric == "privleak":
        # Whether a retain log was used shows in forget_quality: null says that there was none.
        quality = log.get("forget_quality")
        if quality is not None and quality["agg_value"] is None:
            retain_log, note = None, "against an AUC of 0.5: the log was made without a retain log"
        elif retain_log is None:
            return Comparison(metric, stored, None, "it needs the retain model's log")
    try:
        return Comparison(metric, stored, aggregate(log, metric, retain_log), note)
    except MissingMetricError as error:
        return Comparison(metric, stored, None, str(error))


def _compare_parts(log: Log, metric: str) -> Iterator[Comparison]:
    """The numbers of a membership metric beside its agg_value."""
    entry = log[metric]
    if "auc" in entry:
        compared = _compare_aggregate(log, metric, None)
        yield dataclasses.replace(compared, name=f"{metric}, auc", stored=entry["auc"])
    for part in ("forget", "holdout"):
        values = entry.get(part) or {}
        if values.get("value_by_index") is not None:
            mean = _mean_score(metric, logs.column(log, metric, "score", part))
            yield Comparison(f"{metric}, mean of {part}", values.get("agg_value"), mean)


def _compare_rows(log: Log, metric: str) -> Iterator[Comparison]:
    """Per-example values that other per-example values of the log determine."""
    try:
        if metric in _TRUTH_RATIOS:
            logs.check_same_rows(log, metric, _TRUE_ANSWER[_TRUTH_RATIOS[metric]])
            found = {"score": truth_ratios(log, metric)}
        elif metric in _NORMALISED:
            logs.check_same_rows(log, metric, _TRUE_ANSWER[_NORMALISED[metric]])
            found = {"prob": normalised_probabilities(log, metric)}
        elif metric.endswith("_Prob"):
            found = {"prob": metrics.probability(logs.column(log, metric, "avg_loss"))}
        elif metric.endswith("_ROUGE"):
            found = metrics.rouge_scores(
                logs.texts(log, metric, "ground_truth"), logs.texts(log, metric, "generation")
            )
        else:
            return
        stored = {field: logs.column(log, metric, field) for field in found}
    except MissingMetricError as error:
        yield Comparison(f"{metric}, rows", None, None, str(error))
        return
    for field, values in found.items():
        yield _worst_row(log, metric, field, stored[field], values)


def _worst_row(
    log: Log, metric: str, field: str, stored: np.ndarray, values: np.ndarray
) -> Comparison:
    tolerance = TOLERANCE
    if metric.endswith("_Prob"):
        tolerance = _FLOAT32_TOLERANCE
        # Near the smallest normal float32 the reference's probabilities lose digits, then vanish.
        vanishing = np.maximum(stored, values) < np.finfo(np.float32).tiny / tolerance
        stored, values = np.where(vanishing, 0.0, stored), np.where(vanishing, 0.0, values)
    larger = np.maximum(np.abs(stored), np.abs(values))
    relative = np.abs(stored - values) / np.where(larger > 0, larger, 1.0)
    worst = np.unravel_index(np.argmax(relative), relative.shape)
    return Comparison(
        f"{metric}, {field} of row {logs.indices(log, metric)[worst[0]]}",
        float(stored[worst]),
        float(values[worst]),
        f"the largest difference of {len(values)} rows",
        tolerance,
    )


def _true_and_wrong(log: Log, prefix: str, field: str) -> tuple[np.ndarray, np.ndarray]:
    true, wrong = _TRUE_ANSWER[prefix], f"{prefix}_Q_A_PERT_Prob"
    logs.check_same_rows(log, true, wrong)
    # The reference holds a single wrong answer as a number rather than a list of one.
    wrong_values = logs.column(log, wrong, field)
    return logs.column(log, true, field), wrong_values.reshape(len(wrong_values), -1)


def _mean_score(metric: str, scores: np.ndarray) -> float:
    dtype = np.float32 if metric in _FLOAT32_MEANS else np.float64
    return float(np.mean(scores.astype(dtype)))
