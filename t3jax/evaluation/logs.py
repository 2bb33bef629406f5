"""TOFU logs in the reference evaluator's format: built, checked, read and written.

`TOFU_EVAL.json` maps a metric to `{"agg_value": x, "value_by_index": {"0": {...}}}`; a membership
metric holds such a pair for `forget` and for `holdout`, and its AUC. `TOFU_SUMMARY.json` maps the
headline metrics to their `agg_value`. What is missing is null or absent, never a number; the
entry `missing`, which the reference does not read, says why. This module computes no metric.
"""

import json
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from t3jax import hosts
from t3jax.files import replacing
from t3jax.json_files import read_json

Log = dict[str, dict[str, Any]]

EVAL_NAME = "TOFU_EVAL.json"
SUMMARY_NAME = "TOFU_SUMMARY.json"
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
MISSING = "missing"

# Rows without answer tokens have no exact memorization: the only value that may be null.
_NULLABLE = "exact_memorization"
# Fields whose numbers are shares; float32 rounds beyond 1.
_SHARES = ("prob", "rouge1_recall", "rougeL_f1", "rougeL_recall", "auc")
_LARGEST = 1e150  # so that its square is finite
# Rows by number, each in one way of writing: int() reads "01", "1_0" and other scripts' digits too.
_INDEX = re.compile("0|[1-9][0-9]{0,17}")


class MissingMetricError(LookupError):
    """A metric cannot be had from a log; the message is the reason."""


def read_log(path: pathlib.Path) -> Log:
    """Reads a `TOFU_EVAL.json`, of this project or of the reference evaluator.

    Args:
        path: The file, or the folder that holds it.

    Returns:
        The log, checked by `check_log`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is cut short, holds NaN, is no strict JSON (see `t3jax.json_files`), or is
            not such a log.
    """
    path = path / EVAL_NAME if path.is_dir() else path
    log = _read_json(path)
    check_log(log, str(path))
    return log


def read_summary(path: pathlib.Path) -> dict[str, float]:
    """Reads a `TOFU_SUMMARY.json`.

    Args:
        path: The file, or the folder that holds it.

    Returns:
        Aggregates by metric.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is cut short, holds NaN, is no strict JSON (see `t3jax.json_files`), or is
            not such a summary.
    """
    path = path / SUMMARY_NAME if path.is_dir() else path
    aggregates = _read_json(path)
    if not isinstance(aggregates, dict):
        raise ValueError(f"{path} is not a TOFU summary: expected aggregates by metric")
    for metric, value in aggregates.items():
        _check_number(value, f"{path}: {metric}")
    return aggregates


def write_log(folder: pathlib.Path, log: Log) -> None:
    """Writes `TOFU_EVAL.json`, then `TOFU_SUMMARY.json`, each whole or not at all.

    Args:
        folder: Where to; made if need be.
        log: The log.

    Raises:
        ValueError: If the log does not pass `check_log`; nothing is then written.
    """
    check_log(log, EVAL_NAME)
    if not hosts.is_lead():
        return
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / EVAL_NAME, log)
    _write_json(folder / SUMMARY_NAME, summary(log))


def summary(log: Log) -> dict[str, float]:
    """The headline aggregates of a log, those that are missing left out."""
    aggregates = {metric: log.get(metric, {}).get("agg_value") for metric in SUMMARY_METRICS}
    return {metric: value for metric, value in aggregates.items() if value is not None}


def per_example(agg_value: float, **fields: Sequence[Any] | np.ndarray) -> dict[str, Any]:
    """A metric's entry from its columns, e.g. `per_example(mean, prob=..., avg_loss=...)`.

    Args:
        agg_value: The aggregate.
        **fields: One value per row each: `[rows]`, `[rows, wrong]` or texts; NaN is written null.

    Returns:
        `{"agg_value": ..., "value_by_index": {"0": {field: value}}}`.

    Raises:
        ValueError: If the columns have unequal numbers of rows.
    """
    columns = {
        name: values.tolist() if isinstance(values, np.ndarray) else list(values)
        for name, values in fields.items()
    }
    if len({len(values) for values in columns.values()}) > 1:
        rows = {name: len(values) for name, values in columns.items()}
        raise ValueError(f"columns of one metric need equal numbers of rows, got {rows}")
    by_index = {
        str(index): dict(zip(columns, map(_null_if_nan, row), strict=True))
        for index, row in enumerate(zip(*columns.values(), strict=True))
    }
    return {"agg_value": agg_value, "value_by_index": by_index}


