"""From an evaluation to its page: gather what is shown, render the template, write the file.

Only `answer_tokens` runs the model, on the few answers whose tokens are shown.
"""

import dataclasses
import importlib.resources
import itertools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from t3jax import files, hosts
from t3jax.data.records import evenly_spread
from t3jax.evaluation import logs, recompute, selection
from t3jax.evaluation.logs import Log, MissingMetricError
from t3jax.evaluation.scoring import Setting
from t3jax.evaluation.store import Store
from t3jax.evaluation.tofu import SETS, QuestionSet
from t3jax.pipeline import Evaluation
from t3jax.refinements import PLAIN
from t3jax.report import figures, tables
from t3jax.report.tables import BASE, RETAIN_MODEL, Token

SAMPLES = 3  # questions of forget and of retain, each
TOKEN_ROWS = 2  # answers of forget and of retain, each, whose tokens are shown
CHANGE_LIMIT = 4.0  # nats at which the colour of a token's change is deepest


# The class of a kind of row in the page's style sheet.
_CSS = {
    tables.BASE: "base",
    tables.UNLEARNED: "unlearned",
    tables.TEMPERED: "tempered",
    tables.TILTED: "tilted",
    tables.RETAIN_MODEL: "retain",
    tables.SECOND_RETAIN_MODEL: "retain",
}


class Figure(NamedTuple):
    """A figure of the page.

    Attributes:
        title: Its heading.
        caption: How to read it, in a sentence.
        pictures: SVGs as data addresses; several stand side by side where there is room.
    """

    title: str
    caption: str
    pictures: list[str]


class TokenRow(NamedTuple):
    """An answer in the token view.

    Attributes:
        set_name: Which set the question is from.
        question: The question.
        tokens: The right answer's tokens.
    """

    set_name: str
    question: str
    tokens: list[Token]


def write_report(
    path: str | os.PathLike[str],
    evaluation: Evaluation,
    *,
    title: str,
    selected: Sequence[tuple[str, str, str]] = (),
    featured: str | None = None,
) -> None:
    """Writes the report of an evaluation: one HTML file that needs no other and no network.

    Args:
        path: The file.
        evaluation: What was found.
        title: Title of the page.
        selected: What cross-fitting chose, as `selection.summary_rows` gives it; empty for none.
        featured: The setting whose answers, tokens and controls are shown; None takes the one of
            highest utility among those whose forget quality exceeds 0.05, or the nearest.

    Raises:
        ValueError: If there is no such setting.
        OSError: If the file cannot be written.
    """
    setting = _featured(evaluation, featured)
    token_rows = answer_tokens(evaluation.examined.store, evaluation.examined.sets, setting)
    page = render(contents(evaluation, title, selected, setting, token_rows))
    if not hosts.is_lead():
        return
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def contents(
    evaluation: Evaluation,
    title: str,
    selected: Sequence[tuple[str, str, str]],
    featured: Setting | None,
    token_rows: Sequence[TokenRow],
) -> dict[str, Any]:
    """What the page shows, as plain values by the names that the template uses.

    Args:
        evaluation: What was found.
        title: Title of the page.
        selected: What cross-fitting chose.
        featured: The setting that is shown in detail; None if no head was evaluated.
        token_rows: What `answer_tokens` gave.

    Returns:
        The template's variables.
    """
    settings, evaluated = evaluation.settings, evaluation.logs
    heads = [
        f"head{i}: rank {head.config.rank}, {head.config.activation}; trained to serve at "
        f"T = {head.base_temperature:g}, s = {head.guidance_scale:g}"
        for i, head in enumerate(evaluation.examined.store.heads)
    ]
    models = [(BASE, BASE, evaluated[settings[0].name])]
    if featured is not None:
        kind = tables.kind_of(featured)
        models.append((f"{kind} ({featured.name})", kind, evaluated[featured.name]))
    if evaluation.retain_log is not None:
        models.append((RETAIN_MODEL, RETAIN_MODEL, evaluation.retain_log))
    return {
        "title": title,
        "model": evaluation.examined.store.lm.name,
        "heads": heads,
        "sets": {SETS[name]: each.num_rows for name, each in evaluation.examined.sets.items()},
        "featured": featured,
        "cards": tables.cards(
            [(kind, kind, log) for _, kind, log in models], evaluation.retain_log
        ),
        "has_retain_log": evaluation.retain_log is not None,
        "summary": tables.summary_table(
            settings, evaluated, evaluation.retain_log, evaluation.second_retain_log
        ),
        "selected": selected,
        "figures": _figures(evaluation, featured),
        "samples": tables.samples(evaluation.examined.sets, models, SAMPLES),
        "token_rows": token_rows,
        "change_limit": CHANGE_LIMIT,
        "unlearning": tables.unlearning_table(
            settings,
            evaluation.unlearning,
            evaluation.retain_unlearning,
            evaluation.second_retain_unlearning,
        ),
        "has_floor": evaluation.second_retain_log is not None,
        "missing": tables.missing(settings, evaluated, evaluation.unlearning),
        "all_metrics": tables.all_metrics_table(settings, evaluated),
    }


