"""Reads and writes head folders, and compares heads with models.

A head folder holds `head.safetensors` and `head.json`; sampling needs nothing else beside the base
model. Two layouts are read, recognised by their files: this project's own, and the PyTorch
reference's (`t3jax.reference_head`).
"""

import dataclasses
import hashlib
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import msgspec
from jax.sharding import Mesh
from jaxtyping import PyTree

from t3jax import hosts, sharding
from t3jax.head import Head, HeadConfig, HeadParams
from t3jax.head_files import (
    Name,
    Scale,
    Shift,
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
from t3jax.lm.folder import check_inside
from t3jax.lm.model import LM
from t3jax.reference_head import REFERENCE, load_reference, save_reference_head

__all__ = [
    "Head",
    "check_head_fits",
    "common_default",
    "load_head",
    "place_head",
    "read_own",
    "save_head",
    "save_reference_head",
]

_FORMAT = "t3jax-head"
_VERSION = 2  # version 1 had no field `features`: its heads have the paper's


class _Format(msgspec.Struct):
    format: Word
    version: int


class _Version1(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Content of a `head.json` of version 1."""

    format: Word
    version: int
    hidden_size: Size
    vocab_size: Size
    rank: Size
    activation: Word
    num_hidden_layers: Size
    bias: bool
    features: Word = "mean"
    base_temperature: Temperature
    guidance_scale: Scale
    prior_shift: Shift
    model: Name
    record: dict[str, Any]
    weights_sha256: Word | None = None  # missing in older heads


class _Version2(_Version1, kw_only=True, forbid_unknown_fields=True):
    """Content of a `head.json` of version 2."""

    features: Word


def save_head(folder: str | pathlib.Path, head: Head) -> None:
    """Writes a head folder atomically, in the place of an earlier one.

    Args:
        folder: Path of the folder.
        head: The head.

    Raises:
        ValueError: If a weight, T, s or the class-prior shift is not one that `load_head` takes.
        OSError: If the disk is full or the folder cannot be written; an earlier folder stays.

    Example:
        >>> config = t3jax.HeadConfig(hidden_size=4, vocab_size=10, rank=2)
        >>> params = t3jax.init_head(jax.random.key(0), config)
        >>> t3jax.save_head("out/head", t3jax.Head(config, params, 2.5, 1.0, "demo/base"))
        >>> t3jax.load_head("out/head").base_temperature
        2.5
    """
    description = {
        "format": _FORMAT,
        "version": _VERSION,
        **dataclasses.asdict(head.config),
        "base_temperature": float(head.base_temperature),
        "guidance_scale": float(head.guidance_scale),
        "prior_shift": float(head.prior_shift),
        "model": head.model,
        "record": _null_if_not_finite(head.record),
    }
    check_json(description, f"the head for {folder}", _Version2)
    files = "head.safetensors", "head.json"
    write_head(folder, head.params, _own_names(head.config), *files, description, "weights_sha256")


def load_head(folder: str | pathlib.Path, mesh: Mesh | None = None) -> Head:
    """Reads a head folder of either layout.

    Args:
        folder: A folder of `save_head` or `train_classifier.py`, or of the PyTorch reference
            (`config.json` with `model_type: t3_causal_lm`; the base model's weights in the same
            files are not read).
        mesh: The mesh to place the parameters on; None means one device.

    Returns:
        The head, parameters in float32.

    Raises:
        FileNotFoundError: If the folder or one of its files is missing.
        ValueError: If a file is damaged or no regular file, the tensors do not fit the description
            or are not finite, or a value of the description is not implemented.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected a head folder")
    if (folder / "head.json").exists():
        head = _load_own(folder)
    elif (folder / "config.json").exists():
        head = load_reference(folder)
    else:
        raise FileNotFoundError(
            f"{folder}: neither head.json nor config.json; expected a head folder, as "
            f"train_classifier.py writes it, or a {REFERENCE} checkpoint"
        )
    return dataclasses.replace(head, params=place_head(head.params, mesh))


def place_head(params: HeadParams, mesh: Mesh | None = None) -> HeadParams:
    """Places a head's parameters on a mesh; None means one device."""
    if mesh is None:
        mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return hosts.place(params, sharding.param_shardings(mesh, params))


def check_head_fits(head: Head, lm: LM) -> None:
    """Raises a ValueError unless head and model have the same vocabulary and width."""
    for dimension, of_head, of_model in (
        ("vocabulary", head.config.vocab_size, lm.vocab_size),
        ("width of the hidden states", head.config.hidden_size, lm.hidden_size),
    ):
        if of_head != of_model:
            raise ValueError(
                f"the head does not fit the model: {dimension} {of_head} in the head, trained on "
                f"{head.model or 'an unknown model'}, but {of_model} in {lm.name}; use the model "
                "the head was trained on, or train a head on this one"
            )


def common_default(heads: Sequence[Head], name: str, otherwise: float) -> float:
    """The common T or s of heads, else a ValueError; without a head `otherwise`."""
    values = {getattr(head, name) for head in heads} or {otherwise}
    if len(values) > 1:
        raise ValueError(f"the heads differ in {name}, {sorted(values)}: give the one to use")
    return values.pop()


def read_own(folder: pathlib.Path) -> _Version1:
    """Reads the `head.json` of a head folder, and no weights.

    A ValueError means that it is damaged, or that its version is unknown.
    """
    path = folder / "head.json"
    content = read_json(path, dict[str, Any])
    kind = check_json(content, str(path), _Format)
    if kind.format != _FORMAT:
        raise ValueError(f"{path}: format {kind.format!r}, expected {_FORMAT!r}")
    if kind.version not in (1, _VERSION):
        raise ValueError(
            f"{path}: version {kind.version}, but this program reads versions 1 and {_VERSION}; "
            "read it with the version of t3jax that wrote it"
        )
    return check_json(content, str(path), _Version1 if kind.version == 1 else _Version2)


def _load_own(folder: pathlib.Path) -> Head:
    path, weights = folder / "head.json", folder / "head.safetensors"
    for file in (path, weights):
        check_inside(folder, file)
    description = read_own(folder)
    try:
        names = [field.name for field in dataclasses.fields(HeadConfig)]
        config = HeadConfig(**{name: getattr(description, name) for name in names})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    tensors = read_tensors(weights)
    check_layers(tensors, config.num_hidden_layers, path)
    params = check_tensors(tensors, config, _own_names(config), path)
    if description.weights_sha256 not in (None, _sha256(weights)):
        raise ValueError(
            f"{weights}: damaged: its bytes are not those that weights_sha256 in {path.name} was "
            "taken of; copy or train the head again, or remove that field if you changed them"
        )
    return Head(
        config=config,
        params=params,
        base_temperature=description.base_temperature,
        guidance_scale=description.guidance_scale,
        model=description.model,
        prior_shift=description.prior_shift,
        record=description.record,
    )


def _own_names(config: HeadConfig) -> PyTree:
    return name_tensors(config, [f"hidden.{i}" for i in range(config.num_hidden_layers)], "output")


def _null_if_not_finite(value: object) -> object:
    """A record with None for NaN and infinite numbers, which JSON lacks."""
    match value:
        case dict():
            return {name: _null_if_not_finite(part) for name, part in value.items()}
        case list() | tuple():
            return [*map(_null_if_not_finite, value)]
        case float() if not math.isfinite(value):
            return None
    return value


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
