"""A loaded language model: pure functions, frozen parameters, tokenizer."""

import dataclasses
import functools
import pathlib
import warnings
from collections.abc import Callable
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from t3jax import sharding
from t3jax.lm import cache, decoder, gguf, gguf_tokenizer
from t3jax.lm.adapter import CONFIG as ADAPTER_CONFIG
from t3jax.lm.adapter import is_adapter, read_base
from t3jax.lm.config import LMConfig
from t3jax.lm.config_json import read_config, wrapper_of
from t3jax.lm.folder import check_links
from t3jax.lm.gguf_file import GGUFFile, open_gguf
from t3jax.lm.vocabulary import (
    check_vocabulary,
    has_tokenizer,
    ids_within,
    join_ends,
    load_tokenizer,
    read_named_ends,
)
from t3jax.lm.weights import check_params, is_tied, load_params

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]


@dataclasses.dataclass(frozen=True, eq=False)
class LM:
    """A frozen language model as the rest of the library sees it.

    Features, sampling and evaluation use only these fields; `make_lm` fills them in for a model of
    your own.

    Attributes:
        apply: `(params, tokens, positions=None, mask=None, cache=None) -> (hidden, cache)`: last
            hidden states `[B, T, D]` after the final norm; see `t3jax.lm.decoder.apply`.
        unembed: `(params, hidden) -> logits`, `[..., D]` to float32 `[..., V]`.
        init_cache: `(batch, slots) -> cache`, empty.
        params: The parameter tree, placed on the mesh; never changed.
        tokenizer: A transformers tokenizer; None if you handle token ids only.
        vocab_size: V.
        hidden_size: D.
        max_position: Longest text the model was made for, tokens.
        eos_ids: Tokens that end an answer.
        name: Folder or hub id, for records and messages.
        mesh: The mesh of the arrays.
        config: The decoder's shape, a part of every cache key; None for a model of your own.
    """

    apply: Callable[..., tuple[jax.Array, Any]]
    unembed: Callable[[Any, jax.Array], jax.Array]
    init_cache: Callable[[int, int], Any]
    params: Any
    tokenizer: Any
    vocab_size: int
    hidden_size: int
    max_position: int
    eos_ids: tuple[int, ...]
    name: str
    mesh: Mesh
    config: LMConfig | None = None


@functools.cache
def pure_functions(
    config: LMConfig, dtype: Any, mesh: Mesh | None = None
) -> tuple[Callable, Callable, Callable]:
    """`apply`, `unembed` and `init_cache` of a shape; the same objects each time, so jit caches."""
    return (
        functools.partial(decoder.apply, config, mesh=mesh),
        functools.partial(decoder.unembed, config, mesh=mesh),
        functools.partial(cache.init_cache, config, dtype=dtype),
    )


def load_lm(
    name: str | pathlib.Path,
    dtype: str | None = None,
    mesh: Mesh | None = None,
) -> LM:
    """Loads a language model from a Hugging Face folder, a hub id or a GGUF file.

    Local models need no network, and no code of a folder is run. Weights are read straight onto the
    mesh. Answers end at all the tokens that generation_config.json, config.json and the tokenizer
    name.

    Args:
        name: A folder with `config.json`, safetensors weights and tokenizer; a folder of PEFT with
            a LoRA adapter, which is merged into its base as that is read; a hub id of either; or a
            GGUF file, which needs the extra `t3jax[gguf]`.
        dtype: "float32", "bfloat16" or "float16"; None means float32 on CPU, where it is the fast
            one, and bfloat16 elsewhere. "int8" rounds the matrices as they are read, with a scale
            for each row (`t3jax.lm.quantized`), and computes in the dtype of None.
        mesh: From `t3jax.make_mesh`; None means one device.

    Returns:
        The model.

    Raises:
        FileNotFoundError: If there is no such folder, file, or model on the hub, or a file of the
            folder is missing.
        ImportError: If a GGUF file is given without the extra.
        ValueError: If the model is of an unknown family, its weights, tokenizer or eos tokens do
            not fit its config, a weight is NaN or Inf, a file is broken or leads out of the folder,
            or the dtype is unknown.

    Example:
        >>> lm = t3jax.load_lm("demo/base")
        >>> lm.hidden_size, lm.vocab_size
        (128, 1536)
    """
    quantized, computed = read_dtype(dtype or default_dtype(), default_dtype())
    if mesh is None:
        mesh = sharding.make_mesh(devices=jax.devices()[:1])
    path = model_path(name)
    shardings = functools.partial(sharding.param_shardings, mesh)
    if path.is_file():
        file = open_gguf(path)
        config = dataclasses.replace(gguf.read_config(file), quantized=quantized)
        tokenizer, eos_ids = _read_gguf_tokenizer(file, config)
        params = gguf.load_params(file, config, computed, shardings)
    else:
        path, adapter = _find_base(path)
        config = dataclasses.replace(read_config(path), quantized=quantized)
        if wrapper := wrapper_of(path):
            warnings.warn(
                f"{path}: of this {wrapper} the text model is read, a {config.model_type}; images "
                "and sound are not",
                stacklevel=2,
            )
        tokenizer, eos_ids = _read_tokenizer(path, adapter, config)
        params = load_params(path, config, computed, shardings, adapter)
        config = dataclasses.replace(config, tied=config.tied and "lm_head" not in params)
    return from_params(config, params, tokenizer, eos_ids, str(name), mesh)


