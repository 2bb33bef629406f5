"""Chooses the head, T and s: a grid of heads is scored, cross-fitting chooses, and answers follow.

Scoring given texts takes seconds a setting, answering questions minutes. So every setting of the
grid is scored, and only the chosen setting and its controls answer questions. No seed is chosen: a
setting is scored by its median seed.
"""

import dataclasses
import itertools
import pathlib
import re
from collections.abc import Sequence
from typing import NamedTuple

from jax.sharding import Mesh

from t3jax import pipeline
from t3jax.evaluation import aggregates, selection
from t3jax.evaluation.logs import Log
from t3jax.evaluation.metrics import ForgetQuality
from t3jax.evaluation.settings import BASE, Setting, temper_only, tilt_only
from t3jax.head_io import Head
from t3jax.lm import LM
from t3jax.settings import Settings
from t3jax.training import make_members, train_heads
from t3jax.training_sets import TrainingSets


class Grid(NamedTuple):
    """The heads of a sweep and their folders, rank by rank, recipe by recipe, seed by seed.

    `seeds` is the number of consecutive heads that differ in their seed alone.
    """

    folders: list[pathlib.Path]
    heads: list[Head]
    seeds: int

    @property
    def groups(self) -> list[tuple[int, ...]]:
        """The first head of every recipe and rank, each as a group."""
        return [(first,) for first in range(0, len(self.heads), self.seeds)]


@dataclasses.dataclass(frozen=True, eq=False)
class Sweep:
    """The results of a sweep.

    Attributes:
        grid: The heads.
        scored: Logs of all scored settings by name, without answers.
        candidates: The settings to choose from, by name, one for each seed.
        retain_scored: The retain model's log, without answers.
        choice: The choice; its held-out scores are of the logs with answers.
        noise_floor: The test between two retain models, if there are two.
        evaluation: The evaluation of the chosen setting and its controls, with answers.
    """

    grid: Grid
    scored: dict[str, Log]
    candidates: dict[str, list[Setting]]
    retain_scored: Log
    choice: selection.CrossFit
    noise_floor: ForgetQuality | None
    evaluation: pipeline.Evaluation

    @property
    def chosen(self) -> list[Setting]:
        """The setting chosen on all rows, for each seed."""
        return self.candidates[self.choice.overall.name]


def train_grid(config: Settings, lm: LM, sets: TrainingSets, mesh: Mesh) -> Grid:
    """Trains the heads of a sweep, those of one rank in one program.

    Each rank's run has its own folder in the config's `workdir` and resumes by itself.
    """
    config = pipeline.settle_loss(config, sets)
    recipe = config.train
    recipes = [
        dataclasses.replace(recipe, learning_rate=rate, weight_decay=decay)
        for rate, decay in itertools.product(
            config.sweep.learning_rates or (config.train.learning_rate,),
            config.sweep.weight_decays or (config.train.weight_decay,),
        )
    ]
    folders: list[pathlib.Path] = []
    heads: list[Head] = []
    for rank in config.sweep.ranks or (config.classifier.rank,):
        workdir = pathlib.Path(config["workdir"]) / f"sweep-rank{rank}"
        head_config = dataclasses.replace(pipeline.head_config(config, lm), rank=rank)
        heads += train_heads(
            sets.retain,
            sets.forget,
            head_config=head_config,
            init=pipeline.start_head(config, head_config),
            train_config=recipes,
            seeds=config.seeds,
            workdir=workdir,
            mesh=mesh,
            progress="training",
            **pipeline.head_defaults(config),
        )
        folders += [workdir / member.name for member in make_members(recipes, config.seeds)]
    return Grid(folders, heads, len(config.seeds))


def sweep(config: Settings, lm: LM, grid: Grid, mesh: Mesh | None = None) -> Sweep:
    """Scores every setting of a grid of heads, chooses, and evaluates the chosen one."""
    examined = pipeline.examine(config, lm, grid.heads, mesh)
    candidates = {
        setting.name: spread_over_seeds(setting, grid.seeds)
        for setting in pipeline.settings(config, lm, grid.heads, grid.groups, controls=False)
        if setting.guidance_scale > 0
    }
    settings = [BASE, *itertools.chain.from_iterable(candidates.values())]
    scored, retain_scored = pipeline.score(config, examined, settings, answers=False)
    if retain_scored is None:
        raise ValueError("choosing a setting needs the retain model's log")
    choice = selection.cross_fit(
        {name: [scored[member.name] for member in group] for name, group in candidates.items()},
        scored[BASE.name],
        retain_scored,
        config.sweep.selection_rule,
        group=config.sweep.selection_group,
    )
    # The settings chosen on the halves answer questions only for the held-out score.
    halves = [candidates[half.name] for half in choice.halves]
    answered, retain_log = pipeline.score(
        config, examined, list(dict.fromkeys(itertools.chain(*halves)))
    )
    assert retain_log is not None  # there was one for the choice
    choice = dataclasses.replace(
        choice,
        held_out=tuple(
            selection.held_out(
                answered[a.name], answered[b.name], retain_log, group=config.sweep.selection_group
            )
            for a, b in zip(*halves, strict=True)
        ),
    )
    chosen = candidates[choice.overall.name]
    evaluation = pipeline.evaluate(config, examined, [BASE, *chosen, *controls(chosen[0], chosen)])
    floor = None
    if evaluation.second_retain_log is not None:
        floor = aggregates.forget_quality(evaluation.second_retain_log, retain_scored)
    return Sweep(grid, scored, candidates, retain_scored, choice, floor, evaluation)


def spread_over_seeds(setting: Setting, seeds: int) -> list[Setting]:
    """A setting of the first seed's head, repeated for the head of each seed."""
    (first,) = setting.heads
    return [
        dataclasses.replace(
            setting, name=re.sub(r"^head\d+", f"head{head}", setting.name), heads=(head,)
        )
        for head in range(first, first + seeds)
    ]


def controls(setting: Setting, known: Sequence[Setting]) -> list[Setting]:
    """(T, s = 0) and (T = 1, s' = T s) of a setting, without those that are known."""
    candidates = temper_only(setting), tilt_only(setting)
    return [control for control in candidates if control not in (*known, BASE)]
