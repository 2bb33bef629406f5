"""The head with what is needed to use it, and its files.

A head folder holds `head.safetensors` and `head.json` and is all that sampling needs beside the
base model. Two layouts are read, recognised by their files: this project's own, and that of the
PyTorch reference, which keeps the head in the checkpoint of a `t3_causal_lm` model. Nothing is
computed here; see `t3jax.head`.
"""

import dataclasses
import hashlib
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import jax
import msgspec
import numpy as np
import safetensors
import safetensors.numpy
from jax.sharding import Mesh

from t3jax import files, hosts, sharding
from t3jax.head import HeadConfig, HeadParams, head_shapes
from t3jax.json_files import check_json, check_regular, read_json
from t3jax.lm.folder import check_inside, indexed_file
from t3jax.lm.model import LM

_FORMAT = "t3jax-head"
_VERSION = 2  # version 1 had no field `features`: its heads read the paper's
REFERENCE = "t3_causal_lm"
_PREFIX = "guidance_head."
_REFERENCE_ACTIVATIONS = {"identity": "id", "relu": "relu", "gelu": "gelu", "tanh": "tanh"}
# Beyond it scores could overflow: features reach 1e5, and a row has up to 1e5 products.
_LARGEST_WEIGHT = 1e10
_INDEX = "model.safetensors.index.json"

Size = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
Temperature = Annotated[float, msgspec.Meta(ge=1e-3, le=1e6)]
Scale = Annotated[float, msgspec.Meta(ge=0, le=1e6)]
Shift = Annotated[float, msgspec.Meta(ge=-1e6, le=1e6)]
Word = Annotated[str, msgspec.Meta(max_length=100)]
Name = Annotated[str, msgspec.Meta(max_length=4096)]


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
    weights_sha256: Word | None = None  # heads that were written before it lack it


class _Version2(_Version1, kw_only=True, forbid_unknown_fields=True):
    """Content of a `head.json` of version 2."""

    features: Word


class _Guidance(msgspec.Struct, forbid_unknown_fields=True):
    """The head's shape in the reference's config, with the reference's defaults."""

    hidden_size: Size = 100
    num_hidden_layers: Size = 1
    activation_str: Word = "id"
    bias: bool = False


class _BaseConfig(msgspec.Struct):
    """What is read of the base model's config; null is as good as absent."""

    hidden_size: Size | None = None
    vocab_size: Size | None = None
    name: Name | None = msgspec.field(default=None, name="_name_or_path")


