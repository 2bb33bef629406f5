"""The check of a TOFU log: stored numbers beside those recomputed from per-example values.

`evaluate.py --recompute LOG` prints it.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from t3jax.evaluation import aggregates, log_files, logs, metrics
from t3jax.evaluation.aggregates import NORMALISED, TRUE_ANSWER, TRUTH_RATIOS
from t3jax.evaluation.logs import Log, MissingMetricError

TOLERANCE = 1e-9
# The reference exponentiates losses in float32.
_FLOAT32_TOLERANCE = 1e-6


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A stored number beside the recomputed one.

    Attributes:
        name: The metric, and the part of it.
        stored: The number in the log; None if null.
        recomputed: The number from per-example values; None if they do not determine it.
        note: Why it could not be recomputed, or how it was; may be empty.
        tolerance: The largest relative difference of numbers that count as the same.
    """

    name: str
    stored: int | float | None
    recomputed: int | float | None
    note: str = ""
    tolerance: float = TOLERANCE

    @property
    def relative_difference(self) -> float | None:
        """The difference relative to the larger number; None if either is missing."""
        if self.stored is None or self.recomputed is None:
            return None
        if self.stored == self.recomputed:
            return 0.0
        larger = max(abs(self.stored), abs(self.recomputed))
        return abs(self.stored - self.recomputed) / larger

    @property
    def differs(self) -> bool:
        """Whether both numbers are known and disagree."""
        difference = self.relative_difference
        return difference is not None and difference > self.tolerance


def recompute(log: Log, retain_log: Log | None = None) -> list[Comparison]:
    """Recomputes all aggregates of a log, and per-example values that follow from others."""
    if retain_log is not None:
        # A retain log of other rows is an error; missing truth ratios are reported by metric.
        with contextlib.suppress(MissingMetricError):
            logs.check_retain_log(log, retain_log)
    comparisons = []
    for metric in log:
        comparisons.append(_compare_aggregate(log, metric, retain_log))
        comparisons.extend(_compare_parts(log, metric))
        comparisons.extend(_compare_rows(log, metric))
    return comparisons


def compare_summary(log: Log, summary: Mapping[str, int | float]) -> list[Comparison]:
    """Compares a `TOFU_SUMMARY.json` with the aggregates of the log beside it, metric by metric."""
    return [
        Comparison(
            f"summary, {metric}",
            float(value),
            log.aggregate(metric),
            "beside the log" if metric in log else "the log lacks it",
        )
        for metric, value in summary.items()
    ]


def compare_files(path: pathlib.Path, retain_path: pathlib.Path | None = None) -> tuple[str, bool]:
    """Compares a log, and the summary beside it if there is one, with the recomputed numbers.

    Returns the comparison as text, and whether any number differs. A broken log, or a retain log of
    other rows, raises a ValueError.
    """
    log = log_files.read_log(path)
    retain_log = None if retain_path is None else log_files.read_log(retain_path)
    try:
        comparisons = recompute(log, retain_log)
    except ValueError as error:
        against = "" if retain_path is None else f", compared with {retain_path}"
        raise ValueError(f"{path}{against}: {error}") from error
    summary_path = (path if path.is_dir() else path.parent) / log_files.SUMMARY_NAME
    if summary_path.exists():
        comparisons += compare_summary(log, log_files.read_summary(summary_path))
    text = format_comparisons(comparisons)
    with contextlib.suppress(MissingMetricError):
        test = aggregates.forget_quality(log, retain_log)
        text += (
            "\ntruth ratios of the forget rows against the retain model's: "
            f"D = {test.statistic:.4f} (p < 0.05 above D = {test.critical:.4f})"
        )
    return text, any(comparison.differs for comparison in comparisons)


def format_comparisons(comparisons: Sequence[Comparison]) -> str:
    """The comparisons as text, one per line, and the number of each outcome."""

    def show(value: int | float | None) -> str:
        return "-" if value is None else repr(float(value))

    lines = [("metric", "stored", "recomputed", "difference", "")]
    for comparison in comparisons:
        difference = comparison.relative_difference
        verdict = "" if difference is None else ("DIFFERS" if comparison.differs else "same")
        if comparison.recomputed is None:
            verdict = "not recomputed"
        lines.append(
            (
                comparison.name,
                show(comparison.stored),
                show(comparison.recomputed),
                "-" if difference is None else f"{difference:.1e}",
                ": ".join(part for part in (verdict, comparison.note) if part),
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    text = [
        f"{name:<{widths[0]}}  {stored:>{widths[1]}}  {recomputed:>{widths[2]}}  "
        f"{difference:>{widths[3]}}  {verdict}".rstrip()
        for name, stored, recomputed, difference, verdict in lines
    ]
    differing = sum(comparison.differs for comparison in comparisons)
    unknown = sum(comparison.recomputed is None for comparison in comparisons)
    same = sum(comparison.relative_difference is not None for comparison in comparisons) - differing
    return "\n".join([*text, f"{same} same, {differing} differ, {unknown} not recomputed"])


def _compare_aggregate(log: Log, metric: str, retain_log: Log | None) -> Comparison:
    stored, note = log[metric].aggregate, ""
    if metric == "privleak":
        # A null forget_quality shows that the log was made without a retain log.
        if "forget_quality" in log and log.aggregate("forget_quality") is None:
            retain_log, note = None, "against an AUC of 0.5: the log was made without a retain log"
        elif retain_log is None:
            return Comparison(metric, stored, None, "it needs the retain model's log")
    try:
        return Comparison(metric, stored, aggregates.aggregate(log, metric, retain_log), note)
    except MissingMetricError as error:
        return Comparison(metric, stored, None, str(error))


def _compare_parts(log: Log, metric: str) -> Iterator[Comparison]:
    """Compares the numbers of a membership metric other than its aggregate."""
    if "auc" in log[metric].details:
        comparison = _compare_aggregate(log, metric, None)
        stored = log[metric].details["auc"]
        yield dataclasses.replace(comparison, name=f"{metric}, auc", stored=stored)
    for part in ("forget", "holdout"):
        name = f"{metric}/{part}"
        if name in log and log[name].columns:
            mean = aggregates.mean_score(metric, logs.column(log, name, "score"))
            yield Comparison(f"{metric}, mean of {part}", log[name].aggregate, mean)


def _compare_rows(log: Log, metric: str) -> Iterator[Comparison]:
    """Compares per-example values that follow from other per-example values of the log."""
    try:
        if metric in TRUTH_RATIOS:
            logs.check_same_rows(log, metric, TRUE_ANSWER[TRUTH_RATIOS[metric]])
            recomputed = {"score": aggregates.truth_ratios(log, metric)}
        elif metric in NORMALISED:
            logs.check_same_rows(log, metric, TRUE_ANSWER[NORMALISED[metric]])
            recomputed = {"prob": aggregates.normalised_probabilities(log, metric)}
        elif metric.endswith("_Prob"):
            recomputed = {"prob": metrics.probability(logs.column(log, metric, "avg_loss"))}
        elif metric.endswith("_ROUGE"):
            recomputed = metrics.rouge_scores(
                logs.texts(log, metric, "ground_truth"), logs.texts(log, metric, "generation")
            )
        else:
            return
        stored = {field: logs.column(log, metric, field) for field in recomputed}
    except MissingMetricError as error:
        yield Comparison(f"{metric}, rows", None, None, str(error))
        return
    for field, values in recomputed.items():
        yield _compare_worst_row(log, metric, field, stored[field], values)


def _compare_worst_row(
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
