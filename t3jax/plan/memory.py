"""The memory of a job on each device, before anything is loaded.

The arrays that a stage keeps (weights, cache, features, optimizer state) are summed over a device's
shards: exact. Temporary arrays are estimated from the program that one device runs, see
`t3jax.plan.liveness`. Nothing is compiled; docs/planning.md compares with compilers.
"""

import bisect
import dataclasses
import functools
import math
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from t3jax.lm import LMConfig
from t3jax.lm.cache import KeyValues
from t3jax.plan import programs
from t3jax.plan.programs import Job, Step
from t3jax.plan.shapes import GIB

_MOST_DOUBLINGS = 16  # of the rows of a part
USABLE = 0.9  # of a device's memory; programs, fragments and errors of the estimate need the rest


@dataclasses.dataclass(frozen=True)
class Stage:
    """Memory of a stage of a job on each device, bytes.

    `kept` are the arrays that the stage keeps, by their kind; `estimate` computes `temporary`.
    """

    kept: dict[str, int]
    estimate: Callable[[], int]

    @functools.cached_property
    def temporary(self) -> int:
        """Activations, logits and results of the largest step, which is traced for this."""
        return self.estimate()

    @property
    def total(self) -> int:
        """Bytes on each device."""
        return sum(self.kept.values()) + self.temporary


def shard_bytes(tree: PyTree) -> int:
    """Bytes of a tree's abstract arrays on each device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if isinstance(leaf, jax.ShapeDtypeStruct)
    )


def temporary_bytes(job: Job, program: Callable[[Job], Step]) -> int:
    """Estimates the bytes that a program takes on each device besides its arguments.

    They are activations, and results that do not reuse an argument's memory.
    """
    kinds = _layer_kinds(job.config)
    # The peaks with one and with two layers of a kind show how much each further layer adds.
    few = [layers[0] for layers in kinds] if len(kinds) > 1 else kinds[0][:2]

    def peak(layers: list[int]) -> int:
        return program(programs.on_one_device(job, sorted(layers))).peak_bytes()

    total = least = peak(few)
    for layers in kinds:
        if further := [layer for layer in layers if layer not in few]:
            total += len(further) * (peak([*few, further[0]]) - least)
    return total


def _layer_kinds(config: LMConfig) -> list[list[int]]:
    """The layers of each kind of blocks."""
    kinds: dict[Hashable, list[int]] = {}
    for layer in range(config.num_layers):
        kinds.setdefault(config.block_kind(layer), []).append(layer)
    return list(kinds.values())


def gathered_bytes(job: Job) -> int:
    """Bytes of weights that a device gathers to use them: of two layers, or the last table."""
    samples = [layers[-1] for layers in _layer_kinds(job.config)]
    stored, used = _params(job), _params(programs.on_one_device(job, samples))

    def gathered(stored: PyTree, used: PyTree) -> int:
        pairs = zip(*map(jax.tree.leaves, (stored, used)), strict=True)
        sizes = [(shard_bytes(share), shard_bytes(whole)) for share, whole in pairs]
        return sum(whole for share, whole in sizes if whole > share)

    table = "embed" if job.config.tied else "lm_head"
    # The next layer's weights are gathered while one layer computes.
    layers = min(2, job.config.num_layers)
    return max(
        gathered(stored[table], used[table]),
        *(
            layers * gathered(stored["layers"][layer], used["layers"][i])
            for i, layer in enumerate(samples)
        ),
    )


def gathered_cache_bytes(job: Job) -> int:
    """Bytes of one layer's keys and values where their width is split: prefill gathers them."""
    layers = programs.state(job, job.slots[0]).cache.layers

    def gathered(split: jax.Array | jax.ShapeDtypeStruct) -> int:
        whole = programs.by_rows(job.mesh, split)
        by_heads = split.sharding.shard_shape(split.shape)[1] < split.shape[1]
        return 0 if by_heads or shard_bytes(split) == shard_bytes(whole) else 2 * shard_bytes(whole)

    keys = (state.keys for state in layers if isinstance(state, KeyValues))
    return max(map(gathered, keys), default=0)


def decoding(job: Job) -> Stage:
    """Prefill, and chunks of decoding with the longest cache."""
    slots, weights = job.slots, programs.loop_weights(job)
    state = programs.state(job, slots[-1])
    # While a cache grows, the old and the new one are both in memory.
    before = max((s for s in slots if s < slots[-1]), default=0)

    def temporary() -> int:
        gathered = gathered_bytes(job)
        initial = shard_bytes(programs.state(job, slots[0]))
        return max(
            shard_bytes(programs.state(job, before).cache) if before else 0,
            temporary_bytes(job, programs.prefill) - initial + gathered + gathered_cache_bytes(job),
            temporary_bytes(job, programs.decode) + gathered,
        )

    return Stage(
        {
            "weights": shard_bytes(weights.params),
            "heads": shard_bytes(weights.heads),
            "key-value cache": shard_bytes(state.cache),
            "decoding state": shard_bytes(state._replace(cache=None)),
        },
        temporary,
    )


