"""Unlearning by the simplest model with the same outputs on the retain set (MinNorm-OG).

`finetune.py` does it to a language model; `project` is for any function of any parameter tree.
"""

from t3jax.minnorm.projection import MinNormConfig, project, span_coefficients

__all__ = ["MinNormConfig", "project", "span_coefficients"]
