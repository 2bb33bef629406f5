"""How much memory a job takes on each device, before anything is loaded.

    python -m t3jax.plan --config=configs/NAME.py --device=v5e --devices=8 [--config.FIELD=...]

Only `config.json` of the model is read; one of `SHAPES` needs no folder. What a stage keeps
(weights, cache, features, optimizer state) is summed over a device's shards: exact. What lives for
a moment is estimated from the program that one device runs, see `t3jax.liveness`. Nothing is
compiled; docs/planning.md has tables, and compares with compilers.
"""

import dataclasses
import math
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import Mesh

from t3jax import abstract, cli, pipeline, sharding
from t3jax.abstract import Job, Step
from t3jax.batching import TOKENS_PER_SHARD
from t3jax.lm import LMConfig, lm_config, read_config
from t3jax.lm.cache import KeyValues
from t3jax.lm.model import read_dtype

GIB = 2**30
# What a program may have of a device's memory.
DEVICES = {
    "v5e": int(15.75 * GIB),
    "v5p": int(95.74 * GIB),
    "H100": 80 * 10**9,
    "H200": 141 * 10**9,
}
USABLE = 0.9  # of that: the rest is for programs, fragments, and what the estimate does not see


def _llama(width: int, mlp: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": False,
    }


# `config.json` of models that need not be at hand to be planned for.
SHAPES = {
    "llama-3.1-8b": _llama(4096, 14336, 32, 32),
    "llama-3.1-70b": _llama(8192, 28672, 80, 64),
    "llama-3.1-405b": _llama(16384, 53248, 126, 128),
}


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a stage of a job takes on each device, bytes.

    Attributes:
        kept: By what it is.
        temporary: Activations, logits and results of the largest step.
    """

    kept: dict[str, int]
    temporary: int

    @property
    def total(self) -> int:
        """Bytes on each device."""
        return sum(self.kept.values()) + self.temporary


def shard_bytes(tree: Any) -> int:
    """Bytes of a tree on each device.

    Args:
        tree: Abstract arrays with shardings; other leaves take nothing.

    Returns:
        The sum over the arrays' shards.
    """
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if isinstance(leaf, jax.ShapeDtypeStruct)
    )


def temporary_bytes(job: Job, program: Callable[[Job], Step]) -> int:
    """Bytes that a program takes on each device besides its arguments, an estimate.

    Args:
        job: What is planned for.
        program: The step of a job, such as `t3jax.abstract.prefill`.

    Returns:
        Activations, and results that do not stand in an argument's place.
    """
    kinds = _layer_kinds(job.config)
    # A layer of each kind, and one more, show what each further one adds.
    few = [layers[0] for layers in kinds] if len(kinds) > 1 else kinds[0][:2]

    def peak(layers: list[int]) -> int:
        return program(abstract.on_one_device(job, sorted(layers))).peak_bytes()

    total = least = peak(few)
    for layers in kinds:
        if further := [layer for layer in layers if layer not in few]:
            total += len(further) * (peak([*few, further[0]]) - least)
    return total


def _layer_kinds(config: LMConfig) -> list[list[int]]:
    """The layers of each kind of blocks."""
    kinds: dict[Any, list[int]] = {}
    for layer in range(config.num_layers):
        kind = config.has_delta(layer), config.has_experts(layer)
        kinds.setdefault(kind, []).append(layer)
    return list(kinds.values())


def gathered_bytes(job: Job) -> int:
    """Bytes of what a device has to gather to use it: two layers' weights, or the last table."""
    shown = [layers[-1] for layers in _layer_kinds(job.config)]
    stored, used = _params(job), _params(abstract.on_one_device(job, shown))

    def gathered(stored: Any, used: Any) -> int:
        pairs = zip(*map(jax.tree.leaves, (stored, used)), strict=True)
        sizes = [(shard_bytes(share), shard_bytes(whole)) for share, whole in pairs]
        return sum(whole for share, whole in sizes if whole > share)

    table = "embed" if job.config.tied else "lm_head"
    # While one layer is at work, the next one's weights come.
    layers = min(2, job.config.num_layers)
    return max(
        gathered(stored[table], used[table]),
        *(
            layers * gathered(stored["layers"][layer], used["layers"][i])
            for i, layer in enumerate(shown)
        ),
    )


def gathered_cache_bytes(job: Job) -> int:
    """Bytes of one layer's keys and values, whose width is split: prefill gathers them."""
    layers = abstract.state(job, job.slots[0]).cache.layers
    split = next((state.keys for state in layers if isinstance(state, KeyValues)), None)
    if split is None:
        return 0
    whole = abstract.by_rows(job.mesh, split)
    by_heads = split.sharding.shard_shape(split.shape)[1] < split.shape[1]
    return 0 if by_heads or shard_bytes(split) == shard_bytes(whole) else 2 * shard_bytes(whole)


