"""Fine-tunes a language model on question-answer data: all of its weights, or LoRA.

python finetune.py --config=configs/smollm2.py --config.finetune_workdir=out/tuned
    --config.finetune_data="('tofu:forget05',)"

Called again after it was stopped, the script resumes. The model is a Hugging Face folder, which
transformers and every script here open.
"""

from typing import Any

import interrupts

if __name__ == "__main__":
    interrupts.end_at_once()

import t3jax
from t3jax import cli, pipeline, preflight


def main(config: Any) -> None:
    """Makes the model that the config describes."""
    cli.require(config, "model", "finetune_workdir")
    if not config.finetune_data:
        raise ValueError("nothing to train on; give --config.finetune_data=\"('SOURCE',)\"")
    mesh = t3jax.make_mesh(config.mesh)
    pipeline.finetune_config(config)
    preflight.shape_of(config, mesh)
    preflight.check_sources(config, "finetune_data", "finetune_validation")
    with preflight.outputs(config.finetune_workdir):
        print(f"written: {pipeline.finetune_once(config, mesh)}")


if __name__ == "__main__":
    cli.run(main)
