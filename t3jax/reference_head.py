"""Heads in the layout of the PyTorch reference: the checkpoint of a `t3_causal_lm` model.

The base model's weights in the same files are neither read nor written.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
from jaxtyping import PyTree

from t3jax.head import Head, HeadConfig
from t3jax.head_files import (
    Name,
    Scale,
    Size,
    Temperature,
    Word,
    check_layers,
    check_tensors,
    name_tensors,
    read_tensors,
    write_head,
)
from t3jax.json_files import check_json, read_json
from t3jax.lm.folder import check_inside, indexed_file

REFERENCE = "t3_causal_lm"
_PREFIX = "guidance_head."
ACTIVATIONS = {"identity": "id", "relu": "relu", "gelu": "gelu", "tanh": "tanh"}
_INDEX = "model.safetensors.index.json"


class _Guidance(msgspec.Struct, forbid_unknown_fields=True):
    """The head's shape in the reference's config, with the reference's defaults."""

    hidden_size: Size = 100
    num_hidden_layers: Size = 1
    activation_str: Word = "id"
    bias: bool = False


class _BaseConfig(msgspec.Struct):
    """Fields of the base model's config; null is the same as absent."""

    hidden_size: Size | None = None
    vocab_size: Size | None = None
    name: Name | None = msgspec.field(default=None, name="_name_or_path")


class _Reference(msgspec.Struct, kw_only=True):
    """Fields of the reference's config; the others are transformers'."""

    model_type: Word
    guidance: _Guidance = msgspec.field(default_factory=_Guidance)
    extraction_layer: int = -1
    pooling: Word = "mean"
    pool_temp: float | None = None
    base_temp: Temperature = 1.0
    guidance_scale: Scale = 1.0
    base_config_dict: _BaseConfig | None = None


class _Kind(msgspec.Struct):
    model_type: Word | None = None


class _Index(msgspec.Struct):
    """The index of a checkpoint in shards: the file of each tensor."""

    weight_map: dict[str, Word]


def save_reference_head(
    folder: str | pathlib.Path, head: Head, base_config: Mapping[str, object]
) -> None:
    """Writes a head in the PyTorch reference's layout, without the base model's weights.

    The reference then loads those from the folder or hub id `_name_or_path`.

    Args:
        folder: Path of the folder, which is replaced atomically.
        head: The head.
        base_config: The base model's configuration, the content of its `config.json`; the reference
            needs at least `model_type`, `hidden_size` and `vocab_size`. `_name_or_path` is by
            default `head.model`.

    Raises:
        ValueError: If the reference does not support the head's class-prior shift or features,
            `base_config` lacks `model_type` or has another width or vocabulary than the head, or a
            weight, T or s is not one that `load_head` takes.
        OSError: If the disk is full or the folder cannot be written.
    """
    if head.prior_shift:
        raise ValueError(
            f"prior_shift is {head.prior_shift}, which the layout {REFERENCE} cannot hold; save "
            "the head with prior_shift = 0, or with save_head"
        )
    if head.config.features != "mean":
        raise ValueError(
            f"the head reads the features {head.config.features!r}, but the layout {REFERENCE} "
            "knows the causal mean alone; save the head with save_head"
        )
    if "model_type" not in base_config:
        raise ValueError("base_config lacks model_type; expected the base model's config.json")
    description = {
        "architectures": ["T3CausalLM"],
        "model_type": REFERENCE,
        "guidance": {
            "hidden_size": head.config.rank,
            "num_hidden_layers": head.config.num_hidden_layers,
            "activation_str": ACTIVATIONS[head.config.activation],
            "bias": head.config.bias,
        },
        "pooling": "mean",
        "pool_temp": None,
        "extraction_layer": -1,
        "base_temp": float(head.base_temperature),
        "guidance_scale": float(head.guidance_scale),
        "base_config_dict": {"_name_or_path": head.model, **base_config},
    }
    where = f"the head for {folder}"
    checked = check_json(description, where, _Reference)
    _check_base_config(checked.base_config_dict, head.config, f"{where}: base_config_dict")
    files = "model.safetensors", "config.json"
    write_head(folder, head.params, _reference_names(head.config), *files, description)