def render(values: Mapping[str, Any]) -> str:
    """Fills the template.

    Args:
        values: What `contents` gave; all text in it is escaped.

    Returns:
        HTML.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"colour": _colour, "css": _CSS.__getitem__}
    source = importlib.resources.files(__package__).joinpath("report.html.jinja")
    template = source.read_text(encoding="utf-8")
    return environment.from_string(template).render(values)


def answer_tokens(
    store: Store, sets: Mapping[str, QuestionSet], featured: Setting | None
) -> list[TokenRow]:
    """Scores a few right answers of forget and retain with the featured setting and without tilt.

    Args:
        store: Scores of the model.
        sets: Question sets.
        featured: The setting; None gives no rows.

    Returns:
        The answers' tokens.
    """
    if featured is None:
        return []
    chosen = [
        (each, row)
        for name in ("forget", "retain")
        if (each := sets.get(name)) is not None
        for row in evenly_spread(range(each.num_rows), TOKEN_ROWS)
    ]
    examples = [each.answers[row] for each, row in chosen]
    without_tilt = dataclasses.replace(
        featured,
        name=f"{featured.name}-untilted",
        guidance_scale=0.0,
        refinements=dataclasses.replace(featured.refinements, protected=()),
    )
    tilted, tempered = store.scores("report", examples, [featured, without_tilt])
    return [
        TokenRow(
            SETS[each.name],
            each.questions[row],
            tables.tokens(
                _pieces(store.lm.tokenizer, example.tokens[example.answer_start :].tolist()),
                tilted.select(i, i + 1),
                tempered.select(i, i + 1),
            ),
        )
        for i, ((each, row), example) in enumerate(zip(chosen, examples, strict=True))
    ]


def _featured(evaluation: Evaluation, name: str | None) -> Setting | None:
    by_name = {setting.name: setting for setting in evaluation.settings}
    if name is not None:
        if name not in by_name:
            raise ValueError(f"no setting {name!r} was evaluated; there are {list(by_name)}")
        return by_name[name]
    candidates = [setting for setting in evaluation.settings if setting.guidance_scale > 0]
    candidates = [s for s in candidates if tables.kind_of(s) == tables.UNLEARNED] or candidates
    if not candidates:
        return None
    try:
        ratios = logs.column(evaluation.retain_log or {}, "forget_truth_ratio", "score")
        base, *scores = (
            selection.score(selection.rows_of(evaluation.logs[setting.name]), ratios)
            for setting in [evaluation.settings[0], *candidates]
        )
    except MissingMetricError:
        return candidates[0]
    return candidates[selection.RULES["utility_given_quality"](scores, base)[0]]


def _figures(evaluation: Evaluation, featured: Setting | None) -> list[Figure]:
    found = [
        _trade_off(evaluation, featured),
        _distributions(evaluation, featured),
        _temperature_sweep(evaluation, featured),
        _leaks(evaluation, featured),
    ]
    return [figure for figure in found if figure is not None]


def _trade_off(evaluation: Evaluation, featured: Setting | None) -> Figure | None:
    points = []
    retain_log = evaluation.retain_log
    try:
        for setting in evaluation.settings:
            log = evaluation.logs[setting.name]
            shown = setting.name == BASE or (featured and setting.name == featured.name)
            points.append(
                figures.Point(
                    setting.name if shown else "",
                    tables.kind_of(setting),
                    recompute.forget_quality(log, retain_log).p_value,
                    selection.log_utility(log),
                )
            )
    except MissingMetricError:
        return None
    name = tables.utility_name(evaluation.logs[evaluation.settings[0].name])
    try:
        utility = selection.log_utility(retain_log or {})
        points.append(figures.Point("", RETAIN_MODEL, 1.0, utility))
    except MissingMetricError:
        pass  # a retain log of truth ratios alone
    return Figure(
        f"Forget quality against {name}",
        "Every point is a setting: the higher, the less a test tells its truth ratios on the "
        "forget set from the retain model's (above the dashed line it does not at the 5 % level); "
        "the further right, the more is kept. The retain model is the target, at p = 1 by "
        f"definition. What is below {figures.FLOOR:g} stands on the bottom line.",
        [figures.trade_off(points, name)],
    )


def _distributions(evaluation: Evaluation, featured: Setting | None) -> Figure | None:
    ratios = {}
    for label, kind, log in _compared(evaluation, featured, evaluation.logs, evaluation.retain_log):
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


def _temperature_sweep(evaluation: Evaluation, featured: Setting | None) -> Figure | None:
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
    panels = {
        "distance D": lambda log: recompute.forget_quality(log, evaluation.retain_log).statistic,
        tables.utility_name(evaluation.logs[evaluation.settings[0].name]): lambda log: (
            selection.log_utility(log)
        ),
        "forget ROUGE-L recall": lambda log: recompute.aggregate(log, "forget_Q_A_ROUGE"),
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


def _leaks(evaluation: Evaluation, featured: Setting | None) -> Figure | None:
    rates = {}
    for label, kind, log in _compared(
        evaluation, featured, evaluation.unlearning, evaluation.retain_unlearning
    ):
        entry = log.get("forget_leak_rate")
        if entry is not None and entry["samples"] > 1:
            rates[label] = (kind, {int(n): rate for n, rate in entry["by_samples"].items()})
    if not rates:
        return None
    return Figure(
        "Leaks when many answers are drawn",
        "The share of forget questions for which at least one of n drawn answers contains the "
        "right one: a model that has forgotten leaks no more than the retain model guesses.",
        [figures.leaks(rates)],
    )


def _compared(
    evaluation: Evaluation,
    featured: Setting | None,
    found: Mapping[str, Log],
    of_retain_model: Log | None,
) -> list[tuple[str, str, Log]]:
    """Label, kind and log: base, the featured setting and its controls, the retain model."""
    shown = [evaluation.settings[0]]
    if featured is not None:
        shown += [featured, *tables.controls_of(featured, evaluation.settings)]
    rows = [(each.name, tables.kind_of(each), found[each.name]) for each in shown]
    if of_retain_model is not None:
        rows.append((RETAIN_MODEL, RETAIN_MODEL, of_retain_model))
    return rows


def _pieces(tokenizer: Any, tokens: list[int]) -> list[str]:
    """What each token adds to the text, special tokens included."""
    texts = [tokenizer.decode(tokens[:i]) for i in range(len(tokens) + 1)]
    return [
        (after[len(before) :] if after.startswith(before) else after[-1:]).replace("\n", "⏎")
        for before, after in itertools.pairwise(texts)
    ]


def _colour(value: float, low: float, high: float) -> str:
    """A light colour for dark text: orange at `low`, white between, blue at `high`."""
    share = min(max((value - low) / (high - low), 0.0), 1.0)
    towards = (120, 178, 226) if share > 0.5 else (242, 160, 96)
    strength = abs(share - 0.5) * 2
    return "#" + "".join(f"{round(255 + (each - 255) * strength):02x}" for each in towards)
