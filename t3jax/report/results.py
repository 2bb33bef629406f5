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
        ("Chosen by cross-fitting", _tabulate_choice(experiment)),
        ("What was chosen, its controls and the models", _tabulate_settings(experiment)),
        ("Model utility, part by part", _tabulate_utility_parts(experiment)),
        ("Leaks when many answers are drawn", _tabulate_leaks(experiment)),
        ("One thing varied at a time", "![](varied.svg)"),
        ("Refinements, each at the chosen T and s", _tabulate_refinements(experiment)),
        ("Answers drawn from the base's nucleus", _tabulate_nucleus(experiment)),
        ("Texts that no head was trained on", _tabulate_probes(experiment)),
        ("What it took", _tabulate_stages(experiment)),
    ]
    text = "\n\n".join(
        [f"# {title}", *(f"## {heading}\n\n{body}" for heading, body in sections if body)]
    )
    if hosts.is_lead():
        files.write_json(folder / "experiment.json", _make_json(experiment))
        with files.replacing(folder / "varied.svg") as temporary:
            temporary.write_bytes(figures.draw_variations(experiment.points))
        files.write_text(folder / "results.md", text + "\n")
    return text


def _tabulate_choice(experiment: Experiment) -> str:
    base = selection.log_utility(experiment.sweep.evaluation.logs["base"])
    rows = summary_rows(experiment.sweep.choice, experiment.sweep.noise_floor)
    if base > 0:
        shares = [held.score.utility / base for held in experiment.sweep.choice.held_out]
        rows.append(("share of the base model's utility", " ".join(f"{x:.3f}" for x in shares), ""))
    return make_table(["", "value", "meaning"], rows)


def _tabulate_settings(experiment: Experiment) -> str:
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
        "forget quality p": lambda log, _: f"{_test_quality(experiment, log).p_value:.2g}",
        "D": lambda log, _: f"{_test_quality(experiment, log).statistic:.3f}",
        "utility": lambda log, _: f"{selection.log_utility(log):.3f}",
        "forget prob.": lambda log, _: _show_mean(log, "forget_Q_A_Prob"),
        "forget ROUGE": lambda log, _: _show_mean(log, "forget_Q_A_ROUGE"),
        "reworded": lambda _, beyond: _show_aggregate(beyond, "forget_paraphrased_Q_A_ROUGE"),
        "retain prob.": lambda log, _: _show_mean(log, "retain_Q_A_Prob"),
        "retain ROUGE": lambda log, _: _show_mean(log, "retain_Q_A_ROUGE"),
        "reworded ": lambda _, beyond: _show_aggregate(beyond, "retain_paraphrased_Q_A_ROUGE"),
        "KL forget": lambda _, beyond: _show_aggregate(beyond, "forget_KL_guided_retain"),
        "KL retain": lambda _, beyond: _show_aggregate(beyond, "retain_KL_guided_retain"),
        "perplexity": lambda _, beyond: _show_aggregate(beyond, "forget_greedy_fluency"),
        "length": lambda _, beyond: _show_length(beyond),
    }
    return make_table(
        ["", *columns],
        (
            [name, *(_show(column, log, beyond) for column in columns.values())]
            for name, log, beyond in named
        ),
    )


def _tabulate_utility_parts(experiment: Experiment) -> str:
    evaluation = experiment.sweep.evaluation
    named = [("base", evaluation.logs["base"])]
    named += [(setting.name, evaluation.logs[setting.name]) for setting in experiment.sweep.chosen]
    if evaluation.retain_log is not None:
        named.append(("retain-only model", evaluation.retain_log))
    rows = [[part, *(_show(_show_mean, log, part) for _, log in named)] for part in _PARTS]
    return make_table(
        ["", *(name for name, _ in named)], (row for row in rows if set(row[1:]) != {_DASH})
    )


def _tabulate_leaks(experiment: Experiment) -> str:
    evaluation = experiment.sweep.evaluation
    retain = evaluation.retain_unlearning
    rows = []
    for asked, metric in _LEAKS.items():
        if retain is None or metric not in retain:
            continue
        of_retain = answers.leaking_rows(retain, metric)
        rows.append([asked, "retain-only model", *_show_leak_rates(retain, metric), ""])
        for setting in experiment.sweep.chosen:
            log = evaluation.unlearning[setting.name]
            leaking = answers.leaking_rows(log, metric)
            excess = metrics.bootstrap_difference(leaking, of_retain)
            difference = f"{excess.estimate:+.3f} [{excess.low:+.3f}, {excess.high:+.3f}]"
            rows.append([asked, setting.name, *_show_leak_rates(log, metric), difference])
    if not rows:
        return ""
    return make_table(["asked", "", "1 answer", "4 answers", "all answers", "difference"], rows)


