"""Trains heads on frozen features, several at once, and leaves them in a folder.

Features, targets and nothing else of the base model are needed; they stay on the device.
"""

import dataclasses
import hashlib
import importlib.metadata
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from t3jax import sharding
from t3jax.checkpoint import Metrics, open_run
from t3jax.features import Features
from t3jax.head import HeadConfig
from t3jax.head_io import Head, place_head, save_head
from t3jax.training.batches import Data, Planner
from t3jax.training.recipe import Member, TrainConfig, make_members
from t3jax.training.trainer import Trainer


def train_heads(
    retain: Features,
    forget: Features,
    head_config: HeadConfig,
    train_config: TrainConfig | Sequence[TrainConfig] | None = None,
    seeds: Sequence[int] = (1,),
    *,
    workdir: str | pathlib.Path | None = None,
    mesh: Mesh | None = None,
    model: str = "",
    base_temperature: float = 2.5,
    guidance_scale: float = 1.0,
    prior_shift: float = 0.0,
    report: Callable[[str], None] | None = None,
) -> list[Head]:
    """Trains a head for each recipe and each seed, all at once.

    With a `workdir` the run can be killed at any moment and called again: it resumes from its last
    checkpoint and ends with the very bits of the uninterrupted run (same machine, number of devices
    and versions; on another number of devices the same up to rounding). SIGTERM saves the epoch
    under way and ends the run. Metrics go to `metrics.jsonl` and `tensorboard/` in it, and the
    heads to the folders that `make_members` names: `head`, or `head-seed{n}` and so on where there
    are several.

    Args:
        retain: Features of the retain set.
        forget: Features of the forget set.
        head_config: Shape of the head.
        train_config: The recipe, or several that differ in learning rate and weight decay alone;
            None means the paper's.
        seeds: A seed decides the first weights and the batches of its head.
        workdir: Folder of the run; None writes nothing.
        mesh: Where to train; None means one device.
        model: Folder or hub id of the base model, kept in the head.
        base_temperature: T, kept in the head.
        guidance_scale: s, kept in the head.
        prior_shift: Added to scores when the head is used, see `class_prior_shift`; kept in it.
        report: Called with a line of text for each epoch, such as `print`.

    Returns:
        One head for each of `make_members`, in its order, parameters placed on the mesh.

    Raises:
        ValueError: If a set is empty, sets and head do not fit each other, recipes differ in more,
            or the workdir holds another run.
        FloatingPointError: If loss or weights become infinite or NaN; heads and checkpoints stay as
            they were.
        OSError: If the disk is full; heads and checkpoints stay as they were.
        t3jax.hosts.Preempted: After SIGTERM, with the epoch saved; only with a workdir.
    """
    one = TrainConfig() if train_config is None else train_config
    configs = [one] if isinstance(one, TrainConfig) else list(one)
    members = make_members(configs, seeds)
    config = configs[0]
    if mesh is None:
        mesh = sharding.make_mesh(devices=jax.devices()[:1])
    _check(retain, forget, head_config)
    data = Data.build(retain, forget, head_config, config, mesh)
    planner = Planner(data, members, mesh)
    trainer = Trainer(data, head_config, members, planner.steps, mesh)
    settings = {
        "head": dataclasses.asdict(head_config),
        "training": _common(configs),
        "seeds": list(seeds),
        "features": {"retain": _digest(retain), "forget": _digest(forget)},
    }

    with open_run(workdir, settings, trainer.abstract_state, unit="epoch") as folder:
        epochs_done, metrics, state = 0, [], None
        if folder is not None:
            epochs_done, metrics, state = folder.done, folder.metrics, folder.state
        if state is None:
            state = trainer.init()

        plan = planner.epoch(min(epochs_done + 1, config.epochs))
        for epoch in range(epochs_done + 1, config.epochs + 1):
            start = time.perf_counter()
            last = epoch == config.epochs
            rows, counts = plan
            state, *pending = trainer.train_epoch(state, rows)
            if not last:
                plan = planner.epoch(epoch + 1)  # while the device works
            losses, finite = jax.device_get(pending)
            # Tokens of different batches weigh the same.
            losses = np.sum(losses * counts, axis=1) / np.sum(counts, axis=1)
            _check_finite(losses, finite, epoch, members, data)
            held_out = trainer.evaluate(state) if last or epoch % config.eval_every == 0 else None
            lines = [
                {
                    "epoch": epoch,
                    "head": member.name,
                    "seed": member.seed,
                    "loss": float(losses[k]),
                    "learning_rate": float(trainer.learning_rates[k, epoch * planner.steps - 1]),
                    **(held_out[k] if held_out else {}),
                    "seconds": time.perf_counter() - start,
                }
                for k, member in enumerate(members)
            ]
            metrics = metrics + lines
            if folder is not None:
                save = last or epoch % config.checkpoint_every == 0
                folder.finish(epoch, lines, state, save)
            if report is not None:
                for line in lines:
                    report(_describe(line, config.epochs))

    heads = []
    for k, member in enumerate(members):
        own = [line for line in metrics if line["head"] == member.name]
        record = {
            "training": {**dataclasses.asdict(member.config), "seed": member.seed},
            "tokens": {"retain": retain.num_tokens, "forget": forget.num_tokens},
            "sequences": {"retain": retain.num_sequences, "forget": forget.num_sequences},
            "features": settings["features"],
            "final": {
                name: value for name, value in own[-1].items() if name not in ("head", "seconds")
            },
            "versions": {"jax": jax.__version__, "t3jax": _version()},
            "seconds": sum(line["seconds"] for line in own),
        }
        heads.append(
            Head(
                config=head_config,
                params=place_head(trainer.full_params(state, k), mesh),
                base_temperature=base_temperature,
                guidance_scale=guidance_scale,
                model=model,
                prior_shift=prior_shift,
                record=record,
            )
        )
    if workdir is not None:
        for head, member in zip(heads, members, strict=True):
            save_head(pathlib.Path(workdir) / member.name, head)
    return heads


