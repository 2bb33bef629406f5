"""A run of fine-tuning: epochs over the rows, held-out loss, checkpoints, metrics."""

import dataclasses
import math
import pathlib
import time
from collections.abc import Sequence

import jax
import numpy as np
import tqdm
from jax.sharding import Mesh

from t3jax import hosts, sharding
from t3jax.batching import check_examples
from t3jax.checkpoint import Metrics, open_run
from t3jax.data import Example
from t3jax.digests import examples_digest, params_digest
from t3jax.finetuning.batches import epoch_batches
from t3jax.finetuning.lora import merge_lora
from t3jax.finetuning.recipe import FinetuneConfig, learning_rate_schedule
from t3jax.finetuning.trainer import Params, Trainer
from t3jax.lm import LMConfig


def finetune(
    lm_config: LMConfig,
    params: Params,
    examples: Sequence[Example] | Sequence[Sequence[Example]],
    config: FinetuneConfig | None = None,
    *,
    validation: Sequence[Example] = (),
    workdir: str | pathlib.Path | None = None,
    mesh: Mesh | None = None,
    progress: str | None = None,
) -> Params:
    """Fine-tunes a language model on the answers of some rows.

    With a `workdir` the run can be killed at any moment and called again: it resumes from its last
    checkpoint and ends with the very bits of the uninterrupted run (same machine, number of devices
    and versions; on another number of devices the same up to rounding). SIGTERM saves the step
    under way and ends the run. Metrics of every step go to `metrics.jsonl` and `tensorboard/` in
    it.

    Training all weights takes 16 bytes for each (the weight, two moments, a gradient) beside
    `params` and the activations; LoRA takes that for its factors alone.

    With `config.tasks` (LoRA-ML) the base and an adapter for each task minimise the mean of the
    tasks' losses jointly, and the base is returned alone: it is made to be adapted. Each step reads
    a batch of every task. An epoch is one pass over the largest task; smaller tasks are read again.
    It takes 4 bytes a weight more, the sum of the tasks' gradients. With `config.reptile` the
    adapters alone have gradients and moments; the base takes 4 bytes a weight.

    Args:
        lm_config: The model's shape.
        params: Its parameter tree; left as it is.
        examples: Tokenised texts with their answers; with `config.tasks`, those of each task.
        config: The recipe; None means the defaults.
        validation: Texts to report the loss of after every epoch; never trained on.
        workdir: Folder of the run; None writes nothing.
        mesh: Where to train; None means one device.
        progress: Label of a progress bar with loss and remaining time, which leaves a line for each
            epoch; None shows nothing.

    Returns:
        The trained parameter tree, placed on the mesh: float32, or with LoRA merged into `params`
        and of their dtype. `train_weights` returns LoRA's factors.

    Raises:
        ValueError: If there are no examples, or not of as many tasks as the recipe says, a text is
            longer than the model's context or has a token without an embedding, LoRA names a layer
            that does not exist, or the workdir holds another run.
        FloatingPointError: If loss or gradient become infinite or NaN; checkpoints stay as they
            were.
        OSError: If the disk is full; checkpoints stay as they were.
        t3jax.hosts.Preempted: After SIGTERM, with the step saved; only with a workdir.
    """
    config = FinetuneConfig() if config is None else config
    if mesh is None:
        mesh = sharding.make_mesh(devices=jax.devices()[:1])
    trained = train_weights(
        lm_config,
        params,
        examples,
        config,
        validation=validation,
        workdir=workdir,
        mesh=mesh,
        progress=progress,
    )
    return merge_weights(params, trained, config, mesh)


def merge_weights(params: Params, trained: Params, config: FinetuneConfig, mesh: Mesh) -> Params:
    """The parameter tree of the fine-tuned model, from the result of `train_weights`."""
    if config.tasks:
        return trained["base"]
    if config.lora_rank:
        params = hosts.place(params, sharding.param_shardings(mesh, params))
        return merge_lora(params, trained, config.lora_scale)
    return trained


