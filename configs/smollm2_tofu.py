"""The TOFU experiment on SmolLM2-135M-Instruct, at the size of a laptop.

    python experiment.py --config=configs/smollm2_tofu.py

The model learns the 400 questions of retain_perturbed and the 200 of forget05_perturbed with their
right answers, its retain-only twin those 400 alone: the question sets are those of the evaluation,
so that a model this small knows them well. Three head seeds; T, s and gating are chosen by
cross-fitting. On 2 CPU cores fine-tuning takes 25 and 15 minutes and what follows about two hours
and a half; a stopped run goes on where it was. What it found: docs/tofu.md.

Model and data may be folders: `--config.model=FOLDER`, `--config.tofu_dir=FOLDER`.
"""

import ml_collections

from configs import paper


def get_config() -> ml_collections.ConfigDict:
    """The paper's recipe, with SmolLM2, TOFU and a recipe that learns it by heart."""
    return set_tofu(paper.get_config())


def set_tofu(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Sets models, rows and measurements of the experiment in a config, and returns it."""
    config.model = "HuggingFaceTB/SmolLM2-135M-Instruct"
    config.system = ""
    config.experiment_dir = "out/smollm2_tofu"
    config.forget = "tofu:forget05_perturbed"
    config.retain = "tofu:retain_perturbed"
    config.finetune_epochs = 8
    config.finetune_batch_size = 16
    config.finetune_learning_rate = 3e-4
    config.seeds = (1, 2, 3)
    config.eval_forget = config.forget
    config.eval_retain = f"{config.retain}[::4]"
    config.eval_real_authors = "tofu:real_authors_perturbed"
    config.eval_world_facts = "tofu:world_facts_perturbed"
    config.eval_temperatures = (1.0, 1.25, 1.5, 2.5)
    config.eval_scales = (0.4, 0.6, 0.8, 1.0)
    config.eval_refinements = "plain,gated"
    config.selection_rule = "quality_given_utility"
    config.selection_group = 20
    config.max_new_tokens = 96
    config.rows = 64
    config.leak_samples = 16
    config.leak_rows = 50
    config.kl_rows = 32
    config.vary_ranks = (2, 5, 100)
    config.vary_epochs = (10, 25, 400)
    config.vary_retain_rows = (40, 100, 200)
    config.refine_rows = 64
    config.varied_retain = "configs/general_knowledge.jsonl"
    config.plain_chat = "configs/plain_chat.jsonl"
    return config
