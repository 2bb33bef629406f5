"""The report's tables as plain data, made of logs for the template.

All numbers are defined in `evaluation`; this module chooses, rounds and names them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from t3jax.evaluation import aggregates, answers, logs, metrics, selection
from t3jax.evaluation.logs import Log, MissingMetricError
from t3jax.evaluation.settings import Setting, serve_alike, tilt_only

BASE = "base"
UNLEARNED = "unlearned"
TEMPERED = "control: tempered only"
TILTED = "control: tilted only"
RETAIN_MODEL = "retain model"
SECOND_RETAIN_MODEL = "second retain model"  # the noise floor


class Cell(NamedTuple):
    """A number of a table, or a dash, and a small note beside it, such as its interval."""

    text: str
    note: str = ""


class Row(NamedTuple):
    """A row of a table; its kind is base, unlearned, one of the controls, or retain model."""

    label: str
    kind: str
    cells: list[Cell]


class Table(NamedTuple):
    """A table."""

    columns: list[str]
    rows: list[Row]


class CardRow(NamedTuple):
    """A line of a headline card."""

    label: str
    kind: str
    value: str
    featured: bool


class Card(NamedTuple):
    """One headline number of the models that matter."""

    title: str
    meaning: str
    rows: list[CardRow]


MISSING = Cell("\N{EN DASH}")


def kind_of(setting: Setting, settings: Sequence[Setting]) -> str:
    """Names the kind of a setting; a tilt at T = 1 is a control of a setting at another T."""
    if setting.guidance_scale == 0:
        return BASE if setting.base_temperature == 1 else TEMPERED
    tempered = [other for other in settings if other.base_temperature != 1]
    is_control = any(serve_alike(setting, tilt_only(other)) for other in tempered)
    return TILTED if is_control else UNLEARNED


def cards(models: Sequence[tuple[str, str, Log]], retain_log: Log | None) -> list[Card]:
    """The headline numbers, without those that no model has.

    Models are label, kind and log: base, featured setting and retain model.
    """
    utility, recall = utility_name(models[0][2]), "ROUGE-L recall of greedy answers"
    columns: list[tuple[str, str, Callable[[str, Log], Cell]]] = [
        (
            "Forget quality",
            "p of a test against the retain model: 1 is the best",
            lambda kind, log: _show_quality(kind, log, retain_log)[0],
        ),
        (
            utility[:1].upper() + utility[1:],
            "what is kept, from 0 to 1",
            lambda _, log: _show_interval(selection.utility_interval, log),
        ),
        ("Forget answers recited", recall, lambda _, log: _show_mean(log, "forget_Q_A_ROUGE")),
        ("Retain answers recited", recall, lambda _, log: _show_mean(log, "retain_Q_A_ROUGE")),
    ]
    shown = []
    for title, meaning, number in columns:
        rows = [
            CardRow(label, kind, number(kind, log).text, kind not in (BASE, RETAIN_MODEL))
            for label, kind, log in models
        ]
        if any(row.value != MISSING.text for row in rows):
            shown.append(Card(title, meaning, rows))
    return shown


def summary_table(
    settings: Sequence[Setting],
    evaluated: Mapping[str, Log],
    retain_log: Log | None,
    second_retain_log: Log | None = None,
) -> Table:
    """The headline numbers of settings and retain models, with 95 % bootstrap intervals."""
    named = _name_models(settings, evaluated, retain_log, second_retain_log)
    means = {
        "forget ROUGE-L recall": "forget_Q_A_ROUGE",
        "forget probability": "forget_Q_A_Prob",
        "retain ROUGE-L recall": "retain_Q_A_ROUGE",
        "retain probability": "retain_Q_A_Prob",
    }
    rows = [
        Row(
            name,
            kind,
            [
                *_show_quality(kind, log, retain_log),
                _show_interval(selection.utility_interval, log),
                *(_show_mean(log, metric) for metric in means.values()),
            ],
        )
        for name, kind, log in named
    ]
    columns = ["forget quality", "distance D", utility_name(evaluated[settings[0].name])]
    return Table([*columns, *means], rows)


def _name_models(
    settings: Sequence[Setting],
    by_name: Mapping[str, Log],
    retain: Log | None,
    second_retain: Log | None,
) -> list[tuple[str, str, Log]]:
    """Name, kind and log of every setting and retain model."""
    named = [
        (setting.name, kind_of(setting, settings), by_name[setting.name]) for setting in settings
    ]
    for kind, log in ((RETAIN_MODEL, retain), (SECOND_RETAIN_MODEL, second_retain)):
        if log is not None:
            named.append((kind, kind, log))
    return named


def unlearning_table(
    settings: Sequence[Setting],
    measured: Mapping[str, Log],
    retain_unlearning: Log | None,
    second_retain_unlearning: Log | None = None,
) -> Table:
    """The numbers of `UNLEARNING.json`, without those that no model has; rows as above."""
    named = _name_models(settings, measured, retain_unlearning, second_retain_unlearning)
    measured_logs = [log for _, _, log in named]
    columns: dict[str, list[Cell]] = {}
    for metric, asked in _LEAKS.items():
        first = next((log for log in measured_logs if metric in log), None)
        if first is not None:
            drawn, threshold = (logs.detail(first, metric, x) for x in ("samples", "threshold"))
            columns[f"leak in {drawn} answers (recall ≥ {threshold:g}){asked}"] = [
                _show_leak_rate(metric, log, retain_unlearning) for log in measured_logs
            ]
    for name, (show, metric) in _BEYOND.items():
        columns[name] = [show(log, metric) for log in measured_logs]
    columns = {name: cells for name, cells in columns.items() if set(cells) != {MISSING}}
    rows = [
        Row(name, kind, [cells[i] for cells in columns.values()])
        for i, (name, kind, _) in enumerate(named)
    ]
    return Table(list(columns), rows)


def all_metrics_table(settings: Sequence[Setting], evaluated: Mapping[str, Log]) -> Table:
    """Every aggregate of the logs, with a row for each metric and a column for each setting."""
    metrics_of_any = {metric for log in evaluated.values() for metric in (*log, "forget_quality")}
    rows = [
        Row(metric, "", [_show_plain(evaluated[setting.name], metric) for setting in settings])
        for metric in sorted(metrics_of_any)
    ]
    return Table([setting.name for setting in settings], rows)


def missing(settings: Sequence[Setting], *by_name: Mapping[str, Log]) -> list[tuple[str, str]]:
    """Missing metrics with the reason, and with the settings if only some lack them."""
    lacking: dict[tuple[str, str], list[str]] = {}
    for evaluated in by_name:
        for setting in settings:
            for metric, reason in logs.missing_reasons(evaluated[setting.name]).items():
                lacking.setdefault((metric, reason), []).append(setting.name)
    return [
        (metric if len(names) == len(settings) else f"{metric} ({', '.join(names)})", reason)
        for (metric, reason), names in lacking.items()
    ]


def utility_name(log: Log) -> str:
    """`Rows.utility_name` of a log; "model utility" if it has none."""
    try:
        return selection.rows_of(log).utility_name
    except MissingMetricError:
        return "model utility"


def _show_quality(kind: str, log: Log, retain_log: Log | None) -> list[Cell]:
    if kind == RETAIN_MODEL:
        return [Cell("1", "by definition"), Cell("0", "by definition")]
    try:
        quality = aggregates.forget_quality(log, retain_log)
    except MissingMetricError:
        return [MISSING, MISSING]
    verdict = "like the retain model" if quality.p_value > 0.05 else "told apart"
    return [
        Cell(f"{quality.p_value:.2g}", verdict),
        Cell(f"{quality.statistic:.3f}", f"p < 0.05 above {quality.critical:.3f}"),
    ]


def _show_mean(log: Log, metric: str) -> Cell:
    return _show_interval(aggregates.interval, log, metric)


def _show_interval(compute: Callable[..., metrics.Interval], *arguments: object) -> Cell:
    try:
        interval = compute(*arguments)
    except MissingMetricError:
        return MISSING
    return Cell(f"{interval.estimate:.3f}", f"{interval.low:.3f} to {interval.high:.3f}")


def _show_plain(log: Log, metric: str) -> Cell:
    value = log.aggregate(metric)
    return MISSING if value is None else Cell(f"{value:.4g}")


def _show_leak_rate(metric: str, log: Log, retain_unlearning: Log | None) -> Cell:
    """The share of questions with a leak, and its excess over the retain model's."""
    try:
        leaks = answers.leaking_rows(log, metric)
    except MissingMetricError:
        return MISSING
    cell = _show_interval(metrics.bootstrap_interval, np.mean, leaks)
    if log is retain_unlearning or retain_unlearning is None or metric not in retain_unlearning:
        return cell
    excess = metrics.bootstrap_difference(leaks, answers.leaking_rows(retain_unlearning, metric))
    difference = f"{excess.estimate:+.3f}, {excess.low:+.3f} to {excess.high:+.3f}"
    return Cell(cell.text, f"{cell.note}\nthan the retain model {difference}")