def load_config(name: str | pathlib.Path) -> LMConfig:
    """The shape of the model that `load_lm` loads."""
    path = model_path(name)
    if path.is_file():
        return gguf.read_config(open_gguf(path))
    path, _ = _find_base(path)
    config = read_config(path)
    return dataclasses.replace(config, tied=is_tied(path, config)) if config.tied else config


def check_lm(name: str | pathlib.Path) -> None:
    """Checks all that `load_lm` does, with its errors, except for NaN and Inf; reads no weights."""
    path = model_path(name)
    if path.is_file():
        file = open_gguf(path)
        config = gguf.read_config(file)
        gguf.check_params(file, config)
        _read_gguf_tokenizer(file, config)
        return
    base, adapter = _find_base(path)
    config = read_config(base)
    check_params(base, config, adapter)
    _read_tokenizer(base, adapter, config)


def _read_tokenizer(
    path: pathlib.Path, adapter: pathlib.Path | None, config: LMConfig
) -> tuple[Any, tuple[int, ...]]:
    """The tokenizer of a folder, or of the adapter on it, and the tokens that end an answer."""
    named = read_named_ends(path, config.vocab_size)  # first, since these errors name the file
    has_own = adapter is not None and has_tokenizer(adapter)
    tokenizer = load_tokenizer(adapter if adapter is not None and has_own else path)
    check_vocabulary(path, tokenizer, config)
    return tokenizer, join_ends(path, named, tokenizer, config.vocab_size)


def _read_gguf_tokenizer(file: GGUFFile, config: LMConfig) -> tuple[Any, tuple[int, ...]]:
    """The tokenizer of a GGUF file, and the tokens that end an answer."""
    tokenizer = gguf_tokenizer.read_tokenizer(file)
    check_vocabulary(file.path, tokenizer, config)
    eos_ids = gguf_tokenizer.read_eos_ids(file)
    return tokenizer, ids_within(file.path, eos_ids, config.vocab_size)


def _find_base(path: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path | None]:
    """The folder of the whole model, and `path` if it is an adapter's."""
    check_links(path)
    if not is_adapter(path):
        return path, None
    try:
        base = model_path(read_base(path))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path / ADAPTER_CONFIG}: the base model is missing: {error}"
        ) from error
    if base.is_file() or is_adapter(base):
        kind = "a file" if base.is_file() else "an adapter"
        raise ValueError(
            f"{path / ADAPTER_CONFIG}: the base model {base} is {kind}; expected a Hugging Face "
            "folder with whole weights"
        )
    check_links(base)
    return base, path


def from_params(
    config: LMConfig,
    params: decoder.Params,
    tokenizer: Any,
    eos_ids: tuple[int, ...],
    name: str,
    mesh: Mesh | None = None,
) -> LM:
    """An `LM` from parameters in memory, such as those just trained; see `LM` for the arguments."""
    if mesh is None:
        mesh = sharding.make_mesh(devices=jax.devices()[:1])
    apply, unembed, init_cache = pure_functions(config, decoder.compute_dtype(params), mesh)
    return LM(
        apply=apply,
        unembed=unembed,
        init_cache=init_cache,
        params=params,
        tokenizer=tokenizer,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        max_position=config.max_position,
        eos_ids=eos_ids,
        name=name,
        mesh=mesh,
        config=config,
    )


def default_dtype() -> str:
    """The dtype of `load_lm` if none is given."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def read_dtype(name: str, computed: str) -> tuple[bool, Any]:
    """Whether a dtype quantises weights, and the dtype of all else: `computed` beside int8.

    Raises:
        ValueError: If the dtype is unknown.
    """
    if name not in (*DTYPES, "int8"):
        raise ValueError(f"dtype {name!r} is not supported; known: {sorted([*DTYPES, 'int8'])}")
    return name == "int8", DTYPES[computed if name == "int8" else name]


def model_path(name: str | pathlib.Path) -> pathlib.Path:
    """The folder or GGUF file of a model; a hub id is downloaded if it is not in the cache.

    Raises:
        FileNotFoundError: If there is no such folder or file, and no such model on the hub.
    """
    path = pathlib.Path(name)
    if path.exists():
        return path
    not_found = f"{name}: no such folder or file"
    # A hub id is "model" or "owner/model"; anything else can only be a path.
    if isinstance(name, pathlib.Path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(
            f"{not_found}; expected a Hugging Face model folder, a GGUF file or a hub id"
        )
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:
        raise FileNotFoundError(
            f"{not_found}, and it could not be had from the Hugging Face hub either "
            f"({type(error).__name__}: {error}); give a model folder or a GGUF file, or a hub id "
            "with a network"
        ) from error
