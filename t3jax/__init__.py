"""t3jax: Temper-Then-Tilt, unlearning for language models at inference time, in JAX.

The path of the data is the order of the modules: text (`data`) -> tokens -> features (`lm`,
`pooling`, `features`) -> head (`head`, `training`) -> guided scores (`guidance`) -> samples
(`sampling`) -> metrics (`evaluation`).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from t3jax.features import Features, load_or_compute_features
    from t3jax.finetuning import FinetuneConfig, finetune
    from t3jax.guidance import guided_logits, tempered_logprobs, tilt
    from t3jax.head import (
        HeadConfig,
        class_prior_shift,
        classifier_loss,
        head_scores,
        init_head,
        target_scores,
    )
    from t3jax.head_io import Head, load_head, save_head, save_reference_head
    from t3jax.lm import LM, load_lm, make_lm
    from t3jax.pooling import RunningMean, causal_mean, prefix_features, running_mean
    from t3jax.refinements import (
        Refinements,
        combine_heads,
        gated_temperature,
        protect,
        refined_logits,
        retain_probability,
    )
    from t3jax.sampling import Sample, Sampler, SamplingOptions
    from t3jax.sharding import make_mesh
    from t3jax.training import TrainConfig, train_heads

# Imported on access, so that `t3jax --help` does not wait for JAX.
_MODULES = {
    "features": ("Features", "load_or_compute_features"),
    "finetuning": ("FinetuneConfig", "finetune"),
    "guidance": ("guided_logits", "tempered_logprobs", "tilt"),
    "head": (
        "HeadConfig",
        "class_prior_shift",
        "classifier_loss",
        "head_scores",
        "init_head",
        "target_scores",
    ),
    "head_io": ("Head", "load_head", "save_head", "save_reference_head"),
    "lm": ("LM", "load_lm", "make_lm"),
    "pooling": ("RunningMean", "causal_mean", "prefix_features", "running_mean"),
    "refinements": (
        "Refinements",
        "combine_heads",
        "gated_temperature",
        "protect",
        "refined_logits",
        "retain_probability",
    ),
    "sampling": ("Sample", "Sampler", "SamplingOptions"),
    "sharding": ("make_mesh",),
    "training": ("TrainConfig", "train_heads"),
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"t3jax.{name}")
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"t3jax.{module}"), name)
    raise AttributeError(f"module 't3jax' has no attribute {name!r}")


__all__ = [
    "LM",
    "Features",
    "FinetuneConfig",
    "Head",
    "HeadConfig",
    "Refinements",
    "RunningMean",
    "Sample",
    "Sampler",
    "SamplingOptions",
    "TrainConfig",
    "causal_mean",
    "class_prior_shift",
    "classifier_loss",
    "combine_heads",
    "finetune",
    "gated_temperature",
    "guided_logits",
    "head_scores",
    "init_head",
    "load_head",
    "load_lm",
    "load_or_compute_features",
    "make_lm",
    "make_mesh",
    "prefix_features",
    "protect",
    "refined_logits",
    "retain_probability",
    "running_mean",
    "save_head",
    "save_reference_head",
    "target_scores",
    "tempered_logprobs",
    "tilt",
    "train_heads",
]
