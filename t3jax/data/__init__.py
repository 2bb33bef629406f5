"""Data: rows of text from files, and their tokens. TOFU is in `t3jax.data.tofu`."""

from t3jax.data.chat import (
    Example,
    PromptFormat,
    encode_document,
    encode_prompt,
    encode_question_answer,
    encode_records,
)
from t3jax.data.records import evenly_spread, load_prompts, load_records
from t3jax.data.sources import load_dataset

__all__ = [
    "Example",
    "PromptFormat",
    "encode_document",
    "encode_prompt",
    "encode_question_answer",
    "encode_records",
    "evenly_spread",
    "load_dataset",
    "load_prompts",
    "load_records",
]
