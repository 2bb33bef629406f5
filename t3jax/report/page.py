"""From an evaluation to its page: collect the values, render the template, write the file."""

import importlib.resources
import os
import pathlib
from collections.abc import Mapping, Sequence

from t3jax import files, hosts
from t3jax.evaluation import selection
from t3jax.evaluation.logs import MissingMetricError
from t3jax.evaluation.questions import SETS
from t3jax.evaluation.settings import Setting
from t3jax.pipeline import Evaluation
from t3jax.report import tables
from t3jax.report.answers import TokenRow, answer_tokens, samples
from t3jax.report.diagnosis import HeadDiagnosis, make_section
from t3jax.report.plots import make_figures
from t3jax.report.tables import BASE, RETAIN_MODEL

SAMPLES = 3  # questions of forget and of retain, each
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


def write_report(
    path: str | os.PathLike[str],
    evaluation: Evaluation,
    *,
    title: str,
    selected: Sequence[tuple[str, str, str]] = (),
    featured: str | None = None,
    diagnoses: Sequence[HeadDiagnosis] = (),
) -> None:
    """Writes the report of an evaluation: one HTML file that needs no other and no network.

    `selected` is the choice by cross-fitting, as `choice.summary_rows` gives it. `featured` is the
    setting whose answers, tokens and controls are shown: by default the choice of the rule
    "utility_given_quality".
    """
    setting = _find_featured(evaluation, featured)
    token_rows = answer_tokens(evaluation.examined.store, evaluation.examined.sets, setting)
    page = render(contents(evaluation, title, selected, setting, token_rows, diagnoses))
    if hosts.is_lead():
        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(path, page)


def contents(
    evaluation: Evaluation,
    title: str,
    selected: Sequence[tuple[str, str, str]],
    featured: Setting | None,
    token_rows: Sequence[TokenRow],
    diagnoses: Sequence[HeadDiagnosis] = (),
) -> dict[str, object]:
    """The values of the page, by the names that the template uses."""
    settings, evaluated = evaluation.settings, evaluation.logs
    heads = [
        f"head{i}: rank {head.config.rank}, {head.config.activation}; trained to serve at "
        f"T = {head.base_temperature:g}, s = {head.guidance_scale:g}"
        for i, head in enumerate(evaluation.examined.store.heads)
    ]
    models = [(BASE, BASE, evaluated[settings[0].name])]
    if featured is not None:
        kind = tables.kind_of(featured, settings)
        models.append((f"{kind} ({featured.name})", kind, evaluated[featured.name]))
    if evaluation.retain_log is not None:
        models.append((RETAIN_MODEL, RETAIN_MODEL, evaluation.retain_log))
    return {
        "title": title,
        "model": evaluation.examined.store.lm.name,
        "heads": heads,
        "sets": {
            SETS[name]: questions.num_rows for name, questions in evaluation.examined.sets.items()
        },
        "featured": featured,
        "cards": tables.cards(
            [(kind, kind, log) for _, kind, log in models], evaluation.retain_log
        ),
        "has_retain_log": evaluation.retain_log is not None,
        "summary": tables.summary_table(
            settings, evaluated, evaluation.retain_log, evaluation.second_retain_log
        ),
        "selected": selected,
        "figures": make_figures(evaluation, featured),
        "samples": samples(evaluation.examined.sets, models, SAMPLES),
        "token_rows": token_rows,
        "change_limit": CHANGE_LIMIT,
        "unlearning": tables.unlearning_table(
            settings,
            evaluation.unlearning,
            evaluation.retain_unlearning,
            evaluation.second_retain_unlearning,
        ),
        "diagnoses": [make_section(head) for head in diagnoses],
        "has_floor": evaluation.second_retain_log is not None,
        "missing": tables.missing(settings, evaluated, evaluation.unlearning),
        "all_metrics": tables.all_metrics_table(settings, evaluated),
    }


def render(values: Mapping[str, object]) -> str:
    """Fills the template with the result of `contents`; all text in it is escaped."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"colour": _mix_colour, "css": _CSS.__getitem__}
    source = importlib.resources.files(__package__).joinpath("report.html.jinja")
    template = source.read_text(encoding="utf-8")
    return environment.from_string(template).render(values)


def _find_featured(evaluation: Evaluation, name: str | None) -> Setting | None:
    by_name = {setting.name: setting for setting in evaluation.settings}
    if name is not None:
        if name not in by_name:
            raise ValueError(f"no setting {name!r} was evaluated; expected one of {list(by_name)}")
        return by_name[name]
    candidates = [setting for setting in evaluation.settings if setting.guidance_scale > 0]
    candidates = [
        s for s in candidates if tables.kind_of(s, evaluation.settings) == tables.UNLEARNED
    ] or candidates
    if not candidates:
        return None
    try:
        base, *scores = (
            selection.score_log(evaluation.logs[setting.name], evaluation.retain_log)
            for setting in [evaluation.settings[0], *candidates]
        )
    except MissingMetricError:
        return candidates[0]
    return candidates[selection.RULES["utility_given_quality"](scores, base)[0]]


def _mix_colour(value: float, low: float, high: float) -> str:
    """A light colour for dark text: orange at `low`, white between, blue at `high`."""
    share = min(max((value - low) / (high - low), 0.0), 1.0)
    towards = (120, 178, 226) if share > 0.5 else (242, 160, 96)
    strength = abs(share - 0.5) * 2
    return "#" + "".join(f"{round(255 + (part - 255) * strength):02x}" for part in towards)
