"""Variations of the chosen setting: one thing changes at a time, and all else stays as chosen.

Scores at other T and s are the sweep's. Heads are trained for other ranks, epochs and retain sets,
and for refinements that change the training. Nothing here chooses.
"""

import dataclasses
import itertools
import pathlib
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.sharding import Mesh

from t3jax import data, files, pipeline
from t3jax.evaluation import aggregates, metrics, selection, unlearning
from t3jax.evaluation.logs import Log
from t3jax.evaluation.settings import Setting
from t3jax.head import class_prior_shift
from t3jax.head_io import Head
from t3jax.lm import LM
from t3jax.refinements import Refinements
from t3jax.settings import Settings, replace
from t3jax.sweep import Sweep, spread_over_seeds, train_grid

# The axes that are varied, one at a time, beside T and s of the sweep.
RANK, EPOCHS, RETAIN_ROWS = "rank of the head", "epochs", "retain rows seen by the head"


class Point(NamedTuple):
    """The results at one value of an axis.

    Attributes:
        axis: The quantity that is varied.
        line: The quantities that are fixed: the refinements, and T or s.
        value: The value of the axis.
        distances: D to the retain model's truth ratios, one for each seed.
        utilities: Utility without ROUGE, one for each seed.
        utility_interval: 95 % bootstrap interval of the first seed's utility.
        forget_probs: Mean probability of the forget answers, one for each seed.
        forget_interval: 95 % bootstrap interval of the first seed's probability.
    """

    axis: str
    line: str
    value: float
    distances: list[float]
    utilities: list[float]
    utility_interval: tuple[float, float]
    forget_probs: list[float]
    forget_interval: tuple[float, float]


@dataclasses.dataclass(frozen=True, eq=False)
class Refined:
    """The results of a refinement.

    Attributes:
        name: The refinement.
        scored: Logs of all rows without answers, one for each seed.
        answered: The first seed's log of some rows.
        unlearning: The first seed's metrics beyond TOFU's.
    """

    name: str
    scored: list[Log]
    answered: Log
    unlearning: Log


def vary_settings(sweep: Sweep) -> list[Point]:
    """The scores of a sweep over T at the chosen s, and over s at the chosen T."""
    chosen = sweep.chosen[0]
    points = []
    for seeds in sweep.candidates.values():
        setting = seeds[0]
        if setting.heads != chosen.heads:
            continue
        logs = [sweep.scored[seed.name] for seed in seeds]
        kind = setting.refinements.name
        if setting.guidance_scale == chosen.guidance_scale:
            line = f"{kind}, s = {setting.guidance_scale:g}"
            point = _make_point("T", line, setting.base_temperature, logs, sweep.retain_scored)
            points.append(point)
        if setting.base_temperature == chosen.base_temperature:
            line = f"{kind}, T = {setting.base_temperature:g}"
            point = _make_point("s", line, setting.guidance_scale, logs, sweep.retain_scored)
            points.append(point)
    return points


def vary_heads(config: Settings, lm: LM, mesh: Mesh, sweep: Sweep) -> list[Point]:
    """The scores of the chosen setting over rank, epochs and retain rows of the head.

    `experiment.vary_ranks`, `vary_epochs` and `vary_retain_rows` are the values; the sweep has the
    heads of the configured values.
    """
    rows = len(data.load_dataset(config["retain"], config.tofu_dir))
    chosen_heads = _find_heads(sweep)
    trained: list[tuple[str, float, Sequence[Head]]] = [
        (RANK, chosen_heads[0].config.rank, chosen_heads),
        (EPOCHS, config.train.epochs, chosen_heads),
        (RETAIN_ROWS, rows, chosen_heads),
    ]
    changes: list[tuple[str, int, dict[str, Any]]] = [
        *((RANK, rank, {"classifier.rank": rank}) for rank in config.experiment.vary_ranks),
        *((EPOCHS, epochs, {"train.epochs": epochs}) for epochs in config.experiment.vary_epochs),
        *(
            (RETAIN_ROWS, count, {"retain": f"({config.retain})[:{count}]"})
            for count in config.experiment.vary_retain_rows
        ),
    ]
    for axis, value, change in changes:
        heads = _train(config, lm, mesh, f"{axis.split()[0]}-{value}", **change)
        trained.append((axis, value, heads))
    distinct = list(dict.fromkeys(head for _, _, heads in trained for head in heads))
    chosen = dataclasses.replace(sweep.chosen[0], name="head0-varied", heads=(0,))
    settings = spread_over_seeds(chosen, len(distinct))
    examined = _replace_heads(sweep, distinct)
    scored, retain_log = pipeline.score(config, examined, settings, answers=False)
    assert retain_log is not None  # the sweep had one
    by_head = dict(zip(distinct, scored.values(), strict=True))
    kind = chosen.refinements.name
    return [
        _make_point(axis, kind, value, [by_head[head] for head in heads], retain_log)
        for axis, value, heads in trained
    ]


