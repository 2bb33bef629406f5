"""Trains heads on frozen features, several at once, and writes them to a folder.

Training reads features and targets, which stay on the device. It does not run the base model.
"""

import dataclasses
import hashlib
import importlib.metadata
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
import tqdm
from jax.sharding import Mesh
from jaxtyping import PyTree

from t3jax import hosts, sharding
from t3jax.checkpoint import Metrics, RunFolder, UnsavedRun, open_run
from t3jax.digests import params_digest
from t3jax.features import Features
from t3jax.head import HeadConfig, HeadParams
from t3jax.head_io import Head, load_head, place_head, save_head
from t3jax.training.batches import Data, Planner
from t3jax.training.recipe import Member, TrainConfig, check_start, make_members
from t3jax.training.trainer import Trainer


def train_heads(
    retain: Features | Sequence[Features],
    forget: Features,
    head_config: HeadConfig,
    train_config: TrainConfig | Sequence[TrainConfig] | None = None,
    seeds: Sequence[int] = (1,),
    *,
    workdir: str | pathlib.Path | None = None,
    mesh: Mesh | None = None,
    init: Head | None = None,
    model: str = "",
    base_temperature: float = 2.5,
    guidance_scale: float = 1.0,
    prior_shift: float = 0.0,
    report: Callable[[str], None] | None = None,
    progress: str | None = None,
) -> list[Head]:
    """Trains a head for each recipe and each seed, all at once.

    With a `workdir` the run can be killed at any moment and called again: it resumes from its last
    checkpoint and ends with the very bits of the uninterrupted run (same machine, number of devices
    and versions; on another number of devices the same up to rounding). SIGTERM saves the epoch
    under way and ends the run. Metrics go to `metrics.jsonl` and `tensorboard/` in it, and the
    heads to the folders that `make_members` names: `head`, or `head-seed{n}` and so on where there
    are several.

    Args:
        retain: Features of the retain set; or of more sources than one (retain rows, the base
            model's own samples), each drawn from equally often.
        forget: Features of the forget set.
        head_config: Shape of the head.
        train_config: The recipe, or several that differ in learning rate and weight decay alone;
            None means the paper's.
        seeds: A seed decides the first weights and the batches of its head.
        workdir: Folder of the run; None writes nothing.
        mesh: Where to train; None means one device.
        init: A head whose weights every seed begins with, such as a meta-learned one; None means
            PyTorch's start, drawn by the seed.
        model: Folder or hub id of the base model, stored in the head.
        base_temperature: T, stored in the head.
        guidance_scale: s, stored in the head.
        prior_shift: Added to scores when the head is used, see `class_prior_shift`; stored in it.
        report: Called with a line of text for each epoch and head, such as `print`.
        progress: Label of a bar with the mean loss and the remaining time; None shows none.

    Returns:
        One head for each of `make_members`, in its order, parameters placed on the mesh.

    Raises:
        ValueError: If a set is empty, sets and head do not fit each other, recipes differ in more,
            `init` is of another shape or kind, or the workdir holds another run.
        FloatingPointError: If loss or weights become infinite or NaN; heads and checkpoints stay as
            they were.
        OSError: If the disk is full; heads and checkpoints stay as they were.
        t3jax.hosts.Preempted: After SIGTERM, with the epoch saved; only with a workdir.

    Example:
        >>> lm = t3jax.load_lm("demo/base")
        >>> def compute(source):
        ...     rows = data.load_dataset(f"demo/authors/{source}.jsonl[:4]")
        ...     examples = data.encode_records(lm.tokenizer, rows, data.PromptFormat())
        ...     return t3jax.load_or_compute_features(lm, examples, "out/features")
        >>> config = t3jax.HeadConfig(lm.hidden_size, lm.vocab_size)
        >>> (head,) = t3jax.train_heads(compute("retain"), compute("forget"), config)
    """
    one = TrainConfig() if train_config is None else train_config
    configs = [one] if isinstance(one, TrainConfig) else list(one)
    members = make_members(configs, seeds)
    config = configs[0]
    if mesh is None:
        mesh = sharding.make_mesh(devices=jax.devices()[:1])
    sources = [retain] if isinstance(retain, Features) else list(retain)
    _check_sets(sources, forget, head_config, config)
    if init is not None:
        check_start(init.config, head_config)
    data = Data.build(sources, forget, head_config, config, mesh)
    planner = Planner(data, members, mesh)
    first = None if init is None else init.params
    trainer = Trainer(data, head_config, members, planner.steps, mesh, first)
    of_data = _describe_data(sources, forget)
    settings = {
        "head": dataclasses.asdict(head_config),
        "training": _merge_recipes(configs),
        "seeds": list(seeds),
        "features": of_data["features"],
        # None keeps runs valid that were begun before `init` existed.
        "init": None if init is None else params_digest(init.params),
    }
    if init is not None:
        of_data["init"] = settings["init"]
    best = _Best(members, head_config, workdir)
    with open_run(workdir, settings, trainer.abstract_state, unit="epoch") as run:
        state, metrics = _run(run, members, trainer, planner, best, report, progress)
    best.check()
    heads = []
    for k, member in enumerate(members):
        params = best.params[k] or trainer.full_params(state, k, config.epochs)
        heads.append(
            Head(
                config=head_config,
                params=place_head(params, mesh),
                base_temperature=base_temperature,
                guidance_scale=guidance_scale,
                model=model,
                prior_shift=prior_shift,
                record=_make_record(member, of_data, metrics, best.epochs[k]),
            )
        )
    if workdir is not None:
        for head, member in zip(heads, members, strict=True):
            save_head(pathlib.Path(workdir) / member.name, head)
    return heads


