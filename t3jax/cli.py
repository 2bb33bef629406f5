"""What the scripts share: reading their config, and the compilation cache."""

import os
import pathlib
from typing import Any

import jax

from t3jax.data import PromptFormat


def enable_compilation_cache() -> None:
    """Keeps compiled programs between runs, under `$XDG_CACHE_HOME/t3jax` or `~/.cache/t3jax`.

    `JAX_COMPILATION_CACHE_DIR` chooses another folder.
    """
    if jax.config.jax_compilation_cache_dir is None:
        home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(home) / "t3jax" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def prompt_format(config: Any) -> PromptFormat:
    """How questions become prompts, from a script's config."""
    return PromptFormat(
        system=config.system,
        date_string=config.date_string,
        question_start=config.question_start,
        question_end=config.question_end,
        answer_start=config.answer_start,
    )