class _Reference(msgspec.Struct, kw_only=True):
    """What is read of the reference's config; the rest is transformers'."""

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
    """What is read of the index of a checkpoint in shards: the file of each tensor."""

    weight_map: dict[str, Word]


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
        ValueError: If a weight, T, s or the class-prior shift is not one that `load_head` takes.
        OSError: If the disk is full or the folder cannot be written; what stood there stays.
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
        ValueError: If the head has a class-prior shift or features that the reference does not
            know, `base_config` lacks `model_type` or is of another width or vocabulary than the
            head, or a weight, T or s is not one that `load_head` takes.
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
            "activation_str": _REFERENCE_ACTIVATIONS[head.config.activation],
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
        ValueError: If a file is damaged or no regular file, the tensors do not fit the description
            or are not finite, or the description asks for what is not implemented.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected a head folder")
    if (folder / "head.json").exists():
        head = _load_own(folder)
    elif (folder / "config.json").exists():
        head = _load_reference(folder)
    else:
        raise FileNotFoundError(
            f"{folder}: neither head.json nor config.json; expected a head folder, as "
            f"train_classifier.py writes it, or a {REFERENCE} checkpoint"
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


def read_own(folder: pathlib.Path) -> _Version1:
    """Reads the `head.json` of a head folder, and no weights.

    Args:
        folder: The folder.

    Returns:
        Its fields.

    Raises:
        FileNotFoundError: If it is missing.
        ValueError: If it is damaged, or not of a version that this program reads.
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


def read_reference(folder: pathlib.Path) -> _Reference:
    """Reads the `config.json` of a head of the PyTorch reference, and no weights.

    Args:
        folder: The folder.

    Returns:
        The fields that matter.

    Raises:
        FileNotFoundError: If it is missing.
        ValueError: If it is damaged, not a head's, or asks for what is not implemented.
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
        if (found := getattr(description, name)) != known:
            raise ValueError(f"{path}: {name} {found!r} is not supported; expected {known!r}")
    if description.guidance.activation_str not in _REFERENCE_ACTIVATIONS.values():
        raise ValueError(
            f"{path}: unknown activation_str {description.guidance.activation_str!r}; expected one "
            f"of {sorted(_REFERENCE_ACTIVATIONS.values())}"
        )
    return description


def reference_files(folder: pathlib.Path) -> dict[str, pathlib.Path] | pathlib.Path:
    """Says which file holds a tensor of the head in a checkpoint of the PyTorch reference.

    Args:
        folder: The folder of the checkpoint.

    Returns:
        `model.safetensors` where it is there, for transformers reads it whatever an index says; or
        the file of each tensor of the head by name.

    Raises:
        ValueError: If the index is damaged, or names a file that does not lie in the folder.
    """
    whole, index = folder / "model.safetensors", folder / _INDEX
    if whole.exists() or not index.exists():
        check_inside(folder, whole)
        return whole
    return {
        name: indexed_file(index, name, file)
        for name, file in read_json(index, _Index).weight_map.items()
        if name.startswith(_PREFIX)
    }


def _load_own(folder: pathlib.Path) -> Head:
    path, weights = folder / "head.json", folder / "head.safetensors"
    for file in (path, weights):
        check_inside(folder, file)
    description = read_own(folder)
    try:
        config = HeadConfig(
            **{
                field.name: getattr(description, field.name)
                for field in dataclasses.fields(HeadConfig)
            }
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    tensors = _read_tensors(weights)
    _check_layers(tensors, config.num_hidden_layers, path)
    params = _checked(tensors, config, _own_names(config), path)
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


def _load_reference(folder: pathlib.Path) -> Head:
    path = folder / "config.json"
    check_inside(folder, path)
    description = read_reference(folder)
    shape = description.guidance
    layers = shape.num_hidden_layers
    tensors: dict[str, np.ndarray] = {}
    where = reference_files(folder)
    for file in [where] if isinstance(where, pathlib.Path) else sorted(set(where.values())):
        for name, tensor in _read_tensors(file, _PREFIX).items():
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
    # The description holds neither D nor V: they are those of the first and the last matrix.
    first, last = f"{_PREFIX}proj.0.weight", f"{_PREFIX}proj.{2 * layers}.weight"
    for name in (first, last):
        if name not in tensors:
            raise ValueError(
                f"{folder}: {name} is missing, which {path.name} with num_hidden_layers {layers} "
                f"asks for; there are {sorted(tensors) or 'no tensors of a head'}"
            )
        if tensors[name].ndim != 2 or 0 in tensors[name].shape:
            raise ValueError(f"{folder}: {name} has shape {tensors[name].shape}, expected a matrix")
    _check_layers(tensors, layers, path)
    activations = {theirs: ours for ours, theirs in _REFERENCE_ACTIVATIONS.items()}
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
        params=_checked(tensors, config, _reference_names(config), path),
        base_temperature=description.base_temp,
        guidance_scale=description.guidance_scale,
        model=base.name or "",
    )


def _check_base_config(base: _BaseConfig | None, config: HeadConfig, where: str) -> None:
    for name, found in (("hidden_size", config.hidden_size), ("vocab_size", config.vocab_size)):
        if getattr(base, name, None) not in (None, found):
            raise ValueError(
                f"{where} says {name} {getattr(base, name)}, but the head's matrices have {found}; "
                "the head belongs to another model"
            )


def _check_layers(tensors: Mapping[str, np.ndarray], layers: int, path: pathlib.Path) -> None:
    """Refuses more layers than there are tensors before anything is made for each of them."""
    if layers >= len(tensors):
        raise ValueError(
            f"{path}: num_hidden_layers is {layers}, but the weights are {len(tensors)} tensors: "
            f"{sorted(tensors)}"
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
    if wrong := _absurd(tensors):
        raise ValueError(f"the head for {folder} is not written:\n  " + "\n  ".join(wrong))
    with files.replacing_folder(pathlib.Path(folder)) as temporary:
        # Python writes the bytes, not safetensors, so that a full disk is an OSError that says so.
        data = safetensors.numpy.save(tensors, metadata={"format": "pt"})
        (temporary / weights).write_bytes(data)
        if description.get("format") == _FORMAT:
            description = description | {"weights_sha256": hashlib.sha256(data).hexdigest()}
        files.write_json(temporary / config, description)


def _null_if_not_finite(value: Any) -> Any:
    """A record without NaN and infinite numbers, which JSON has no way to write."""
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


def _read_tensors(path: pathlib.Path, prefix: str = "") -> dict[str, np.ndarray]:
    try:
        check_regular(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; the head's weights are missing") from None
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
            return {name: file.get_tensor(name) for name in names}
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path}: not a whole safetensors file ({error}); copy or write it again"
        ) from error
    except (AttributeError, KeyError, TypeError) as error:  # a type that numpy lacks
        raise ValueError(f"{path}: a tensor has a type that cannot be read ({error})") from error


def _absurd(tensors: Mapping[str, np.ndarray]) -> list[str]:
    """Tensors with values that no score can be computed from, and how many they have."""
    wrong = []
    for name, tensor in tensors.items():
        # NaN compares as false.
        if count := tensor.size - np.count_nonzero(np.abs(tensor) <= _LARGEST_WEIGHT):
            wrong.append(
                f"{name}: {count} of {tensor.size} values are NaN, infinite or beyond "
                f"{_LARGEST_WEIGHT:g}; the file is damaged, or training diverged"
            )
    return wrong


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
    with np.errstate(over="ignore"):
        single = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
    if wrong := _absurd(single):
        raise ValueError(f"the weights of {where} cannot be used:\n  " + "\n  ".join(wrong))
    return jax.tree.map(single.__getitem__, names)
