"""The default recipe on the models of the TOFU experiment on SmolLM2-135M-Instruct.

    python experiment.py --config=configs/smollm2_tofu.py    # makes the models
    python train_classifier.py --config=configs/smollm2_tofu_default.py
    python evaluate.py --config=configs/smollm2_tofu_default.py

Three head seeds; T and s are chosen by the made-up-name level. docs/tofu.md has the results.
"""

import ml_collections

from t3jax.configs import default, smollm2_tofu


def get_config() -> ml_collections.ConfigDict:
    """The default recipe with the experiment's rows and measurements."""
    config = smollm2_tofu.set_tofu(default.get_config())
    config.model = "out/smollm2_tofu/base/model"
    config.eval.retain_model = "out/smollm2_tofu/retain_only/model"
    config.workdir = "out/smollm2_tofu/default"
    config.feature_store = "out/smollm2_tofu/features"
    config.eval.dir = "out/smollm2_tofu/default/evaluation"
    config.eval.heads = tuple(f"{config.workdir}/head-seed{seed}" for seed in config.seeds)
    config.eval.base_temperatures = ()
    config.eval.guidance_scales = ()
    config.eval.refinements = "plain"
    config.eval.controls = False
    config.leaks.samples = 4
    return config
