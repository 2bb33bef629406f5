"""The head with what is needed to use it, and its files.

A head folder holds `head.safetensors` and `head.json` and is all that sampling needs beside the
base model. Two layouts are read, told apart by their files: this project's own, and that of the
PyTorch reference, which keeps the head in the checkpoint of a `t3_causal_lm` model. Nothing is
computed here; see `t3jax.head`.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy
from jax.sharding import Mesh

from t3jax import files, hosts, sharding
from t3jax.head import HeadConfig, HeadParams, head_shapes
from t3jax.lm.model import LM

_FORMAT = "t3jax-head"
_VERSION = 1
_REFERENCE = "t3_causal_lm"
_PREFIX = "guidance_head."
_REFERENCE_ACTIVATIONS = {"identity": "id", "relu": "relu", "gelu": "gelu", "tanh": "tanh"}
# What the reference takes for a field that its configuration leaves out.
_REFERENCE_DEFAULTS: dict[str, Any] = {
    "hidden_size": 100,
    "num_hidden_layers": 1,
    "activation_str": "id",
    "bias": False,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Head:
    """A trained classifier and how it is meant to be used.

    Attributes:
        config: Its shape.
        params: Its parameters, see `t3jax.head`.
        base_temperature: T, by which the base model's logits are divided.
        guidance_scale: s, the strength of the tilt.
        model: Folder or hub id of the base model whose features it was trained on; "" if unknown.
        prior_shift: Constant added to the scores, see `t3jax.head.class_prior_shift`.
        record: How it was trained: settings, numbers of tokens, final metrics, versions.
    """

    config: HeadConfig
    params: HeadParams
    base_temperature: float
    guidance_scale: float
    model: str
    prior_shift: float = 0.0
    record: dict[str, Any] = dataclasses.field(default_factory=dict)


def save_head(folder: str | pathlib.Path, head: Head) -> None:
    """Writes a head folder, whole or not at all; one that stood there before is replaced.

    Args:
        folder: Where to write.
        head: The head.

    Raises:
        OSError: If the disk is full or the folder cannot be written; what stood there stays.
    """
    description = {
        "format": _FORMAT,
        "version": _VERSION,
        **dataclasses.asdict(head.config),
        "base_temperature": head.base_temperature,
        "guidance_scale": head.guidance_scale,
        "prior_shift": head.prior_shift,
        "model": head.model,
        "record": head.record,
    }
    names = _own_names(head.config)
    _write(folder, head, names, "head.safetensors", "head.json", description)


def save_reference_head(
    folder: str | pathlib.Path, head: Head, base_config: Mapping[str, Any]
) -> None:
    """Writes a head as the PyTorch reference stores it, without the base model's weights.

    The reference then takes those from the folder or hub id that `_name_or_path` names.

    Args:
        folder: Where to write; replaced whole or not at all.
        head: The head.
        base_config: The base model's configuration, the content of its `config.json`; the reference
            needs at least `model_type`, `hidden_size` and `vocab_size`. `_name_or_path` is
            `head.model` where it is not given.

    Raises:
        ValueError: If the head has a class-prior shift, which the reference does not know, or
            `base_config` lacks `model_type` or is of another width or vocabulary than the head.
        OSError: If the disk is full or the folder cannot be written.
    """
    if head.prior_shift:
        raise ValueError(
            f"prior_shift is {head.prior_shift}, which the layout {_REFERENCE} cannot hold; save "
            "the head with prior_shift = 0, or with save_head"
        )
    if "model_type" not in base_config:
        raise ValueError("base_config lacks model_type; expected the base model's config.json")
    _check_base_config(base_config, head.config, "base_config")
    description = {
        "architectures": ["T3CausalLM"],
        "model_type": _REFERENCE,
        "guidance": {
            "hidden_size": head.config.rank,
            "num_hidden_layers": head.config.num_hidden_layers,
            "activation_str": _REFERENCE_ACTIVATIONS[head.config.activation],
            "bias": head.config.bias,
        },
        "pooling": "mean",
        "pool_temp": None,
        "extraction_layer": -1,
        "base_temp": head.base_temperature,
        "guidance_scale": head.guidance_scale,
        "base_config_dict": {"_name_or_path": head.model, **base_config},
    }
    names = _reference_names(head.config)
    _write(folder, head, names, "model.safetensors", "config.json", description)


def load_head(folder: str | pathlib.Path, mesh: Mesh | None = None) -> Head:
    """Reads a head folder of either layout.

    Args:
        folder: A folder that `save_head` or `train_classifier.py` wrote, or one of the PyTorch
            reference (`config.json` of `model_type: t3_causal_lm`; the base model's weights in the
            same files are not read).
        mesh: Where to place the parameters; None means one device.

    Returns:
        The head, parameters in float32.

    Raises:
        FileNotFoundError: If the folder or one of its files is missing.
        ValueError: If a file is damaged, the tensors do not fit the description, or the description
            asks for what is not implemented.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected a head folder")
    if (folder / "head.json").is_file():
        head = _load_own(folder)
    elif (folder / "config.json").is_file():
        head = _load_reference(folder)
    else:
        raise FileNotFoundError(
            f"{folder}: neither head.json nor config.json; expected a head folder, as "
            f"train_classifier.py writes it, or a {_REFERENCE} checkpoint"
        )
    return dataclasses.replace(head, params=place_head(head.params, mesh))


