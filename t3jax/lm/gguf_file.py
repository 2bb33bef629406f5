"""GGUF files: opening one, its metadata and the descriptions of its tensors; no weights."""

import dataclasses
import pathlib
from types import ModuleType
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class GGUFFile:
    """An open file.

    Attributes:
        path: Path of the file.
        metadata: All metadata by name.
        tensors: The library's description of each tensor, mapped to memory, by name.
    """

    path: pathlib.Path
    metadata: dict[str, Any]
    tensors: dict[str, Any]

    @property
    def architecture(self) -> str:
        """The family, in llama.cpp's words."""
        return self.metadata.get("general.architecture", "")

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the architecture's own metadata."""
        return self.metadata.get(f"{self.architecture}.{key}", default)


def open_gguf(path: pathlib.Path) -> GGUFFile:
    """Opens a file and reads all but its weights.

    Raises:
        ImportError: If the package `gguf` is not installed.
        ValueError: If it is no whole GGUF file, or is one of several that make a model.
    """
    library = load_library()
    try:
        reader = library.GGUFReader(path)
        metadata = {name: _read_value(field) for name, field in reader.fields.items()}
    except Exception as error:  # reading past the end, or nonsense, raises errors of many types
        raise ValueError(
            f"{path}: not a whole GGUF file, or one of a newer kind than the installed gguf reads "
            f"({error}); expected a GGUF file or a Hugging Face folder. Download it again, or "
            "upgrade gguf"
        ) from error
    if (parts := metadata.get("split.count", 1)) > 1:
        raise ValueError(
            f"{path}: one of {parts} files of a model; join them with `llama-gguf-split --merge`"
        )
    return GGUFFile(path, metadata, {tensor.name: tensor for tensor in reader.tensors})


def not_installed(package: str) -> ImportError:
    """The error that names the extra."""
    return ImportError(f"reading GGUF files needs {package}: pip install 't3jax[gguf]'")


def load_library() -> ModuleType:
    """The package `gguf`."""
    try:
        import gguf  # an optional extra
    except ImportError as error:
        raise not_installed("the package gguf") from error
    return gguf


def _read_value(field: Any) -> Any:
    """A value of the metadata; a float32 as the shortest decimal number that rounds to it."""
    value = field.contents()
    return float(str(np.float32(value))) if isinstance(value, float) else value


def tensor_shape(tensor: Any) -> tuple[int, ...]:
    """Shape of a tensor as the library describes it, rows first."""
    return tuple(int(size) for size in reversed(tensor.shape))  # ggml counts from the inside
