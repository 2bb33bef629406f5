"""Training the head on frozen features: whole epochs in one compiled scan, several seeds at once.

Features, targets and nothing else of the base model are needed; they stay on the device. Sequences
are ragged and never padded one by one: the host plans each epoch as rows of the feature array, and
one step gathers the rows of its batch. An epoch is one pass over the forget sequences, each paired
with a retain sequence drawn at random.

Only rows of W2 whose token occurs in the data get a gradient, so only those are trained. The other
rows can but shrink by weight decay, by a factor that is known in closed form.

Axes: K seeds, N answer tokens of all sequences, D features, R rank, V vocabulary, U tokens of the
vocabulary that are trained, M tokens of a batch.

References:
    Temper-Then-Tilt, arXiv 2602.10217, training.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import math
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from t3jax import sharding
from t3jax.features import Features
from t3jax.head import (
    HeadConfig,
    HeadParams,
    classifier_loss,
    head_shapes,
    init_head,
    target_scores,
)
from t3jax.head_io import Head, place_head, save_head

if TYPE_CHECKING:
    from t3jax.checkpoint import Metrics, RunFolder

_HOLDOUT_SEED = 0
_BATCH_STEP = 64


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How the head is trained; the defaults are the paper's recipe.

    Attributes:
        epochs: Passes over the forget set.
        warmup_epochs: Epochs over which the learning rate rises from 0; it then falls to 0.
        batch_size: Forget sequences of a batch; as many retain sequences come on top.
        learning_rate: AdamW's at its peak.
        weight_decay: AdamW's, decoupled: a step shrinks weights by learning rate times this.
        b1: AdamW's decay of the mean gradient.
        b2: AdamW's decay of the mean squared gradient.
        eps: AdamW's, added to the root of the latter.
        clip_norm: Largest global norm of a gradient.
        zero_output: Start the output layer at zero (an extension, see `init_head`).
        holdout_fraction: Share of the retain and of the forget sequences that is kept from training
            and evaluated; the same sequences for every seed. The paper keeps none.
        eval_every: Epochs between evaluations on the held-out sequences; the last always counts.
        checkpoint_every: Epochs between checkpoints; the last is always saved.
    """

    epochs: int = 100
    warmup_epochs: int = 25
    batch_size: int = 32
    learning_rate: float = 1e-2
    weight_decay: float = 1e-2
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float = 1.0
    zero_output: bool = False
    holdout_fraction: float = 0.0
    eval_every: int = 5
    checkpoint_every: int = 20

    def __post_init__(self):
        for name in ("epochs", "batch_size", "eval_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.warmup_epochs <= self.epochs:
            raise ValueError(
                f"warmup_epochs must lie between 0 and epochs = {self.epochs}, got "
                f"{self.warmup_epochs}"
            )
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must not be negative, got {self.weight_decay}")
        if not 0 <= self.holdout_fraction < 1:
            raise ValueError(f"holdout_fraction must lie in [0, 1), got {self.holdout_fraction}")


def train_heads(
    retain: Features,
    forget: Features,
    head_config: HeadConfig,
    train_config: TrainConfig | None = None,
    seeds: Sequence[int] = (1,),
    *,
    workdir: str | pathlib.Path | None = None,
    mesh: Mesh | None = None,
    model: str = "",
    base_temperature: float = 2.5,
    guidance_scale: float = 1.0,
    report: Callable[[str], None] | None = None,
) -> list[Head]:
    """Trains a head for each seed, all at once.

    With a `workdir` the run can be killed at any moment and called again: it resumes from its last
    checkpoint and ends with the very bits of the uninterrupted run (same machine, number of devices
    and versions). Metrics go to `metrics.jsonl` and `tensorboard/` in it, and the heads to `head`,
    or `head-seed{n}` where there are several.

    Args:
        retain: Features of the retain set.
        forget: Features of the forget set.
        head_config: Shape of the head.
        train_config: The recipe; None means the paper's.
        seeds: A seed decides the first weights and the batches of its head.
        workdir: Folder of the run; None writes nothing.
        mesh: Where to train; None means one device.
        model: Folder or hub id of the base model, kept in the head.
        base_temperature: T, kept in the head.
        guidance_scale: s, kept in the head.
        report: Called with a line of text for each epoch, such as `print`.

    Returns:
        One head for each seed, parameters placed on the mesh.

    Raises:
        ValueError: If a set is empty, sets and head do not fit each other, or the workdir holds
            another run.
        FloatingPointError: If loss or weights become infinite or NaN; heads and checkpoints stay as
            they were.
        OSError: If the disk is full; heads and checkpoints stay as they were.
    """
    config = TrainConfig() if train_config is None else train_config
    if mesh is None:
        mesh = sharding.make_mesh((1, 1), jax.devices()[:1])
    _check(retain, forget, head_config, seeds)
    data = _Data.build(retain, forget, head_config, config, mesh)
    planner = _Planner(data, config, seeds, mesh)
    trainer = _Trainer(data, head_config, config, planner.steps, seeds, mesh)
    settings = {
        "head": dataclasses.asdict(head_config),
        "training": dataclasses.asdict(config),
        "seeds": list(seeds),
        "features": {"retain": _digest(retain), "forget": _digest(forget)},
    }

    with _open_folder(workdir, settings, trainer.abstract_state) as folder:
        epochs_done, metrics, state = 0, [], None
        if folder is not None:
            epochs_done, metrics, state = folder.epoch, folder.metrics, folder.state
        if state is None:
            state = trainer.init()

        for epoch in range(epochs_done + 1, config.epochs + 1):
            start = time.perf_counter()
            rows, counts = planner.epoch(epoch)
            state, losses, finite = trainer.train_epoch(state, rows)
            # Tokens of different batches weigh the same.
            losses = np.sum(losses * counts, axis=1) / np.sum(counts, axis=1)
            _check_finite(losses, finite, epoch, seeds, config, data)
            last = epoch == config.epochs
            held_out = trainer.evaluate(state) if last or epoch % config.eval_every == 0 else None
            lines = [
                {
                    "epoch": epoch,
                    "seed": seed,
                    "loss": float(losses[k]),
                    "learning_rate": float(trainer.learning_rates[epoch * planner.steps - 1]),
                    **(held_out[k] if held_out else {}),
                    "seconds": time.perf_counter() - start,
                }
                for k, seed in enumerate(seeds)
            ]
            metrics = metrics + lines
            if folder is not None:
                folder.log(lines)
                if last or epoch % config.checkpoint_every == 0:
                    folder.save(epoch, state)
            if report is not None:
                for line in lines:
                    report(_describe(line, config.epochs))

    heads = []
    for k, seed in enumerate(seeds):
        own = [line for line in metrics if line["seed"] == seed]
        record = {
            "training": {**dataclasses.asdict(config), "seed": seed},
            "tokens": {"retain": retain.num_tokens, "forget": forget.num_tokens},
            "sequences": {"retain": retain.num_sequences, "forget": forget.num_sequences},
            "features": settings["features"],
            "final": {name: value for name, value in own[-1].items() if name != "seconds"},
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
                record=record,
            )
        )
    if workdir is not None:
        for head, folder_name in zip(heads, head_folders(seeds), strict=True):
            save_head(pathlib.Path(workdir) / folder_name, head)
    return heads


