"""A start for heads, meta-learned on simulated requests to forget (Reptile).

    python -m t3jax.lora_ml.head_start --config=configs/demo_paper.py --config.workdir=out/start
    python train_classifier.py --config=configs/demo_paper.py
        --config.classifier.init=out/start/head

Retain rows are what a later request's head must leave alone, and what requests can be simulated
with: rows that stand together, such as an author's, are to be forgotten and all others retained.
Reptile takes a few steps of Adam on each such request and moves the start a part of the way there.
The loss is the paper's classifier loss; a distilled head needs targets that no simulation has, and
its training is not simulated here.

Axes: N answer tokens, F features, B tokens of a batch, K inner steps, M requests.

References:
    On First-Order Meta-Learning Algorithms, arXiv 1803.02999, algorithm 1.
    Provable Meta-Learning with Low-Rank Adaptations, arXiv 2410.22264 (Reptile as the variant it
    compares with).
"""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from jaxtyping import Array, PyTree

import t3jax
from t3jax import pipeline, preflight
from t3jax.features import Features
from t3jax.head import HeadConfig, HeadParams, classifier_loss, init_head, target_scores
from t3jax.head_io import Head, save_head
from t3jax.settings import Settings


@dataclasses.dataclass(frozen=True)
class MetaConfig:
    """How a start is meta-learned.

    Attributes:
        requests: M, how many are simulated, one after the other.
        group: Rows that are forgotten together, such as those on one author, which stand together.
        groups: Groups of a request.
        steps: K, steps of Adam on a request.
        tokens: Answer tokens to forget in a batch; as many to retain come on top.
        learning_rate: Adam's on a request.
        share: How far the first request moves the start towards its own head; falls to 0 on a line.
        seed: Decides the requests, their batches and the first start.
    """

    requests: int = 1500
    group: int = 20
    groups: int = 3
    steps: int = 30
    tokens: int = 256
    learning_rate: float = 3e-3
    share: float = 0.5
    seed: int = 0


def meta_learn_head(
    retain: Features,
    head_config: HeadConfig,
    config: MetaConfig | None = None,
    progress: bool = False,
) -> HeadParams:
    """Meta-learns a start on requests that are simulated with retain rows.

    Rows of one group stand together in `retain`.

    Raises:
        ValueError: If there are too few groups of rows.
    """
    config = MetaConfig() if config is None else config
    rows = np.arange(retain.num_sequences) // config.group
    count = rows[-1] + 1 if len(rows) else 0
    if count <= config.groups:
        raise ValueError(
            f"{retain.num_sequences} retain rows are {count} groups of {config.group}: expected "
            f"more than the {config.groups} that a simulated request forgets; give more rows or "
            "smaller groups"
        )
    group_of = np.repeat(rows, np.diff(retain.starts))  # of each token
    members = [np.flatnonzero(group_of == group) for group in range(count)]
    pooled, targets = jnp.asarray(retain.pooled), jnp.asarray(retain.targets)
    params = init_head(jax.random.key(config.seed), head_config)
    rng = np.random.default_rng(config.seed)
    for request in tqdm.trange(config.requests, desc="requests", disable=not progress):
        chosen = rng.choice(count, config.groups, replace=False)
        forget = np.concatenate([members[group] for group in chosen])
        others = np.flatnonzero(~np.isin(group_of, chosen))
        batches = np.concatenate(
            [rng.choice(each, (config.steps, config.tokens)) for each in (others, forget)], axis=1
        )
        share = config.share * (1 - request / config.requests)
        params = _follow_request(
            head_config.activation,
            params,
            (pooled, targets),
            jnp.asarray(batches, jnp.int32),
            jnp.float32(config.learning_rate),
            jnp.float32(share),
        )
    return params


@functools.partial(jax.jit, static_argnums=0)
def _follow_request(
    activation: str,
    start: HeadParams,
    tokens: tuple[Array, Array],
    batches: Array,
    rate: Array,
    share: Array,
) -> HeadParams:
    """A step of Reptile: some of Adam on a request, and the start moves towards where they end."""
    adam = optax.adam(rate)
    retain = jnp.arange(batches.shape[1]) < batches.shape[1] // 2

    def loss(params: HeadParams, batch: Array) -> Array:
        pooled, targets = (each[batch] for each in tokens)
        scores = target_scores(params, pooled, targets, activation)
        return classifier_loss(scores, retain, mask=jnp.ones_like(retain))

    def step(state: PyTree, batch: Array) -> tuple[PyTree, None]:
        grads = jax.grad(loss)(state[0], batch)
        with jax.numpy_dtype_promotion("standard"):
            updates, opt = adam.update(grads, state[1])
        return (optax.apply_updates(state[0], updates), opt), None

    (found, _), _ = jax.lax.scan(step, (start, adam.init(start)), batches)
    return jax.tree.map(lambda a, b: a + share * (b - a), start, found)


def main(config: Settings) -> None:
    """Meta-learns the start that a config describes, and writes it as a head folder."""
    config.require("model", "retain", "workdir")
    if config.train.loss != "classifier":
        raise ValueError(
            f"config.train.loss = {config.train.loss!r}: a start is meta-learned for the loss "
            "'classifier' alone; take configs/paper.py, or leave init unset"
        )
    mesh = t3jax.make_mesh(config.mesh)
    preflight.shape_of(config, mesh)
    preflight.check_sources(config, "retain")
    folder = pathlib.Path(config["workdir"]) / "head"
    with preflight.outputs(config.workdir):
        lm = t3jax.load_lm(config["model"], config.dtype, mesh)
        retain = t3jax.load_or_compute_features(
            lm,
            pipeline.encode(config, lm, config["retain"]),
            config.feature_store,
            kind=config.classifier.features,
            dtype=config.classifier.feature_dtype,
            progress="features of the retain set",
        )
        shape = pipeline.head_config(config, lm)
        settings = MetaConfig(group=config.sweep.selection_group)
        params = meta_learn_head(retain, shape, settings, progress=True)
        record = {"meta_learning": dataclasses.asdict(settings)}
        save_head(folder, Head(shape, params, 1.0, 1.0, config["model"], record=record))
    print(f"{folder}: give it to train_classifier.py as --config.classifier.init={folder}")


if __name__ == "__main__":
    from t3jax import cli

    cli.run(main)
