"""Reads, checks and writes the tensors of a head, for both layouts."""

import hashlib
import pathlib
from collections.abc import Mapping
from typing import Annotated

import jax
import msgspec
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import PyTree

from t3jax import files, hosts
from t3jax.head import HeadConfig, HeadParams, head_shapes
from t3jax.json_files import check_regular

# Larger weights could overflow scores: features reach 1e5, and a row has up to 1e5 products.
_LARGEST_WEIGHT = 1e10

Size = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
Temperature = Annotated[float, msgspec.Meta(ge=1e-3, le=1e6)]
Scale = Annotated[float, msgspec.Meta(ge=0, le=1e6)]
Shift = Annotated[float, msgspec.Meta(ge=-1e6, le=1e6)]
Word = Annotated[str, msgspec.Meta(max_length=100)]
Name = Annotated[str, msgspec.Meta(max_length=4096)]


def name_tensors(config: HeadConfig, hidden: list[str], output: str) -> PyTree:
    """The parameter tree with names of tensors as leaves."""
    layers = head_shapes(config)["hidden"]
    return {
        "hidden": tuple(
            {kind: f"{name}.{kind}" for kind in layer}
            for name, layer in zip(hidden, layers, strict=True)
        ),
        "output": f"{output}.weight",
    }


def check_layers(tensors: Mapping[str, np.ndarray], layers: int, path: pathlib.Path) -> None:
    """Refuses more layers than there are tensors, before memory is allocated for them."""
    if layers >= len(tensors):
        raise ValueError(
            f"{path}: num_hidden_layers is {layers}, but the weights are {len(tensors)} tensors: "
            f"{sorted(tensors)}"
        )


def read_tensors(path: pathlib.Path, prefix: str = "") -> dict[str, np.ndarray]:
    """The tensors of a file whose names begin with `prefix`."""
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


def _find_unusable(tensors: Mapping[str, np.ndarray]) -> list[str]:
    """Errors on tensors with values that are not finite or too large for scores."""
    # NaN compares as false.
    return [
        f"{name}: {count} of {tensor.size} values are NaN, infinite or beyond "
        f"{_LARGEST_WEIGHT:g}; the file is damaged, or training diverged"
        for name, tensor in tensors.items()
        if (count := tensor.size - np.count_nonzero(np.abs(tensor) <= _LARGEST_WEIGHT))
    ]


def check_tensors(
    tensors: Mapping[str, np.ndarray], config: HeadConfig, names: PyTree, where: pathlib.Path
) -> HeadParams:
    """The parameter tree; one ValueError lists all faults of the tensors."""
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
    if wrong := _find_unusable(single):
        raise ValueError(f"the weights of {where} cannot be used:\n  " + "\n  ".join(wrong))
    return jax.tree.map(single.__getitem__, names)


def write_head(
    folder: str | pathlib.Path,
    params: HeadParams,
    names: PyTree,
    weights: str,
    config: str,
    description: Mapping[str, object],
    checksum: str | None = None,
) -> None:
    """Writes weights and description, both or none, in the place of a folder.

    `names` are the names of the tensors, `weights` and `config` the names of the two files;
    `checksum` is the field of the description for the SHA-256 of the weights; None writes none.
    """
    params = hosts.fetch_to_lead(params)
    if not hosts.is_lead():
        return
    leaves = map(np.ascontiguousarray, jax.tree.leaves(params))
    tensors = dict(zip(jax.tree.leaves(names), leaves, strict=True))
    if wrong := _find_unusable(tensors):
        raise ValueError(f"the head for {folder} is not written:\n  " + "\n  ".join(wrong))
    with files.replacing_folder(pathlib.Path(folder)) as temporary:
        # Python writes the bytes: safetensors raises no OSError on a full disk.
        data = safetensors.numpy.save(tensors, metadata={"format": "pt"})
        (temporary / weights).write_bytes(data)
        if checksum:
            description = {**description, checksum: hashlib.sha256(data).hexdigest()}
        files.write_json(temporary / config, description)
