"""An experiment for people: `results.md`, its figures, and every number in `experiment.json`."""

import itertools
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from t3jax import files, hosts
from t3jax.evaluation import logs, metrics, recompute, selection, unlearning
from t3jax.evaluation.logs import Log, MissingMetricError
from t3jax.report import figures
from t3jax.report.choice import write_sweep
from t3jax.study.experiment import Experiment

_PARTS = tuple(itertools.chain.from_iterable(selection.UTILITY.values()))
_DASH = "\N{EN DASH}"
_LEAKS = {
    "forget questions": "forget_leak_rate",
    "reworded forget questions": "forget_paraphrased_leak_rate",
}


def write_experiment(folder: str | os.PathLike[str], found: Experiment, *, title: str) -> str:
    """Writes `results.md` with its figures, `experiment.json`, `selection.json`, `report.html`.

    Args:
        folder: Where to.
        found: The experiment.
        title: Title of the page and of the report.

    Returns:
        The page's text.

    Raises:
        OSError: If a file cannot be written.
    """
    folder = pathlib.Path(folder)
    write_sweep(folder, found.sweep, title=title)
    sections = [
        ("Chosen by cross-fitting", _choice(found)),
        ("What was chosen, its controls and the models", _settings(found)),
        ("Model utility, part by part", _utility_parts(found)),
        ("Leaks when many answers are drawn", _leaks(found)),
        ("One thing varied at a time", "![](varied.svg)"),
        ("Refinements, each at the chosen T and s", _refined(found)),
        ("Answers drawn from the base's nucleus", _truncated(found)),
        ("Texts that no head was trained on", _probes(found)),
        ("What it took", _stages(found)),
    ]
    text = "\n\n".join(
        [f"# {title}", *(f"## {heading}\n\n{body}" for heading, body in sections if body)]
    )
    if hosts.is_lead():
        files.write_json(folder / "experiment.json", _as_json(found))
        with files.replacing(folder / "varied.svg") as temporary:
            temporary.write_bytes(figures.draw_variations(found.points))
        with files.replacing(folder / "results.md") as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
    return text


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _choice(found: Experiment) -> str:
    base = selection.log_utility(found.sweep.evaluation.logs["base"])
    rows = [
        [label, value, note]
        for label, value, note in selection.summary_rows(
            found.sweep.choice, found.sweep.noise_floor
        )
    ]
    if base > 0:
        shares = [each.score.utility / base for each in found.sweep.choice.held_out]
        rows.append(["share of the base model's utility", " ".join(f"{x:.3f}" for x in shares), ""])
    return _table(["", "value", "meaning"], rows)


def _settings(found: Experiment) -> str:
    evaluation = found.sweep.evaluation
    named = [
        (setting.name, evaluation.logs[setting.name], evaluation.unlearning[setting.name])
        for setting in evaluation.settings
    ]
    if evaluation.retain_log is not None:
        named.append(
            ("retain-only model", evaluation.retain_log, evaluation.retain_unlearning or {})
        )
    columns = {
        "forget quality p": lambda log, _: f"{_quality(found, log).p_value:.2g}",
        "D": lambda log, _: f"{_quality(found, log).statistic:.3f}",
        "utility": lambda log, _: f"{selection.log_utility(log):.3f}",
        "forget prob.": lambda log, _: _mean(log, "forget_Q_A_Prob"),
        "forget ROUGE": lambda log, _: _mean(log, "forget_Q_A_ROUGE"),
        "reworded": lambda _, more: _aggregate(more, "forget_paraphrased_Q_A_ROUGE"),
        "retain prob.": lambda log, _: _mean(log, "retain_Q_A_Prob"),
        "retain ROUGE": lambda log, _: _mean(log, "retain_Q_A_ROUGE"),
        "reworded ": lambda _, more: _aggregate(more, "retain_paraphrased_Q_A_ROUGE"),
        "KL forget": lambda _, more: _aggregate(more, "forget_KL_guided_retain"),
        "KL retain": lambda _, more: _aggregate(more, "retain_KL_guided_retain"),
        "perplexity": lambda _, more: _aggregate(more, "forget_greedy_fluency"),
        "length": lambda _, more: _length(more),
    }
    return _table(
        ["", *columns],
        (
            [name, *(_cell(column, log, more) for column in columns.values())]
            for name, log, more in named
        ),
    )


def _utility_parts(found: Experiment) -> str:
    evaluation = found.sweep.evaluation
    named = [("base", evaluation.logs["base"])]
    named += [(setting.name, evaluation.logs[setting.name]) for setting in found.sweep.chosen]
    if evaluation.retain_log is not None:
        named.append(("retain-only model", evaluation.retain_log))
    rows = [[part, *(_cell(_mean, log, part) for _, log in named)] for part in _PARTS]
    return _table(
        ["", *(name for name, _ in named)], (row for row in rows if set(row[1:]) != {_DASH})
    )


def _leaks(found: Experiment) -> str:
    evaluation = found.sweep.evaluation
    retain = evaluation.retain_unlearning
    rows = []
    for asked, metric in _LEAKS.items():
        if retain is None or metric not in retain:
            continue
        own = unlearning.leaking_rows(retain, metric)
        rows.append([asked, "retain-only model", *_by_samples(retain[metric]), ""])
        for setting in found.sweep.chosen:
            log = evaluation.unlearning[setting.name]
            leaking = unlearning.leaking_rows(log, metric)
            by = metrics.bootstrap_difference(leaking, own)
            difference = f"{by.estimate:+.3f} [{by.low:+.3f}, {by.high:+.3f}]"
            rows.append([asked, setting.name, *_by_samples(log[metric]), difference])
    if not rows:
        return ""
    return _table(["asked", "", "1 answer", "4 answers", "all answers", "difference"], rows)


