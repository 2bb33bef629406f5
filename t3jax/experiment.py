"""The TOFU experiment: does the method unlearn what a model was made to know, and at what cost?

From a model that knows nothing of the authors to a page of numbers, in stages: fine-tune it with
and without the forget set; train heads of several seeds; choose T, s and refinements by
cross-fitting; measure what was chosen, and its controls, beside the retain-only model; vary one
thing at a time; look at texts that no head was trained on. Every stage keeps what it finished: a
run that was stopped goes on where it was.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import resource
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jax.sharding import Mesh

from t3jax import data, files, hosts, pipeline
from t3jax.evaluation import metrics, probes, recompute, selection
from t3jax.evaluation.logs import Log
from t3jax.evaluation.scoring import BASE, Setting
from t3jax.head_io import Head
from t3jax.lm import LM, load_lm
from t3jax.sweep import Sweep, of_seeds, sweep, train_grid

# What is varied, one at a time, beside T and s of the sweep.
RANK, EPOCHS, RETAIN_ROWS = "rank of the head", "epochs", "retain rows seen by the head"


class Point(NamedTuple):
    """What one value of what is varied gives.

    Attributes:
        axis: What is varied.
        line: What is held: the refinements, and T or s.
        value: Its value.
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
class Experiment:
    """What an experiment found.

    Attributes:
        sweep: The choice and its evaluation, with the leaks of what was chosen on all rows.
        points: What was varied.
        probes: By kind of text, one for each seed.
        stages: Seconds, and gigabytes of the process at its peak so far, by stage.
    """

    sweep: Sweep
    points: list[Point]
    probes: dict[str, list[probes.Probe]]
    stages: dict[str, dict[str, float]]


def experiment(config: Any, mesh: Mesh) -> Experiment:
    """Runs an experiment, or goes on with it.

    Args:
        config: The settings; everything goes to its `experiment_dir`.
        mesh: Where to.

    Returns:
        What was found.

    Raises:
        ValueError: As the stages.
    """
    folder = pathlib.Path(config.experiment_dir)
    stage = functools.partial(_stage, folder / "stages.json")
    with stage("fine-tuning"):
        config = with_models(config, mesh)
    lm = load_lm(config.model, config.dtype, mesh)
    with stage("features and heads"):
        grid = train_grid(config, lm, mesh)
    with stage("choosing"):
        found = sweep(_changed(config, leak_samples=0), lm, grid, mesh)
    with stage("leaks"):
        found = with_leaks(config, found)
    with stage("varying"):
        points = [*swept(found), *varied(config, lm, mesh, found)]
    with stage("probing"):
        found_probes = probed(config, found)
    hosts.wait_for(folder / "stages.json")
    stages = json.loads((folder / "stages.json").read_text())
    return Experiment(found, points, found_probes, stages)


def with_models(config: Any, mesh: Mesh) -> Any:
    """Makes the two models: one that knows both sets, one that knows the retain set alone.

    Args:
        config: The settings. If it names a `retain_model`, both are there and nothing is made.
        mesh: Where to train.

    Returns:
        The config with both, and with the folders of an experiment.
    """
    folder = pathlib.Path(config.experiment_dir)
    kept = {
        "workdir": str(folder / "heads"),
        "feature_store": str(folder / "features"),
        "eval_dir": str(folder / "evaluation"),
    }
    if config.retain_model is not None:
        return _changed(config, **kept)
    both, alone = (config.retain, config.forget), (config.retain,)
    made = {
        name: pipeline.finetuned(
            _changed(
                config,
                finetune_data=sources,
                finetune_validation=() if name == "base" else (config.forget,),
                finetune_workdir=str(folder / name),
            ),
            mesh,
        )
        for name, sources in (("base", both), ("retain_only", alone))
    }
    return _changed(config, model=str(made["base"]), retain_model=str(made["retain_only"]), **kept)


def with_leaks(config: Any, found: Sweep) -> Sweep:
    """Draws answers from the retain model and from what was chosen; the base recites anyway.

    Args:
        config: The settings.
        found: The sweep.

    Returns:
        The sweep with these leaks in its evaluation.
    """
    drawn, of_retain_model = pipeline.measure(config, found.evaluation.examined, found.chosen)
    evaluation = dataclasses.replace(
        found.evaluation,
        unlearning=found.evaluation.unlearning | drawn,
        retain_unlearning=of_retain_model,
    )
    return dataclasses.replace(found, evaluation=evaluation)


def swept(found: Sweep) -> list[Point]:
    """How what was scored in a sweep depends on T and on s, the other held as it was chosen."""
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


