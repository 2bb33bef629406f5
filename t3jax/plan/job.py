"""From settings to the job that is planned."""

import dataclasses
import math

import jax.numpy as jnp
from jax.sharding import Mesh

from t3jax import pipeline
from t3jax.batching import TOKENS_PER_SHARD
from t3jax.lm.model import read_dtype
from t3jax.plan import Job, read_shape
from t3jax.plan.programs import abstract_lm
from t3jax.settings import Settings


def make_job(
    config: Settings,
    mesh: Mesh,
    prompt: int = 128,
    text: int = 1024,
    texts: int = 4000,
    answer: int = 40,
) -> Job:
    """The job of a config; lengths and numbers of texts, which a config lacks, are arguments.

    `mesh` replaces the config's. The lengths of the longest prompt, the longest text and the mean
    answer are in tokens; model and config bound the text. `texts` is the number of forget and
    retain texts together.
    """
    config.require("model")
    dtype = config.dtype or "bfloat16"
    quantized, computed = read_dtype(dtype, "bfloat16")
    shape = dataclasses.replace(read_shape(config["model"]), quantized=quantized)
    lm = abstract_lm(shape, computed, mesh)
    grids = [config.seeds, config.sweep.learning_rates, config.sweep.weight_decays]
    head = pipeline.head_config(config, lm)
    head = dataclasses.replace(head, rank=max([head.rank, *config.sweep.ranks]))
    text = min(text, config.max_length or text, shape.max_position)
    job = Job(
        config=shape,
        dtype=computed,
        mesh=mesh,
        heads=(head,) * len((config.head or "").split(",")),
        rows=config.rows,
        prompt=prompt,
        new_tokens=config.sampling.max_new_tokens,
        text=text,
        texts=texts,
        answer=answer,
        feature_dtype=jnp.dtype(config.classifier.feature_dtype),
        recipe=config.train.settle_loss("distillation"),  # soft targets take the most memory
        members=math.prod(max(1, len(grid)) for grid in grids),
        finetuning=(
            dataclasses.replace(pipeline.finetune_config(config), dtype=dtype)
            if config.finetune.data
            else None
        ),
    )
    rows = max(1, TOKENS_PER_SHARD // text) * job.row_shards
    return dataclasses.replace(job, text_rows=rows)