def _refined(found: Experiment) -> str:
    columns = [
        "",
        "D",
        "utility without ROUGE",
        "forget prob.",
        "forget ROUGE",
        "reworded",
        "retain ROUGE",
        "reworded ",
        "real authors ROUGE",
        "perplexity",
        "length",
    ]
    rows = []
    for each in found.refined:
        distances = [
            recompute.forget_quality(log, found.sweep.retain_scored).statistic
            for log in each.scored
        ]
        forget = [recompute.rows(log, "forget_Q_A_Prob").mean() for log in each.scored]
        rows.append(
            [
                each.name,
                _spread(distances),
                _spread([selection.log_utility(log) for log in each.scored]),
                _spread(forget),
                _cell(_mean, each.answered, "forget_Q_A_ROUGE"),
                _aggregate(each.unlearning, "forget_paraphrased_Q_A_ROUGE"),
                _cell(_mean, each.answered, "retain_Q_A_ROUGE"),
                _aggregate(each.unlearning, "retain_paraphrased_Q_A_ROUGE"),
                _cell(_mean, each.answered, "ra_Q_A_ROUGE"),
                _aggregate(each.unlearning, "forget_greedy_fluency"),
                _length(each.unlearning),
            ]
        )
    return _table(columns, rows)


def _truncated(found: Experiment) -> str:
    if found.truncated is None:
        return ""
    chosen = found.sweep.chosen[0].name
    whole = found.sweep.evaluation.unlearning[chosen]
    rows = []
    for name, log in ((f"{chosen}, whole", whole), (f"{chosen}, nucleus", found.truncated)):
        fluency = log["forget_sample_fluency"]
        leaks = ["/".join(_by_samples(log[m])) if m in log else _DASH for m in _LEAKS.values()]
        rows.append([name, *leaks, f"{fluency['agg_value']:.3g}", f"{fluency['repetition']:.3f}"])
    columns = ["", "leaks of 1/4/all answers", "reworded", "perplexity", "repetition"]
    return _table(columns, rows)


def _by_samples(entry: dict[str, Any]) -> list[str]:
    by, n = entry["by_samples"], entry["samples"]
    return [f"{by[str(min(k, n))]:.3f}" for k in (1, 4, n)]


def _probes(found: Experiment) -> str:
    rows = [
        [
            kind,
            str(seeds[0].texts),
            *(
                _spread([getattr(each, field) for each in seeds])
                for field in ("retain_prob", "lowest", "below_half", "change")
            ),
        ]
        for kind, seeds in found.probes.items()
    ]
    columns = ["texts", "how many", "mean q", "lowest q", "q < 1/2", "change, nats a token"]
    return _table(columns, rows)


def _stages(found: Experiment) -> str:
    rows = [
        [name, f"{stage['seconds']:.0f}", f"{stage['peak_gigabytes']:.1f}"]
        for name, stage in found.stages.items()
    ]
    return _table(["stage", "seconds", "peak memory of the process so far, GB"], rows)


def _as_json(found: Experiment) -> dict[str, Any]:
    evaluation = found.sweep.evaluation
    return {
        "choice": selection.as_json(found.sweep.choice, found.sweep.noise_floor),
        "chosen": [setting.name for setting in found.sweep.chosen],
        "settings": {
            name: _aggregates(log) | _aggregates(evaluation.unlearning[name])
            for name, log in evaluation.logs.items()
        },
        "retain_model": _aggregates(evaluation.retain_log or {})
        | _aggregates(evaluation.retain_unlearning or {}),
        "scored": {name: _aggregates(log) for name, log in found.sweep.scored.items()},
        "points": [point._asdict() for point in found.points],
        "refined": {
            each.name: {
                "scored": [_aggregates(log) for log in each.scored],
                "answered": _aggregates(each.answered) | _aggregates(each.unlearning),
            }
            for each in found.refined
        },
        "truncated": _aggregates(found.truncated or {}),
        "probes": {
            kind: [each._asdict() for each in seeds] for kind, seeds in found.probes.items()
        },
        "stages": found.stages,
    }


def _spread(seeds: Sequence[float]) -> str:
    text = f"{np.mean(seeds):.3f}"
    return text if len(seeds) == 1 else f"{text} ({min(seeds):.3f} to {max(seeds):.3f})"


def _aggregates(log: Log) -> dict[str, float]:
    return {
        metric: entry["agg_value"]
        for metric, entry in log.items()
        if metric != logs.MISSING and entry["agg_value"] is not None
    }


def _quality(found: Experiment, log: Log) -> metrics.ForgetQuality:
    return recompute.forget_quality(log, found.sweep.evaluation.retain_log)


def _mean(log: Log, metric: str) -> str:
    return f"{recompute.rows(log, metric).mean():.3f}"


def _aggregate(log: Log, metric: str) -> str:
    return f"{log[metric]['agg_value']:.3g}" if metric in log else _DASH


def _length(log: Log) -> str:
    """Tokens of a greedy answer to a forget question."""
    if "forget_greedy_fluency" not in log:
        return _DASH
    entry = log["forget_greedy_fluency"]
    return f"{entry['tokens'] / len(entry['value_by_index']):.1f}"


def _cell(number: Any, *arguments: Any) -> str:
    try:
        return number(*arguments)
    except MissingMetricError:
        return _DASH