def place_head(params: HeadParams, mesh: Mesh | None = None) -> HeadParams:
    """Puts a head's parameters in their place on a mesh; None means one device."""
    if mesh is None:
        mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return hosts.place(params, sharding.param_shardings(mesh, params))


def check_head_fits(head: Head, lm: LM) -> None:
    """Checks that a head can guide a model.

    Args:
        head: The head.
        lm: The model to guide.

    Raises:
        ValueError: If they differ in vocabulary or width.
    """
    for what, ours, theirs in (
        ("vocabulary", head.config.vocab_size, lm.vocab_size),
        ("width of the hidden states", head.config.hidden_size, lm.hidden_size),
    ):
        if ours != theirs:
            raise ValueError(
                f"the head does not fit the model: {what} {ours} in the head, trained on "
                f"{head.model or 'an unknown model'}, but {theirs} in {lm.name}; use the model the "
                "head was trained on, or train a head on this one"
            )


def common_default(heads: Sequence[Head], name: str, otherwise: float) -> float:
    """T or s of heads that are served together.

    Args:
        heads: The heads.
        name: `base_temperature` or `guidance_scale`.
        otherwise: The value without a head.

    Returns:
        The value that all of them have.

    Raises:
        ValueError: If they differ.
    """
    values = {getattr(head, name) for head in heads} or {otherwise}
    if len(values) > 1:
        raise ValueError(f"the heads differ in {name}, {sorted(values)}: say which one to use")
    return values.pop()


def _load_own(folder: pathlib.Path) -> Head:
    path = folder / "head.json"
    description = _read_json(path)
    if description.get("format") != _FORMAT:
        raise ValueError(f"{path}: format {description.get('format')!r}, expected {_FORMAT!r}")
    if description.get("version") != _VERSION:
        raise ValueError(
            f"{path}: version {description.get('version')!r}, but this program reads version "
            f"{_VERSION}; read it with the version of t3jax that wrote it"
        )
    try:
        config = HeadConfig(
            **{field.name: description[field.name] for field in dataclasses.fields(HeadConfig)}
        )
        tensors = _read_tensors(folder / "head.safetensors")
        return Head(
            config=config,
            params=_checked(tensors, config, _own_names(config), path),
            base_temperature=description["base_temperature"],
            guidance_scale=description["guidance_scale"],
            model=description["model"],
            prior_shift=description["prior_shift"],
            record=description["record"],
        )
    except KeyError as error:
        raise ValueError(f"{path}: field {error} is missing") from error


def _load_reference(folder: pathlib.Path) -> Head:
    path = folder / "config.json"
    description = _read_json(path)
    if description.get("model_type") != _REFERENCE:
        raise ValueError(
            f"{path}: model_type {description.get('model_type')!r} is not a head; expected a "
            f"folder with head.json, or model_type {_REFERENCE!r}"
        )
    for name, known in (("extraction_layer", -1), ("pooling", "mean"), ("pool_temp", None)):
        if (found := description.get(name, known)) != known:
            raise ValueError(f"{path}: {name} {found!r} is not supported; expected {known!r}")
    guidance = {**_REFERENCE_DEFAULTS, **description.get("guidance", {})}
    activations = {theirs: ours for ours, theirs in _REFERENCE_ACTIVATIONS.items()}
    activation = guidance["activation_str"]
    if activation not in activations:
        raise ValueError(
            f"{path}: unknown activation_str {activation!r}; expected one of {sorted(activations)}"
        )
    layers = guidance["num_hidden_layers"]
    tensors: dict[str, np.ndarray] = {}
    for file in _reference_files(folder):
        tensors |= _read_tensors(file, _PREFIX)
    if f"{_PREFIX}proj.{2 * layers}.bias" in tensors:
        raise ValueError(
            f"{folder}: {_PREFIX}proj.{2 * layers}.bias: a bias on the output layer is not "
            "supported; the method's output layer has none"
        )
    # The description holds neither D nor V: they are those of the first and the last matrix.
    first, last = f"{_PREFIX}proj.0.weight", f"{_PREFIX}proj.{2 * layers}.weight"
    for name in (first, last):
        if name not in tensors:
            raise ValueError(
                f"{folder}: {name} is missing, which {path.name} with num_hidden_layers {layers} "
                f"asks for; there are {sorted(tensors) or 'no tensors of a head'}"
            )
    config = HeadConfig(
        hidden_size=tensors[first].shape[-1],
        vocab_size=tensors[last].shape[0],
        rank=guidance["hidden_size"],
        activation=activations[activation],
        num_hidden_layers=layers,
        bias=guidance["bias"],
    )
    base_config: dict[str, Any] = description.get("base_config_dict") or {}
    _check_base_config(base_config, config, f"{path}: base_config_dict")
    return Head(
        config=config,
        params=_checked(tensors, config, _reference_names(config), path),
        base_temperature=description.get("base_temp", 1.0),
        guidance_scale=description.get("guidance_scale", 1.0),
        model=base_config.get("_name_or_path") or "",
    )


