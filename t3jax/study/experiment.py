"""The TOFU experiment: does the method unlearn rows of the fine-tuning data, and at what cost?

The stages: fine-tune a model that knows nothing of the authors with and without the forget set;
train heads of several seeds; choose T, s and refinements by cross-fitting; measure the chosen
setting and its controls beside the retain-only model; vary one thing at a time; probe texts that no
head was trained on. Every stage stores its results, so that a stopped run resumes.
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
        truncated: Leaks of the first chosen setting in samples from the base's nucleus; None
            without samples.
        probes: By kind of text, one for each seed.
        stages: Seconds, and the process's peak memory so far in gigabytes, by stage.
    """

    sweep: Sweep
    points: list[variations.Point]
    refined: list[variations.Refined]
    truncated: Log | None
    probes: dict[str, list[probes.Probe]]
    stages: dict[str, dict[str, float]]


def experiment(config: Settings, mesh: Mesh) -> Experiment:
    """Runs or resumes an experiment; all results are in the config's `experiment.dir`."""
    folder = pathlib.Path(config["experiment.dir"])
    stage = functools.partial(_measure_stage, folder / "stages.json")
    with stage("fine-tuning"):
        config = make_models(config, mesh)
    lm = load_lm(config["model"], config.dtype, mesh)
    with stage("features and heads"):
        grid = train_grid(config, lm, pipeline.training_sets(config, lm), mesh)
    with stage("choosing"):
        result = sweep(replace(config, **{"leaks.leak_samples": 0}), lm, grid, mesh)
    with stage("leaks"):
        result = draw_leaks(config, result)
    with stage("varying"):
        varied = variations.vary_heads(config, lm, mesh, result)
        points = [*variations.vary_settings(result), *varied]
    with stage("refining"):
        refined = variations.refine(config, lm, mesh, result)
    truncated = None
    if config.leaks.leak_samples:
        with stage("truncating"):
            truncated = variations.truncate(config, result)
    with stage("probing"):
        by_kind = probe(config, result)
    hosts.wait_for(folder / "stages.json")
    stages = json.loads((folder / "stages.json").read_text(encoding="utf-8"))
    return Experiment(result, points, refined, truncated, by_kind, stages)


def make_models(config: Settings, mesh: Mesh) -> Settings:
    """Fine-tunes the two models, one on both sets and one on the retain set alone.

    Nothing is trained if `eval.retain_model` is set. Returns the settings with both models and the
    folders of the experiment.
    """
    folder = pathlib.Path(config["experiment.dir"])
    folders = {
        "workdir": str(folder / "heads"),
        "feature_store": str(folder / "features"),
        "eval.dir": str(folder / "evaluation"),
    }
    if config.eval.retain_model is not None:
        return replace(config, **folders)
    both, alone = (config.retain, config.forget), (config.retain,)
    trained = {
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
    models = {"model": str(trained["base"]), "eval.retain_model": str(trained["retain_only"])}
    return replace(config, **models, **folders)


def draw_leaks(config: Settings, result: Sweep) -> Sweep:
    """Adds to a sweep the leaks of the retain model and the chosen setting.

    The base model is left out: its leak rate is near 1.
    """
    evaluation = result.evaluation
    drawn, of_retain_model = pipeline.measure(config, evaluation.examined, result.chosen)
    evaluation = dataclasses.replace(
        evaluation, unlearning=evaluation.unlearning | drawn, retain_unlearning=of_retain_model
    )
    return dataclasses.replace(result, evaluation=evaluation)


def probe(config: Settings, result: Sweep) -> dict[str, list[probes.Probe]]:
    """The effect of gate and tilt by kind of text, for each seed of the chosen setting."""
    examined = result.evaluation.examined
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
        for setting in result.chosen
    ]
    settings = list(dict.fromkeys([BASE, *plain, *result.chosen]))
    by_kind = {}
    for kind, examples in texts.items():
        if examples:
            label = f"probe-{files.slug(kind)}"
            scores = dict(zip(settings, store.scores(label, examples, settings), strict=True))
            by_kind[kind] = [
                probes.probe(scores[BASE], scores[tilted], scores[served])
                for tilted, served in zip(plain, result.chosen, strict=True)
            ]
    return by_kind


@contextlib.contextmanager
def _measure_stage(path: pathlib.Path, name: str) -> Iterator[None]:
    """Writes the seconds of a stage, summed over runs until it is done, and the peak memory."""
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