def _tabulate_refinements(experiment: Experiment) -> str:
    rows = []
    for refined in experiment.refined:
        distances = [
            aggregates.forget_quality(log, experiment.sweep.retain_scored).statistic
            for log in refined.scored
        ]
        forget = [aggregates.rows(log, "forget_Q_A_Prob").mean() for log in refined.scored]
        utilities = [selection.log_utility(log) for log in refined.scored]
        answered, beyond = refined.answered, refined.unlearning
        rows.append(
            {
                "": refined.name,
                "D": _show_seeds(distances),
                "utility without ROUGE": _show_seeds(utilities),
                "forget prob.": _show_seeds(forget),
                "forget ROUGE": _show(_show_mean, answered, "forget_Q_A_ROUGE"),
                "reworded": _show_aggregate(beyond, "forget_paraphrased_Q_A_ROUGE"),
                "retain ROUGE": _show(_show_mean, answered, "retain_Q_A_ROUGE"),
                "reworded ": _show_aggregate(beyond, "retain_paraphrased_Q_A_ROUGE"),
                "real authors ROUGE": _show(_show_mean, answered, "ra_Q_A_ROUGE"),
                "perplexity": _show_aggregate(beyond, "forget_greedy_fluency"),
                "length": _show_length(beyond),
            }
        )
    return make_table(list(rows[0]), [list(row.values()) for row in rows])


def _tabulate_nucleus(experiment: Experiment) -> str:
    if experiment.truncated is None:
        return ""
    chosen = experiment.sweep.chosen[0].name
    whole = experiment.sweep.evaluation.unlearning[chosen]
    rows = []
    for name, log in ((f"{chosen}, whole", whole), (f"{chosen}, nucleus", experiment.truncated)):
        leaks = ["/".join(_show_leak_rates(log, m)) if m in log else _DASH for m in _LEAKS.values()]
        repeated = logs.detail(log, "forget_sample_fluency", "repetition")
        perplexity = _show_aggregate(log, "forget_sample_fluency")
        rows.append([name, *leaks, perplexity, f"{repeated:.3f}"])
    columns = ["", "leaks of 1/4/all answers", "reworded", "perplexity", "repetition"]
    return make_table(columns, rows)


def _show_leak_rates(log: Log, metric: str) -> list[str]:
    rates = answers.leak_rates(log, metric)
    most = max(rates)
    return [f"{rates[min(n, most)]:.3f}" for n in (1, 4, most)]


def _tabulate_probes(experiment: Experiment) -> str:
    rows = [
        [
            kind,
            str(seeds[0].texts),
            *(
                _show_seeds([getattr(probe, field) for probe in seeds])
                for field in ("retain_prob", "lowest", "below_half", "change")
            ),
        ]
        for kind, seeds in experiment.probes.items()
    ]
    columns = ["texts", "how many", "mean q", "lowest q", "q < 1/2", "change, nats a token"]
    return make_table(columns, rows)


def _tabulate_stages(experiment: Experiment) -> str:
    rows = [
        [name, f"{stage['seconds']:.0f}", f"{stage['peak_gigabytes']:.1f}"]
        for name, stage in experiment.stages.items()
    ]
    return make_table(["stage", "seconds", "peak memory of the process so far, GB"], rows)


def _make_json(experiment: Experiment) -> dict[str, object]:
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


def _show_seeds(seeds: Sequence[float]) -> str:
    text = f"{np.mean(seeds):.3f}"
    return text if len(seeds) == 1 else f"{text} ({min(seeds):.3f} to {max(seeds):.3f})"


def _test_quality(experiment: Experiment, log: Log) -> metrics.ForgetQuality:
    return aggregates.forget_quality(log, experiment.sweep.evaluation.retain_log)


def _show_mean(log: Log, metric: str) -> str:
    return f"{aggregates.rows(log, metric).mean():.3f}"


def _show_aggregate(log: Log, metric: str) -> str:
    return f"{log[metric].aggregate:.3g}" if metric in log else _DASH


def _show_length(log: Log) -> str:
    """Mean number of tokens of greedy answers to forget questions."""
    metric = "forget_greedy_fluency"
    if metric not in log:
        return _DASH
    return f"{logs.detail(log, metric, 'tokens') / len(logs.indices(log, metric)):.1f}"


def _show(number: Callable[..., str], *arguments: object) -> str:
    try:
        return number(*arguments)
    except MissingMetricError:
        return _DASH
