"""An experiment for people: `results.md`, its figures, and every number in `experiment.json`."""

import itertools
import os
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from t3jax import files, hosts
from t3jax.evaluation import aggregates, answers, logs, metrics, selection
from t3jax.evaluation.logs import Log, MissingMetricError
from t3jax.report import figures
from t3jax.report.choice import as_json, summary_rows, write_sweep
from t3jax.report.markdown import make_table
from t3jax.study.experiment import Experiment

_PARTS = tuple(itertools.chain.from_iterable(aggregates.UTILITY.values()))
_DASH = "\N{EN DASH}"
_LEAKS = {
    "forget questions": "forget_leak_rate",
    "reworded forget questions": "forget_paraphrased_leak_rate",
}


def write_experiment(folder: str | os.PathLike[str], experiment: Experiment, *, title: str) -> str:
    """Writes `results.md` with its figures, `experiment.json`, `selection.json`, `report.html`.

    Returns the text of the page.
    """
    folder = pathlib.Path(folder)
    write_sweep(folder, experiment.sweep, title=title)
    sections = [
        ("Chosen by cross-fitting", _choice(experiment)),
        ("What was chosen, its controls and the models", _settings(experiment)),
        ("Model utility, part by part", _utility_parts(experiment)),
        ("Leaks when many answers are drawn", _leaks(experiment)),
        ("One thing varied at a time", "![](varied.svg)"),
        ("Refinements, each at the chosen T and s", _refined(experiment)),
        ("Answers drawn from the base's nucleus", _truncated(experiment)),
        ("Texts that no head was trained on", _probes(experiment)),
        ("What it took", _stages(experiment)),
    ]
    text = "\n\n".join(
        [f"# {title}", *(f"## {heading}\n\n{body}" for heading, body in sections if body)]
    )
    if hosts.is_lead():
        files.write_json(folder / "experiment.json", _as_json(experiment))
        with files.replacing(folder / "varied.svg") as temporary:
            temporary.write_bytes(figures.draw_variations(experiment.points))
        with files.replacing(folder / "results.md") as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
    return text


def _choice(experiment: Experiment) -> str:
    base = selection.log_utility(experiment.sweep.evaluation.logs["base"])
    rows = summary_rows(experiment.sweep.choice, experiment.sweep.noise_floor)
    if base > 0:
        shares = [held.score.utility / base for held in experiment.sweep.choice.held_out]
        rows.append(("share of the base model's utility", " ".join(f"{x:.3f}" for x in shares), ""))
    return make_table(["", "value", "meaning"], rows)


