"""Memory of each device before anything is loaded: `python -m t3jax.plan`, docs/planning.md."""

from t3jax.plan.memory import (
    USABLE,
    Stage,
    decoding,
    describe,
    feature_pass,
    fine_tuning,
    gathered_bytes,
    gathered_cache_bytes,
    head_training,
    largest_rows,
    shard_bytes,
    stages,
    temporary_bytes,
)
from t3jax.plan.programs import Job, Step, simulate
from t3jax.plan.shapes import DEVICES, GIB, SHAPES, read_shape

__all__ = [
    "DEVICES",
    "GIB",
    "SHAPES",
    "USABLE",
    "Job",
    "Stage",
    "Step",
    "decoding",
    "describe",
    "feature_pass",
    "fine_tuning",
    "gathered_bytes",
    "gathered_cache_bytes",
    "head_training",
    "largest_rows",
    "read_shape",
    "shard_bytes",
    "simulate",
    "stages",
    "temporary_bytes",
]