def feature_pass(job: Job) -> Stage:
    """The feature pass, while the result of the previous batch is copied to the host."""
    pending = jax.eval_shape(
        lambda: jnp.zeros((job.text_rows, job.text, job.config.hidden_size), jnp.float32)
    )
    return Stage(
        {
            "weights": shard_bytes(_params(job)),
            "features": shard_bytes(programs.by_rows(job.mesh, pending)),
        },
        lambda: temporary_bytes(job, programs.feature_pass) + gathered_bytes(job),
    )


def head_training(job: Job) -> Stage:
    """An epoch of head training, beside the weights of the model."""
    state, data, rows, _ = programs.head_training(job).arguments
    return Stage(
        {
            "weights": shard_bytes(_params(job)),
            "features": shard_bytes((data, rows)),
            "heads": shard_bytes(state[0]),
            "optimizer state": shard_bytes(state[1]),
        },
        lambda: temporary_bytes(job, programs.head_training),
    )


def fine_tuning(job: Job) -> Stage:
    """A step of fine-tuning, beside the initial weights."""
    recipe = job.finetuning
    assert recipe is not None
    trained, optimizer = programs.finetuning_programs(job).abstract_state
    initial = job if recipe.freezes_weights else dataclasses.replace(job, dtype=jnp.float32)
    summed = recipe.tasks and not recipe.reptile  # the gradient over the tasks so far
    over_tasks = shard_bytes(trained) if summed else 0
    copy = shard_bytes(trained) // 2 if recipe.dtype == "bfloat16" else 0

    def temporary() -> int:
        # The gradient is split like the weights; the program of one device holds all of it.
        whole = programs.on_one_device(job, range(job.config.num_layers))
        activations = temporary_bytes(job, programs.gradient) - _gradient_bytes(whole)
        return max(0, activations) + gathered_bytes(job)

    return Stage(
        {
            "weights": shard_bytes(_params(initial)),
            "trained": shard_bytes(trained),
            "optimizer state": shard_bytes(optimizer),
            "gradient": _gradient_bytes(job) + over_tasks,
            "copy in bfloat16": copy,
        },
        temporary,
    )


def largest_rows(stage: Callable[[Job], Stage], job: Job, field: str, capacity: int) -> int:
    """The largest batch that fits, a power of two of rows on each part of the mesh; 0 if none does.

    `field` is the job's number of rows to vary; `capacity` is a device's memory, bytes.
    """

    def exceeds(doublings: int) -> bool:
        varied: dict[str, Any] = {field: job.row_shards << doublings}
        planned = stage(dataclasses.replace(job, **varied))
        most = USABLE * capacity
        return sum(planned.kept.values()) > most or planned.total > most  # tracing takes the time

    fitting = bisect.bisect_left(range(_MOST_DOUBLINGS), True, key=exceeds)
    return job.row_shards << fitting - 1 if fitting else 0


def stages(job: Job) -> dict[str, Stage]:
    """The stages of a job by name."""
    planned = {
        "decoding": decoding(job),
        "features": feature_pass(job),
        "head training": head_training(job),
    }
    return planned | ({"fine-tuning": fine_tuning(job)} if job.finetuning else {})


def describe(job: Job, capacity: int) -> str:
    """The plan of a job as text: a table of stages, and the largest batches that fit."""
    planned = stages(job)
    names = dict.fromkeys(name for stage in planned.values() for name in stage.kept)
    columns = [
        [stage.kept.get(name, 0) for name in names] + [stage.temporary, stage.total]
        for stage in planned.values()
    ]
    stored = "int8" if job.config.quantized else jnp.dtype(job.dtype).name
    axes = ", ".join(f"{name} {size}" for name, size in job.mesh.shape.items())
    params = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(_params(job)))
    lines = [
        f"{params / 1e9:.3g}e9 weights in {stored} on {job.mesh.size} devices "
        f"({axes}) of {capacity / GIB:.4g} GiB",
        f"{'GiB on each device':30}" + "".join(f"{name:>15}" for name in planned),
    ]
    for name, *values in zip([*names, "activations and results", "all"], *columns, strict=True):
        lines.append(f"{name:30}" + "".join(f"{value / GIB:15.3f}" for value in values))
    fits = ["yes" if s.total <= USABLE * capacity else "no" for s in planned.values()]
    lines.append(f"{f'in {USABLE:.0%} of a device':30}" + "".join(f"{word:>15}" for word in fits))
    most = largest_rows(decoding, job, "rows", capacity)
    lines.append(
        f"decoding: {job.rows} rows of {job.prompt} + {job.new_tokens} tokens; {most} would fit"
    )
    most = largest_rows(feature_pass, job, "text_rows", capacity)
    lines.append(f"features: {job.text_rows} rows of {job.text} tokens; {most} would fit")
    return "\n".join(lines)


def _params(job: Job) -> PyTree:
    return programs.abstract_lm(job.config, job.dtype, job.mesh).params


def _gradient_bytes(job: Job) -> int:
    """Bytes of a gradient: of one microbatch in the dtype of the pass, and the sum in float32."""
    assert job.finetuning is not None
    trained, _ = programs.finetuning_programs(job).abstract_state
    if job.finetuning.reptile:
        trained = trained["adapters"]
    return shard_bytes(trained) * (jnp.dtype(job.finetuning.dtype).itemsize + 4) // 4