def _run(
    run: RunFolder | UnsavedRun,
    members: Sequence[Member],
    trainer: Trainer,
    planner: Planner,
    best: "_Best",
    report: Callable[[str], None] | None,
    progress: str | None,
) -> tuple[PyTree, list[Metrics]]:
    """Trains from the first epoch or the last checkpoint to the end: the state and all metrics."""
    config = members[0].config  # all members share epochs, patience and the like
    bar = tqdm.tqdm(
        total=config.epochs,
        initial=run.done,
        desc=progress,
        unit="epoch",
        disable=progress is None or not hosts.is_lead(),
    )
    with bar:
        metrics = run.metrics
        state = trainer.init() if run.state is None else run.state
        best.restore(metrics)
        plan = planner.epoch(min(run.done + 1, config.epochs))
        for epoch in range(run.done + 1, config.epochs + 1):
            if best.is_over:
                break
            start = time.perf_counter()
            last = epoch == config.epochs
            rows, counts = plan
            state, *pending = trainer.train_epoch(state, rows)
            if not last:
                plan = planner.epoch(epoch + 1)  # while the device works
            losses, finite = jax.device_get(pending)
            # The mean over tokens: batches differ in their number of tokens.
            losses = np.sum(losses * counts, axis=1) / np.sum(counts, axis=1)
            trainer.check_finite(losses, finite, epoch)
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
            if config.patience and held_out:
                for k in best.update(epoch, [line["held_out_loss"] for line in held_out]):
                    best.keep(k, epoch, trainer.full_params(state, k, epoch))
            save = last or best.is_over or epoch % config.checkpoint_every == 0
            run.finish(epoch, lines, state, save)
            bar.set_postfix(loss=f"{np.mean(losses):.4f}", refresh=False)
            bar.update()
            if report is not None:
                for line in lines:
                    report(_describe(line, config.epochs))
    return state, metrics


def _make_record(
    member: Member,
    of_data: Mapping[str, object],
    metrics: Sequence[Metrics],
    best_epoch: int | None,
) -> dict[str, object]:
    """The record of a head: how it was trained, on which data, and its last metrics."""
    lines = [line for line in metrics if line["head"] == member.name]
    final = next((line for line in lines if line["epoch"] == best_epoch), lines[-1])
    return {
        "training": {**dataclasses.asdict(member.config), "seed": member.seed},
        **of_data,
        "final": {name: value for name, value in final.items() if name not in ("head", "seconds")},
        "versions": {"jax": jax.__version__, "t3jax": _version()},
        "seconds": sum(line["seconds"] for line in lines),
    }


def _merge_recipes(configs: Sequence[TrainConfig]) -> dict[str, object]:
    """The recipes as one, with lists where they may differ."""
    merged = dataclasses.asdict(configs[0])
    if len(configs) > 1:
        for name in ("learning_rate", "weight_decay"):
            merged[name] = [getattr(config, name) for config in configs]
    return merged


def _describe_data(sources: Sequence[Features], forget: Features) -> dict[str, object]:
    """Sizes and digests of the sets, for the record of a head."""
    digests = [_digest(features) for features in sources]
    return {
        "tokens": {
            "retain": sum(features.num_tokens for features in sources),
            "forget": forget.num_tokens,
        },
        "sequences": {
            "retain": sum(features.num_sequences for features in sources),
            "forget": forget.num_sequences,
        },
        "features": {
            "retain": digests[0] if len(digests) == 1 else digests,
            "forget": _digest(forget),
        },
    }


def _check_sets(
    sources: Sequence[Features], forget: Features, head_config: HeadConfig, config: TrainConfig
) -> None:
    for features in sources:
        _check_set(features, "retain", head_config, config)
    _check_set(forget, "forget", head_config, config)
    for features in sources:
        if features.pooled.dtype != forget.pooled.dtype:
            raise ValueError(
                f"features of the retain set are {features.pooled.dtype}, those of the forget set "
                f"{forget.pooled.dtype}; compute both with one dtype"
            )