def varied(config: Any, lm: LM, mesh: Mesh, found: Sweep) -> list[Point]:
    """How the chosen setting depends on the head's rank and epochs and the retain rows it saw.

    Args:
        config: The settings; `vary_ranks`, `vary_epochs` and `vary_retain_rows` say which.
        lm: The model.
        mesh: Where to train.
        found: The sweep, whose heads are the values that the config has anyway.

    Returns:
        A point for each value.
    """
    rows = len(data.load_dataset(config.retain, config.tofu_dir))
    first = found.chosen[0].heads[0]
    own = found.grid.heads[first : first + found.grid.seeds]
    trained: list[tuple[str, float, Sequence[Head]]] = [
        (RANK, own[0].config.rank, own),
        (EPOCHS, config.epochs, own),
        (RETAIN_ROWS, rows, own),
    ]
    changes = [
        *((RANK, rank, {"rank": rank}) for rank in config.vary_ranks),
        *((EPOCHS, epochs, {"epochs": epochs}) for epochs in config.vary_epochs),
        *(
            (RETAIN_ROWS, count, {"retain": f"{config.retain}[:{count}]"})
            for count in config.vary_retain_rows
        ),
    ]
    for axis, value, change in changes:
        if "epochs" in change:  # the same share of them is warm-up
            warmup = value * config.warmup_epochs // config.epochs
            change["warmup_epochs"] = warmup
        workdir = pathlib.Path(config.workdir) / f"{axis.split()[0]}-{value}"
        other = _changed(config, **change, workdir=str(workdir), sweep_ranks=())
        trained.append((axis, value, train_grid(other, lm, mesh).heads))
    heads = list(dict.fromkeys(head for _, _, several in trained for head in several))
    chosen = dataclasses.replace(found.chosen[0], name="head0-varied", heads=(0,))
    settings = of_seeds(chosen, len(heads))
    examined = found.evaluation.examined
    examined = dataclasses.replace(examined, store=examined.store.with_heads(heads))
    scored, retain_log = pipeline.score(config, examined, settings, answers=False)
    by_head = dict(zip(heads, scored.values(), strict=True))
    return [
        _point(axis, chosen.refinements.name, value, [by_head[h] for h in several], retain_log)
        for axis, value, several in trained
    ]


def probed(config: Any, found: Sweep) -> dict[str, list[probes.Probe]]:
    """What gate and tilt make of texts by their kind, under what was chosen.

    Args:
        config: The settings.
        found: The sweep.

    Returns:
        By kind of text, one for each seed.
    """
    examined = found.evaluation.examined
    store, sets = examined.store, examined.sets
    texts = {"forget answers (trained on)": sets["forget"].answers}
    texts["forget, reworded questions"] = sets["forget"].reworded or []
    forget = data.load_dataset(config.eval_forget, config.tofu_dir)
    cut = probes.split_answers(forget)
    texts["forget answers cut in two"] = pipeline.encode_rows(config, store.lm, cut)
    texts["retain answers (trained on)"] = sets["retain"].answers
    texts["retain, reworded questions"] = sets["retain"].reworded or []
    for name, kind in (("ra", "real authors"), ("wf", "world facts")):
        if name in sets:
            texts[kind] = sets[name].answers
    if config.plain_chat is not None:
        texts["plain chat"] = pipeline.encode(config, store.lm, config.plain_chat)
    plain = [
        Setting(f"head{setting.heads[0]}-T1-s1", 1.0, 1.0, setting.heads)
        for setting in found.chosen
    ]
    settings = list(dict.fromkeys([BASE, *plain, *found.chosen]))
    results = {}
    for kind, examples in texts.items():
        if examples:
            label = "probe-" + "".join(c if c.isalnum() else "-" for c in kind)
            scores = dict(zip(settings, store.scores(label, examples, settings), strict=True))
            results[kind] = [
                probes.probe(scores[BASE], scores[tilted], scores[served])
                for tilted, served in zip(plain, found.chosen, strict=True)
            ]
    return results


def _point(axis: str, line: str, value: float, seeds: Sequence[Log], retain_log: Any) -> Point:
    rows = [selection.rows_of(log) for log in seeds]
    forget = [recompute.rows(log, "forget_Q_A_Prob") for log in seeds]
    utility = metrics.bootstrap_interval(selection.utility, *rows[0].utility.values())
    interval = metrics.bootstrap_interval(lambda prob: float(prob.mean()), forget[0])
    return Point(
        axis,
        line,
        value,
        [recompute.forget_quality(log, retain_log).statistic for log in seeds],
        [selection.utility(*each.utility.values()) for each in rows],
        (utility.low, utility.high),
        [float(prob.mean()) for prob in forget],
        (interval.low, interval.high),
    )


def _changed(config: Any, **fields: Any) -> Any:
    """A copy of a config with other values."""
    copy = config.copy_and_resolve_references()
    for name, value in fields.items():
        copy[name] = value
    return copy


@contextlib.contextmanager
def _stage(path: pathlib.Path, name: str) -> Iterator[None]:
    """Adds up the seconds of a stage over the runs it took, until it is done."""
    known = json.loads(path.read_text()) if path.is_file() else {}
    stage = known.get(name, {"seconds": 0.0, "done": False})
    start = time.perf_counter()
    print(f"== {name}", flush=True)
    done = False
    try:
        yield
        done = True
    finally:
        if not stage["done"]:
            stage["seconds"] += time.perf_counter() - start
            stage["peak_gigabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            stage["done"] = done
            if hosts.is_lead():
                path.parent.mkdir(parents=True, exist_ok=True)
                files.write_json(path, known | {name: stage})
