"""The published recipe of Temper-Then-Tilt, and nothing beyond it.

    python train_classifier.py --config=configs/paper.py --config.model=... --config.forget=...

Only heads of this recipe can be saved in the layout of the PyTorch reference. They have T = 2.5 and
s = 1, the paper's for an 8B model; a small model mostly needs less.

References:
    Temper-Then-Tilt, arXiv 2602.10217.
"""

import ml_collections

from t3jax.configs import default


def get_config() -> ml_collections.ConfigDict:
    """The defaults, with the paper's head, features, texts and training."""
    return follow_paper(default.get_config())


def follow_paper(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Sets the published recipe in a config, and returns it."""
    config.classifier.features = "mean"
    config.synthetic.own_samples = 0
    config.synthetic.made_up_names = 0
    config.synthetic.earlier_turns = 0.0
    config.classifier.rank = 20
    config.classifier.activation = "identity"
    config.classifier.bias = False
    config.train.zero_output = False
    config.train.loss = "classifier"
    config.train.epochs = 100
    config.train.warmup_ratio = 0.25
    config.train.learning_rate = 1e-2
    config.train.weight_decay = 1e-2
    return config
