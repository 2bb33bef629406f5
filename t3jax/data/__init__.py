"""Data: rows of text from files, and their tokens.

`Tofu` and `load_tofu` are imported when first used, because tensorflow_datasets takes seconds.
"""

from typing import TYPE_CHECKING, Any

from t3jax.data.chat import (
    Example,
    PromptFormat,
    encode_document,
    encode_prompt,
    encode_question_answer,
    encode_records,
)
from t3jax.data.records import evenly_spread, load_dataset, load_prompts, load_records

if TYPE_CHECKING:
    from t3jax.data.tofu import Tofu, load_tofu

__all__ = [
    "Example",
    "PromptFormat",
    "Tofu",
    "encode_document",
    "encode_prompt",
    "encode_question_answer",
    "encode_records",
    "evenly_spread",
    "load_dataset",
    "load_prompts",
    "load_records",
    "load_tofu",
]


def __getattr__(name: str) -> Any:
    if name in ("Tofu", "load_tofu"):
        from t3jax.data import tofu

        return getattr(tofu, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
