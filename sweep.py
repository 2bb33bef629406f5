"""Chooses the head, T and s: trains a grid of heads, evaluates all, and cross-fits the choice.

    python sweep.py --config=configs/smollm2.py --config.sweep_learning_rates=0.01,0.003

Heads of all `sweep_learning_rates` x `sweep_weight_decays` x `seeds` train together in one program,
one program for each of `sweep_ranks`; an empty list is the config's own value. All are evaluated at
`eval_temperatures` x `eval_scales`, with the controls. Scoring reads each text once for all
settings, but answers are generated anew for every head and every T · s: that is the cost of a grid.

Called again after it was stopped, it goes on where it was. Writes `selection.json`, `report.html`
and the logs to `eval_dir`, and the heads to `workdir`.
"""

import pathlib
from typing import Any

import t3jax
from t3jax import cli, files, hosts, pipeline
from t3jax.evaluation import logs, recompute, selection
from t3jax.report import write_report


def main(config: Any) -> None:
    """Trains, evaluates and chooses."""
    cli.require(config, "model", "forget", "retain", "workdir", "eval_forget", "eval_retain")
    cli.require(config, "eval_dir")
    if config.retain_model is None and config.retain_log is None:
        raise ValueError("choosing needs the retain model: give --config.retain_model=FOLDER")
    mesh = t3jax.make_mesh(config.mesh)
    lm = t3jax.load_lm(config.model, config.dtype, mesh)
    folders, heads = pipeline.train_grid(config, lm, mesh)
    evaluation = pipeline.evaluate(config, lm, heads, mesh)
    found, floor = pipeline.choose(config, evaluation, heads)

    names = [setting.name for setting in evaluation.settings]
    width = max(len(name) for name in names)
    print(f"{'':{width}} {'forget quality':>15} {'D':>7} {found.utility_name:>15}")
    for name in names:
        log = evaluation.logs[name]
        quality = recompute.forget_quality(log, evaluation.retain_log)
        utility = selection.utility(*selection.rows_of(log).utility.values())
        print(f"{name:{width}} {quality.p_value:15.3g} {quality.statistic:7.3f} {utility:15.3f}")
    for index, folder in enumerate(folders):
        print(f"head{index}: {folder}")
    print()
    for label, value, note in selection.summary_rows(found, floor):
        print(f"{label}: {value} ({note})")
    for metric, number in _generalisation(evaluation.unlearning[found.overall.name]).items():
        print(f"{found.overall.name}, {metric}: {number:.3f}")
    folder = pathlib.Path(config.eval_dir)
    if hosts.is_lead():
        files.write_json(folder / "selection.json", selection.as_json(found, floor))
    write_report(
        folder / "report.html",
        evaluation,
        title=f"Choosing a head for {config.model}",
        selected=selection.summary_rows(found, floor),
        featured=found.overall.name,
    )
    chosen = evaluation.settings[names.index(found.overall.name)]
    (head,) = chosen.heads  # candidates have one
    print(
        f"written: {folder}/selection.json, {folder}/report.html\n"
        f"use: --config.head={folders[head]} "
        f"--config.base_temperature={chosen.base_temperature:g} "
        f"--config.guidance_scale={chosen.guidance_scale:g} "
        f"--config.refinements={chosen.refinements.name}"
    )


def _generalisation(log: logs.Log) -> dict[str, float]:
    """Numbers on what no head trained on: reworded questions."""
    metrics = ("forget_paraphrased_Q_A_ROUGE", "retain_paraphrased_Q_A_ROUGE")
    return {metric: log[metric]["agg_value"] for metric in metrics if metric in log}


if __name__ == "__main__":
    cli.run(main)
