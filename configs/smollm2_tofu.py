"""The TOFU experiment on SmolLM2-135M-Instruct, at the size of a laptop.

    python experiment.py --config=configs/smollm2_tofu.py

The model learns the 400 questions of retain_perturbed and the 200 of forget05_perturbed with their
right answers, the retain-only model those 400 alone. They are the question sets of the evaluation,
so that a model this small knows them well. Three head seeds; T, s and gating are chosen by
cross-fitting. On 2 CPU cores fine-tuning takes 25 and 15 minutes and the other stages about two
hours and a half; a stopped run resumes. docs/tofu.md has the results.

Model and data may be folders: `--config.model=FOLDER`, `--config.tofu_dir=FOLDER`.
"""

import pathlib

import ml_collections

from t3jax.configs import paper

FOLDER = pathlib.Path(__file__).parent


def get_config() -> ml_collections.ConfigDict:
    """The paper's recipe, with SmolLM2, TOFU and a recipe that learns it by heart."""
    return set_tofu(paper.get_config())


def set_tofu(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Sets models, rows and measurements of the experiment in a config, and returns it."""
    config.model = "HuggingFaceTB/SmolLM2-135M-Instruct"
    config.prompt_format.system = ""
    config.experiment.dir = "out/smollm2_tofu"
    config.forget = "tofu:forget05_perturbed"
    config.retain = "tofu:retain_perturbed"
    config.finetune.epochs = 8
    config.finetune.batch_size = 16
    config.finetune.learning_rate = 3e-4
    config.seeds = (1, 2, 3)
    config.eval.forget = config.forget
    config.eval.retain = f"{config.retain}[::4]"
    config.eval.real_authors = "tofu:real_authors_perturbed"
    config.eval.world_facts = "tofu:world_facts_perturbed"
    config.eval.base_temperatures = (1.0, 1.25, 1.5, 2.5)
    config.eval.guidance_scales = (0.4, 0.6, 0.8, 1.0)
    config.eval.refinements = "plain,gated"
    config.sweep.selection_rule = "quality_given_utility"
    config.sweep.selection_group = 20
    config.sampling.max_new_tokens = 96
    config.rows = 64
    config.leaks.samples = 16
    config.leaks.rows = 50
    config.leaks.kl_rows = 32
    config.experiment.vary_ranks = (2, 5, 100)
    config.experiment.vary_epochs = (10, 25, 400)
    config.experiment.vary_retain_rows = (40, 100, 200)
    config.experiment.refine_rows = 64
    config.experiment.varied_retain = f"{FOLDER}/general_knowledge.jsonl"
    config.experiment.plain_chat = f"{FOLDER}/plain_chat.jsonl"
    return config
