"""The TOFU experiment at full size: Llama-3.1-8B-Instruct, all of TOFU, on accelerators.

    python experiment.py --config=configs/llama31_tofu.py:forget05

`forget01`, `forget05` and `forget10` are the forget sets. The base model is fine-tuned on all of
TOFU, the retain-only model on the retain set, with the benchmark's recipe; five head seeds are
trained over the grid of the paper. It needs 8 devices of 80 GB or more: weights, moments and
gradients of fine-tuning are 16 bytes a weight, split over `fsdp`. No run of the 8B model is
recorded; `--config.model` takes any other model, and on SmolLM2 the stages have been run at the
size of configs/smollm2_tofu.py.

Models that exist already are not fine-tuned: `--config.model=BASE
--config.eval.retain_model=RETAIN_ONLY`.
"""

import pathlib

import ml_collections

from t3jax.configs import paper

FOLDER = pathlib.Path(__file__).parent
RETAIN = {"forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}


def get_config(split: str = "forget05") -> ml_collections.ConfigDict:
    """The paper's recipe, with the benchmark's model, prompts, recipe and question sets."""
    if split not in RETAIN:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(RETAIN)}")
    config = paper.get_config()
    config.model = "meta-llama/Llama-3.1-8B-Instruct"
    config.mesh = (1, -1, 1)
    config.prompt_format.system = "You are a helpful assistant."
    config.prompt_format.date_string = "10 Apr 2025"
    config.experiment.dir = f"out/llama31_tofu/{split}"
    config.forget = f"tofu:{split}"
    config.retain = f"tofu:{RETAIN[split]}"
    config.finetune.epochs = 5
    config.finetune.batch_size = 32
    config.finetune.learning_rate = 1e-5
    config.finetune.remat = True
    config.seeds = (1, 2, 3, 4, 5)
    config.sweep.learning_rates = (1e-2, 1e-3)
    config.sweep.weight_decays = (1e-2, 1e-3)
    config.sweep.ranks = (20, 50)
    config.train.holdout_fraction = 0.0
    config.eval.forget = f"tofu:{split}_perturbed"
    config.eval.retain = "tofu:retain_perturbed"
    config.eval.real_authors = "tofu:real_authors_perturbed"
    config.eval.world_facts = "tofu:world_facts_perturbed"
    config.eval.base_temperatures = (1.0, 1.5, 2.0, 2.5, 4.0)
    config.eval.guidance_scales = (0.2, 0.4, 0.6, 1.0)
    config.eval.refinements = "plain,gated"
    config.sweep.selection_rule = "quality_given_utility"
    config.sweep.selection_group = 20
    config.rows = 128
    config.leaks.samples = 16
    config.leaks.kl_rows = 100
    config.experiment.vary_ranks = (5, 100)
    config.experiment.vary_epochs = (25, 400)
    config.experiment.vary_retain_rows = (200, 800)
    config.experiment.plain_chat = f"{FOLDER}/plain_chat.jsonl"
    return config
