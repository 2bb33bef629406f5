"""The stages of the commands as functions of the config; there is no mathematics here.

`models` makes tokens and fine-tuned models, `heads` trains and loads heads, `evaluation` scores
them. The commands, the demo, `t3jax.sweep` and `t3jax.study` call these stages.
"""

from t3jax.pipeline.evaluation import (
    Evaluation,
    Examined,
    evaluate,
    examine,
    load_sets,
    measure,
    score,
    settings,
)
from t3jax.pipeline.heads import (
    choose_among,
    digests,
    fit_heads,
    head_config,
    head_defaults,
    load_heads,
    refinements,
    replace_classifier,
    settle_loss,
    start_head,
    synthetic_options,
    training_sets,
)
from t3jax.pipeline.models import encode, encode_rows, finetune_config, finetune_once

__all__ = [
    "Evaluation",
    "Examined",
    "choose_among",
    "digests",
    "encode",
    "encode_rows",
    "evaluate",
    "examine",
    "finetune_config",
    "finetune_once",
    "fit_heads",
    "head_config",
    "head_defaults",
    "load_heads",
    "load_sets",
    "measure",
    "refinements",
    "replace_classifier",
    "score",
    "settings",
    "settle_loss",
    "start_head",
    "synthetic_options",
    "training_sets",
]