def mark_missing(log: Log, metric: str, reason: str) -> None:
    """Notes in a log that a metric is missing and why.

    The metric's own entry is left out, except that of `forget_quality`, which the reference holds
    as null: it reads other null entries as if they were numbers.

    Args:
        log: The log to change.
        metric: The metric.
        reason: Why, for people.
    """
    log.pop(metric, None)
    if metric == "forget_quality":
        log[metric] = {"agg_value": None}
    log.setdefault(MISSING, {"agg_value": None, "reasons": {}})["reasons"][metric] = reason


def missing_reasons(log: Log) -> dict[str, str]:
    """Why metrics are missing, by metric, as noted by `mark_missing` and not filled in since."""
    return {
        metric: reason
        for metric, reason in log.get(MISSING, {}).get("reasons", {}).items()
        if log.get(metric, {}).get("agg_value") is None
    }


def column(
    log: Log, metric: str, field: str, part: str | None = None
) -> Float[np.ndarray, "rows *wrong"]:
    """One number (or one list of numbers) per row of a metric, ordered by index.

    Args:
        log: A checked log.
        metric: The metric, e.g. `forget_Q_A_Prob`.
        field: The field of its per-example values, e.g. `avg_loss`.
        part: `forget` or `holdout` of a membership metric.

    Returns:
        Float64 `[rows]`, or `[rows, wrong]`; NaN where the log holds null.

    Raises:
        MissingMetricError: If the log lacks the metric or the field.
        ValueError: If the field is of the other kind.
    """
    values = _values(log, metric, field, part)
    if isinstance(values[0], str):
        raise ValueError(f"{metric}, {field}: expected numbers, got texts")
    return np.array(values, np.float64)


def texts(log: Log, metric: str, field: str) -> list[str]:
    """One text per row of a metric, ordered by index, e.g. the field `generation` of a ROUGE.

    Args:
        log: A checked log.
        metric: The metric.
        field: The field of its per-example values.

    Returns:
        The texts, `[rows]`.

    Raises:
        MissingMetricError: If the log lacks the metric or the field.
        ValueError: If the field is of the other kind.
    """
    values = _values(log, metric, field, None)
    if not isinstance(values[0], str):
        raise ValueError(f"{metric}, {field}: expected texts, got {_kind(values[0])}")
    return values


def indices(log: Log, metric: str, part: str | None = None) -> list[int]:
    """The rows' indices of a metric, ascending.

    Raises:
        MissingMetricError: If the log lacks the metric or its per-example values.
    """
    return sorted(map(int, _by_index(log, metric, part)))


def check_same_rows(log: Log, *metrics: str) -> None:
    """Checks that metrics which are combined row by row are about the same rows.

    Raises:
        MissingMetricError: If the log lacks one of them.
        ValueError: If their indices differ.
    """
    first = indices(log, metrics[0])
    for metric in metrics[1:]:
        if indices(log, metric) != first:
            raise ValueError(
                f"{metrics[0]} has {len(first)} rows and {metric} "
                f"{len(indices(log, metric))}, or their indices differ: they must be the same rows"
            )