def _open_folder(
    workdir: str | pathlib.Path | None, settings: dict[str, Any], abstract_state: Any
) -> "contextlib.AbstractContextManager[RunFolder | None]":
    if workdir is None:
        return contextlib.nullcontext()
    from t3jax.checkpoint import RunFolder  # slow to import: only who keeps files waits

    return RunFolder(pathlib.Path(workdir), settings, abstract_state)


def head_folders(seeds: Sequence[int]) -> list[str]:
    """Names of the head folders that `train_heads` writes into its workdir."""
    return ["head"] if len(seeds) == 1 else [f"head-seed{seed}" for seed in seeds]


def learning_rate_schedule(config: TrainConfig, steps_per_epoch: int) -> optax.Schedule:
    """Linear from 0 to the peak, then linear to 0: `get_linear_schedule_with_warmup`.

    Args:
        config: The recipe.
        steps_per_epoch: Batches of an epoch.

    Returns:
        The learning rate as a function of the number of steps done before; the first step has 0.
    """
    warmup = config.warmup_epochs * steps_per_epoch
    total = config.epochs * steps_per_epoch

    def schedule(count: Any) -> Any:
        done = jnp.asarray(count, jnp.float32)
        rise = done / max(1, warmup)
        fall = (total - done) / max(1, total - warmup)
        return config.learning_rate * jnp.where(done < warmup, rise, jnp.maximum(fall, 0.0))

    return schedule


