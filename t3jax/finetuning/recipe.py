"""How a language model is fine-tuned: the recipe's settings and its optimizer."""

import dataclasses
from typing import Annotated

import jax
import optax

from t3jax.minnorm import MinNormConfig
from t3jax.ranges import (
    BELOW_1,
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    RATE,
    SEED,
    Ranged,
    Words,
    whole,
)

_LAST_RATE = 0.02  # the learning rate at the end, as a share of its peak


@dataclasses.dataclass(frozen=True)
class FinetuneConfig(Ranged):
    """How a language model is fine-tuned.

    Attributes:
        epochs: Passes over the rows.
        batch_size: Rows of an optimizer step; with tasks, of each task.
        microbatches: Parts of a batch whose gradients are computed one after the other and summed:
            less memory, the same step up to rounding.
        learning_rate: AdamW's at its peak.
        warmup_steps: Steps over which the rate rises from 0; it then falls as a cosine, to 2 % of
            the peak.
        weight_decay: AdamW's, decoupled, of matrices alone.
        b1: AdamW's decay of the mean gradient.
        b2: AdamW's decay of the mean squared gradient.
        eps: AdamW's, added to the root of the latter.
        clip_norm: Largest global norm of a gradient.
        prompt_weight: Weight of a prompt token in the loss; an answer token has 1.
        lora_rank: R of LoRA's updates; 0 trains all weights instead.
        lora_alpha: LoRA's updates are multiplied by this over R.
        lora_layers: Names of the linear layers that LoRA updates, in every block.
        dtype: Dtype of the forward and backward pass; trained parameters and moments are float32.
        remat: Compute activations again in the backward pass and keep the blocks' inputs alone:
            less memory, a third more work.
        seed: Decides the order of the rows, and LoRA's first factors.
        checkpoint_every: Steps between checkpoints; the last is always saved.
        minnorm: Unlearn by MinNorm-OG: the rows are the retain set, and the trained parameters are
            projected before the steps of some epochs; None never projects.
        tasks: T of LoRA-ML: all weights are trained, jointly with a LoRA adapter for each of T
            tasks, and the adapters are dropped at the end; None trains no adapters of tasks.
        reptile: With tasks, train the adapters alone, and move the weights by their mean every
            `inner_steps` steps (Reptile instead of LoRA-ML).
        inner_steps: K of Reptile: steps of the adapters, which then begin anew.
    """

    epochs: Annotated[int, whole(1, 10**6)] = 5
    batch_size: Annotated[int, COUNT] = 32
    microbatches: Annotated[int, COUNT] = 1
    learning_rate: Annotated[float, RATE] = 1e-5
    warmup_steps: Annotated[int, whole(0)] = 20
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.01
    b1: Annotated[float, BELOW_1] = 0.9
    b2: Annotated[float, BELOW_1] = 0.999
    eps: Annotated[float, POSITIVE] = 1e-8
    clip_norm: Annotated[float, POSITIVE] = 1.0
    prompt_weight: Annotated[float, NOT_NEGATIVE] = 0.0
    lora_rank: Annotated[int, whole(0, 2**16)] = 0
    lora_alpha: Annotated[float, POSITIVE] = 16.0
    lora_layers: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")
    dtype: Annotated[str, Words(("float32", "bfloat16"))] = "float32"
    remat: bool = False
    seed: Annotated[int, SEED] = 0
    checkpoint_every: Annotated[int, whole(1)] = 100
    minnorm: MinNormConfig | None = None
    tasks: int | None = None
    reptile: bool = False
    inner_steps: Annotated[int, COUNT] = 10

    def __post_init__(self):
        super().__post_init__()
        if not self.lora_layers:
            raise ValueError("lora_layers = (): expected at least one")
        if self.microbatches > self.batch_size:
            raise ValueError(
                f"a batch of {self.batch_size} rows cannot be cut into {self.microbatches} "
                "microbatches; lower microbatches or raise batch_size"
            )
        if self.tasks is not None and self.tasks < 2:
            raise ValueError(
                f"LoRA-ML and Reptile need 2 tasks or more, each a source, got {self.tasks}"
            )
        if self.reptile and not self.tasks:
            raise ValueError("Reptile needs tasks: give their number, 2 or more")
        if self.tasks and (not self.lora_rank or self.minnorm is not None):
            raise ValueError(
                "tasks have a LoRA adapter each and know no projection: give a lora_rank of 1 or "
                f"more and no minnorm, got lora_rank = {self.lora_rank}, minnorm = {self.minnorm}"
            )

    @property
    def freezes_weights(self) -> bool:
        """Whether LoRA's factors alone are trained."""
        return self.lora_rank > 0 and not self.tasks

    @property
    def lora_scale(self) -> float:
        """The factor of LoRA's updates B A."""
        return self.lora_alpha / max(1, self.lora_rank)


def learning_rate_schedule(config: FinetuneConfig, steps: int) -> optax.Schedule:
    """Linear from 0 to the peak, then a cosine to 2 % of it, over the steps of the whole run.

    The warm-up takes at most half of the run. The first step has the rate 0.
    """
    peak, warmup = config.learning_rate, min(config.warmup_steps, steps // 2)
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps, _LAST_RATE * peak)


def make_optimizer(config: FinetuneConfig, steps: int) -> optax.GradientTransformation:
    """AdamW with clipped gradients, warm-up and decay, for the steps of the whole run."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate_schedule(config, steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=lambda trained: jax.tree.map_with_path(_decays, trained),
        ),
    )


def _decays(path: tuple, leaf: jax.Array | jax.ShapeDtypeStruct) -> bool:
    """True for matrices; a norm may have a vector for each head, which is no matrix."""
    return leaf.ndim > 1 and "norm" not in jax.tree_util.keystr(path[-2:])