def check_retain_log(log: Log, retain_log: Log) -> None:
    """Checks that a retain model was evaluated on the same forget rows.

    Args:
        log: The log of a model.
        retain_log: The log of the retain model.

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
    if rows != retain_rows:
        raise ValueError(
            f"the retain log is of another forget split: it has {len(retain_rows)} forget rows, "
            f"the log {len(rows)}"
            + ("" if len(rows) != len(retain_rows) else ", other indices")
            + f"; {advice}"
        )
    try:
        answers, retain_answers = (
            texts(each, "forget_Q_A_ROUGE", "ground_truth") for each in (log, retain_log)
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


def check_log(log: Any, name: str) -> None:
    """Checks that an object is a log, and that all its numbers are finite.

    Args:
        log: What was read from JSON, or is to be written.
        name: What to call it in errors.

    Raises:
        ValueError: Naming the metric, row and field of what is wrong.
    """
    if not isinstance(log, dict) or not log:
        raise ValueError(f"{name} is not a TOFU log: expected metrics by name, got {_kind(log)}")
    for metric, entry in log.items():
        where = f"{name}: {metric}"
        if metric == MISSING:
            _check_reasons(entry, where)
            continue
        if not isinstance(entry, dict) or "agg_value" not in entry:
            raise ValueError(
                f'{where} is not a metric: expected {{"agg_value": ...}}, got {_kind(entry)}; '
                f"name a {EVAL_NAME}, not a {SUMMARY_NAME}"
            )
        for part in (None, "forget", "holdout"):
            values = entry if part is None else entry.get(part)
            if values is not None:
                _check_values(values, where if part is None else f"{where}, {part}", metric)


def _check_reasons(entry: Any, where: str) -> None:
    reasons = entry.get("reasons") if isinstance(entry, dict) else None
    if not isinstance(reasons, dict) or not all(isinstance(r, str) for r in reasons.values()):
        raise ValueError(f"{where}: expected reasons, a text for each metric, got {_kind(entry)}")


def _check_values(values: Any, where: str, metric: str) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected aggregate and rows, got {_kind(values)}")
    for field in ("agg_value", "auc"):
        if values.get(field) is not None:
            _check_number(values[field], f"{where}, {field}", field)
    rows = values.get("value_by_index")
    if rows is None:
        return
    if not isinstance(rows, dict) or not rows:
        raise ValueError(f"{where}, value_by_index: expected rows by index, got {_kind(rows)}")
    first_index, first = next(iter(rows.items()))
    for index, row in rows.items():
        if not _INDEX.fullmatch(index) or not isinstance(row, dict) or not row:
            raise ValueError(
                f"{where}, row {index[:40]!r}: expected a row's number, such as '0', and its fields"
            )
        if row.keys() != first.keys():
            raise ValueError(
                f"{where}, row {index}: has the fields {sorted(row)}, "
                f"row {first_index} has {sorted(first)}"
            )
        if len({len(value) for value in row.values() if isinstance(value, list)}) > 1:
            raise ValueError(f"{where}, row {index}: its fields have unequal numbers of answers")
        for field, value in row.items():
            _check_field(value, first[field], f"{where}, row {index}, {field}", metric, field)


def _check_field(value: Any, first: Any, where: str, metric: str, field: str) -> None:
    if value is None and metric == _NULLABLE:
        return
    if isinstance(value, str) != isinstance(first, str):
        raise ValueError(f"{where}: {_kind(value)}, but {_kind(first)} in the first row")
    if isinstance(value, str):
        return
    if isinstance(value, list) != isinstance(first, list):
        raise ValueError(f"{where}: {_kind(value)}, but {_kind(first)} in the first row")
    if isinstance(value, list):
        if not value or len(value) != len(first):
            raise ValueError(
                f"{where}: {len(value)} wrong answers, but {len(first)} in the first row; every "
                "row needs the same number, at least one"
            )
        for number in value:
            _check_number(number, where, field)
        return
    _check_number(value, where, field)


def _check_number(value: Any, where: str, field: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where}: expected a number, got {_kind(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(
            f"{where} is {value}: the model that was evaluated gave it; such a log compares with "
            "nothing"
        )
    if field in _SHARES and not -1e-6 <= value <= 1 + 1e-6:
        raise ValueError(f"{where} is {value:g}, expected a share between 0 and 1")
    if field == "avg_loss" and value < -1e-6:
        raise ValueError(f"{where} is {value:g}, expected a loss of at least 0")
    if abs(value) > _LARGEST:
        raise ValueError(f"{where} is {value:g}, expected at most {_LARGEST:g}")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", type(None): "null"}
    return names.get(type(value), repr(value))


def _null_if_nan(value: Any) -> Any:
    return None if isinstance(value, float) and np.isnan(value) else value


def _by_index(log: Log, metric: str, part: str | None) -> Mapping[str, Mapping[str, Any]]:
    entry = log.get(metric)
    if entry is None:
        reason = missing_reasons(log).get(metric)
        raise MissingMetricError(f"{metric} is missing" + (f": {reason}" if reason else ""))
    rows = (entry if part is None else entry.get(part) or {}).get("value_by_index")
    if rows is None:
        of_part = f" for {part}" if part else ""
        raise MissingMetricError(f"{metric} has no per-example values{of_part}")
    return rows


def _values(log: Log, metric: str, field: str, part: str | None) -> list[Any]:
    rows = _by_index(log, metric, part)
    if field not in next(iter(rows.values())):
        raise MissingMetricError(f"the per-example values of {metric} have no {field}")
    return [rows[index][field] for index in sorted(rows, key=int)]


def _read_json(path: pathlib.Path) -> Any:
    try:
        return read_json(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is not there: name a {EVAL_NAME} or its folder") from None


def _write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Writes JSON as the reference does, byte for byte: sorted metrics, four spaces, ASCII."""
    text = json.dumps(dict(sorted(content.items())), indent=4, allow_nan=False)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
