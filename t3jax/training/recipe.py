"""How a head is trained: the recipe's settings, its learning rate and its optimizer.

References:
    Temper-Then-Tilt, arXiv 2602.10217, training.
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import optax

from t3jax.head import HeadConfig
from t3jax.ranges import (
    BELOW_1,
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    RATE,
    SHARE,
    Numbers,
    Ranged,
    Words,
    whole,
)

LOSSES = ("classifier", "distillation", "auto")


@dataclasses.dataclass(frozen=True)
class TrainConfig(Ranged):
    """How the head is trained; the defaults are the paper's recipe.

    Attributes:
        epochs: Passes over the forget set.
        warmup_ratio: Share of the steps over which the learning rate rises from 0; it then falls
            to 0.
        batch_size: Forget sequences of a batch, which has as many retain sequences.
        learning_rate: AdamW's at its peak.
        weight_decay: AdamW's, decoupled: a step shrinks weights by learning rate times this.
        b1: AdamW's decay of the mean gradient.
        b2: AdamW's decay of the mean squared gradient.
        eps: AdamW's, added to the root of the latter.
        clip_norm: Largest global norm of a gradient.
        loss: "classifier", the paper's; "distillation" (see `t3jax.distillation`), for which the
            sets need soft targets; or "auto", which `make_training_sets` decides.
        distilled_temperature: The base temperature T that a distilled head is trained for.
        retain_weight: Weight of a distilled position of a retain text; one of a forget text has 1.
        zero_output: Start the output layer at zero (an extension, see `init_head`).
        holdout_fraction: Share of the retain and of the forget sequences that is held out and
            evaluated; the same sequences for every seed. The paper holds out none.
        patience: Training ends after this many evaluations in a row in which no head's held-out
            loss became smaller; each head then has the weights of its best evaluation. 0: train to
            the end and take the last. It needs a holdout_fraction.
        eval_every: Epochs between evaluations on the held-out sequences; the last always counts.
        checkpoint_every: Epochs between checkpoints; the last is always saved.
    """

    epochs: Annotated[int, whole(1, 10**6)] = 100
    warmup_ratio: Annotated[float, SHARE] = 0.25
    batch_size: Annotated[int, COUNT] = 32
    learning_rate: Annotated[float, RATE] = 1e-2
    weight_decay: Annotated[float, NOT_NEGATIVE] = 1e-2
    b1: Annotated[float, BELOW_1] = 0.9
    b2: Annotated[float, BELOW_1] = 0.999
    eps: Annotated[float, POSITIVE] = 1e-8
    clip_norm: Annotated[float, POSITIVE] = 1.0
    loss: Annotated[str, Words(LOSSES)] = "classifier"
    distilled_temperature: Annotated[float, Numbers(1, 1000)] = 1.0
    retain_weight: Annotated[float, POSITIVE] = 6.0
    zero_output: bool = False
    holdout_fraction: Annotated[float, BELOW_1] = 0.0
    patience: Annotated[int, whole(0)] = 0
    eval_every: Annotated[int, whole(1)] = 5
    checkpoint_every: Annotated[int, whole(1)] = 20

    def settle_loss(self, loss: str) -> "TrainConfig":
        """The recipe with "auto" replaced by a loss."""
        return dataclasses.replace(self, loss=loss) if self.loss == "auto" else self

    def __post_init__(self):
        super().__post_init__()
        if self.patience and not self.holdout_fraction:
            raise ValueError(
                f"patience = {self.patience}: expected 0, or a holdout_fraction above 0"
            )


def learning_rate_schedule(config: TrainConfig, steps_per_epoch: int) -> optax.Schedule:
    """Linear from 0 to the peak, then linear to 0: `get_linear_schedule_with_warmup`.

    The first step, after a count of 0 steps, has the rate 0.
    """
    total = config.epochs * steps_per_epoch
    warmup = round(config.warmup_ratio * total)

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        done = jnp.asarray(count, jnp.float32)
        rise = done / max(1, warmup)
        fall = (total - done) / max(1, total - warmup)
        return config.learning_rate * jnp.where(done < warmup, rise, jnp.maximum(fall, 0.0))

    return schedule


def make_optimizer(
    config: TrainConfig,
    steps_per_epoch: int,
    learning_rate: jax.Array | None = None,
    weight_decay: jax.Array | None = None,
) -> optax.GradientTransformation:
    """AdamW with the recipe's clipping of gradients, warm-up and decay.

    Peak rate and weight decay may be traced; the form of the optimizer's state depends on neither.
    """
    peak = config.learning_rate if learning_rate is None else learning_rate
    shape = learning_rate_schedule(dataclasses.replace(config, learning_rate=1.0), steps_per_epoch)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            lambda count: peak * shape(count),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay if weight_decay is None else weight_decay,
        ),
    )


class Member(NamedTuple):
    """One of the heads that are trained together.

    Attributes:
        name: Name of its folder.
        config: Its recipe.
        seed: Decides its first weights and its batches.
    """

    name: str
    config: TrainConfig
    seed: int


def make_members(configs: Sequence[TrainConfig], seeds: Sequence[int]) -> list[Member]:
    """A head for every recipe and every seed, recipe by recipe.

    Recipes differ in learning rate and weight decay alone. Names show the differences: `head`,
    `head-seed1`, `head-lr0.01-wd0.1-seed1`.
    """
    # JAX keeps the lower 32 bits of a seed alone: 2^32 would draw as 0 does.
    if not seeds or len(set(seeds)) < len(seeds) or not all(0 <= seed < 2**32 for seed in seeds):
        raise ValueError(f"seeds must be different, in [0, 2^32), at least one; got {seeds}")
    if not configs or len(set(configs)) < len(configs):
        raise ValueError(f"recipes must be different, at least one; got {list(configs)}")
    if len({dataclasses.replace(c, learning_rate=1.0, weight_decay=0.0) for c in configs}) > 1:
        raise ValueError(
            "heads that are trained together may differ in learning_rate, weight_decay and seed "
            f"alone; got the recipes {list(configs)}"
        )
    members = []
    for config in configs:
        recipe = f"-lr{config.learning_rate!r}-wd{config.weight_decay!r}"
        for seed in seeds:
            name = "head" + (recipe if len(configs) > 1 else "")
            if len(configs) > 1 or len(seeds) > 1:
                name += f"-seed{seed}"
            members.append(Member(name, config, seed))
    return members


def check_start(start: HeadConfig, expected: HeadConfig) -> None:
    """Checks that a head can begin with the weights of another; a ValueError names the fields."""
    different = [
        f"{field.name} {getattr(start, field.name)!r} where {getattr(expected, field.name)!r} is"
        for field in dataclasses.fields(HeadConfig)
        if getattr(start, field.name) != getattr(expected, field.name)
    ]
    if different:
        raise ValueError(
            f"the head to start at has {' and '.join(different)} asked for; give a head of the "
            "same shape and kind, made on the same base model"
        )
