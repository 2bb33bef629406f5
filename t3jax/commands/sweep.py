"""Chooses the head, T and s: trains a grid of heads, scores all, and cross-fits the choice.

    python sweep.py --config=configs/smollm2.py --config.sweep.learning_rates=0.01,0.003

Heads of all `sweep.learning_rates` x `sweep.weight_decays` x `seeds` train together in one program,
one program for each of `sweep.ranks`; an empty list is the config's own value. A stopped run
resumes when it is called again. The heads are written to `workdir`.

With a retain model (`eval.retain_model` or `eval.retain_log`) all heads are scored at
`eval.base_temperatures` x `eval.guidance_scales`; the chosen one and its controls then answer
questions too. `selection.json`, `report.html` and the logs are written to `eval.dir`. Without one,
head, T and s are chosen by the made-up-name level, see `t3jax.evaluation.calibration`, and
`selection.json` is written to `workdir`.
"""

import dataclasses
import pathlib

from jax.sharding import Mesh

import t3jax
from t3jax import files, pipeline, preflight
from t3jax.lm import LM
from t3jax.report import write_calibration, write_sweep
from t3jax.settings import Settings
from t3jax.sweep import sweep, train_grid


def main(config: Settings) -> None:
    """Trains a grid of heads and chooses among them."""
    config.require("model", "forget", "retain", "workdir")
    if config.eval.retain_model is None and config.eval.retain_log is None:
        if not config.synthetic.made_up_names:
            raise ValueError(
                "choosing needs a retain model (--config.eval.retain_model=FOLDER) or made-up "
                "names (--config.synthetic.made_up_names=4)"
            )
        choose = _choose_by_made_up_names
    else:
        config.require("eval.forget", "eval.retain", "eval.dir")
        choose = _choose_by_retain_model
    mesh = t3jax.make_mesh(config.mesh)
    shape = preflight.shape_of(config, mesh)
    for rank in config.sweep.ranks or (config.classifier.rank,):
        head_config = dataclasses.replace(pipeline.head_config(config, shape), rank=rank)
        pipeline.start_head(config, head_config)
    preflight.check_sources(config, "forget", "retain")
    files.check_writable(pathlib.Path(config.feature_store))
    folders = [config.workdir]
    if choose is _choose_by_retain_model:
        folders.append(config.eval.dir)
        preflight.check_evaluation(config, shape)
    with preflight.outputs(*folders):
        print(choose(config, t3jax.load_lm(config["model"], config.dtype, mesh), mesh))


def _choose_by_retain_model(config: Settings, lm: LM, mesh: Mesh) -> str:
    grid = train_grid(config, lm, pipeline.training_sets(config, lm), mesh)
    result = sweep(config, lm, grid, mesh)
    return write_sweep(config["eval.dir"], result, title=f"Choosing a head for {config.model}")


def _choose_by_made_up_names(config: Settings, lm: LM, mesh: Mesh) -> str:
    folder = config["workdir"]
    while True:
        sets = pipeline.training_sets(config, lm)
        settled = pipeline.settle_loss(config, sets)
        grid = train_grid(settled, lm, sets, mesh)
        calibration, record = pipeline.choose_among(settled, lm, grid.heads, sets, grid.seeds)
        distilled = pipeline.replace_classifier(config, record)
        if distilled is None:
            return write_calibration(folder, calibration, grid.folders)
        config = distilled