def decoding(job: Job) -> Stage:
    """Prefill, and chunks of decoding with the longest cache."""
    slots, weights = job.slots, abstract.prefill(job).arguments[1]
    state = abstract.state(job, slots[-1])
    # A cache that grows is in memory twice for a moment, as it was and as it will be.
    before = max((s for s in slots if s < slots[-1]), default=0)
    gathered = gathered_bytes(job)
    made = shard_bytes(abstract.state(job, slots[0]))
    return Stage(
        {
            "weights": shard_bytes(weights.params),
            "heads": shard_bytes(weights.heads),
            "key-value cache": shard_bytes(state.cache),
            "decoding state": shard_bytes(state._replace(cache=None)),
        },
        max(
            shard_bytes(abstract.state(job, before).cache) if before else 0,
            temporary_bytes(job, abstract.prefill) - made + gathered + gathered_cache_bytes(job),
            temporary_bytes(job, abstract.decode) + gathered,
        ),
    )


def feature_pass(job: Job) -> Stage:
    """The feature pass, while the result of the batch before is on its way to the host."""
    pending = jax.eval_shape(
        lambda: jnp.zeros((job.text_rows, job.text, job.config.hidden_size), jnp.float32)
    )
    return Stage(
        {
            "weights": shard_bytes(_params(job)),
            "features": shard_bytes(abstract.by_rows(job.mesh, pending)),
        },
        temporary_bytes(job, abstract.feature_pass) + gathered_bytes(job),
    )


def head_training(job: Job) -> Stage:
    """An epoch of head training, beside the weights that made the features."""
    state, data, rows, _ = abstract.head_training(job).arguments
    return Stage(
        {
            "weights": shard_bytes(_params(job)),
            "features": shard_bytes((data, rows)),
            "heads": shard_bytes(state[0]),
            "optimizer state": shard_bytes(state[1]),
        },
        temporary_bytes(job, abstract.head_training),
    )


def fine_tuning(job: Job) -> Stage:
    """A step of fine-tuning, beside the weights that it began with."""
    recipe = job.finetuning
    assert recipe is not None
    trained, optimizer = abstract.finetuning_programs(job).abstract_state
    begun = job if recipe.freezes_weights else dataclasses.replace(job, dtype=jnp.float32)
    of_tasks = shard_bytes(trained) if recipe.tasks else 0  # the sum over the tasks so far
    copy = shard_bytes(trained) // 2 if recipe.dtype == "bfloat16" else 0
    # The gradient is split as the weights are, which the program of one device does not know.
    known = abstract.on_one_device(job, range(job.config.num_layers))
    activations = temporary_bytes(job, abstract.gradient) - _gradient_bytes(known)
    return Stage(
        {
            "weights": shard_bytes(_params(begun)),
            "trained": shard_bytes(trained),
            "optimizer state": shard_bytes(optimizer),
            "gradient": _gradient_bytes(job) + of_tasks,
            "copy in bfloat16": copy,
        },
        max(0, activations) + gathered_bytes(job),
    )


def largest_rows(stage: Callable[[Job], Stage], job: Job, field: str, capacity: int) -> int:
    """The largest batch that fits, a power of two of rows on each part of the mesh.

    Args:
        stage: The stage of a job.
        job: What is planned for.
        field: The job's number of rows that is varied.
        capacity: Bytes of a device.

    Returns:
        Rows; 0 if not even one on each part fits.
    """
    rows, following = 0, job.row_shards
    while True:
        changed: dict[str, Any] = {field: following}
        if stage(dataclasses.replace(job, **changed)).total > USABLE * capacity:
            return rows
        rows, following = following, 2 * following


