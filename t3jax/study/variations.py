"""Variations of the chosen setting: one thing changed at a time, all else as it was chosen.

T and s come from the sweep, whose scores are there. Heads of other ranks, epochs and retain sets
are trained, and those of refinements that change the training. Nothing here chooses.
"""

import dataclasses
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
        line: The quantities that are held: the refinements, and T or s.
        value: The value of the axis.
        distances: D to the retain model's truth ratios, one for each seed.
        utilities: Utility without ROUGE, one for each seed.
        utility_interval: 95 % bootstrap interval of the first seed's.
        forget_probs: Mean probability of the forget answers, one for each seed.
        forget_interval: 95 % bootstrap interval of the first seed's.
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
        scored: Logs without answers of all rows, one for each seed.
        answered: Log of the first seed, of some rows.
        unlearning: Its numbers beyond TOFU's.
    """

    name: str
    scored: list[Log]
    answered: Log
    unlearning: Log


def vary_settings(found: Sweep) -> list[Point]:
    """The scores of a sweep over T and over s, the other held as it was chosen."""
    chosen = found.chosen[0]
    recipe = [setting for setting in found.candidates.values() if setting[0].heads == chosen.heads]
    points = []
    for seeds in recipe:
        setting = seeds[0]
        kept = [found.scored[each.name] for each in seeds]
        kind = setting.refinements.name
        if setting.guidance_scale == chosen.guidance_scale:
            line = f"{kind}, s = {setting.guidance_scale:g}"
            points.append(_point("T", line, setting.base_temperature, kept, found.retain_scored))
        if setting.base_temperature == chosen.base_temperature:
            line = f"{kind}, T = {setting.base_temperature:g}"
            points.append(_point("s", line, setting.guidance_scale, kept, found.retain_scored))
    return points


def vary_heads(config: Settings, lm: LM, mesh: Mesh, found: Sweep) -> list[Point]:
    """How the chosen setting depends on the head's rank and epochs and the retain rows it saw.

    `experiment.vary_ranks`, `vary_epochs` and `vary_retain_rows` say which; the sweep has the heads
    of the values that the settings have anyway.
    """
    rows = len(data.load_dataset(config["retain"], config.tofu_dir))
    own = _own_heads(found)
    trained: list[tuple[str, float, Sequence[Head]]] = [
        (RANK, own[0].config.rank, own),
        (EPOCHS, config.train.epochs, own),
        (RETAIN_ROWS, rows, own),
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
    every = list(dict.fromkeys(head for _, _, several in trained for head in several))
    chosen = dataclasses.replace(found.chosen[0], name="head0-varied", heads=(0,))
    settings = spread_over_seeds(chosen, len(every))
    scored, retain_log = pipeline.score(config, _with_heads(found, every), settings, answers=False)
    assert retain_log is not None  # the sweep had one
    by_head = dict(zip(every, scored.values(), strict=True))
    return [
        _point(axis, chosen.refinements.name, value, [by_head[h] for h in several], retain_log)
        for axis, value, several in trained
    ]


def refine(config: Settings, lm: LM, mesh: Mesh, found: Sweep) -> list[Refined]:
    """The results of each refinement at the chosen T and s, the paper's method first.

    `experiment.refine_rows` says how many questions of a set are answered, and
    `experiment.varied_retain` which further retain texts a head may read. The forget set as
    two requests is two heads, each trained on the authors of one half.
    """
    kinds = _kinds(config, lm, mesh, found)
    every = list(dict.fromkeys(h for _, seeds in kinds.values() for group in seeds for h in group))
    settings = {
        name: [
            Setting(
                f"{files.slug(name)}-seed{seed}",
                found.chosen[0].base_temperature,
                found.chosen[0].guidance_scale,
                tuple(every.index(head) for head in group),
                refinements,
            )
            for seed, group in enumerate(seeds)
        ]
        for name, (refinements, seeds) in kinds.items()
    }
    examined = _with_heads(found, every)
    flat = [setting for seeds in settings.values() for setting in seeds]
    scored, _ = pipeline.score(config, examined, flat, answers=False)
    # Answers cost minutes: only the first seed answers, and only some of the questions.
    fewer = {
        "eval.dir": str(pathlib.Path(config["eval.dir"]) / "refined"),
        "eval.rows": config.experiment.refine_rows,
        "eval.world_facts": None,
        "leaks.leak_samples": 0,
        "leaks.kl_rows": 0,
    }
    some = replace(config, **fewer)
    sets = pipeline.load_sets(some, lm)
    firsts = [seeds[0] for seeds in settings.values()]
    evaluation = pipeline.evaluate(some, dataclasses.replace(examined, sets=sets), firsts)
    return [
        Refined(
            name,
            [scored[setting.name] for setting in seeds],
            evaluation.logs[seeds[0].name],
            evaluation.unlearning[seeds[0].name],
        )
        for name, seeds in settings.items()
    ]


def _kinds(
    config: Settings, lm: LM, mesh: Mesh, found: Sweep
) -> dict[str, tuple[Refinements, Sequence[tuple[Head, ...]]]]:
    """By name, the refinements when served, and the heads of each seed, trained if need be."""
    own = [(head,) for head in _own_heads(found)]
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
        (dataclasses.replace(head, prior_shift=class_prior_shift(fraction)),) for (head,) in own
    ]
    as_chosen = found.chosen[0].refinements
    product = dataclasses.replace(as_chosen, combine="product")
    kinds: dict[str, tuple[Refinements, Sequence[tuple[Head, ...]]]] = {
        name: (pipeline.refinements(name, lm), own)
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


def truncate(config: Settings, found: Sweep) -> Log:
    """Leaks and fluency of answers drawn from the base distribution's nucleus.

    They are drawn under the first chosen setting; `experiment.refine_top_p` is how much of it.
    """
    examined = found.evaluation.examined
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
    with warnings.catch_warnings():  # what the warning is about is measured here
        warnings.filterwarnings("ignore", 'truncate_on="base"')
        drawn = unlearning.measure(examined.store, forget, found.chosen[:1], folder, options)
    return drawn[found.chosen[0].name]


def _own_heads(found: Sweep) -> list[Head]:
    """The heads of the chosen recipe, one for each seed."""
    first = found.chosen[0].heads[0]
    return found.grid.heads[first : first + found.grid.seeds]


def _with_heads(found: Sweep, heads: Sequence[Head]) -> pipeline.Examined:
    examined = found.evaluation.examined
    return dataclasses.replace(examined, store=examined.store.with_heads(heads))


def _train(config: Settings, lm: LM, mesh: Mesh, name: str, **change: object) -> list[Head]:
    """A head for each seed of a config that is changed in something, in a folder of its own."""
    workdir = str(pathlib.Path(config["workdir"]) / name)
    changed = replace(config, **change, **{"workdir": workdir, "sweep.ranks": ()})
    return train_grid(changed, lm, pipeline.training_sets(changed, lm), mesh).heads


def _point(axis: str, line: str, value: float, seeds: Sequence[Log], retain_log: Log) -> Point:
    rows = [selection.rows_of(log) for log in seeds]
    forget = [aggregates.rows(log, "forget_Q_A_Prob") for log in seeds]
    utility = metrics.bootstrap_interval(selection.utility, *rows[0].utility.values())
    interval = metrics.bootstrap_interval(lambda prob: float(prob.mean()), forget[0])
    return Point(
        axis,
        line,
        value,
        [aggregates.forget_quality(log, retain_log).statistic for log in seeds],
        [selection.utility(*each.utility.values()) for each in rows],
        (utility.low, utility.high),
        [float(prob.mean()) for prob in forget],
        (interval.low, interval.high),
    )
