"""A start for heads, meta-learned on simulated requests to forget (Reptile).

    python -m t3jax.lora_ml.head_start --config=configs/demo_paper.py --config.workdir=out/start
    python train_classifier.py --config=configs/demo_paper.py
        --config.classifier.init=out/start/head

Requests are simulated with retain rows: a group of neighbouring rows, such as those on one author,
is forgotten and all other rows are retained. Reptile takes a few steps of Adam on each such request
and moves the start a part of the way there. The loss is the paper's classifier loss. A distilled
head needs soft targets, which simulated requests do not have.

Axes: K inner steps, M requests.

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
from t3jax import optimizer, pipeline, preflight
from t3jax.features import Features
from t3jax.head import HeadConfig, HeadParams, classifier_loss, init_head, target_scores
from t3jax.head_io import Head, save_head
from t3jax.settings import Settings


@dataclasses.dataclass(frozen=True)
class MetaConfig:
    """How a start is meta-learned.

    Attributes:
        requests: M, number of simulated requests.
        group: Neighbouring rows that are forgotten together, such as those on one author.
        groups: Groups of a request.
        steps: K, steps of Adam on a request.
        tokens: Answer tokens to forget in a batch, which has as many to retain.
        learning_rate: Adam's on a request.
        share: How far the first request moves the start towards its own head; falls linearly to 0.
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
    """Meta-learns a start on simulated requests; rows of one group are neighbours in `retain`."""
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
        to_retain = np.flatnonzero(~np.isin(group_of, chosen))
        batches = np.concatenate(
            [rng.choice(side, (config.steps, config.tokens)) for side in (to_retain, forget)],
            axis=1,
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
    """A step of Reptile: steps of Adam on a request; the start moves towards their result."""
    adam = optax.adam(rate)
    retain = jnp.arange(batches.shape[1]) < batches.shape[1] // 2

    def loss(params: HeadParams, batch: Array) -> Array:
        pooled, targets = tokens
        scores = target_scores(params, pooled[batch], targets[batch], activation)
        return classifier_loss(scores, retain, mask=jnp.ones_like(retain))

    def step(state: PyTree, batch: Array) -> tuple[PyTree, None]:
        return optimizer.step(adam, state, jax.grad(loss)(state[0], batch)), None

    (end, _), _ = jax.lax.scan(step, (start, adam.init(start)), batches)
    return jax.tree.map(lambda a, b: a + share * (b - a), start, end)


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
