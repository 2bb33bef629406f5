"""Reads and writes logs as JSON files in the reference evaluator's format.

`TOFU_EVAL.json` maps a metric to `{"agg_value": x, "value_by_index": {"0": {...}}}`; a membership
metric holds such a pair for `forget` and for `holdout`, and its AUC. `TOFU_SUMMARY.json` maps the
headline metrics to their `agg_value`. A metric that is missing is null or absent, never a number;
the entry `missing`, which the reference does not read, says why. `UNLEARNING.json` has the same
form, and numbers beside the aggregates.
"""

import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import TypeGuard

import numpy as np

from t3jax import files, hosts
from t3jax.evaluation.logs import NULLABLE, Column, Log, Metric, check_log, check_numbers, summarize
from t3jax.json_files import read_json

EVAL_NAME = "TOFU_EVAL.json"
SUMMARY_NAME = "TOFU_SUMMARY.json"
UNLEARNING_NAME = "UNLEARNING.json"

_MISSING = "missing"
_NULL_WHERE_MISSING = "forget_quality"  # the reference reads other null entries as if numbers
_SETS = ("forget", "holdout")
_ROWS = "value_by_index"
# The canonical form of a row's number: int() also reads "01", "1_0" and other scripts' digits.
_INDEX = re.compile("0|[1-9][0-9]{0,17}")


def read_log(path: pathlib.Path) -> Log:
    """Reads a `TOFU_EVAL.json`, ours or the reference evaluator's, or an `UNLEARNING.json`.

    A folder is replaced by the `TOFU_EVAL.json` in it. All numbers are checked by `check_log`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is truncated, holds NaN, is not strict JSON (see `t3jax.json_files`), or
            is not such a log.
    """
    path = path / EVAL_NAME if path.is_dir() else path
    return parse_log(_read_json(path), str(path))


def read_summary(path: pathlib.Path) -> dict[str, int | float]:
    """Reads aggregates by metric from a `TOFU_SUMMARY.json` or its folder; errors as `read_log`."""
    path = path / SUMMARY_NAME if path.is_dir() else path
    content = _read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a TOFU summary: expected aggregates by metric")
    aggregates = {name: _as_number(value, f"{path}: {name}") for name, value in content.items()}
    for name, value in aggregates.items():
        check_numbers(np.asarray([value], np.float64), f"{path}: {name}")
    return aggregates


def write_log(folder: pathlib.Path, log: Log) -> None:
    """Writes `TOFU_EVAL.json`, then `TOFU_SUMMARY.json`, each whole or not at all.

    A log that `check_log` refuses is not written.
    """
    check_log(log, EVAL_NAME)
    if hosts.is_lead():
        folder.mkdir(parents=True, exist_ok=True)
        entries = _make_entries(log, [*log, *log.missing])
        for name, content in ((EVAL_NAME, entries), (SUMMARY_NAME, summarize(log))):
            # As the reference does, byte for byte: sorted metrics, four spaces, ASCII.
            text = json.dumps(dict(sorted(content.items())), indent=4, allow_nan=False)
            files.write_text(folder / name, text)


def write_unlearning(folder: pathlib.Path, log: Log, order: Sequence[str]) -> None:
    """Writes `UNLEARNING.json`, whole or not at all, all its metrics in `order`."""
    check_log(log, UNLEARNING_NAME)
    if hosts.is_lead():
        folder.mkdir(parents=True, exist_ok=True)
        files.write_json(folder / UNLEARNING_NAME, _make_entries(log, order))


def parse_log(content: object, name: str) -> Log:
    """Makes a log of its JSON; a ValueError names the metric, row and field of a fault."""
    if not isinstance(content, dict) or not content:
        raise ValueError(
            f"{name} is not a TOFU log: expected metrics by name, got {_kind(content)}"
        )
    metrics: dict[str, Metric] = {}
    missing: dict[str, str] = {}
    for metric, entry in content.items():
        where = f"{name}: {metric}"
        if metric == _MISSING:
            missing = _parse_reasons(entry, where)
            continue
        if "/" in metric:
            raise ValueError(f"{where} is not a metric: expected a name without a slash")
        if not isinstance(entry, dict) or "agg_value" not in entry:
            raise ValueError(
                f'{where} is not a metric: expected {{"agg_value": ...}}, got {_kind(entry)}; '
                f"name a {EVAL_NAME}, not a {SUMMARY_NAME}"
            )
        metrics[metric] = _parse_metric(entry, where, metric)
        for of_set in _SETS:
            if entry.get(of_set) is not None:
                metrics[f"{metric}/{of_set}"] = _parse_metric(
                    entry[of_set], f"{where}, {of_set}", metric
                )
    log = Log(metrics, missing)
    check_log(log, name)
    return log


def _parse_reasons(entry: object, where: str) -> dict[str, str]:
    reasons = entry.get("reasons") if isinstance(entry, dict) else None
    if isinstance(reasons, dict):
        texts = {name: reason for name, reason in reasons.items() if isinstance(reason, str)}
        if len(texts) == len(reasons):
            return texts
    raise ValueError(f"{where}: expected reasons, a text for each metric, got {_kind(entry)}")


