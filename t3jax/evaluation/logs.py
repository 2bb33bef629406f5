"""Results of an evaluation in columns: arrays by metric, aggregates, reasons for gaps.

A `Log` holds what one setting scored. A metric that compares sets, as membership metrics do, has
the columns of each set under its own name: `mia_loss/forget` and `mia_loss/holdout` beside
`mia_loss`. `log_files.py` reads and writes JSON, and `aggregates.py` computes aggregates.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Concatenate, ParamSpec, TypeVar

import numpy as np
from jaxtyping import Float, Int

P = ParamSpec("P")
T = TypeVar("T")

# Numbers `[rows]`, or `[rows, wrong]` for wrong answers; or a text for each row.
Column = np.ndarray | list[str]

SUMMARY_METRICS = (
    "exact_memorization",
    "extraction_strength",
    "forget_Q_A_Prob",
    "forget_Q_A_ROUGE",
    "forget_quality",
    "mia_gradnorm",
    "mia_loss",
    "mia_min_k",
    "mia_min_k_plus_plus",
    "mia_reference",
    "mia_zlib",
    "model_utility",
    "privleak",
)
NULLABLE = "exact_memorization"  # NaN in the column for rows without answer tokens

_LARGEST = 1e150  # so that its square is finite
# The range of each field, and its name in errors; float32 rounds beyond 1.
_SHARE = (-1e-6, 1 + 1e-6, "a share between 0 and 1")
_RANGES = dict.fromkeys(("prob", "rouge1_recall", "rougeL_f1", "rougeL_recall", "auc"), _SHARE)
_RANGES["avg_loss"] = (-1e-6, _LARGEST, "a loss of at least 0")
_ANY = (-_LARGEST, _LARGEST, f"at most {_LARGEST:g}")


class MissingMetricError(LookupError):
    """A log does not give a metric; the message is the reason."""


@dataclasses.dataclass(frozen=True, eq=False)
class Metric:
    """One metric of a log.

    Attributes:
        aggregate: The headline number, or None.
        columns: Values by field, one for each row. A missing value is NaN.
        index: The rows' numbers, ascending, `[rows]`; None takes 0, 1, 2 and so on.
        details: Other numbers by name. A slash groups them, as in `by_samples/4`.
    """

    aggregate: int | float | None = None
    columns: Mapping[str, Column] = dataclasses.field(default_factory=dict)
    index: Int[np.ndarray, " rows"] | None = None
    details: Mapping[str, int | float | None] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        rows = {field: len(values) for field, values in self.columns.items()}
        if self.columns and self.index is None:
            first = next(iter(rows.values()))
            object.__setattr__(self, "index", np.arange(first, dtype=np.int64))
        if set(rows.values()) - {0 if self.index is None else len(self.index)}:
            raise ValueError(f"columns of one metric need equal numbers of rows, got {rows}")


@dataclasses.dataclass(frozen=True, eq=False)
class Log:
    """The measurements of a model under one setting.

    Attributes:
        metrics: The metrics by name; a metric of a single set is named `metric/set`.
        missing: Why metrics are missing, by name.
        computed: The cache of `compute_once`.
    """

    metrics: Mapping[str, Metric] = dataclasses.field(default_factory=dict)
    missing: Mapping[str, str] = dataclasses.field(default_factory=dict)
    computed: dict = dataclasses.field(default_factory=dict, init=False, repr=False)

    def __contains__(self, name: str) -> bool:
        return name in self.metrics

    def __iter__(self) -> Iterator[str]:
        """Names of the metrics, without those of single sets."""
        return (name for name in self.metrics if "/" not in name)

    def __getitem__(self, name: str) -> Metric:
        if name not in self.metrics:
            metric, _, of_set = name.partition("/")
            if metric in self.metrics:
                raise MissingMetricError(f"{metric} has no per-example values for {of_set}")
            reason = missing_reasons(self).get(metric)
            raise MissingMetricError(f"{metric} is missing" + (f": {reason}" if reason else ""))
        return self.metrics[name]

    def aggregate(self, name: str) -> int | float | None:
        """The aggregate of a metric; None where it is missing."""
        return self.metrics[name].aggregate if name in self.metrics else None

    @property
    def aggregates(self) -> dict[str, int | float]:
        """The aggregates by metric, without missing ones."""
        values = {name: self.aggregate(name) for name in self}
        return {name: value for name, value in values.items() if value is not None}


def compute_once(
    definition: Callable[Concatenate[Log, P], T],
) -> Callable[Concatenate[Log, P], T]:
    """Caches a function of a log and hashable arguments; the cache lives with the log."""

    @functools.wraps(definition)
    def look_up(log: Log, *args: P.args, **kwargs: P.kwargs) -> T:
        key = (definition, args, tuple(kwargs.items()))
        if key not in log.computed:
            log.computed[key] = definition(log, *args, **kwargs)
        return log.computed[key]

    return look_up


def collect(
    makers: Mapping[str, Callable[[Log], Mapping[str, Metric]]],
    aggregate: Callable[[Log, str], float] | None = None,
) -> Log:
    """Makes metrics one by one, and notes the reason for each that is missing.

    A maker maps the log so far to the metric and the metrics of its sets, by name. `aggregate`
    computes an aggregate that the maker leaves open, from the log with the metric's columns.
    """
    metrics: dict[str, Metric] = {}
    missing: dict[str, str] = {}
    log = Log(metrics, missing)
    for name, make in makers.items():
        results: Mapping[str, Metric] = {}
        try:
            results = make(log)
            metrics |= results
            if aggregate is not None and metrics[name].aggregate is None:
                metrics[name] = dataclasses.replace(metrics[name], aggregate=aggregate(log, name))
        except MissingMetricError as error:
            for metric in results:
                del metrics[metric]
            missing[name] = str(error)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return log


def summarize(log: Log) -> dict[str, int | float]:
    """The headline aggregates of a log, without missing ones."""
    aggregates = log.aggregates
    return {name: aggregates[name] for name in SUMMARY_METRICS if name in aggregates}


def missing_reasons(log: Log) -> dict[str, str]:
    """Why metrics are missing, by metric; metrics that were added later are left out."""
    return {name: why for name, why in log.missing.items() if log.aggregate(name) is None}


def column(log: Log, metric: str, field: str) -> Float[np.ndarray, "rows *wrong"]:
    """One number (or one list of numbers) per row of a metric such as `mia_loss/holdout`.

    It is float64, with NaN for a missing value. A log without the metric or the field raises a
    MissingMetricError, a column of texts a ValueError.
    """
    values = _values(log, metric, field)
    if isinstance(values, list):
        raise ValueError(f"{metric}, {field}: expected numbers, got texts")
    return values.astype(np.float64)


def texts(log: Log, metric: str, field: str) -> list[str]:
    """A column of texts, e.g. `generation` of a ROUGE; errors as for `column`."""
    values = _values(log, metric, field)
    if not isinstance(values, list):
        raise ValueError(f"{metric}, {field}: expected texts, got numbers")
    return values


def indices(log: Log, metric: str) -> Int[np.ndarray, " rows"]:
    """The rows' numbers of a metric, ascending; a MissingMetricError if there are none."""
    index = log[metric].index
    if index is None:
        raise MissingMetricError(f"{metric} has no per-example values")
    return index


