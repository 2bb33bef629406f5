"""Checks before weights are loaded: paths, heads and the shape of the model.

A script with a wrong input fails in its first seconds, with one line that names the field. The
library reports other errors later, such as changed data of a run.
"""

import contextlib
import pathlib
from collections.abc import Iterator, Sequence

from jax.sharding import Mesh

from t3jax import data, files, hosts
from t3jax.evaluation.log_files import read_log
from t3jax.head_io import Head, check_head_fits, common_default
from t3jax.lm import LM, load_config
from t3jax.lm.model import default_dtype, model_path, read_dtype
from t3jax.plan.programs import abstract_lm
from t3jax.settings import Settings


def check_sources(config: Settings, *names: str) -> None:
    """Reads the rows of sources in a config, so that a bad file is found early."""
    for name in names:
        sources = config[name] or ()
        for source in (sources,) if isinstance(sources, str) else sources:
            try:
                data.load_dataset(source, config.tofu_dir)
            except (FileNotFoundError, ValueError) as error:
                kind = FileNotFoundError if isinstance(error, OSError) else ValueError
                raise kind(f"config.{name}: {error}") from error


def shape_of(config: Settings, mesh: Mesh, name: str = "model") -> LM:
    """The model of a config without weights or tokenizer, from its `config.json`.

    A FileNotFoundError means that there is no such model, or that it has no weights; a ValueError,
    that its family or the dtype is unknown.
    """
    path = model_path(config[name])
    shape = load_config(path)
    if path.is_dir() and not any(path.glob("*.safetensors")):
        raise FileNotFoundError(
            f"{path}: no *.safetensors file; expected a model folder with its weights"
        )
    _, dtype = read_dtype(config.dtype or default_dtype(), default_dtype())
    return abstract_lm(shape, dtype, mesh)


def check_heads(
    config: Settings, folders: Sequence[str], heads: Sequence[Head], groups: Sequence[tuple], lm: LM
) -> None:
    """Raises a ValueError unless the heads fit the model, and those of each group fit each other.

    The model's weights are not needed.
    """
    for folder, head in zip(folders, heads, strict=True):
        try:
            check_head_fits(head, lm)
        except ValueError as error:
            raise ValueError(f"{folder} on {config.model}: {error}") from error
    for group in groups:
        served = [heads[index] for index in group]
        for name in ("base_temperature", "guidance_scale"):
            if config[name] is None:
                common_default(served, name, 1.0)


def check_answer_length(config: Settings, lm: LM) -> None:
    """Checks that an answer of the config's length fits the model's context."""
    if config.sampling.max_new_tokens >= lm.max_position:
        raise ValueError(
            f"config.sampling.max_new_tokens = {config.sampling.max_new_tokens}: expected less "
            f"than the {lm.max_position} tokens of the context of {config.model}"
        )


def check_evaluation(config: Settings, lm: LM) -> None:
    """Checks the inputs of an evaluation beside model and heads: rows, logs, the retain model."""
    names = ("forget", "retain", "real_authors", "world_facts", "holdout")
    check_sources(config, *(f"eval.{name}" for name in names))
    for name in ("eval.retain_log", "eval.second_retain_log"):
        if config[name] is not None:
            read_log(pathlib.Path(config[name]))
    check_answer_length(config, lm)
    if config.eval.retain_model is not None:
        shape_of(config, lm.mesh, "eval.retain_model")


@contextlib.contextmanager
def outputs(*folders: str | pathlib.Path | None) -> Iterator[None]:
    """Claims the output folders of a script in process 0, see `files.claim`."""
    with contextlib.ExitStack() as claimed:
        if hosts.is_lead():
            for folder in sorted({str(folder) for folder in folders if folder is not None}):
                claimed.enter_context(files.claim(pathlib.Path(folder)))
        yield