def _settings(experiment: Experiment) -> str:
    evaluation = experiment.sweep.evaluation
    named = [
        (setting.name, evaluation.logs[setting.name], evaluation.unlearning[setting.name])
        for setting in evaluation.settings
    ]
    if evaluation.retain_log is not None:
        named.append(
            ("retain-only model", evaluation.retain_log, evaluation.retain_unlearning or Log())
        )
    columns = {
        "forget quality p": lambda log, _: f"{_quality(experiment, log).p_value:.2g}",
        "D": lambda log, _: f"{_quality(experiment, log).statistic:.3f}",
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
    return make_table(
        ["", *columns],
        (
            [name, *(_cell(column, log, more) for column in columns.values())]
            for name, log, more in named
        ),
    )


def _utility_parts(experiment: Experiment) -> str:
    evaluation = experiment.sweep.evaluation
    named = [("base", evaluation.logs["base"])]
    named += [(setting.name, evaluation.logs[setting.name]) for setting in experiment.sweep.chosen]
    if evaluation.retain_log is not None:
        named.append(("retain-only model", evaluation.retain_log))
    rows = [[part, *(_cell(_mean, log, part) for _, log in named)] for part in _PARTS]
    return make_table(
        ["", *(name for name, _ in named)], (row for row in rows if set(row[1:]) != {_DASH})
    )


def _leaks(experiment: Experiment) -> str:
    evaluation = experiment.sweep.evaluation
    retain = evaluation.retain_unlearning
    rows = []
    for asked, metric in _LEAKS.items():
        if retain is None or metric not in retain:
            continue
        of_retain = answers.leaking_rows(retain, metric)
        rows.append([asked, "retain-only model", *_by_samples(retain, metric), ""])
        for setting in experiment.sweep.chosen:
            log = evaluation.unlearning[setting.name]
            leaking = answers.leaking_rows(log, metric)
            by = metrics.bootstrap_difference(leaking, of_retain)
            difference = f"{by.estimate:+.3f} [{by.low:+.3f}, {by.high:+.3f}]"
            rows.append([asked, setting.name, *_by_samples(log, metric), difference])
    if not rows:
        return ""
    return make_table(["asked", "", "1 answer", "4 answers", "all answers", "difference"], rows)


def _refined(experiment: Experiment) -> str:
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
    for refined in experiment.refined:
        distances = [
            aggregates.forget_quality(log, experiment.sweep.retain_scored).statistic
            for log in refined.scored
        ]
        forget = [aggregates.rows(log, "forget_Q_A_Prob").mean() for log in refined.scored]
        rows.append(
            [
                refined.name,
                _spread(distances),
                _spread([selection.log_utility(log) for log in refined.scored]),
                _spread(forget),
                _cell(_mean, refined.answered, "forget_Q_A_ROUGE"),
                _aggregate(refined.unlearning, "forget_paraphrased_Q_A_ROUGE"),
                _cell(_mean, refined.answered, "retain_Q_A_ROUGE"),
                _aggregate(refined.unlearning, "retain_paraphrased_Q_A_ROUGE"),
                _cell(_mean, refined.answered, "ra_Q_A_ROUGE"),
                _aggregate(refined.unlearning, "forget_greedy_fluency"),
                _length(refined.unlearning),
            ]
        )
    return make_table(columns, rows)


def _truncated(experiment: Experiment) -> str:
    if experiment.truncated is None:
        return ""
    chosen = experiment.sweep.chosen[0].name
    whole = experiment.sweep.evaluation.unlearning[chosen]
    rows = []
    for name, log in ((f"{chosen}, whole", whole), (f"{chosen}, nucleus", experiment.truncated)):
        leaks = ["/".join(_by_samples(log, m)) if m in log else _DASH for m in _LEAKS.values()]
        repeated = logs.detail(log, "forget_sample_fluency", "repetition")
        perplexity = _aggregate(log, "forget_sample_fluency")
        rows.append([name, *leaks, perplexity, f"{repeated:.3f}"])
    columns = ["", "leaks of 1/4/all answers", "reworded", "perplexity", "repetition"]
    return make_table(columns, rows)


def _by_samples(log: Log, metric: str) -> list[str]:
    rates = answers.leak_rates(log, metric)
    most = max(rates)
    return [f"{rates[min(n, most)]:.3f}" for n in (1, 4, most)]


def _probes(experiment: Experiment) -> str:
    rows = [
        [
            kind,
            str(seeds[0].texts),
            *(
                _spread([getattr(each, field) for each in seeds])
                for field in ("retain_prob", "lowest", "below_half", "change")
            ),
        ]
        for kind, seeds in experiment.probes.items()
    ]
    columns = ["texts", "how many", "mean q", "lowest q", "q < 1/2", "change, nats a token"]
    return make_table(columns, rows)


def _stages(experiment: Experiment) -> str:
    rows = [
        [name, f"{stage['seconds']:.0f}", f"{stage['peak_gigabytes']:.1f}"]
        for name, stage in experiment.stages.items()
    ]
    return make_table(["stage", "seconds", "peak memory of the process so far, GB"], rows)


def _as_json(experiment: Experiment) -> dict[str, object]:
    sweep, evaluation = experiment.sweep, experiment.sweep.evaluation
    nothing = Log()
    return {
        "choice": as_json(sweep.choice, sweep.noise_floor),
        "chosen": [setting.name for setting in sweep.chosen],
        "settings": {
            name: log.aggregates | evaluation.unlearning[name].aggregates
            for name, log in evaluation.logs.items()
        },
        "retain_model": (evaluation.retain_log or nothing).aggregates
        | (evaluation.retain_unlearning or nothing).aggregates,
        "scored": {name: log.aggregates for name, log in sweep.scored.items()},
        "points": [point._asdict() for point in experiment.points],
        "refined": {
            refined.name: {
                "scored": [log.aggregates for log in refined.scored],
                "answered": refined.answered.aggregates | refined.unlearning.aggregates,
            }
            for refined in experiment.refined
        },
        "truncated": (experiment.truncated or nothing).aggregates,
        "probes": {
            kind: [probe._asdict() for probe in seeds] for kind, seeds in experiment.probes.items()
        },
        "stages": experiment.stages,
    }


def _spread(seeds: Sequence[float]) -> str:
    text = f"{np.mean(seeds):.3f}"
    return text if len(seeds) == 1 else f"{text} ({min(seeds):.3f} to {max(seeds):.3f})"


def _quality(experiment: Experiment, log: Log) -> metrics.ForgetQuality:
    return aggregates.forget_quality(log, experiment.sweep.evaluation.retain_log)


def _mean(log: Log, metric: str) -> str:
    return f"{aggregates.rows(log, metric).mean():.3f}"


def _aggregate(log: Log, metric: str) -> str:
    return f"{log[metric].aggregate:.3g}" if metric in log else _DASH


def _length(log: Log) -> str:
    """Tokens of a greedy answer to a forget question."""
    metric = "forget_greedy_fluency"
    if metric not in log:
        return _DASH
    return f"{logs.detail(log, metric, 'tokens') / len(logs.indices(log, metric)):.1f}"


def _cell(number: Callable[..., str], *arguments: object) -> str:
    try:
        return number(*arguments)
    except MissingMetricError:
        return _DASH
