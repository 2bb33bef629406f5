"""Training the head on frozen features."""

from t3jax.training.heads import train_heads
from t3jax.training.recipe import TrainConfig, check_start, learning_rate_schedule, make_members

__all__ = ["TrainConfig", "check_start", "learning_rate_schedule", "make_members", "train_heads"]
