"""Fine-tuning a language model: all of its weights, or low-rank updates of them (LoRA)."""

from t3jax.finetuning.lora import init_lora, merge_lora
from t3jax.finetuning.recipe import FinetuneConfig
from t3jax.finetuning.run import finetune, merge_weights, train_weights
from t3jax.finetuning.trainer import Trainer

__all__ = [
    "FinetuneConfig",
    "Trainer",
    "finetune",
    "init_lora",
    "merge_lora",
    "merge_weights",
    "train_weights",
]
