"""SmolLM2-135M-Instruct on TOFU: forget05 against retain95.

    python train_classifier.py --config=configs/smollm2.py
    python sample.py --config=configs/smollm2.py --config.prompts=FILE.jsonl
    python evaluate.py --config=configs/smollm2.py

The model and TOFU come from the Hugging Face hub, or from folders: `--config.model=FOLDER`,
`--config.tofu_dir=FOLDER`. The untuned model does not know TOFU's authors: the run shows that the
program works at this size. On 2 CPU cores the first command takes 10 minutes, nearly all of it for
the features of 4,000 rows, which are stored (then 22 seconds); the second takes 2 seconds a prompt.
docs/smollm2.md has the times and answers.
"""

import ml_collections

from t3jax.configs import default


def get_config() -> ml_collections.ConfigDict:
    """The defaults, with SmolLM2 and TOFU."""
    config = default.get_config()
    config.model = "HuggingFaceTB/SmolLM2-135M-Instruct"
    config.forget = "tofu:forget05"
    config.retain = "tofu:retain95"
    config.workdir = "out/smollm2"
    config.head = "out/smollm2/head"
    config.eval.forget = "tofu:forget05_perturbed"
    config.eval.retain = "tofu:retain_perturbed"
    config.eval.real_authors = "tofu:real_authors_perturbed"
    config.eval.world_facts = "tofu:world_facts_perturbed"
    config.eval.dir = "out/smollm2/evaluation"
    return config