def _common(configs: Sequence[TrainConfig]) -> dict[str, Any]:
    """The recipes as one, with lists where they may differ."""
    common = dataclasses.asdict(configs[0])
    if len(configs) > 1:
        for name in ("learning_rate", "weight_decay"):
            common[name] = [getattr(config, name) for config in configs]
    return common


def _check(retain: Features, forget: Features, head_config: HeadConfig) -> None:
    for name, features in (("retain", retain), ("forget", forget)):
        if not features.num_sequences or not features.num_tokens:
            raise ValueError(
                f"the {name} set is empty: it has {features.num_sequences} sequences and "
                f"{features.num_tokens} answer tokens; training needs both sets"
            )
        if (empty := np.flatnonzero(np.diff(features.starts) < 1)).size:
            raise ValueError(f"sequence {empty[0]} of the {name} set has no answer tokens")
        if (width := features.pooled.shape[-1]) != head_config.hidden_size:
            raise ValueError(
                f"the features of the {name} set have width {width}, but the head has hidden_size "
                f"{head_config.hidden_size}; compute both sets with the model the head is for"
            )
        low, high = features.targets.min(), features.targets.max()
        if low < 0 or high >= head_config.vocab_size:
            raise ValueError(
                f"the {name} set has token ids from {low} to {high}, but the head has vocab_size "
                f"{head_config.vocab_size}; the tokens are another model's"
            )
    if retain.pooled.dtype != forget.pooled.dtype:
        raise ValueError(
            f"features of the retain set are {retain.pooled.dtype}, those of the forget set "
            f"{forget.pooled.dtype}; compute both with one dtype"
        )


def _check_finite(
    losses: np.ndarray,
    finite: np.ndarray,
    epoch: int,
    members: Sequence[Member],
    data: Data,
) -> None:
    wrong = np.flatnonzero(~(np.isfinite(losses) & finite))
    if not wrong.size:
        return
    k = wrong[0]
    if not bool(jnp.isfinite(data.train.pooled).all()):
        advice = "the features hold values that are not finite: compute them anew, in float32"
    else:
        advice = "train with a smaller learning_rate, in another workdir"
    member = members[k]
    raise FloatingPointError(
        f"epoch {epoch}, seed {member.seed}: the loss is {losses[k]} and the weights are "
        f"{'finite' if finite[k] else 'not finite'} (learning_rate {member.config.learning_rate}); "
        f"{advice}. Nothing of this epoch was saved"
    )


def _version() -> str:
    try:
        return importlib.metadata.version("t3jax")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _describe(line: Metrics, epochs: int) -> str:
    text = (
        f"epoch {line['epoch']:>{len(str(epochs))}}/{epochs}  {line['head']}  "
        f"lr {line['learning_rate']:.2e}  loss {line['loss']:.5f}"
    )
    if "held_out_loss" in line:
        text += (
            f"  held out: loss {line['held_out_loss']:.4f}, sequences right: "
            f"retain {line['held_out_retain_sequence_accuracy']:.1%}, "
            f"forget {line['held_out_forget_sequence_accuracy']:.1%}"
        )
    return text


def _digest(features: Features) -> str:
    """Tells sets of features apart: by their key and tokens, or by all bytes if there is no key."""
    digest = hashlib.sha256(f"{features.key} {features.pooled.shape}".encode())
    arrays = [features.targets, features.starts] + ([] if features.key else [features.pooled])
    for array in arrays:
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()[:32]
