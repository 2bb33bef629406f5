"""Language models from GGUF files, the format of llama.cpp: shape, weights and tokenizer.

A file is read like a Hugging Face folder: its metadata as a `config.json`, and its tensors as the
weights of a `Family` whose modules have llama.cpp's names. Quantised tensors are dequantised when
they are read, a few rows at a time; nothing computes with quantised weights. Models in several
files are not read.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from t3jax.lm.config import LMConfig
from t3jax.lm.config_json import lm_config
from t3jax.lm.decoder import Params
from t3jax.lm.families import FAMILIES
from t3jax.lm.family import Family
from t3jax.lm.gguf_config import describe_config, find_architecture
from t3jax.lm.gguf_delta import group_heads
from t3jax.lm.gguf_file import GGUFFile, load_library, tensor_shape
from t3jax.lm.places import View
from t3jax.lm.weights import check_tensors, place_params

_ROPE_TENSORS = r"^rope_(freqs|factors_(long|short))\.weight$"

_PLAIN = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_ROW = ".ffn_gate_inp_shexp.weight"  # stored as a vector
_MATRICES = r"layers\.\{i\}\.experts\.(gate|up|down)(\.weight|\.bias)?$"
_WHOLE = {  # parameters and the whole name of their tensor
    "layers.{i}.attention.sinks": "blk.{i}.attn_sinks.weight",
    "layers.{i}.delta.fading_bias": "blk.{i}.ssm_dt.bias",
    "layers.{i}.delta.log_rate": "blk.{i}.ssm_a",
    "layers.{i}.multiplier": "blk.{i}.layer_output_scale.weight",
    "layers.{i}.experts.router.input_scale": "blk.{i}.ffn_gate_inp.scale",
    "layers.{i}.experts.router.expert_scale": "blk.{i}.ffn_down_exps.scale",
    "layers.{i}.experts.router.correction": "blk.{i}.exp_probs_b.bias",
}
_DELTA_TENSOR = re.compile(r"\.(ssm_\w+|attn_qkv|attn_gate)(\.weight|\.bias)?$")
_FUSED = "blk.{i}.ffn_gate_up_exps"
_DEQUANTIZED_AT_ONCE = 1 << 22  # numbers, in float32


def read_config(file: GGUFFile) -> LMConfig:
    """Reads the decoder's shape from the metadata.

    Raises:
        ValueError: If the architecture is unknown, a value is missing, or one is not implemented.
    """
    try:
        return lm_config(describe_config(file))
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from error


def load_params(
    file: GGUFFile,
    config: LMConfig,
    dtype: DTypeLike,
    shardings: Callable[[Params], Any] | None = None,
) -> Params:
    """Reads a model's weights, as `t3jax.lm.weights.load_params` does from a folder.

    Raises:
        ValueError: If names or shapes do not fit the config, or a tensor is quantised in a way that
            the package `gguf` does not know.
    """
    family, tensors = _open_tensors(file, config, dtype)
    return place_params(file.path, config, family, tensors, dtype, shardings)


def check_params(file: GGUFFile, config: LMConfig) -> None:
    """Checks that names and shapes of the weights fit a config; reads no weight.

    Raises:
        ValueError: As `load_params`, but for NaN and Inf.
    """
    check_tensors(file.path, config, *_open_tensors(file, config, np.float32))


def _open_tensors(
    file: GGUFFile, config: LMConfig, dtype: DTypeLike
) -> tuple[Family, dict[str, tuple[View, str]]]:
    """The family as the file stores it, and a view of each tensor with its stored name."""
    for tensor in file.tensors.values():
        if not _is_readable(tensor):
            raise ValueError(
                f"{file.path}: {tensor.name} is stored as {tensor.tensor_type.name}, which the "
                "installed gguf cannot dequantise; use a file quantised otherwise, such as Q8_0"
            )
    permuted, family = find_architecture(file).permuted, FAMILIES[config.model_type]
    predicting = file.get("nextn_predict_layers")
    tensors: dict[str, tuple[View, str]] = {}
    for name, tensor in file.tensors.items():
        layer = re.match(r"blk\.(\d+)\.", name)
        later = predicting and layer and int(layer[1]) >= config.num_layers
        if re.match(_ROPE_TENSORS, name) or later:
            continue
        head_width = config.head_dim if permuted and re.search(r"\.attn_[qk]\.", name) else 0
        stored = _Tensor(tensor, head_width, _norm_shift(config, name), dtype)
        view: View = stored
        if name.endswith(_ROW):
            view = _Row(stored)
        elif config.delta is not None and _DELTA_TENSOR.search(name):
            view = group_heads(stored, name, config.delta)
        tensors[name] = (view, name)
    return _convert_family(file, family), tensors


def _is_readable(tensor: Any) -> bool:
    library, kind = load_library(), tensor.tensor_type
    if kind.name in _PLAIN:
        return True
    try:
        library.dequantize(np.zeros((1, library.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return len(tensor.shape) in (2, 3)


def _convert_family(file: GGUFFile, family: Family) -> Family:
    """The family as llama.cpp stores it: with other names, and plain matrices."""
    library = load_library()
    kinds = {name: kind for kind, name in library.MODEL_ARCH_NAMES.items()}
    if file.architecture not in kinds:
        raise ValueError(
            f"{file.path}: the installed gguf does not know architecture {file.architecture!r}; "
            "upgrade gguf"
        )
    names = library.get_tensor_name_map(kinds[file.architecture], 1)

    def rename(module: str) -> str:
        module_0 = module.replace("{i}", "0")
        name = names.get_name(module_0) or names.get_name(module_0.removeprefix("transformer."))
        return module if name is None else name.replace("blk.0.", "blk.{i}.")

    weights = {key: _WHOLE.get(key) or rename(name) for key, name in family.weights.items()}
    if "layers.{i}.experts.router" in weights:  # a tensor for all matrices of a kind
        weights = {key: name for key, name in weights.items() if not re.match(_MATRICES, key)}
        weights |= {
            "layers.{i}.experts.router": "blk.{i}.ffn_gate_inp",
            **{
                f"layers.{{i}}.experts.{name}": f"blk.{{i}}.ffn_{name}_exps"
                for name in ("gate", "up", "down")
            },
        }
        if any(name.endswith(".ffn_gate_up_exps.weight") for name in file.tensors):
            weights |= {f"layers.{{i}}.experts.{name}": _FUSED for name in ("gate", "up")}
    # The rows of a head's gate follow those of its query, as in folders.
    grouped = {"attn_q": "num_heads"} if "layers.{i}.attention.gate" in weights else {}
    return dataclasses.replace(
        family, weights=weights, grouped=grouped, transposed=(), channelwise=(), in_row=()
    )


def _norm_shift(config: LMConfig, name: str) -> float:
    """The number to add to a stored weight: norms are stored with their offset of 1."""
    centred = config.norm.endswith("_offset") and name.endswith("norm.weight")
    return -1.0 if centred and not _DELTA_TENSOR.search(name) else 0.0


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor of a file, which is read in parts.

    Attributes:
        stored: The library's description.
        head_width: Rows of a head, stored with the two rows of a rotary pair as neighbours and read
            half a head apart; 0 if they are not permuted.
        shift: Added to the stored numbers.
        dtype: The dtype to which a quantised tensor is dequantised.
    """

    stored: Any
    head_width: int
    shift: float
    dtype: DTypeLike

    def get_shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return tensor_shape(self.stored)

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """Reads rows, or rows and columns, or those of some experts."""
        if len(index) == 3:
            experts, rows, columns = index
            data = self.stored.data[experts, rows]
            part = self._read(data.reshape(-1, data.shape[-1]), (columns,))
            return part.reshape(*data.shape[:2], -1)
        rows, *rest = index
        return self._read(self.stored.data[self._stored_rows(rows)], tuple(rest))

    def read_rows(self, rows: np.ndarray, columns: tuple[slice, ...]) -> np.ndarray:
        """Reads rows by their numbers."""
        return self._read(self.stored.data[rows], columns)

    def _read(self, data: np.ndarray, columns: tuple[slice, ...]) -> np.ndarray:
        kind = self.stored.tensor_type
        if (plain := _PLAIN.get(kind.name)) is not None:
            # A copy, since a JAX array may alias the memory map, which changes with the file.
            part = np.array(data.view(plain)[(slice(None), *columns)])
            return part + np.float32(self.shift) if self.shift else part
        return self._dequantize(data, *columns)

    def _stored_rows(self, rows: slice) -> slice | np.ndarray:
        if not self.head_width:
            return rows
        head, row = np.divmod(np.arange(rows.start, rows.stop), self.head_width)
        half, pair = np.divmod(row, self.head_width // 2)
        return head * self.head_width + 2 * pair + half

    def _dequantize(self, data: np.ndarray, columns: slice) -> np.ndarray:
        library = load_library()
        kind = self.stored.tensor_type
        numbers, size = library.GGML_QUANT_SIZES[kind]  # numbers and bytes of a block
        first, last = columns.start // numbers, -(-columns.stop // numbers)
        blocks = data[:, first * size : last * size]
        within = slice(columns.start - first * numbers, columns.stop - first * numbers)
        out = np.empty((len(data), columns.stop - columns.start), self.dtype)
        rows = max(1, _DEQUANTIZED_AT_ONCE // ((last - first) * numbers))
        for start in range(0, len(data), rows):
            part = library.dequantize(blocks[start : start + rows], kind)
            out[start : start + rows] = part[:, within]
        return out


@dataclasses.dataclass(frozen=True)
class _Row:
    """A stored vector as a matrix of one row."""

    vector: _Tensor

    def get_shape(self) -> tuple[int, ...]:
        """Shape of the matrix."""
        return (1, *self.vector.get_shape())

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """Reads rows and columns."""
        rows, columns = index
        return self.vector[(columns,)][None][rows]