def train_weights(
    lm_config: LMConfig,
    params: Params,
    examples: Sequence[Example] | Sequence[Sequence[Example]],
    config: FinetuneConfig,
    *,
    validation: Sequence[Example],
    workdir: str | pathlib.Path | None,
    mesh: Mesh,
    progress: str | None,
) -> Params:
    """Trains as `finetune` does, and returns the trained parameters.

    They are the parameter tree; with LoRA its factors; with tasks the base and the adapters.
    """
    rows = _Rows(examples, config)
    for texts in [*rows.tasks, validation] if validation else rows.tasks:
        check_examples(lm_config, texts)
    steps_per_epoch = rows.steps_per_epoch
    steps = config.epochs * steps_per_epoch
    trainer = Trainer(lm_config, params, config, steps, mesh)
    schedule = learning_rate_schedule(config, steps)
    digests = [examples_digest(texts) for texts in rows.tasks]
    settings = {
        "model": dataclasses.asdict(lm_config),
        "weights": params_digest(params),
        "finetuning": dataclasses.asdict(config),
        "data": digests if config.tasks else digests[0],
        "validation": examples_digest(validation),
    }
    if not hosts.is_lead():
        progress = None
    with open_run(workdir, settings, trainer.abstract_state, unit="step") as run:
        metrics = run.metrics
        state = trainer.init() if run.state is None else run.state
        bar = tqdm.tqdm(
            total=steps, initial=run.done, desc=progress, unit="step", disable=progress is None
        )
        for step in range(run.done + 1, steps + 1):
            start = time.perf_counter()
            epoch, place = divmod(step - 1, steps_per_epoch)
            batches = rows.draw(step - 1)
            share = 0.0
            if config.minnorm is not None:
                share = config.minnorm.share_at(step - 1, steps_per_epoch, config.epochs)
            if share:
                state = trainer.project(state, batches[0], step, share)
            state, loss, norm = trainer.step(state, *batches)
            if config.reptile and (step % config.inner_steps == 0 or step == steps):
                state = trainer.end_round(state, step)
            line = {
                "step": step,
                "epoch": epoch + 1,
                "loss": float(loss),
                "gradient_norm": float(norm),
                "learning_rate": float(schedule(step - 1)),
                "answer_tokens": sum(row.num_answer_tokens for batch in batches for row in batch),
            }
            if config.minnorm is not None:
                line["projected_share"] = share
            _check_finite(line, config)
            epoch_ends = place + 1 == steps_per_epoch
            if epoch_ends and validation:
                line["validation_loss"] = trainer.loss(state[0], validation)
            line["seconds"] = time.perf_counter() - start
            metrics.append(line)
            run.finish(step, [line], state, step == steps or step % config.checkpoint_every == 0)
            bar.set_postfix(loss=f"{line['loss']:.4f}")
            bar.update()
            if epoch_ends and progress is not None:
                bar.write(_describe(metrics, config.epochs))
        bar.close()
    trained: Params = state[0]
    return trained


class _Rows:
    """The texts of each task, a single one without tasks, and the rows of each step.

    Attributes:
        tasks: The texts.
        steps_per_epoch: Steps in which the largest task is read once.
    """

    def __init__(
        self, examples: Sequence[Example] | Sequence[Sequence[Example]], config: FinetuneConfig
    ):
        tasks: list[Sequence[Example]] = list(examples) if config.tasks else [examples]  # type: ignore[arg-type,list-item]
        if config.tasks and len(tasks) != config.tasks:
            raise ValueError(
                f"expected the texts of {config.tasks} tasks, got those of {len(tasks)}"
            )
        self.tasks, self._config = tasks, config
        self._lengths = [np.array([len(text.tokens) for text in texts]) for texts in tasks]
        self._steps = [-(-len(texts) // config.batch_size) for texts in tasks]
        self.steps_per_epoch = max(self._steps)

    def draw(self, step: int) -> list[list[Example]]:
        """Draws the rows of every task in a step, which counts from 0."""
        batches = []
        for task, texts in enumerate(self.tasks):
            epoch, place = divmod(step, self._steps[task])
            seed = self._config.seed + task
            epoch_rows = epoch_batches(self._lengths[task], self._config.batch_size, seed, epoch)
            batches.append([texts[row] for row in epoch_rows[place]])
        return batches


def _check_finite(line: Metrics, config: FinetuneConfig) -> None:
    if math.isfinite(line["loss"]) and math.isfinite(line["gradient_norm"]):
        return
    raise FloatingPointError(
        f"step {line['step']}: the loss is {line['loss']} and the norm of its gradient "
        f"{line['gradient_norm']} (learning_rate {config.learning_rate}, dtype {config.dtype}); "
        "train with a smaller learning_rate, in another workdir"
    )


def _describe(metrics: Sequence[Metrics], epochs: int) -> str:
    """A line on the last epoch; its loss is the mean over tokens."""
    last = metrics[-1]
    lines = [line for line in metrics if line["epoch"] == last["epoch"]]
    tokens = sum(line["answer_tokens"] for line in lines)
    loss = sum(line["loss"] * line["answer_tokens"] for line in lines) / tokens
    text = f"epoch {last['epoch']:>{len(str(epochs))}}/{epochs}  loss {loss:.4f}"
    if "validation_loss" in last:
        text += f"  validation {last['validation_loss']:.4f}"
    return text + f"  {sum(line['seconds'] for line in lines):.0f} s"
