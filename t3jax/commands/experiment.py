"""The TOFU experiment: fine-tunes a model on TOFU, unlearns, and measures the result.

python experiment.py --config=configs/smollm2_tofu.py

Fine-tunes a model with and without the forget set (or takes `model` and `eval.retain_model` as they
are), trains heads of several seeds, chooses T, s and refinements by cross-fitting, and measures
leaks, variations of the recipe, and texts that no head was trained on. A stopped run resumes when
it is called again. Writes `results.md`, `experiment.json` and `report.html` to `experiment.dir`.
"""

import t3jax
from t3jax import pipeline, preflight
from t3jax.report import write_experiment
from t3jax.settings import Settings
from t3jax.study.experiment import experiment


def main(config: Settings) -> None:
    """Runs the experiment of a config."""
    config.require("model", "forget", "retain", "eval.forget", "eval.retain", "experiment.dir")
    mesh = t3jax.make_mesh(config.mesh)
    shape = preflight.shape_of(config, mesh)
    pipeline.head_config(config, shape)
    pipeline.finetune_config(config)
    preflight.check_sources(
        config, "forget", "retain", "experiment.plain_chat", "experiment.varied_retain"
    )
    preflight.check_evaluation(config, shape)
    with preflight.outputs(config.experiment.dir):
        results = experiment(config, mesh)
        print(write_experiment(config["experiment.dir"], results, title=f"{config.model} on TOFU"))
        print(f"written: {config.experiment.dir}/results.md, experiment.json, report.html")
