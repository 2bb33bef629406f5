"""The published recipe of Temper-Then-Tilt, and nothing beyond it.

    python train_classifier.py --config=configs/paper.py --config.model=... --config.forget=...

Heads of this recipe, and no others, can be saved in the layout of the PyTorch reference.

A head of this recipe keeps T = 2.5 and s = 1, the paper's for an 8B model; a small model mostly
needs less.

References:
    Temper-Then-Tilt, arXiv 2602.10217.
"""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
    """The defaults, with the paper's head, features, texts and training."""
    return follow_paper(default.get_config())


def follow_paper(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Sets the published recipe in a config, and returns it."""
    config.features = "mean"
    config.own_samples = 0
    config.made_up_names = 0
    config.rank = 20
    config.activation = "identity"
    config.bias = False
    config.zero_output = False
    config.loss = "classifier"
    config.epochs = 100
    config.warmup_ratio = 0.25
    config.learning_rate = 1e-2
    config.weight_decay = 1e-2
    return config
