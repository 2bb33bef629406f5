"""Unlearning by the simplest model with the same outputs on the retain set (MinNorm-OG).

`finetune.py` applies it to a language model; `project` takes any function of a parameter tree.
"""

from t3jax.minnorm.projection import MinNormConfig, project, span_coefficients

__all__ = ["MinNormConfig", "project", "span_coefficients"]