def _parse_metric(entry: object, where: str, metric: str) -> Metric:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected aggregate and rows, got {_kind(entry)}")
    aggregate = entry.get("agg_value")
    if aggregate is not None:
        aggregate = _as_number(aggregate, f"{where}, agg_value")
    details = _parse_details(entry, where)
    if entry.get(_ROWS) is None:
        return Metric(aggregate, details=details)
    rows = _parse_rows(entry[_ROWS], where)
    order = sorted(rows, key=int)
    columns = {
        field: _parse_column({index: rows[index][field] for index in order}, where, metric, field)
        for field in rows[order[0]]
    }
    return Metric(aggregate, columns, np.array(list(map(int, order)), np.int64), details)


def _parse_details(entry: Mapping[str, object], where: str) -> dict[str, int | float | None]:
    """Numbers beside the aggregate; entries of other kinds are left out."""
    details: dict[str, int | float | None] = {}
    for name, value in entry.items():
        if name in ("agg_value", _ROWS, *_SETS):
            continue
        if name == "auc" and value is not None:
            _as_number(value, f"{where}, {name}")
        for key, number in value.items() if isinstance(value, dict) else [("", value)]:
            if number is None or _is_number(number):
                details[f"{name}/{key}" if key else name] = number
    return details


def _parse_rows(rows: object, where: str) -> dict[str, dict[str, object]]:
    """Checks that rows by index all have the same fields."""
    if not isinstance(rows, dict) or not rows:
        raise ValueError(f"{where}, {_ROWS}: expected rows by index, got {_kind(rows)}")
    parsed: dict[str, dict[str, object]] = {}
    first_index = next(iter(rows))
    for index, row in rows.items():
        if not _INDEX.fullmatch(index) or not isinstance(row, dict) or not row:
            raise ValueError(
                f"{where}, row {index[:40]!r}: expected a row's number, such as '0', and its fields"
            )
        parsed[index] = row
        first = parsed[first_index]
        if row.keys() != first.keys():
            raise ValueError(
                f"{where}, row {index}: has the fields {sorted(row)}, "
                f"row {first_index} has {sorted(first)}"
            )
        if len({len(value) for value in row.values() if isinstance(value, list)}) > 1:
            raise ValueError(f"{where}, row {index}: its fields have unequal numbers of answers")
    return parsed


def _parse_column(values: Mapping[str, object], where: str, metric: str, field: str) -> Column:
    """Makes a column of a field's values, by index, which must be of one kind."""
    present = [value for value in values.values() if value is not None or metric != NULLABLE]
    first = present[0] if present else None
    numbers: list = []
    for index, value in values.items():
        here = f"{where}, row {index}, {field}"
        if value is None and metric == NULLABLE and not isinstance(first, str | list):
            numbers.append(np.nan)
            continue
        if (isinstance(value, str), isinstance(value, list)) != (
            isinstance(first, str),
            isinstance(first, list),
        ):
            raise ValueError(f"{here}: {_kind(value)}, but {_kind(first)} in the first row")
        if isinstance(value, list):
            wrong = len(first) if isinstance(first, list) else 0
            if not value or len(value) != wrong:
                raise ValueError(
                    f"{here}: {len(value)} wrong answers, but {wrong} in the first row; every "
                    "row needs the same number, at least one"
                )
            numbers.append([_as_number(inner, here) for inner in value])
        else:
            numbers.append(value if isinstance(value, str) else _as_number(value, here))
    if isinstance(first, str):
        return numbers
    array = np.array(numbers)
    return array if array.dtype == np.int64 else array.astype(np.float64)


def _make_entries(log: Log, order: Sequence[str]) -> dict[str, object]:
    """A log as JSON; the reasons follow the first missing metric."""
    entries: dict[str, object] = {}
    for name in order:
        if name in log:
            entries[name] = _make_entry(log, name)
        elif name == _NULL_WHERE_MISSING:
            entries[name] = {"agg_value": None}
        if name in log.missing:
            entries[_MISSING] = {"agg_value": None, "reasons": dict(log.missing)}
    return entries


def _make_entry(log: Log, name: str) -> dict[str, object]:
    metric = log.metrics[name]
    details: dict[str, object] = {}
    for key, value in metric.details.items():
        group, _, inner = key.partition("/")
        if inner:
            grouped = details.setdefault(group, {})
            assert isinstance(grouped, dict)
            grouped[inner] = value
        else:
            details[key] = value
    sets = {part: _make_entry(log, f"{name}/{part}") for part in _SETS if f"{name}/{part}" in log}
    if sets:
        return {**sets, **details, "agg_value": metric.aggregate}
    entry: dict[str, object] = {"agg_value": metric.aggregate}
    if metric.columns:
        assert metric.index is not None
        lists = {
            field: values if isinstance(values, list) else values.tolist()
            for field, values in metric.columns.items()
        }
        entry[_ROWS] = {
            str(index): {
                field: None if isinstance(value, float) and np.isnan(value) else value
                for field, value in zip(lists, row, strict=True)
            }
            for index, *row in zip(metric.index, *lists.values(), strict=True)
        }
    return entry | details


def _as_number(value: object, where: str) -> int | float:
    if not _is_number(value):
        raise ValueError(f"{where}: expected a number, got {_kind(value)}")
    return value


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", type(None): "null"}
    return names.get(type(value), repr(value))


def _read_json(path: pathlib.Path) -> object:
    try:
        return read_json(path)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} does not exist: name a {EVAL_NAME} or its folder"
        ) from None
