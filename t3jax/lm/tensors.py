"""The tensors of a model folder, by the names of its family, each a view that is read in parts.

Views convert other forms to the family's: experts, quantised weights, and the updates of an
adapter. Only headers are read until a view is indexed.
"""

import pathlib

import ml_dtypes
import msgspec
import numpy as np
import safetensors

from t3jax.json_files import check_regular, parse_json, read_json
from t3jax.lm.adapter import merge_adapter
from t3jax.lm.dequantized import dequantize
from t3jax.lm.expert_tensors import stack_experts
from t3jax.lm.family import Family
from t3jax.lm.folder import check_inside, indexed_file
from t3jax.lm.places import Tensors, View
from t3jax.lm.quantization_json import quantization_of
from t3jax.lm.wrappers import checkpoint_name


class _Index(msgspec.Struct):
    """`model.safetensors.index.json`: which file has which tensor."""

    weight_map: dict[str, str]


def open_tensors(
    folder: pathlib.Path, family: Family, adapter: pathlib.Path | None = None
) -> Tensors:
    """Opens the tensors of a folder, with the updates of the LoRA adapter in another.

    Raises:
        FileNotFoundError: If there are no safetensors weights, or a file of them is missing.
        ValueError: If a file is broken, lies outside of the folder or holds a tensor of another,
            or tensors of one matrix do not fit each other.
    """
    stored = _open_files(folder, family)
    try:
        tensors = dequantize(stored, quantization_of(folder))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    for view, stored_name in tensors.values():
        if isinstance(view, _Mapped):
            raise ValueError(
                f"{folder}: {stored_name} is float8 without a scale; expected weight_scale or "
                "weight_scale_inv beside it, and a quantization_config in config.json"
            )
    if adapter is not None:
        tensors = merge_adapter(adapter, tensors)
    try:
        return stack_experts(tensors, family)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def _open_files(folder: pathlib.Path, family: Family) -> Tensors:
    """Opens every tensor of the decoder in the folder's checkpoint."""
    tensors: dict[str, tuple[View, str]] = {}
    paths: dict[str, pathlib.Path] = {}
    for path in _find_files(folder):
        try:
            file = safetensors.safe_open(path, framework="numpy")
        except safetensors.SafetensorError as error:
            raise ValueError(
                f"{path}: not a whole safetensors file ({error}); {_suggest_fix(path)}"
            ) from error
        float8: dict[str, _Mapped] = {}
        for stored_name in file.keys():  # noqa: SIM118  (not a dict)
            if (name := checkpoint_name(family, stored_name)) is None:
                continue
            if name in tensors:
                raise ValueError(
                    f"{path}: {stored_name} is also in {paths[name].name}, as {tensors[name][1]}; "
                    "expected each tensor once. Write the folder anew"
                )
            view = file.get_slice(stored_name)
            if view.get_dtype() in _FLOAT8:
                float8 = float8 or _map_float8(path)
                view = float8[stored_name]
            tensors[name] = (view, stored_name)
            paths[name] = path
    return tensors


def _suggest_fix(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        pointer = file.read(len(_POINTER)) == _POINTER
    if pointer:
        return "it is a pointer of Git LFS, which `git lfs pull` replaces by the weights"
    return "download or write it again"


def _find_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of the folder's checkpoint, each a regular file in the folder."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if (adapter := folder / "adapter_config.json").exists():
        raise ValueError(
            f"{adapter}: the folder holds an adapter, which is not applied here and which "
            "transformers applies where peft is installed; merge the adapter into the weights, or "
            "remove its files"
        )
    if single.exists():  # like transformers, which ignores an index beside a whole file
        paths = [single]
    elif index.exists():
        names = read_json(index, _Index).weight_map
        if not names:
            raise ValueError(f"{index}: weight_map is empty, expected the file of each tensor")
        paths = sorted({indexed_file(index, *item, ".safetensors") for item in names.items()})
    elif parts := sorted(folder.glob("model-*-of-*.safetensors")):
        raise FileNotFoundError(
            f"{index}: missing, beside {len(parts)} files as {parts[0].name}; expected the index "
            "that says which file has which tensor. Download it too"
        )
    else:
        raise FileNotFoundError(
            f"{folder}: no model.safetensors and no model.safetensors.index.json; expected a "
            "Hugging Face folder with safetensors weights. Pickled ones (.bin, .pt) are not read: "
            "open the folder with transformers and write it with save_pretrained"
        )
    if missing := [str(path) for path in paths if not path.exists()]:
        raise FileNotFoundError(f"{index} names files that are not there: {', '.join(missing)}")
    for path in paths:
        check_inside(folder, path)
        check_regular(path)
    return paths


_POINTER = b"version https://git-lfs"
_FLOAT8 = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}


class _Mapped:
    """A tensor mapped from its file, with the interface of safetensors' slices."""

    def __init__(self, numbers: np.ndarray):
        self._numbers = numbers

    def get_shape(self) -> list[int]:
        return list(self._numbers.shape)

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        return self._numbers[index]


def _map_float8(path: pathlib.Path) -> dict[str, _Mapped]:
    """The tensors of float8 in a whole file, which safetensors does not convert to NumPy."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = parse_json(file.read(size), str(path))
    contents = np.memmap(path, np.uint8, "r", offset=8 + size)
    return {
        name: _Mapped(
            contents[slice(*tensor["data_offsets"])]
            .view(_FLOAT8[tensor["dtype"]])
            .reshape(tensor["shape"])
        )
        for name, tensor in header.items()
        if tensor.get("dtype") in _FLOAT8
    }
