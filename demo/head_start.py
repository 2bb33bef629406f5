"""Heads from a meta-learned start against heads from PyTorch's, on small requests to forget.

    python -m demo.head_start
    python -m demo.head_start --world=tofu --model=FOLDER --retain_model=FOLDER --tofu_dir=FOLDER

A request is on some of the authors to forget; a third of its rows is held out, and some of the
remaining rows are to be forgotten. The retain rows are those that the start is meta-learned from;
the authors that no head sees are held out. Prints two Markdown tables over five requests:

The held-out classifier loss in nats a token, the mean over both sets, median and range, at the
learning rate with the smallest median. A constant score of 0 has .693.

The heads of those rates, served: all questions about a request's authors are asked, and the
questions of the five requests are one sample. D and p compare truth ratios with the retain-only
model's; a question leaks if the greedy answer recalls at least .7 of the right one.
"""

import argparse
import dataclasses
import itertools
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

import t3jax
from configs import demo_paper
from t3jax import cli, data, pipeline
from t3jax.evaluation import logs, metrics, tofu
from t3jax.evaluation.logs import Log
from t3jax.evaluation.questions import encode_set
from t3jax.evaluation.recall import leak_recall
from t3jax.evaluation.settings import BASE, Setting
from t3jax.evaluation.store import Store
from t3jax.evaluation.unlearning import UnlearningOptions
from t3jax.features import Features
from t3jax.head import HeadConfig, target_scores
from t3jax.head_io import Head
from t3jax.lora_ml.head_start import MetaConfig, meta_learn_head
from t3jax.settings import Settings, from_config, replace
from t3jax.training import TrainConfig, train_heads

EPOCHS, REQUESTS, RATES = (10, 40, 100), range(5), (1e-3, 3e-3, 1e-2)


@dataclasses.dataclass(frozen=True)
class World:
    """A model that knows authors, and rows on them; rows on one author are neighbours.

    Attributes:
        forget: Source of the requests.
        questions: Rows on the same authors in the same order, with wrong answers.
        retain: Rows to retain.
        unseen: Rows on authors that no head sees.
        rows: Rows of `forget` on one author.
        counts: Number of authors of a request, by its number of rows to forget.
        served: T and s.
        max_new_tokens: Longest answer.
    """

    forget: str
    questions: str
    retain: str
    unseen: str
    rows: int
    counts: dict[int, int]
    served: tuple[float, float]
    max_new_tokens: int


WORLDS = {
    "demo": World(
        forget="demo/authors/forget.jsonl",
        questions="demo/authors/forget_perturbed.jsonl",
        retain="demo/authors/retain.jsonl",
        unseen="demo/authors/unseen_retain.jsonl",
        rows=24,
        counts={5: 3, 10: 3, 20: 3, 40: 3, 80: 5},
        served=(2.5, 0.56),
        max_new_tokens=40,
    ),
    "tofu": World(
        forget="tofu:forget05_perturbed[:100]",
        questions="tofu:forget05_perturbed[:100]",
        retain="tofu:retain_perturbed[:140]",
        unseen="tofu:retain_perturbed[140:200]",
        rows=20,
        counts={5: 3, 10: 3, 20: 3, 40: 3},
        served=(1.0, 1.0),
        max_new_tokens=64,
    ),
}


def main() -> None:
    """Meta-learns, trains and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", choices=WORLDS, default="demo")
    parser.add_argument("--model", default="demo/base")
    parser.add_argument("--retain_model", default="demo/retain_only")
    parser.add_argument("--tofu_dir", help="folder with the files of TOFU")
    parser.add_argument("--rows", type=int, nargs="*", help="to forget; all counts without")
    args = parser.parse_args()
    cli.enable_compilation_cache()
    world = WORLDS[args.world]
    config = replace(
        from_config(Settings, demo_paper.get_config()),
        model=args.model,
        tofu_dir=args.tofu_dir,
        feature_store=f"out/head_start/{args.world}/features",
    )
    lm = t3jax.load_lm(config.model)
    retain, forget, unseen = (
        t3jax.load_or_compute_features(
            lm,
            pipeline.encode(config, lm, source),
            config.feature_store,
            kind=config.classifier.features,
            progress="features",
        )
        for source in (world.retain, world.forget, world.unseen)
    )
    authors = forget.num_sequences // world.rows
    shape = HeadConfig(lm.hidden_size, lm.vocab_size, rank=20)
    meta = MetaConfig(group=world.rows)
    learned = Head(shape, meta_learn_head(retain, shape, meta), 1.0, 1.0, "")
    print("| rows | epochs | PyTorch's start | rate | meta-learned | rate |\n|" + " --- |" * 6)
    served: dict[tuple[int, int, str], list[Head]] = {}
    for count, epochs in itertools.product(args.rows or world.counts, EPOCHS):
        recipes = [TrainConfig(epochs=epochs, learning_rate=rate) for rate in RATES]
        cells = []
        for name, start in (("PyTorch's", None), ("meta-learned", learned)):
            losses, of_requests = [], []
            for seed in REQUESTS:
                request = draw_request(world, authors, seed, count)
                rows = forget.select(np.sort(request.seen[:count]))
                heads = train_heads(retain, rows, shape, recipes, (seed,), init=start)
                test = (unseen, forget.select(request.held_out))
                losses.append([held_out_loss(head, *test) for head in heads])
                of_requests.append(heads)
            best = int(np.argmin(np.median(losses, axis=0)))
            chosen = np.array(losses)[:, best]
            spread = f"{np.median(chosen):.3f} ({chosen.min():.3f}, {chosen.max():.3f})"
            cells += [spread, f"{RATES[best]:g}"]
            served[count, epochs, name] = [heads[best] for heads in of_requests]
        print(f"| {count} | {epochs} | {' | '.join(cells)} |", flush=True)
    print_served(config, world, (lm, t3jax.load_lm(args.retain_model)), authors, served)


class Request(NamedTuple):
    """The authors of a request, the rows to forget in random order, and the rows held out."""

    authors: np.ndarray
    seen: np.ndarray
    held_out: np.ndarray


def draw_request(world: World, authors: int, seed: int, count: int) -> Request:
    """Draws a seed's request with `count` rows to forget; two thirds of its rows are seen."""
    rng = np.random.default_rng(seed)
    drawn = rng.choice(authors, world.counts[count], replace=False)
    mixed = rng.permutation((drawn[:, None] * world.rows + np.arange(world.rows)).ravel())
    end = 2 * len(mixed) // 3
    return Request(drawn, mixed[:end], np.sort(mixed[end:]))