def make_optimizer(config: TrainConfig, steps_per_epoch: int) -> optax.GradientTransformation:
    """AdamW with clipped gradients, warm-up and decay, as the recipe has it."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate_schedule(config, steps_per_epoch),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
        ),
    )


class _Tokens(NamedTuple):
    """Answer tokens on the device: those of retain sequences, of forget sequences, padding.

    Attributes:
        pooled: Features, `[N, D]`.
        targets: Row of the trained W2 of the token that came next, `[N]`.
        forget_start: First token of the forget sequences.
    """

    pooled: jax.Array
    targets: jax.Array
    forget_start: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class _Data:
    """Training and held-out tokens, placed, and where on the host their sequences are.

    Attributes:
        train: Tokens to train on.
        held_out: Tokens of the held-out sequences; None if there are none.
        starts: Of the retain and of the forget sequences in `train`, `[S + 1]` each.
        held_out_starts: The same in `held_out`.
        vocabulary: Token ids of the trained rows of W2, sorted, `[U]`.
    """

    train: _Tokens
    held_out: _Tokens | None
    starts: tuple[np.ndarray, np.ndarray]
    held_out_starts: tuple[np.ndarray, np.ndarray]
    vocabulary: np.ndarray

    @classmethod
    def build(
        cls,
        retain: Features,
        forget: Features,
        head_config: HeadConfig,
        config: TrainConfig,
        mesh: Mesh,
    ) -> "_Data":
        seen = np.union1d(retain.targets, forget.targets)
        # Unseen tokens fill up, so that the rows divide among the devices.
        unseen = np.setdiff1d(np.arange(head_config.vocab_size), seen)
        vocabulary = np.union1d(seen, unseen[: -len(seen) % mesh.shape[sharding.MODEL]])

        parts = [
            _split(features, config.holdout_fraction, name, stream)
            for stream, (name, features) in enumerate((("retain", retain), ("forget", forget)))
        ]

        def placed(sets: Sequence[Features]) -> _Tokens:
            total = sum(features.num_tokens for features in sets)
            padded = total + -total % mesh.shape[sharding.DATA]
            pooled = np.zeros((padded, head_config.hidden_size), retain.pooled.dtype)
            targets = np.zeros(padded, np.int32)
            end = 0
            for features in sets:
                start, end = end, end + features.num_tokens
                pooled[start:end] = features.pooled
                targets[start:end] = np.searchsorted(vocabulary, features.targets)
            rows, whole = sharding.batch_sharding(mesh, targets.shape), NamedSharding(mesh, P())
            arrays = (pooled, targets, np.int32(sets[0].num_tokens))
            return _Tokens(*jax.device_put(arrays, (rows, rows, whole)))

        def starts(sets: Sequence[Features]) -> tuple[np.ndarray, np.ndarray]:
            first, second = sets
            return first.starts, second.starts + first.num_tokens

        train, held_out = zip(*parts, strict=True)
        return cls(
            train=placed(train),
            held_out=placed(held_out) if config.holdout_fraction else None,
            starts=starts(train),
            held_out_starts=starts(held_out),
            vocabulary=vocabulary,
        )


class _Planner:
    """Which rows of the training tokens each step of each epoch reads, for every seed.

    Attributes:
        steps: Batches of an epoch.
    """

    def __init__(self, data: _Data, config: TrainConfig, seeds: Sequence[int], mesh: Mesh):
        self._retain, self._forget = data.starts
        self._seeds = seeds
        self._batch_size = config.batch_size
        forget_sequences = len(self._forget) - 1
        self._firsts = np.arange(0, forget_sequences, config.batch_size)
        self.steps = len(self._firsts)
        # The largest batch that will ever come, so that one compiled program serves all epochs.
        largest = max(
            self._counts(seed, epoch).max()
            for seed in seeds
            for epoch in range(1, config.epochs + 1)
        )
        # Rounded up, so that it serves other seeds too and divides among the devices.
        size = int(largest) + -int(largest) % math.lcm(_BATCH_STEP, mesh.shape[sharding.DATA])
        self._shape = (len(seeds), self.steps, size)
        self._sharding = sharding.fitting(mesh, P(None, None, sharding.DATA), self._shape)

    def epoch(self, epoch: int) -> tuple[jax.Array, np.ndarray]:
        """Rows `[K, steps, M]`, -1 where a batch has fewer, and tokens per batch `[K, steps]`."""
        rows = np.full(self._shape, -1, np.int32)
        for k, seed in enumerate(self._seeds):
            forget, retain = self._pairs(seed, epoch)
            for step, first in enumerate(self._firsts):
                batch = slice(first, first + self._batch_size)
                read = np.concatenate(
                    [_rows(self._forget, forget[batch]), _rows(self._retain, retain[batch])]
                )
                rows[k, step, : len(read)] = read
        counts = np.stack([self._counts(seed, epoch) for seed in self._seeds])
        return jax.device_put(rows, self._sharding), counts

    def _pairs(self, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The forget sequences in this epoch's order, and the retain sequence drawn for each."""
        rng = np.random.default_rng((seed, epoch))
        forget = rng.permutation(len(self._forget) - 1)
        retain = rng.integers(len(self._retain) - 1, size=len(forget))
        return forget, retain

    def _counts(self, seed: int, epoch: int) -> np.ndarray:
        forget, retain = self._pairs(seed, epoch)
        lengths = np.diff(self._forget)[forget] + np.diff(self._retain)[retain]
        return np.add.reduceat(lengths, self._firsts)


