"""The default recipe: `t3jax.settings.Settings`, with other values for some fields.

`t3jax NAME --help` lists the fields of a command with their comments. A config of your own takes
this one and sets other values; see `smollm2.py`. Relative paths are from the working folder.
"""

import ml_collections

from t3jax.cli import to_config
from t3jax.settings import Settings


def get_config() -> ml_collections.ConfigDict:
    """All fields; None is unset."""
    config = to_config(Settings)
    # The library's own default is the published recipe (paper.py). This one adds texts that the
    # base model writes, and a head distilled from its answers under made-up names; where such names
    # do not hide whom the rows are about, the head is a classifier trained on those texts too.
    config.synthetic.own_samples = 1000
    config.synthetic.made_up_names = 4
    config.synthetic.earlier_turns = 0.5  # without them, a system text makes forgotten answers leak
    config.train.loss = "auto"
    config.train.epochs = 40
    config.train.warmup_ratio = 0.1
    config.train.learning_rate = 3e-3
    config.train.zero_output = True
    config.train.holdout_fraction = 0.05
    config.leaks.samples = 4
    config.minnorm.share = 0.0  # plain fine-tuning
    return config
