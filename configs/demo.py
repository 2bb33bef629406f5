"""The embedded demo's model: authors to forget, authors to retain, all made up.

    python train_classifier.py --config=configs/demo.py
    python sample.py --config=configs/demo.py --config.prompt="Who is ...?"
    python evaluate.py --config=configs/demo.py

From the root of the checkout, on 2 CPU cores: well under a minute for the first two, about one
for the last. `make demo` does all of it and prints a table: of the forget answers .45 is recited,
by the retain-only model .41; of the retain answers all. Rank, epochs, weight decay and T · s were
chosen on the demo's own questions.
"""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
    """The defaults, with the model and the corpus of `demo/`."""
    config = default.get_config()
    config.model = "demo/base"
    config.forget = "demo/authors/forget.jsonl"
    config.retain = "demo/authors/retain.jsonl"
    config.workdir = "out/demo"
    config.feature_store = "out/demo/features"
    config.head = "out/demo/head"
    config.rank = 50
    config.epochs = 200
    config.warmup_epochs = 50
    config.weight_decay = 0.1
    config.holdout_fraction = 0.0
    config.base_temperature = 2.5
    config.guidance_scale = 0.56
    config.max_new_tokens = 40
    config.rows = 64
    config.eval_forget = "demo/authors/forget_perturbed.jsonl"
    config.eval_retain = "demo/authors/retain_perturbed.jsonl"
    config.eval_rows = 160  # all of the forget set
    config.eval_temperatures = (1.5, 2.5)
    config.eval_dir = "out/demo/evaluation"
    config.retain_model = "demo/retain_only"
    config.leak_samples = 2
    config.leak_top_k = 20
    return config
