"""Fine-tunes a language model on question-answer data: all of its weights, or LoRA.

python finetune.py --config=configs/smollm2.py --config.finetune.workdir=out/tuned
    --config.finetune.data="('tofu:forget05',)"

A stopped run resumes when it is called again. The model is a Hugging Face folder, which
transformers and every script here open.
"""

import t3jax
from t3jax import pipeline, preflight
from t3jax.settings import Settings


def main(config: Settings) -> None:
    """Fine-tunes the model of a config."""
    config.require("model", "finetune.workdir")
    if not config.finetune.data:
        raise ValueError("nothing to train on; give --config.finetune.data=\"('SOURCE',)\"")
    mesh = t3jax.make_mesh(config.mesh)
    pipeline.finetune_config(config)
    preflight.shape_of(config, mesh)
    preflight.check_sources(config, "finetune.data", "finetune.validation")
    with preflight.outputs(config.finetune.workdir):
        print(f"written: {pipeline.finetune_once(config, mesh)}")