def make_job(
    config: Any,
    mesh: Mesh,
    prompt: int = 128,
    text: int = 1024,
    texts: int = 4000,
    answer: int = 40,
) -> Job:
    """The job that a config describes, and the lengths and numbers of texts that it does not have.

    Args:
        config: The settings.
        mesh: The devices, in the place of the config's mesh.
        prompt: Longest prompt, tokens.
        text: Longest text, tokens; cut to what model and config allow.
        texts: Texts of the forget and of the retain set together.
        answer: Mean length of their answers, tokens.

    Returns:
        The job, in bfloat16 unless the config says otherwise.

    Raises:
        ValueError: If dtype, model or recipe are not valid.
        FileNotFoundError: If there is no such model.
    """
    cli.require(config, "model")
    dtype = config.dtype or "bfloat16"
    quantized, computed = read_dtype(dtype, "bfloat16")
    shape = dataclasses.replace(read_shape(config.model), quantized=quantized)
    lm = abstract.abstract_lm(shape, computed, mesh)
    grids = [config.seeds, config.sweep_learning_rates, config.sweep_weight_decays]
    head = pipeline.head_config(config, lm)
    head = dataclasses.replace(head, rank=max([head.rank, *config.sweep_ranks]))
    text = min(text, config.max_length or text, shape.max_position)
    job = Job(
        config=shape,
        dtype=computed,
        mesh=mesh,
        heads=(head,) * len((config.head or "").split(",")),
        rows=config.rows,
        prompt=prompt,
        new_tokens=config.max_new_tokens,
        text=text,
        texts=texts,
        answer=answer,
        feature_dtype=jnp.dtype(config.feature_dtype),
        recipe=pipeline.train_config(config),
        members=math.prod(max(1, len(grid)) for grid in grids),
        finetuning=(
            dataclasses.replace(pipeline.finetune_config(config), dtype=dtype)
            if config.finetune_data
            else None
        ),
    )
    rows = max(1, TOKENS_PER_SHARD // text) * job.row_shards
    return dataclasses.replace(job, text_rows=rows)


def read_shape(model: str) -> LMConfig:
    """The shape of a model: one of `SHAPES`, or that of a folder with a `config.json`."""
    if model in SHAPES:
        return lm_config(SHAPES[model])
    if not pathlib.Path(model).is_dir():
        raise FileNotFoundError(
            f"{model}: no such folder; give one with a config.json, or one of {', '.join(SHAPES)}"
        )
    return read_config(pathlib.Path(model))


def stages(job: Job) -> dict[str, Stage]:
    """The stages of a job by name."""
    found = {
        "decoding": decoding(job),
        "features": feature_pass(job),
        "head training": head_training(job),
    }
    return found | ({"fine-tuning": fine_tuning(job)} if job.finetuning else {})


def describe(job: Job, capacity: int) -> str:
    """The plan of a job as text.

    Args:
        job: What is planned for.
        capacity: Bytes of a device.

    Returns:
        A table, what fits, and the largest batches.
    """
    found = stages(job)
    names = dict.fromkeys(name for stage in found.values() for name in stage.kept)
    columns = [
        [stage.kept.get(name, 0) for name in names] + [stage.temporary, stage.total]
        for stage in found.values()
    ]
    stored = "int8" if job.config.quantized else jnp.dtype(job.dtype).name
    axes = ", ".join(f"{name} {size}" for name, size in job.mesh.shape.items())
    params = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(_params(job)))
    lines = [
        f"{params / 1e9:.3g}e9 weights in {stored} on {job.mesh.size} devices "
        f"({axes}) of {capacity / GIB:.4g} GiB",
        f"{'GiB on each device':30}" + "".join(f"{name:>15}" for name in found),
    ]
    for name, *values in zip([*names, "activations and results", "all"], *columns, strict=True):
        lines.append(f"{name:30}" + "".join(f"{value / GIB:15.3f}" for value in values))
    fits = ["yes" if s.total <= USABLE * capacity else "no" for s in found.values()]
    lines.append(f"{f'in {USABLE:.0%} of a device':30}" + "".join(f"{word:>15}" for word in fits))
    most = largest_rows(decoding, job, "rows", capacity)
    lines.append(
        f"decoding: {job.rows} rows of {job.prompt} + {job.new_tokens} tokens; {most} would fit"
    )
    most = largest_rows(feature_pass, job, "text_rows", capacity)
    lines.append(f"features: {job.text_rows} rows of {job.text} tokens; {most} would fit")
    return "\n".join(lines)


def simulate(devices: int) -> None:
    """Gives this process simulated devices; before any is used."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)


def main() -> None:
    """Reads the command line and prints the plan."""
    flags.DEFINE_string("device", "v5e", f"{', '.join(DEVICES)}, or the bytes of a device")
    for name, default, meaning, low, high in (
        ("devices", 1, "how many there are", 1, 2**14),
        ("prompt_tokens", 128, "longest prompt", 1, 2**24),
        ("text_tokens", 1024, "longest text of features and fine-tuning", 2, 2**24),
        ("texts", 4000, "texts to forget and to retain together", 2, 2**31 - 1),
        ("answer_tokens", 40, "mean length of their answers", 1, 2**24),
    ):
        flags.DEFINE_integer(name, default, meaning, lower_bound=low, upper_bound=high)

    def script(config: Any) -> None:
        given = flags.FLAGS
        if given.device not in DEVICES and not re.fullmatch("[1-9][0-9]{0,17}", given.device):
            raise ValueError(
                f"device {given.device!r} is not known; known: {', '.join(DEVICES)}, or a number "
                "of bytes"
            )
        simulate(given.devices)
        numbers = given.prompt_tokens, given.text_tokens, given.texts, given.answer_tokens
        job = make_job(config, sharding.make_mesh(config.mesh), *numbers)
        print(describe(job, DEVICES.get(given.device) or int(given.device)))

    cli.run(script)


def _params(job: Job) -> Any:
    return abstract.abstract_lm(job.config, job.dtype, job.mesh).params


def _gradient_bytes(job: Job) -> int:
    """Bytes of a gradient: of one microbatch in the dtype of the pass, and the sum in float32."""
    assert job.finetuning is not None
    trained, _ = abstract.finetuning_programs(job).abstract_state
    return shard_bytes(trained) * (jnp.dtype(job.finetuning.dtype).itemsize + 4) // 4


if __name__ == "__main__":
    main()