class _Programs(NamedTuple):
    """What is compiled for one shape of run.

    The training state is `(params, optimizer state)`, each leaf with a leading axis of seeds, and
    W2 with the rows of the trained tokens only, `[K, U, R]`.

    Attributes:
        abstract_state: The training state as shapes with shardings.
        init_optimizer: `params -> optimizer state`.
        epoch: `(state, tokens, rows) -> (state, losses [K, steps], finite [K])`; the state given is
            donated, `rows` `[K, steps, M]` says which tokens each batch has, -1 for none.
        score: `(params, tokens) -> scores [K, N]`.
    """

    abstract_state: Any
    init_optimizer: Callable[[HeadParams], Any]
    epoch: Callable[[Any, _Tokens, jax.Array], tuple[Any, jax.Array, jax.Array]]
    score: Callable[[HeadParams, _Tokens], jax.Array]


@functools.cache
def _compile(
    head_config: HeadConfig, config: TrainConfig, steps: int, seeds: int, mesh: Mesh
) -> _Programs:
    """The programs for a head whose vocabulary is that of the trained tokens."""
    optimizer = make_optimizer(config, steps)
    activation = head_config.activation

    def loss_fn(params: HeadParams, tokens: _Tokens, rows: jax.Array) -> jax.Array:
        index = jnp.maximum(rows, 0)
        pooled = tokens.pooled.at[index].get(mode="promise_in_bounds")
        targets = tokens.targets.at[index].get(mode="promise_in_bounds")
        scores = target_scores(params, pooled, targets, activation)
        return classifier_loss(scores, retain=rows < tokens.forget_start, mask=rows >= 0)

    def train_one(state: Any, tokens: _Tokens, rows: jax.Array) -> tuple:
        def step(state: Any, rows: jax.Array) -> tuple[Any, jax.Array]:
            params, opt_state = state
            loss, grads = jax.value_and_grad(loss_fn)(params, tokens, rows)
            # Optax relies on implicit promotion where it corrects the bias of the means.
            with jax.numpy_dtype_promotion("standard"):
                updates, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), loss

        state, losses = jax.lax.scan(step, state, rows)
        finite = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state[0])]
        return state, losses, jnp.stack(finite).all()

    def score_one(params: HeadParams, tokens: _Tokens) -> jax.Array:
        return target_scores(params, tokens.pooled, tokens.targets, activation)

    shapes = head_shapes(head_config)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct((seeds, *x.shape), x.dtype), shapes)
    opt_state = jax.eval_shape(jax.vmap(optimizer.init), params)
    whole = NamedSharding(mesh, P())
    placed = jax.tree.map(
        lambda s: NamedSharding(mesh, P(None, *s.spec)), sharding.param_shardings(mesh, shapes)
    )
    placed_opt = optax.tree.map_params(
        optimizer, lambda _, s: s, opt_state, placed, transform_non_params=lambda _: whole
    )
    # Scatter-adds and the choice of kernels would differ from run to run on a GPU.
    deterministic = jax.default_backend() == "gpu"
    return _Programs(
        abstract_state=jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            (params, opt_state),
            (placed, placed_opt),
        ),
        init_optimizer=jax.jit(jax.vmap(optimizer.init), out_shardings=placed_opt),
        epoch=jax.jit(
            jax.vmap(train_one, in_axes=(0, None, 0)),
            donate_argnums=0,
            out_shardings=((placed, placed_opt), whole, whole),
            compiler_options={"xla_gpu_deterministic_ops": True} if deterministic else None,
        ),
        score=jax.jit(jax.vmap(score_one, in_axes=(0, None)), out_shardings=whole),
    )