def refine(config: Settings, lm: LM, mesh: Mesh, sweep: Sweep) -> list[Refined]:
    """The results of each refinement at the chosen T and s, the paper's method first.

    `experiment.refine_rows` is the number of questions of a set that are answered, and
    `experiment.varied_retain` names further retain texts for a head. The forget set as two requests
    is two heads, each trained on the authors of one half.
    """
    kinds = _make_kinds(config, lm, mesh, sweep)
    groups = [group for _, seeds in kinds.values() for group in seeds]
    distinct = list(dict.fromkeys(itertools.chain(*groups)))
    settings = {
        name: [
            Setting(
                f"{files.slug(name)}-seed{seed}",
                sweep.chosen[0].base_temperature,
                sweep.chosen[0].guidance_scale,
                tuple(distinct.index(head) for head in group),
                refinements,
            )
            for seed, group in enumerate(seeds)
        ]
        for name, (refinements, seeds) in kinds.items()
    }
    examined = _replace_heads(sweep, distinct)
    flat = [setting for seeds in settings.values() for setting in seeds]
    scored, _ = pipeline.score(config, examined, flat, answers=False)
    # Answers take minutes: only the first seed answers, and only some of the questions.
    changes = {
        "eval.dir": str(pathlib.Path(config["eval.dir"]) / "refined"),
        "eval.rows": config.experiment.refine_rows,
        "eval.world_facts": None,
        "leaks.leak_samples": 0,
        "leaks.kl_rows": 0,
    }
    config = replace(config, **changes)
    examined = dataclasses.replace(examined, sets=pipeline.load_sets(config, lm))
    evaluation = pipeline.evaluate(config, examined, [seeds[0] for seeds in settings.values()])
    return [
        Refined(
            name,
            [scored[setting.name] for setting in seeds],
            evaluation.logs[seeds[0].name],
            evaluation.unlearning[seeds[0].name],
        )
        for name, seeds in settings.items()
    ]


def _make_kinds(
    config: Settings, lm: LM, mesh: Mesh, sweep: Sweep
) -> dict[str, tuple[Refinements, Sequence[tuple[Head, ...]]]]:
    """Refinements to serve and the heads of each seed, by name; trains heads where needed."""
    chosen_heads = [(head,) for head in _find_heads(sweep)]
    rows = {
        name: len(data.load_dataset(config[name], config.tofu_dir)) for name in ("forget", "retain")
    }
    fraction = rows["forget"] / sum(rows.values())
    middle = max(
        1, rows["forget"] // 2 // config.sweep.selection_group * config.sweep.selection_group
    )
    zero = _train(config, lm, mesh, "zero", **{"train.zero_output": True})
    halves = [
        _train(config, lm, mesh, f"request-{i}", forget=f"({config.forget})[{part}]")
        for i, part in enumerate((f":{middle}", f"{middle}:"))
    ]
    prior = [
        (dataclasses.replace(head, prior_shift=class_prior_shift(fraction)),)
        for (head,) in chosen_heads
    ]
    as_chosen = sweep.chosen[0].refinements
    product = dataclasses.replace(as_chosen, combine="product")
    kinds: dict[str, tuple[Refinements, Sequence[tuple[Head, ...]]]] = {
        name: (pipeline.refinements(name, lm), chosen_heads)
        for name in ("plain", "gated", "protected", "gated-protected")
    }
    kinds["zero-started output"] = as_chosen, [(head,) for head in zero]
    kinds[f"class prior {fraction:.2f}"] = as_chosen, prior
    if config.experiment.varied_retain is not None:
        more = f"({config.retain})+({config.experiment.varied_retain})"
        heads = _train(config, lm, mesh, "varied-retain", retain=more)
        kinds["more varied retain texts"] = as_chosen, [(head,) for head in heads]
    kinds["two requests"] = as_chosen, list(zip(*halves, strict=True))
    kinds["two requests, product"] = product, list(zip(*halves, strict=True))
    return kinds


def truncate(config: Settings, sweep: Sweep) -> Log:
    """Leaks and fluency of answers drawn from the base distribution's nucleus.

    They are drawn under the first chosen setting; `experiment.refine_top_p` is the nucleus's
    probability.
    """
    examined = sweep.evaluation.examined
    forget = {"forget": examined.sets["forget"]}
    folder = pathlib.Path(config["eval.dir"]) / "truncated"
    options = dataclasses.replace(
        config.leaks,
        leak_top_p=config.experiment.refine_top_p,
        leak_truncate_on="base",
        kl_rows=0,
        max_new_tokens=config.sampling.max_new_tokens,
        seed=config.sampling.seed,
    )
    with warnings.catch_warnings():  # it warns of the leaks that are measured here
        warnings.filterwarnings("ignore", 'truncate_on="base"')
        drawn = unlearning.measure(examined.store, forget, sweep.chosen[:1], folder, options)
    return drawn[sweep.chosen[0].name]


def _find_heads(sweep: Sweep) -> list[Head]:
    """The heads of the chosen recipe, one for each seed."""
    first = sweep.chosen[0].heads[0]
    return sweep.grid.heads[first : first + sweep.grid.seeds]


def _replace_heads(sweep: Sweep, heads: Sequence[Head]) -> pipeline.Examined:
    examined = sweep.evaluation.examined
    return dataclasses.replace(examined, store=examined.store.with_heads(heads))


def _train(config: Settings, lm: LM, mesh: Mesh, name: str, **change: object) -> list[Head]:
    """Trains a head for each seed under a changed config, in a folder of its own."""
    workdir = str(pathlib.Path(config["workdir"]) / name)
    changed = replace(config, **change, **{"workdir": workdir, "sweep.ranks": ()})
    return train_grid(changed, lm, pipeline.training_sets(changed, lm), mesh).heads


def _make_point(axis: str, line: str, value: float, seeds: Sequence[Log], retain_log: Log) -> Point:
    forget = [aggregates.rows(log, "forget_Q_A_Prob") for log in seeds]
    utility = selection.utility_interval(seeds[0])
    interval = metrics.bootstrap_interval(lambda prob: float(prob.mean()), forget[0])
    return Point(
        axis,
        line,
        value,
        [aggregates.forget_quality(log, retain_log).statistic for log in seeds],
        [selection.log_utility(log) for log in seeds],
        (utility.low, utility.high),
        [float(prob.mean()) for prob in forget],
        (interval.low, interval.high),
    )
