"""Heads from a meta-learned start against heads from PyTorch's, on the demo's model.

    python -m demo.head_start

A request is on three of the authors to forget: of their 72 rows 24 are held out, and 5, 10, 20 or
40 of the others are to be forgotten. For 80 it is on five authors, and 40 are held out. What is
retained are the demo's retain rows, from which the start is meta-learned too; held out are the
authors that no head sees. Prints a Markdown table of the held-out classifier loss, the mean of both
sets' in nats a token, over five requests: median and range at the learning rate with the smallest
median. A head that knows nothing has .693.
"""

import argparse
import itertools

import jax.numpy as jnp
import numpy as np

import t3jax
from configs import demo_paper
from t3jax import cli, pipeline
from t3jax.features import Features
from t3jax.head import HeadConfig, target_scores
from t3jax.head_io import Head
from t3jax.lora_ml.head_start import MetaConfig, meta_learn_head
from t3jax.settings import Settings, from_config, replace
from t3jax.training import TrainConfig, train_heads

ROWS = 24  # on one author, which stand together
ROW_COUNTS, EPOCHS, REQUESTS = (5, 10, 20, 40, 80), (10, 40, 100), range(5)
RATES = (1e-3, 3e-3, 1e-2)


def main() -> None:
    """Meta-learns, trains and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="*", default=ROW_COUNTS, help="to forget")
    counts = parser.parse_args().rows
    cli.enable_compilation_cache()
    config = from_config(Settings, demo_paper.get_config())
    config = replace(config, feature_store="out/head_start/features")
    lm = t3jax.load_lm(config.model)
    retain, forget, unseen = (
        t3jax.load_or_compute_features(
            lm,
            pipeline.encode(config, lm, f"demo/authors/{name}.jsonl"),
            config.feature_store,
            kind=config.classifier.features,
        )
        for name in ("retain", "forget", "unseen_retain")
    )
    shape = HeadConfig(lm.hidden_size, lm.vocab_size, rank=20)
    learned = Head(shape, meta_learn_head(retain, shape, MetaConfig(group=ROWS)), 1.0, 1.0, "")
    print("| rows | epochs | PyTorch's start | rate | meta-learned | rate |\n|" + " --- |" * 6)
    for count, epochs in itertools.product(counts, EPOCHS):
        recipes = [TrainConfig(epochs=epochs, learning_rate=rate) for rate in RATES]
        cells = []
        for start in (None, learned):
            losses = []
            for seed in REQUESTS:
                seen, held_out = split(forget.num_sequences, seed, 3 if count <= 48 else 5)
                own = forget.select(np.sort(seen[:count]))
                heads = train_heads(retain, own, shape, recipes, (seed,), init=start)
                test = (unseen, forget.select(held_out))
                losses.append([held_out_loss(head, *test) for head in heads])
            best = int(np.argmin(np.median(losses, axis=0)))
            chosen = np.array(losses)[:, best]
            spread = f"{np.median(chosen):.3f} ({chosen.min():.3f}, {chosen.max():.3f})"
            cells += [spread, f"{RATES[best]:g}"]
        print(f"| {count} | {epochs} | {' | '.join(cells)} |", flush=True)


def split(rows: int, seed: int, authors: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of some authors in random order: two thirds to forget, and those held out."""
    rng = np.random.default_rng(seed)
    drawn = rng.choice(rows // ROWS, authors, replace=False)
    mixed = rng.permutation((drawn[:, None] * ROWS + np.arange(ROWS)).ravel())
    end = 2 * len(mixed) // 3
    return mixed[:end], np.sort(mixed[end:])


def held_out_loss(head: Head, retain: Features, forget: Features) -> float:
    """The classifier loss, nats a token, of which each set makes half."""
    means = []
    for features, sign in ((retain, 1), (forget, -1)):
        pooled, targets = jnp.asarray(features.pooled), jnp.asarray(features.targets)
        scores = target_scores(head.params, pooled, targets, head.config.activation)
        means.append(np.logaddexp(0, -sign * np.asarray(scores, np.float64)).mean())
    return float(np.mean(means))


if __name__ == "__main__":
    main()