def read_reference(folder: pathlib.Path) -> _Reference:
    """Reads the `config.json` of a head of the PyTorch reference, and no weights.

    A ValueError means that it is damaged, not a head's, or has a value that is not implemented.
    """
    path = folder / "config.json"
    content = read_json(path, dict[str, Any])
    model_type = check_json(content, str(path), _Kind).model_type
    if model_type != REFERENCE:
        raise ValueError(
            f"{path}: model_type {model_type!r} is not a head; expected a folder with head.json, "
            f"or model_type {REFERENCE!r}"
        )
    description = check_json(content, str(path), _Reference)
    for name, known in (("extraction_layer", -1), ("pooling", "mean"), ("pool_temp", None)):
        if (value := getattr(description, name)) != known:
            raise ValueError(f"{path}: {name} {value!r} is not supported; expected {known!r}")
    if description.guidance.activation_str not in ACTIVATIONS.values():
        raise ValueError(
            f"{path}: unknown activation_str {description.guidance.activation_str!r}; expected one "
            f"of {sorted(ACTIVATIONS.values())}"
        )
    return description


def reference_files(folder: pathlib.Path) -> dict[str, pathlib.Path] | pathlib.Path:
    """The file of the head's tensors in a checkpoint of the PyTorch reference.

    It is `model.safetensors` if that exists, which transformers reads without a look at the index;
    else the file of each tensor of the head by name. A ValueError means that the index is damaged,
    or names a file outside of the folder.
    """
    single, index = folder / "model.safetensors", folder / _INDEX
    if single.exists() or not index.exists():
        check_inside(folder, single)
        return single
    return {
        name: indexed_file(index, name, file)
        for name, file in read_json(index, _Index).weight_map.items()
        if name.startswith(_PREFIX)
    }


def load_reference(folder: pathlib.Path) -> Head:
    """Reads a head, parameters on the host; see `t3jax.head_io.load_head`."""
    path = folder / "config.json"
    check_inside(folder, path)
    description = read_reference(folder)
    shape = description.guidance
    layers = shape.num_hidden_layers
    tensors: dict[str, np.ndarray] = {}
    where = reference_files(folder)
    for file in [where] if isinstance(where, pathlib.Path) else sorted(set(where.values())):
        for name, tensor in read_tensors(file, _PREFIX).items():
            if name in tensors:
                raise ValueError(
                    f"{file}: {name} is in another file too; expected each tensor once"
                )
            tensors[name] = tensor
    if f"{_PREFIX}proj.{2 * layers}.bias" in tensors:
        raise ValueError(
            f"{folder}: {_PREFIX}proj.{2 * layers}.bias: a bias on the output layer is not "
            "supported; the method's output layer has none"
        )
    # The description has neither D nor V: the first and the last matrix have them.
    first, last = f"{_PREFIX}proj.0.weight", f"{_PREFIX}proj.{2 * layers}.weight"
    for name in (first, last):
        if name not in tensors:
            raise ValueError(
                f"{folder}: {name} is missing, which {path.name} with num_hidden_layers {layers} "
                f"asks for; there are {sorted(tensors) or 'no tensors of a head'}"
            )
        if tensors[name].ndim != 2 or 0 in tensors[name].shape:
            raise ValueError(f"{folder}: {name} has shape {tensors[name].shape}, expected a matrix")
    check_layers(tensors, layers, path)
    activations = {reference: name for name, reference in ACTIVATIONS.items()}
    config = HeadConfig(
        hidden_size=tensors[first].shape[-1],
        vocab_size=tensors[last].shape[0],
        rank=shape.hidden_size,
        activation=activations[shape.activation_str],
        num_hidden_layers=layers,
        bias=shape.bias,
    )
    base = description.base_config_dict or _BaseConfig()
    _check_base_config(base, config, f"{path}: base_config_dict")
    return Head(
        config=config,
        params=check_tensors(tensors, config, _reference_names(config), path),
        base_temperature=description.base_temp,
        guidance_scale=description.guidance_scale,
        model=base.name or "",
    )


def _check_base_config(base: _BaseConfig | None, config: HeadConfig, where: str) -> None:
    for name, size in (("hidden_size", config.hidden_size), ("vocab_size", config.vocab_size)):
        if getattr(base, name, None) not in (None, size):
            raise ValueError(
                f"{where} says {name} {getattr(base, name)}, but the head's matrices have {size}; "
                "the head belongs to another model"
            )


def _reference_names(config: HeadConfig) -> PyTree:
    # Odd indices belong to activations.
    *hidden, output = [f"{_PREFIX}proj.{2 * i}" for i in range(config.num_hidden_layers + 1)]
    return name_tensors(config, hidden, output)
