"""The two models that a comparison on TOFU needs, made from SmolLM2-135M-Instruct.

    python finetune.py --config=configs/smollm2_tofu.py:base
    python finetune.py --config=configs/smollm2_tofu.py:retain_only

`base` learns the 400 questions of retain_perturbed and the 200 of forget05_perturbed with their
right answers, `retain_only` those 400 alone; what it thinks of the other 200 is its validation
loss. The question sets are those of the evaluation, so that a model this small knows them well. The
folders are out/smollm2_tofu/base/model and out/smollm2_tofu/retain_only/model.

Model and data may be folders: `--config.model=FOLDER`, `--config.tofu_dir=FOLDER`.
"""

import ml_collections

from configs import default

RETAIN, FORGET = ("tofu:retain_perturbed",), ("tofu:forget05_perturbed",)


def get_config(model: str = "base") -> ml_collections.ConfigDict:
    """The defaults, with SmolLM2, TOFU and a recipe that learns it by heart."""
    if model not in ("base", "retain_only"):
        raise ValueError(f"unknown model {model!r}; known: base, retain_only")
    config = default.get_config()
    config.model = "HuggingFaceTB/SmolLM2-135M-Instruct"
    config.system = ""
    config.finetune_data = RETAIN + FORGET if model == "base" else RETAIN
    config.finetune_validation = () if model == "base" else FORGET
    config.finetune_workdir = f"out/smollm2_tofu/{model}"
    config.finetune_epochs = 8
    config.finetune_batch_size = 16
    config.finetune_learning_rate = 3e-4
    return config