def held_out_loss(head: Head, retain: Features, forget: Features) -> float:
    """The classifier loss, nats a token; both sets have the same weight."""
    means = []
    for features, sign in ((retain, 1), (forget, -1)):
        pooled, targets = jnp.asarray(features.pooled), jnp.asarray(features.targets)
        scores = target_scores(head.params, pooled, targets, head.config.activation)
        means.append(np.logaddexp(0, -sign * np.asarray(scores, np.float64)).mean())
    return float(np.mean(means))


def print_served(
    config: Settings,
    world: World,
    models: tuple[t3jax.LM, t3jax.LM],
    authors: int,
    served: dict[tuple[int, int, str], list[Head]],
) -> None:
    """Prints D, p and the share of questions that leak, beside both models without a head."""
    base_lm, retain_lm = models
    by_author = np.array_split(data.load_dataset(world.questions, config.tofu_dir), authors)
    folder = pathlib.Path(config.feature_store).parent / "evaluation"
    options = tofu.TofuOptions(world.max_new_tokens)

    def ask(lm: t3jax.LM, heads: list[Head], chosen: np.ndarray, name: str) -> list[Log]:
        rows = [x for author in chosen for x in by_author[author]]
        sets = {
            "forget": encode_set(
                "forget", rows, lm.tokenizer, config.prompt_format, lm.max_position
            )
        }
        settings = [Setting(f"start{i}", *world.served, (i,)) for i in range(len(heads))]
        store = Store(lm, heads, folder / "store", rows=config.rows)
        results = tofu.evaluate(store, sets, settings or [BASE], folder / name, options)
        return list(results.values())

    print("\n| rows | epochs | start | D | p | leaks |\n|" + " --- |" * 6)
    for count in dict.fromkeys(count for count, _, _ in served):
        kinds = [kind for kind in served if kind[0] == count]
        of_heads: list[list[Log]] = []
        base: list[Log] = []
        twin: list[Log] = []
        for seed in REQUESTS:
            chosen = draw_request(world, authors, seed, count).authors
            heads = [served[kind][seed] for kind in kinds]
            of_heads.append(ask(base_lm, heads, chosen, f"{count}-{seed}"))
            base += ask(base_lm, [], chosen, "base")
            twin += ask(retain_lm, [], chosen, "retain_only")
        print(f"| {count} | | base | {describe(base, twin)} |")
        print(f"| {count} | | retain-only | {describe(twin, twin)} |")
        for (_, epochs, name), of_kind in zip(kinds, zip(*of_heads, strict=True), strict=True):
            print(f"| {count} | {epochs} | {name} | {describe(of_kind, twin)} |", flush=True)


def describe(of_model: Sequence[Log], of_twin: Sequence[Log]) -> str:
    """D, p and the share of questions that leak, as cells of a table."""
    ratios = [
        np.concatenate([logs.column(log, "forget_truth_ratio", "score") for log in of_requests])
        for of_requests in (of_model, of_twin)
    ]
    test = metrics.forget_quality(*ratios)
    recalls = [
        leak_recall(
            logs.texts(log, "forget_Q_A_ROUGE", "ground_truth"),
            logs.texts(log, "forget_Q_A_ROUGE", "generation"),
        )
        for log in of_model
    ]
    leaks = np.concatenate(recalls) >= UnlearningOptions.leak_threshold
    return f"{test.statistic:.2f} | {test.p_value:.2g} | {leaks.mean():.2f}"


if __name__ == "__main__":
    main()
