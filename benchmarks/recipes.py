"""Training each kind of head: the published recipe's, and the default's two.

    python -m benchmarks recipes

One process, on random features of 200 forget and 1,000 retain answers of TOFU's lengths, at the
size of SmolLM2-135M (width 576, 49,152 tokens) and of an 8B model (width 4,096, 128,256 tokens).
The default's heads, a classifier and a distilled one, have its features (twice the width), rank and
GELU; the distilled one has 80 candidate tokens a position. Times are of one epoch, without
compiling and copying: the recipes differ in their number of epochs.
"""

import dataclasses
from typing import Any

import numpy as np

from benchmarks.head import random_features
from benchmarks.side_by_side import Measured, alternate, announce, make_parser, ratio, write
from configs import default, paper
from t3jax.distillation import SoftTargets
from t3jax.features import Features
from t3jax.head import HeadConfig
from t3jax.sections import narrow
from t3jax.settings import Settings, from_config
from t3jax.synthetic.targets import CANDIDATES, REST
from t3jax.training import train_heads

KINDS = {
    "published": (paper, "classifier"),
    "classifier": (default, "classifier"),
    "distilled": (default, "distillation"),
}
SIZES = {"135M": (576, 49_152), "8B": (4_096, 128_256)}


def main() -> None:
    """Reads the command line, measures, writes `out/benchmarks/recipes.json`."""
    parser = make_parser(__doc__)
    parser.add_argument("--epochs", type=int, default=2, help="in each run")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    figures: dict[str, Any] = {}
    details: dict[str, Any] = {"arguments": vars(arguments)}
    for size, (width, vocabulary) in SIZES.items():
        measured, details[size] = compare(width, vocabulary, arguments.epochs, arguments.repeats)
        figures |= {f"{name}_{size}": value for name, value in measured.items()}
    write("recipes", figures, details)


def compare(width: int, vocabulary: int, epochs: int, repeats: int) -> Measured:
    """Seconds an epoch of each kind in turn, after first runs that are not counted."""
    announce(f"width {width}, {vocabulary} tokens")
    seconds: dict[str, list[float]] = {name: [] for name in KINDS}
    works = {}
    for name, (module, loss) in KINDS.items():
        settings = from_config(Settings, module.get_config())
        head_config = narrow(
            HeadConfig, settings.classifier, hidden_size=width, vocab_size=vocabulary
        )
        recipe = dataclasses.replace(settings.train.settle_loss(loss), epochs=epochs)
        wide = dataclasses.replace(head_config, hidden_size=head_config.feature_size)
        sets = [random_features(count, seed, wide) for count, seed in ((1000, 0), (200, 1))]
        if recipe.loss == "distillation":
            sets = [add_random_targets(features, vocabulary) for features in sets]

        def train(_: int = 0, name=name, sets=sets, head_config=head_config, recipe=recipe) -> None:
            (head,) = train_heads(sets[0], sets[1], head_config, recipe, (1,))
            seconds[name].append(head.record["seconds"] / epochs)

        train()
        works[name] = train
    for times in seconds.values():
        times.clear()
    alternate(works, repeats)
    figures: dict[str, Any] = {
        f"{name}_seconds_an_epoch": float(np.median(seconds[name])) for name in seconds
    }
    figures |= {
        f"{name}_over_published": ratio(seconds[name], seconds["published"])
        for name in seconds
        if name != "published"
    }
    return figures, {"seconds an epoch": seconds}


def add_random_targets(features: Features, vocabulary: int) -> Features:
    """The features with random soft targets."""
    rng = np.random.default_rng(features.num_tokens)
    shape = (features.num_tokens, CANDIDATES + REST)
    logprobs = np.log(rng.dirichlet(np.full(shape[1] + 1, 0.1), len(features.targets)) + 1e-9)
    log_weights = np.zeros(shape, np.float32)
    return dataclasses.replace(
        features,
        soft=SoftTargets(
            rng.integers(vocabulary, size=shape, dtype=np.int32),
            logprobs[:, :-1].astype(np.float32),
            log_weights,
            rng.dirichlet(np.ones(CANDIDATES + 1), len(features.targets)).astype(np.float32),
        ),
    )