def detail(log: Log, metric: str, name: str) -> int | float:
    """A number beside a metric's aggregate, e.g. `samples`; a MissingMetricError without it."""
    value = log[metric].details.get(name)
    if value is None:
        raise MissingMetricError(f"{metric} has no {name}")
    return value


def check_same_rows(log: Log, *metrics: str) -> None:
    """Checks that metrics which are combined row by row have the same rows."""
    first = indices(log, metrics[0])
    for metric in metrics[1:]:
        if not np.array_equal(indices(log, metric), first):
            raise ValueError(
                f"{metrics[0]} has {len(first)} rows and {metric} "
                f"{len(indices(log, metric))}, or their indices differ: they must be the same rows"
            )


@compute_once
def check_retain_log(log: Log, retain_log: Log) -> None:
    """Checks that the retain model of another log was evaluated on the same forget rows.

    Raises:
        MissingMetricError: If either lacks `forget_truth_ratio`.
        ValueError: If the forget rows differ in number, index or, where both logs hold the
            answers' texts, in text.
    """
    metric = "forget_truth_ratio"
    rows = indices(log, metric)
    try:
        retain_rows = indices(retain_log, metric)
    except MissingMetricError as error:
        raise MissingMetricError(f"the retain log cannot be used: {error}") from error
    advice = "the retain model must be evaluated on the same forget split"
    if not np.array_equal(rows, retain_rows):
        raise ValueError(
            f"the retain log is of another forget split: it has {len(retain_rows)} forget rows, "
            f"the log {len(rows)}"
            + ("" if len(rows) != len(retain_rows) else ", other indices")
            + f"; {advice}"
        )
    try:
        answers, retain_answers = (
            texts(model_log, "forget_Q_A_ROUGE", "ground_truth") for model_log in (log, retain_log)
        )
    except MissingMetricError:
        return  # Without texts, equal indices are all that can be compared.
    for row, answer, retain_answer in zip(rows, answers, retain_answers, strict=False):
        # Detokenisers differ in white space.
        if "".join(answer.split()) != "".join(retain_answer.split()):
            raise ValueError(
                "the retain log is of another forget split: the right answer of forget row "
                f"{row} differs; {advice}"
            )


def check_log(log: Log, name: str) -> None:
    """Checks that all numbers of a log are finite and in range; errors begin with `name`."""
    for metric, measured in log.metrics.items():
        where = f"{name}: {metric.replace('/', ', ')}"
        numbers = {"agg_value": measured.aggregate, **measured.details}
        for field, value in numbers.items():
            if value is not None:
                check_numbers(np.asarray([value], np.float64), f"{where}, {field}", field)
        for field, values in measured.columns.items():
            if not isinstance(values, list):
                assert measured.index is not None
                check_numbers(
                    values, where, field, measured.index.tolist(), nullable=metric == NULLABLE
                )


def check_numbers(
    values: np.ndarray,
    where: str,
    field: str = "",
    rows: Sequence[int] | None = None,
    nullable: bool = False,
) -> None:
    """Checks that numbers, `[rows]` or `[rows, wrong]`, are finite and in the range of their field.

    Errors name the place, field and row. `nullable` allows NaN, for a missing value.
    """
    low, high, expected = _RANGES.get(field, _ANY)
    bad = ~((values >= low) & (values <= high))
    if nullable:
        bad &= ~np.isnan(values)
    if not bad.any():
        return
    first = np.argwhere(bad)[0]
    value = float(values[tuple(first)])
    if rows is not None:
        where = f"{where}, row {rows[first[0]]}, {field}"
    if not np.isfinite(value):
        raise ValueError(
            f"{where} is {value}: the evaluated model gave it, and such a log cannot be compared; "
            "evaluate again with a model whose numbers are finite"
        )
    if abs(value) > _LARGEST:
        expected = _ANY[2]
    raise ValueError(f"{where} is {value:g}, expected {expected}")


def _values(log: Log, metric: str, field: str) -> Column:
    measured = log[metric]
    if not measured.columns:
        raise MissingMetricError(f"{metric} has no per-example values")
    if field not in measured.columns:
        raise MissingMetricError(f"the per-example values of {metric} have no {field}")
    return measured.columns[field]
