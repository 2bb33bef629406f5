"""The TOFU experiment: does the method unlearn what a model was made to know, and at what cost?

From a model that knows nothing of the authors to a page of numbers, in stages: fine-tune it with
and without the forget set; train heads of several seeds; choose T, s and refinements by
cross-fitting; measure the chosen setting and its controls beside the retain-only model; vary one
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
from collections.abc import Iterator

from jax.sharding import Mesh

from t3jax import data, files, hosts, pipeline
from t3jax.evaluation import probes
from t3jax.evaluation.logs import Log
from t3jax.evaluation.settings import BASE, Setting
from t3jax.lm import load_lm
from t3jax.settings import Settings, replace
from t3jax.study import variations
from t3jax.sweep import Sweep, sweep, train_grid


@dataclasses.dataclass(frozen=True, eq=False)
class Experiment:
    """The results of an experiment.

    Attributes:
        sweep: The choice and its evaluation, with the leaks of the setting chosen on all rows.
        points: The variations.
        refined: The paper's method and its refinements at the chosen T and s.
        truncated: Leaks of the first chosen setting drawn from the base's nucleus; None without
            draws.
        probes: By kind of text, one for each seed.
        stages: Seconds, and gigabytes of the process at its peak so far, by stage.
    """

    sweep: Sweep
    points: list[variations.Point]
    refined: list[variations.Refined]
    truncated: Log | None
    probes: dict[str, list[probes.Probe]]
    stages: dict[str, dict[str, float]]


def experiment(config: Settings, mesh: Mesh) -> Experiment:
    """Runs an experiment, or goes on with it; everything goes to the config's `experiment.dir`."""
    folder = pathlib.Path(config["experiment.dir"])
    stage = functools.partial(_stage, folder / "stages.json")
    with stage("fine-tuning"):
        config = make_models(config, mesh)
    lm = load_lm(config["model"], config.dtype, mesh)
    with stage("features and heads"):
        grid = train_grid(config, lm, pipeline.training_sets(config, lm), mesh)
    with stage("choosing"):
        found = sweep(replace(config, **{"leaks.leak_samples": 0}), lm, grid, mesh)
    with stage("leaks"):
        found = draw_leaks(config, found)
    with stage("varying"):
        varied = variations.vary_heads(config, lm, mesh, found)
        points = [*variations.vary_settings(found), *varied]
    with stage("refining"):
        refined = variations.refine(config, lm, mesh, found)
    truncated = None
    if config.leaks.leak_samples:
        with stage("truncating"):
            truncated = variations.truncate(config, found)
    with stage("probing"):
        found_probes = probe(config, found)
    hosts.wait_for(folder / "stages.json")
    stages = json.loads((folder / "stages.json").read_text(encoding="utf-8"))
    return Experiment(found, points, refined, truncated, found_probes, stages)


def make_models(config: Settings, mesh: Mesh) -> Settings:
    """Makes the two models: one that knows both sets, one that knows the retain set alone.

    Nothing is made if `eval.retain_model` is set. Gives the settings with both, and with the
    folders of an experiment.
    """
    folder = pathlib.Path(config["experiment.dir"])
    kept = {
        "workdir": str(folder / "heads"),
        "feature_store": str(folder / "features"),
        "eval.dir": str(folder / "evaluation"),
    }
    if config.eval.retain_model is not None:
        return replace(config, **kept)
    both, alone = (config.retain, config.forget), (config.retain,)
    made = {
        name: pipeline.finetune_once(
            replace(
                config,
                **{
                    "finetune.data": sources,
                    "finetune.validation": () if name == "base" else (config.forget,),
                    "finetune.workdir": str(folder / name),
                },
            ),
            mesh,
        )
        for name, sources in (("base", both), ("retain_only", alone))
    }
    models = {"model": str(made["base"]), "eval.retain_model": str(made["retain_only"])}
    return replace(config, **models, **kept)


def draw_leaks(config: Settings, found: Sweep) -> Sweep:
    """Draws answers of the retain model and the chosen setting; the base recites anyway.

    Gives the sweep with these leaks in its evaluation.
    """
    drawn, of_retain_model = pipeline.measure(config, found.evaluation.examined, found.chosen)
    evaluation = dataclasses.replace(
        found.evaluation,
        unlearning=found.evaluation.unlearning | drawn,
        retain_unlearning=of_retain_model,
    )
    return dataclasses.replace(found, evaluation=evaluation)


def probe(config: Settings, found: Sweep) -> dict[str, list[probes.Probe]]:
    """The effect of gate and tilt by kind of text, for each seed of the chosen setting."""
    examined = found.evaluation.examined
    store, sets = examined.store, examined.sets
    texts = {"forget answers (trained on)": sets["forget"].answers}
    texts["forget, reworded questions"] = sets["forget"].reworded or []
    forget = data.load_dataset(config["eval.forget"], config.tofu_dir)
    cut = probes.split_answers(forget)
    texts["forget answers cut in two"] = pipeline.encode_rows(config, store.lm, cut)
    texts["retain answers (trained on)"] = sets["retain"].answers
    texts["retain, reworded questions"] = sets["retain"].reworded or []
    for name, kind in (("ra", "real authors"), ("wf", "world facts")):
        if name in sets:
            texts[kind] = sets[name].answers
    if config.experiment.plain_chat is not None:
        texts["plain chat"] = pipeline.encode(config, store.lm, config.experiment.plain_chat)
    plain = [
        Setting(f"head{setting.heads[0]}-T1-s1", 1.0, 1.0, setting.heads)
        for setting in found.chosen
    ]
    settings = list(dict.fromkeys([BASE, *plain, *found.chosen]))
    results = {}
    for kind, examples in texts.items():
        if examples:
            label = f"probe-{files.slug(kind)}"
            scores = dict(zip(settings, store.scores(label, examples, settings), strict=True))
            results[kind] = [
                probes.probe(scores[BASE], scores[tilted], scores[served])
                for tilted, served in zip(plain, found.chosen, strict=True)
            ]
    return results


@contextlib.contextmanager
def _stage(path: pathlib.Path, name: str) -> Iterator[None]:
    """Adds up the seconds of a stage over the runs it took, until it is done."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
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