def _check_set(features: Features, name: str, head_config: HeadConfig, config: TrainConfig) -> None:
    if not features.num_sequences or not features.num_tokens:
        raise ValueError(
            f"the {name} set is empty: it has {features.num_sequences} sequences and "
            f"{features.num_tokens} answer tokens; training needs both sets"
        )
    if (empty := np.flatnonzero(np.diff(features.starts) < 1)).size:
        raise ValueError(f"sequence {empty[0]} of the {name} set has no answer tokens")
    if (width := features.pooled.shape[-1]) != head_config.feature_size:
        raise ValueError(
            f"the features of the {name} set have width {width}, but the head has hidden_size "
            f"{head_config.hidden_size} and reads {head_config.features!r}, of width "
            f"{head_config.feature_size}; compute both sets with the head's model and its kind of "
            "features"
        )
    low, high = features.targets.min(), features.targets.max()
    if low < 0 or high >= head_config.vocab_size:
        raise ValueError(
            f"the {name} set has token ids from {low} to {high}, but the head has vocab_size "
            f"{head_config.vocab_size}; the tokens are another model's"
        )
    if config.loss == "auto":
        raise ValueError(
            "loss = 'auto' is decided by make_training_sets; train with the loss of its sets, "
            "'classifier' or 'distillation'"
        )
    if config.loss == "distillation" and features.soft is None:
        raise ValueError(
            f"loss = 'distillation' needs soft targets, which the {name} set does not have; "
            "compute them with t3jax.synthetic, or train with loss = 'classifier'"
        )


class _Best:
    """Early stopping: the evaluation of each head with the smallest held-out loss.

    The weights are written before the checkpoint of their epoch, so that a resumed run has them.
    Weights that a killed run wrote after its last checkpoint are written again.

    Attributes:
        epochs: Epoch of each head's best evaluation; None before the first, or without patience.
        params: Weights of each head at that epoch, on the host.
    """

    def __init__(
        self, members: Sequence[Member], config: HeadConfig, workdir: str | pathlib.Path | None
    ):
        self._members, self._config = members, config
        self._patience = members[0].config.patience
        self._folder = None if workdir is None else pathlib.Path(workdir) / "best"
        self._losses = [float("inf")] * len(members)
        self._waited = [0] * len(members)
        self.epochs: list[int | None] = [None] * len(members)
        self.params: list[HeadParams | None] = [None] * len(members)

    @property
    def is_over(self) -> bool:
        """Whether the patience of the recipe is used up for every head."""
        return bool(self._patience) and min(self._waited) >= self._patience

    def update(self, epoch: int, losses: Sequence[float]) -> list[int]:
        """Compares held-out losses with the best so far; returns the heads that improved."""
        better = [k for k, loss in enumerate(losses) if loss < self._losses[k]]
        for k, loss in enumerate(losses):
            self._waited[k] = 0 if k in better else self._waited[k] + 1
            if k in better:
                self._losses[k], self.epochs[k] = loss, epoch
        return better

    def keep(self, k: int, epoch: int, params: HeadParams) -> None:
        """Stores the weights of a head, also in the run's folder if it has one."""
        self.params[k] = params
        if self._folder is not None:
            record = {"epoch": epoch, "weights": params_digest(params)}
            head = Head(self._config, params, 1.0, 1.0, "", record=record)
            save_head(self._folder / self._members[k].name, head)

    def restore(self, metrics: Sequence[Metrics]) -> None:
        """Restores the state that a resumed run had at its last metrics."""
        if not self._patience or not metrics:
            return
        epochs = sorted({line["epoch"] for line in metrics if "held_out_loss" in line})
        for epoch in epochs:
            losses = {
                line["head"]: line["held_out_loss"] for line in metrics if line["epoch"] == epoch
            }
            self.update(epoch, [losses[member.name] for member in self._members])
        for k, member in enumerate(self._members):
            if self._folder is None or self.epochs[k] is None:
                continue
            try:
                head = load_head(self._folder / member.name)
            except (OSError, ValueError) as error:
                raise self._make_error(k, str(error)) from error
            # A killed run may have stored weights after its last checkpoint: that epoch runs again.
            epoch, weights = (head.record.get(name) for name in ("epoch", "weights"))
            if epoch == self.epochs[k] and weights in (None, params_digest(head.params)):
                self.params[k] = jax.device_get(head.params)
            elif not (isinstance(epoch, int) and epoch > epochs[-1]):
                raise self._make_error(k, "its epoch or its checksum differs")

    def check(self) -> None:
        """Raises ValueError if the weights of a best evaluation are missing at the end."""
        for k, epoch in enumerate(self.epochs):
            if epoch is not None and self.params[k] is None:
                raise self._make_error(k, "it holds a later epoch's")

    def _make_error(self, k: int, why: str) -> ValueError:
        folder = self._folder and self._folder / self._members[k].name
        return ValueError(
            f"{folder}: the weights of epoch {self.epochs[k]}, the best so far, are damaged or "
            f"missing ({why}); remove the workdir to train anew"
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
        text += f"  held out: loss {line['held_out_loss']:.4f}"
    if "held_out_retain_sequence_accuracy" in line:
        text += (
            f", sequences right: retain {line['held_out_retain_sequence_accuracy']:.1%}, "
            f"forget {line['held_out_forget_sequence_accuracy']:.1%}"
        )
    return text


def _digest(features: Features) -> str:
    """A digest of features: of their key and tokens, or of all bytes if there is no key."""
    digest = hashlib.sha256(f"{features.key} {features.pooled.shape}".encode())
    arrays = [features.targets, features.starts] + ([] if features.key else [features.pooled])
    arrays += features.soft or ()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()[:32]