_init_head = jax.jit(init_head, static_argnames=("config", "zero_output"))


class _Trainer:
    """A run: its data, its programs, and what is known of the rows that are not trained."""

    def __init__(
        self,
        data: _Data,
        head_config: HeadConfig,
        config: TrainConfig,
        steps: int,
        seeds: Sequence[int],
        mesh: Mesh,
    ):
        self._data, self._head_config, self._config = data, head_config, config
        self._seeds = seeds
        trained = dataclasses.replace(head_config, vocab_size=len(data.vocabulary))
        self._programs = _compile(trained, config, steps, len(seeds), mesh)
        self.abstract_state = self._programs.abstract_state
        schedule = learning_rate_schedule(config, steps)
        self.learning_rates = np.asarray(jax.jit(schedule)(np.arange(config.epochs * steps)))

    def init(self) -> Any:
        """The training state before the first step."""
        drawn = [self._draw(seed) for seed in self._seeds]
        trained = [{**p, "output": p["output"][self._data.vocabulary]} for p in drawn]
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *trained)
        places = jax.tree.map(lambda x: x.sharding, self.abstract_state[0])
        params = jax.device_put(stacked, places)
        return params, self._programs.init_optimizer(params)

    def train_epoch(self, state: Any, rows: jax.Array) -> tuple[Any, np.ndarray, np.ndarray]:
        """The state after an epoch, losses `[K, steps]`, whether the weights are finite `[K]`."""
        with jax.transfer_guard("disallow"):
            state, losses, finite = self._programs.epoch(state, self._data.train, rows)
        return state, *jax.device_get((losses, finite))

    def evaluate(self, state: Any) -> list[dict[str, float]] | None:
        """Metrics on the held-out sequences for each seed; None if there are none."""
        if self._data.held_out is None:
            return None
        scores = jax.device_get(self._programs.score(state[0], self._data.held_out))
        return [_held_out_metrics(row, *self._data.held_out_starts) for row in scores]

    def full_params(self, state: Any, k: int) -> HeadParams:
        """The parameters of one head, on the host, W2 with all rows `[V, R]`.

        Rows that were not trained had gradients of zero, hence no step but weight decay.
        """
        params = jax.tree.map(lambda leaf: leaf[k], jax.device_get(state[0]))
        shrunk = np.prod(1.0 - self.learning_rates.astype(np.float64) * self._config.weight_decay)
        output = self._draw(self._seeds[k])["output"] * np.float32(shrunk)
        output[self._data.vocabulary] = params["output"]
        return {**params, "output": output}

    def _draw(self, seed: int) -> HeadParams:
        """The whole head of a seed before the first step, on the host."""
        key = jax.random.key(seed)
        zero_output = self._config.zero_output
        return jax.device_get(_init_head(key, config=self._head_config, zero_output=zero_output))


