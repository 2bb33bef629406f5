"""What the scripts share: their flags and errors, their config, and the compilation cache."""

import contextlib
import dataclasses
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
from absl import app, flags, logging
from jax.sharding import Mesh
from ml_collections import config_flags

from t3jax import hosts
from t3jax.data import PromptFormat
from t3jax.head import class_prior_shift
from t3jax.head_io import Head, load_head
from t3jax.lm import LM
from t3jax.refinements import Refinements


def run(script: Callable[[Any], None]) -> None:
    """Runs a script on its `--config=configs/NAME.py`; what is wrong with its input is one line.

    The flag `--distributed` says whether several processes are one program, see `hosts.initialize`;
    process 0 alone then prints. SIGTERM, where training puts it off, ends with status 143.

    Args:
        script: Takes the config.
    """
    distributed = flags.DEFINE_enum(
        "distributed", "auto", hosts.MODES, "Whether to join the processes of a cluster."
    )
    flag = config_flags.DEFINE_config_file("config", help_string="Path of a configs/*.py file.")
    name = pathlib.Path(sys.argv[0]).name

    def parse(argv: list[str]) -> list[str]:
        try:
            return app.parse_flags_with_usage(argv)
        except AttributeError as error:  # from ml_collections, with the nearest key that there is
            cause = error.args[0]
            message = cause.args[0] if isinstance(cause, KeyError) else cause
            sys.exit(f"{name}: unknown config key {message}")

    def main(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"unexpected {argv[1:]}; options are --config.NAME=VALUE")
        if flag.value is None:
            raise app.UsageError("no config; give --config=configs/demo.py or another")
        logging.set_verbosity(logging.WARNING)  # JAX and Orbax tell every step they take
        enable_compilation_cache()
        try:
            hosts.initialize(distributed.value)
            with contextlib.redirect_stdout(sys.stdout if hosts.is_lead() else None):
                script(flag.value)
        except hosts.Preempted as error:
            print(f"{name}: {error}", file=sys.stderr)
            sys.exit(hosts.PREEMPTED_STATUS)
        except (OSError, ValueError, FloatingPointError) as error:
            _fail(f"{name}: {error}")
        except (Exception, KeyboardInterrupt):
            if not jax.distributed.is_initialized():
                raise
            _fail(
                f"{traceback.format_exc()}{name}: process {jax.process_index()} of "
                f"{jax.process_count()} ends; if it lost another one, the cause is that one's error"
            )

    app.run(main, flags_parser=parse)


def _fail(message: str) -> NoReturn:
    if not jax.distributed.is_initialized():
        sys.exit(message)
    # At a usual exit JAX would wait for the other processes, which wait for this one.
    print(message, file=sys.stderr, flush=True)
    os._exit(1)


def require(config: Any, *names: str) -> None:
    """Raises ValueError if one of these fields of the config is not set."""
    if missing := [name for name in names if config[name] is None]:
        raise ValueError(f"not in the config: {missing}; give --config.{missing[0]}=... or so")


def enable_compilation_cache() -> None:
    """Keeps compiled programs between runs, under `$XDG_CACHE_HOME/t3jax` or `~/.cache/t3jax`.

    `JAX_COMPILATION_CACHE_DIR` chooses another folder.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
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


def load_heads(
    config: Any, names: Sequence[str], mesh: Mesh
) -> tuple[list[str], list[Head], list[tuple[int, ...]]]:
    """Loads the heads that a config names, with its class prior where it has one.

    Args:
        config: The settings.
        names: Head folders; "FOLDER,FOLDER" are several that are served together.
        mesh: Where to.

    Returns:
        The folders, each once; their heads; and for each name the indices of its heads.
    """
    groups = [name.split(",") for name in names]
    folders = list(dict.fromkeys(folder for group in groups for folder in group))
    heads = [load_head(folder, mesh) for folder in folders]
    if config.forget_fraction is not None:
        shift = class_prior_shift(config.forget_fraction)
        heads = [dataclasses.replace(head, prior_shift=shift) for head in heads]
    return folders, heads, [tuple(map(folders.index, group)) for group in groups]


def changed(config: Any, **fields: Any) -> Any:
    """A copy of a config with other values."""
    copy = config.copy_and_resolve_references()
    for name, value in fields.items():
        copy[name] = value
    return copy


def refinements(name: str, lm: LM) -> Refinements:
    """Refinements by name; what is protected are the model's stop tokens.

    Args:
        name: `plain`, or some of `gated`, `protected` and `product`, joined by "-".
        lm: The model.

    Returns:
        The refinements, of this `name`.

    Raises:
        ValueError: If a part of the name is unknown.
    """
    parts = set(name.split("-")) - {"plain"}
    if unknown := sorted(parts - {"gated", "protected", "product"}):
        raise ValueError(
            f"refinements {name!r}: unknown {unknown}; expected plain, or some of gated, protected "
            "and product, joined by '-'"
        )
    return Refinements(
        gated="gated" in parts,
        protected=lm.eos_ids if "protected" in parts else (),
        combine="product" if "product" in parts else "disjoint",
    )
