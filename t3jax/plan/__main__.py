"""The command that plans: a config's job on devices that need not be there.

    python -m t3jax.plan --config=configs/NAME.py --device=v5e --devices=8 [--config.FIELD=...]

Only `config.json` of the model is read; one of `SHAPES` needs no folder.
"""

import dataclasses
import math
import re
from typing import Any

import jax.numpy as jnp
from absl import flags
from jax.sharding import Mesh

from t3jax import cli, pipeline, sharding
from t3jax.batching import TOKENS_PER_SHARD
from t3jax.lm.model import read_dtype
from t3jax.plan import DEVICES, Job, describe, read_shape
from t3jax.plan.programs import abstract_lm, simulate


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
    lm = abstract_lm(shape, computed, mesh)
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


if __name__ == "__main__":
    main()
