"""Fine-tunes a language model on question-answer data: all of its weights, or LoRA.

python finetune.py --config=configs/smollm2.py --config.finetune_workdir=out/tuned
    --config.finetune_data="('tofu:forget05',)"

Called again after it was stopped, the script resumes. The model is a Hugging Face folder, which
transformers and every script here open.
"""

from typing import Any

import t3jax
from t3jax import cli, pipeline


def main(config: Any) -> None:
    """Makes the model that the config describes."""
    cli.require(config, "model", "finetune_workdir")
    if not config.finetune_data:
        raise ValueError("nothing to train on; give --config.finetune_data=\"('SOURCE',)\"")
    folder = pipeline.finetuned(config, t3jax.make_mesh(config.mesh))
    print(f"written: {folder}")


if __name__ == "__main__":
    cli.run(main)
