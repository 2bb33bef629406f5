"""The demo's model: authors to forget, authors to retain, all made up.

    python train_classifier.py --config=configs/demo.py
    python sample.py --config=configs/demo.py --config.prompt="Who is ...?"
    python evaluate.py --config=configs/demo.py
    python verify.py --config=configs/demo.py

Run these from the root of the checkout. `make demo` runs all of it and prints a table, beside the
published recipe (`configs/demo_paper.py`). T and s are chosen by the made-up-name level, on the
training rows, without the questions of the table.
"""

import ml_collections

from t3jax.configs import default


def get_config() -> ml_collections.ConfigDict:
    """The defaults, with the model and the corpus of `demo/`."""
    config = default.get_config()
    config.model = "demo/base"
    config.request = "demo: 20 made-up authors"
    config.forget = "demo/authors/forget.jsonl"
    config.retain = "demo/authors/retain.jsonl"
    config.workdir = "out/demo"
    config.feature_store = "out/demo/features"
    config.head = "out/demo/head"
    config.synthetic.own_samples = 2000
    config.synthetic.made_up_names = 3
    config.classifier.rank = 400  # the features of a model this small need a larger rank
    config.train.holdout_fraction = 0.0
    config.sampling.max_new_tokens = 40
    config.rows = 128
    config.eval.forget = "demo/authors/forget_perturbed.jsonl"
    config.eval.retain = "demo/authors/retain_perturbed.jsonl"
    config.eval.rows = 160  # all of the forget set
    config.eval.dir = "out/demo/evaluation"
    config.eval.retain_model = "demo/retain_only"
    config.leaks.samples = 4
    config.leaks.temperature = 0.7
    config.leaks.top_p = 0.9
    return config