def _split(
    features: Features, fraction: float, name: str, stream: int
) -> tuple[Features, Features]:
    """Sequences to train on and held-out ones, both in their order."""
    if not fraction:
        return features, features.select([])
    count = max(1, round(fraction * features.num_sequences))
    if count >= features.num_sequences:
        raise ValueError(
            f"the {name} set has {features.num_sequences} sequences, of which holdout_fraction = "
            f"{fraction} leaves none to train on; give more sequences or set it to 0"
        )
    order = np.random.default_rng((_HOLDOUT_SEED, stream)).permutation(features.num_sequences)
    return features.select(np.sort(order[count:])), features.select(np.sort(order[:count]))


def _rows(starts: np.ndarray, sequences: np.ndarray) -> np.ndarray:
    """The rows of some sequences, one sequence after the other."""
    lengths = starts[sequences + 1] - starts[sequences]
    offsets = np.cumsum(lengths) - lengths
    return np.repeat(starts[sequences] - offsets, lengths) + np.arange(lengths.sum())


def _held_out_metrics(
    scores: np.ndarray, retain_starts: np.ndarray, forget_starts: np.ndarray
) -> dict[str, float]:
    """Loss in nats per token, and the shares of tokens and of sequences on the right side of 0.

    A sequence is judged by the mean score of its answer tokens.
    """
    metrics, losses = {}, []
    for name, starts, sign in (("retain", retain_starts, 1.0), ("forget", forget_starts, -1.0)):
        signed = sign * scores[starts[0] : starts[-1]].astype(np.float64)
        means = np.add.reduceat(signed, starts[:-1] - starts[0]) / np.diff(starts)
        losses.append(np.logaddexp(0.0, -signed))
        metrics[f"held_out_{name}_loss"] = float(losses[-1].mean())
        metrics[f"held_out_{name}_token_accuracy"] = float((signed > 0).mean())
        metrics[f"held_out_{name}_sequence_accuracy"] = float((means > 0).mean())
    return {"held_out_loss": float(np.concatenate(losses).mean()), **metrics}


def _check(
    retain: Features, forget: Features, head_config: HeadConfig, seeds: Sequence[int]
) -> None:
    if not seeds or len(set(seeds)) < len(seeds) or any(seed < 0 for seed in seeds):
        raise ValueError(f"seeds must be different and not negative, at least one; got {seeds}")
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
    seeds: Sequence[int],
    config: TrainConfig,
    data: _Data,
) -> None:
    wrong = np.flatnonzero(~(np.isfinite(losses) & finite))
    if not wrong.size:
        return
    k = wrong[0]
    if not bool(jnp.isfinite(data.train.pooled).all()):
        advice = "the features hold values that are not finite: compute them anew, in float32"
    else:
        advice = "train with a smaller learning_rate, in another workdir"
    raise FloatingPointError(
        f"epoch {epoch}, seed {seeds[k]}: the loss is {losses[k]} and the weights are "
        f"{'finite' if finite[k] else 'not finite'} (learning_rate {config.learning_rate}); "
        f"{advice}. Nothing of this epoch was saved"
    )


def _version() -> str:
    try:
        return importlib.metadata.version("t3jax")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _describe(line: "Metrics", epochs: int) -> str:
    text = (
        f"epoch {line['epoch']:>{len(str(epochs))}}/{epochs}  seed {line['seed']}  "
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
