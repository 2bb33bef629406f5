"""The embedded demo with the published recipe, to compare with.

    python train_classifier.py --config=configs/demo_paper.py

Rank, epochs, weight decay and T s were chosen on the demo's questions, in favour of this recipe.
"""

import ml_collections

from t3jax.configs import demo, paper


def get_config() -> ml_collections.ConfigDict:
    """The demo's model and corpus, with the paper's head, features, texts and training."""
    config = paper.follow_paper(demo.get_config())
    config.workdir = "out/demo/paper"
    config.head = "out/demo/paper/head"
    config.classifier.rank = 50
    config.train.epochs = 200
    config.train.weight_decay = 0.1
    config.base_temperature = 2.5
    config.guidance_scale = 0.56
    return config