def _reference_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of a checkpoint that hold tensors of the head."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [folder / "model.safetensors"]
    where = _read_json(index)["weight_map"]
    return sorted({folder / file for name, file in where.items() if name.startswith(_PREFIX)})


def _check_base_config(base_config: Mapping[str, Any], config: HeadConfig, where: str) -> None:
    for name, found in (("hidden_size", config.hidden_size), ("vocab_size", config.vocab_size)):
        if base_config.get(name, found) != found:
            raise ValueError(
                f"{where} says {name} {base_config[name]}, but the head's matrices have {found}; "
                "the head belongs to another model"
            )


def _own_names(config: HeadConfig) -> Any:
    return _names(config, [f"hidden.{i}" for i in range(config.num_hidden_layers)], "output")


def _reference_names(config: HeadConfig) -> Any:
    # The odd places are those of the activations.
    *hidden, output = [f"{_PREFIX}proj.{2 * i}" for i in range(config.num_hidden_layers + 1)]
    return _names(config, hidden, output)


def _names(config: HeadConfig, hidden: list[str], output: str) -> Any:
    """The parameter tree with the names of the tensors as leaves."""
    layers = head_shapes(config)["hidden"]
    return {
        "hidden": tuple(
            {kind: f"{name}.{kind}" for kind in layer}
            for name, layer in zip(hidden, layers, strict=True)
        ),
        "output": f"{output}.weight",
    }


def _write(
    folder: str | pathlib.Path,
    head: Head,
    names: Any,
    weights: str,
    config: str,
    description: dict[str, Any],
) -> None:
    params = hosts.fetch_to_lead(head.params)
    if not hosts.is_lead():
        return
    leaves = map(np.ascontiguousarray, jax.tree.leaves(params))
    tensors = dict(zip(jax.tree.leaves(names), leaves, strict=True))
    with files.replacing_folder(pathlib.Path(folder)) as temporary:
        # Python writes the bytes, not safetensors, so that a full disk is an OSError that says so.
        data = safetensors.numpy.save(tensors, metadata={"format": "pt"})
        (temporary / weights).write_bytes(data)
        files.write_json(temporary / config, description)


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object with named fields")
    return content


def _read_tensors(path: pathlib.Path, prefix: str = "") -> dict[str, np.ndarray]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; the head's weights are missing")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
            return {name: file.get_tensor(name) for name in names}
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path}: not a whole safetensors file ({error}); copy or write it again"
        ) from error


def _checked(
    tensors: Mapping[str, np.ndarray], config: HeadConfig, names: Any, where: pathlib.Path
) -> HeadParams:
    """The parameter tree, or one error that lists all that does not fit."""
    shapes = [leaf.shape for leaf in jax.tree.leaves(head_shapes(config))]
    wrong = []
    expected = dict(zip(jax.tree.leaves(names), shapes, strict=True))
    for name, shape in expected.items():
        if name not in tensors:
            wrong.append(f"{name}: missing, expected shape {shape}")
        elif tensors[name].shape != shape:
            wrong.append(f"{name}: shape {tensors[name].shape}, expected {shape}")
        elif not jax.dtypes.issubdtype(tensors[name].dtype, np.floating):
            wrong.append(f"{name}: dtype {tensors[name].dtype}, expected a floating one")
    wrong += [f"{name}: unexpected" for name in sorted(set(tensors) - set(expected))]
    if wrong:
        raise ValueError(f"the weights do not fit {where}:\n  " + "\n  ".join(wrong))
    return jax.tree.map(lambda name: tensors[name].astype(np.float32), names)