def _show_fluency(log: Log, metric: str) -> Cell:
    if metric not in log:
        return MISSING
    distinct = log[metric].details.get("distinct_2")
    repeats = f"4-grams repeated {logs.detail(log, metric, 'repetition'):.2f}"
    return Cell(
        f"{log[metric].aggregate:.3g}",
        repeats if distinct is None else f"distinct-2 {distinct:.2f}\n{repeats}",
    )


def _show_divergence(log: Log, metric: str) -> Cell:
    if metric not in log:
        return MISSING
    error = log[metric].details.get("standard_error")
    return Cell(
        f"{log[metric].aggregate:.3g}" + ("" if error is None else f" ± {error:.2g}"),
        f"{logs.detail(log, metric, 'per_token'):.2g} a token",
    )


_LEAKS = {
    "forget_leak_rate": "",
    "forget_paraphrased_leak_rate": ", reworded questions",
}
# By column, the function that shows a number, and its metric.
_BEYOND: dict[str, tuple[Callable[[Log, str], Cell], str]] = {
    "forget ROUGE-L recall, reworded questions": (_show_mean, "forget_paraphrased_Q_A_ROUGE"),
    "retain ROUGE-L recall, reworded questions": (_show_mean, "retain_paraphrased_Q_A_ROUGE"),
    "forget perplexity": (_show_fluency, "forget_greedy_fluency"),
    "retain perplexity": (_show_fluency, "retain_greedy_fluency"),
    "perplexity, drawn": (_show_fluency, "forget_sample_fluency"),
    "head's accuracy, forget": (_show_plain, "forget_classifier_accuracy"),
    "head's accuracy, retain": (_show_plain, "retain_classifier_accuracy"),
    "head's AUC": (_show_plain, "classifier_auc"),
    "KL(served ‖ retain model), forget": (_show_divergence, "forget_KL_guided_retain"),
    "KL(retain model ‖ served), forget": (_show_divergence, "forget_KL_retain_guided"),
    "KL(served ‖ retain model), retain": (_show_divergence, "retain_KL_guided_retain"),
    "KL(retain model ‖ served), retain": (_show_divergence, "retain_KL_retain_guided"),
}
