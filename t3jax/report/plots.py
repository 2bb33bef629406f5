"""The numbers of an evaluation that each figure of the report shows, and its caption."""

import contextlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

from t3jax.evaluation import aggregates, answers, logs, selection
from t3jax.evaluation.logs import Log, MissingMetricError
from t3jax.evaluation.settings import BASE, Setting, find_controls
from t3jax.pipeline import Evaluation
from t3jax.refinements import PLAIN
from t3jax.report import figures, tables
from t3jax.report.tables import RETAIN_MODEL


class Figure(NamedTuple):
    """A figure of the page."""

    title: str
    caption: str
    pictures: list[str]


def make_figures(evaluation: Evaluation, featured: Setting | None) -> list[Figure]:
    """The figures that an evaluation has the numbers for, in the page's order."""
    plots = (_plot_trade_off, _plot_distributions, _plot_temperatures, _plot_leaks)
    candidates = [plot(evaluation, featured) for plot in plots]
    return [figure for figure in candidates if figure is not None]


def _plot_trade_off(evaluation: Evaluation, featured: Setting | None) -> Figure | None:
    points = []
    base, retain_log = evaluation.logs[evaluation.settings[0].name], evaluation.retain_log
    try:
        for setting in evaluation.settings:
            log = evaluation.logs[setting.name]
            shown = setting == BASE or (featured and setting.name == featured.name)
            points.append(
                figures.Point(
                    setting.name if shown else "",
                    tables.kind_of(setting, evaluation.settings),
                    aggregates.forget_quality(log, retain_log).p_value,
                    selection.log_utility(log),
                )
            )
    except MissingMetricError:
        return None
    name = tables.utility_name(base)
    if retain_log is not None:
        with contextlib.suppress(MissingMetricError):  # a retain log of truth ratios alone
            utility = selection.log_utility(retain_log)
            points.append(figures.Point("", RETAIN_MODEL, 1.0, utility))
    return Figure(
        f"Forget quality against {name}",
        "Every point is a setting: the higher, the closer its truth ratios on the forget set are "
        "to the retain model's (above the dashed line a test at the 5 % level does not distinguish "
        "them); the further right, the higher the utility. The retain model is the target, at p = "
        f"1 by definition. Points below {figures.FLOOR:g} are drawn on the bottom line.",
        [figures.trade_off(points, name)],
    )


def _plot_distributions(evaluation: Evaluation, featured: Setting | None) -> Figure | None:
    ratios = {}
    for label, kind, log in _label_logs(
        evaluation, featured, evaluation.logs, evaluation.retain_log
    ):
        try:
            ratios[label] = (kind, logs.column(log, "forget_truth_ratio", "score"))
        except MissingMetricError:
            return None
    return Figure(
        "Truth ratios on the forget set",
        "The share of forget rows whose truth ratio lies below x: an unlearned model's line should "
        "lie on the retain model's, and D is the widest vertical gap between the two.",
        [figures.distributions(ratios)],
    )


def _plot_temperatures(evaluation: Evaluation, featured: Setting | None) -> Figure | None:
    """Lines of equal s over T, of the featured heads and of tempering alone."""
    heads = () if featured is None else featured.heads
    grouped: dict[str, list[Setting]] = {}
    for setting in evaluation.settings:
        if setting.heads in ((), heads):
            scale = setting.guidance_scale
            label = f"s = {scale:g}" if scale else "s = 0 (tempered only)"
            if setting.refinements != PLAIN:
                label += f", {setting.refinements.name}"
            grouped.setdefault(label, []).append(setting)
    lines = {
        label: sorted(members, key=lambda setting: setting.base_temperature)
        for label, members in sorted(grouped.items())
        if len(members) > 1
    }
    if not lines:
        return None
    panels: dict[str, Callable[[Log], float]] = {
        "distance D": lambda log: aggregates.forget_quality(log, evaluation.retain_log).statistic,
        tables.utility_name(evaluation.logs[evaluation.settings[0].name]): selection.log_utility,
        "forget ROUGE-L recall": lambda log: aggregates.rows(log, "forget_Q_A_ROUGE").mean(),
    }
    values: dict[str, dict[str, list[float]]] = {}
    for panel, number in panels.items():
        try:
            values[panel] = {
                label: [number(evaluation.logs[setting.name]) for setting in members]
                for label, members in lines.items()
            }
        except MissingMetricError:
            continue
    return Figure(
        "Temperature sweep",
        "Each line is one s, T runs from left to right: tempering alone (s = 0) moves "
        "probabilities but never the greedy answer, so its recall line is flat.",
        [
            figures.temperature_sweep(
                panel,
                [
                    figures.Line(
                        label, [setting.base_temperature for setting in members], by_line[label]
                    )
                    for label, members in lines.items()
                ],
            )
            for panel, by_line in values.items()
        ],
    )


def _plot_leaks(evaluation: Evaluation, featured: Setting | None) -> Figure | None:
    rates = {}
    for label, kind, log in _label_logs(
        evaluation, featured, evaluation.unlearning, evaluation.retain_unlearning
    ):
        with contextlib.suppress(MissingMetricError):
            if len(by_samples := answers.leak_rates(log)) > 1:
                rates[label] = (kind, by_samples)
    if not rates:
        return None
    return Figure(
        "Leaks when many answers are drawn",
        "The share of forget questions for which at least one of n drawn answers contains the "
        "right one: a model that has forgotten leaks no more than the retain model guesses.",
        [figures.leaks(rates)],
    )


def _label_logs(
    evaluation: Evaluation,
    featured: Setting | None,
    by_name: Mapping[str, Log],
    retain_log: Log | None,
) -> list[tuple[str, str, Log]]:
    """Label, kind and log: base, the featured setting and its controls, the retain model."""
    shown = [evaluation.settings[0]]
    if featured is not None:
        shown += [featured, *find_controls(featured, evaluation.settings)]
    rows = [(s.name, tables.kind_of(s, evaluation.settings), by_name[s.name]) for s in shown]
    if retain_log is not None:
        rows.append((RETAIN_MODEL, RETAIN_MODEL, retain_log))
    return rows
