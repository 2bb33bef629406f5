"""The `quantization_config` of a model folder: how its matrices are stored.

Quantised matrices are dequantised when they are read (`dequantized.py`). Activations are not
rounded: their settings are for programs that compute in fp8.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NoReturn

import msgspec
from msgspec import Meta

from t3jax.json_files import check_json, read_json, show_json
from t3jax.lm.family import Json

_Width = Annotated[int, Meta(ge=1, le=1 << 22)]
_PACKED = (4, 8)  # bits of a number, several in an int32


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How matrices are stored.

    Attributes:
        method: The method, in the words of `config.json`.
        layout: "mxfp4" (blocks of 32 numbers of 4 bits, each with a power of 2); "scaled" (float8
            or int8, with scales); or numbers packed in int32: "gptq", "awq" or "rows".
        block: "scaled": rows and columns that share a scale, if scales are a matrix.
        scale_dtype: Whether products with scales are rounded to the dtype of the scales.
        bits: Bits of a packed number.
        group: Columns that share a scale of a packed matrix; -1 for all.
        zero_shift: Added to stored zero points.
    """

    method: str
    layout: str
    block: tuple[int, int] | None = None
    scale_dtype: bool = False
    bits: int = 4
    group: int = -1
    zero_shift: int = 0


class _Fp8(msgspec.Struct):
    weight_block_size: tuple[_Width, _Width] | None = (128, 128)
    expert_dtype: str = "fp8"


class _Packed(msgspec.Struct):
    bits: int
    group_size: Annotated[int, Meta(ge=-1, le=1 << 22)]
    checkpoint_format: str = "gptq"
    dynamic: dict[str, Any] | None = None
    version: str = "gemm"
    zero_point: bool = True


class _Weights(msgspec.Struct):
    num_bits: int
    type: str = "int"
    strategy: str | None = None
    symmetric: bool = True
    group_size: int | None = None
    block_structure: tuple[_Width, _Width] | None = None


class _Group(msgspec.Struct):
    weights: _Weights | None
    format: str | None = None


class _CompressedTensors(msgspec.Struct):
    config_groups: dict[str, _Group]
    format: str | None = None
    sparsity_config: dict[str, Any] | None = None


def _refuse(reason: str) -> NoReturn:
    raise ValueError(
        f"quantization_config: {reason}; known: {', '.join(_METHODS)}. Load the unquantised "
        "folder, with dtype=int8 if memory is short, or a GGUF file, or write this one anew "
        "after dequantize() of transformers"
    )


def _expect(name: str, value: object, known: tuple) -> None:
    if value not in known:
        raise ValueError(
            f"{name} {show_json(value)} is not supported, expected {show_json(known[0])}"
        )


def _read_mxfp4(content: Json) -> Quantization:
    return Quantization("mxfp4", "mxfp4")


def _read_fp8(content: Json) -> Quantization:
    fp8 = check_json(content, "quantization_config", _Fp8)
    _expect("expert_dtype", fp8.expert_dtype, ("fp8",))
    return Quantization("fp8", "scaled", block=fp8.weight_block_size)


def _read_fbgemm(content: Json) -> Quantization:
    return Quantization("fbgemm_fp8", "scaled")


def _read_gptq(content: Json) -> Quantization:
    gptq = check_json(content, "quantization_config", _Packed)
    _expect("bits", gptq.bits, _PACKED)
    _expect("checkpoint_format", gptq.checkpoint_format, ("gptq", "gptq_v2"))
    _expect("dynamic", gptq.dynamic, (None, {}))
    # The format "gptq" stores zero points minus one.
    shift = int(gptq.checkpoint_format == "gptq")
    return Quantization("gptq", "gptq", bits=gptq.bits, group=gptq.group_size, zero_shift=shift)


def _read_awq(content: Json) -> Quantization:
    awq = check_json(content, "quantization_config", _Packed)
    _expect("bits", awq.bits, (4,))
    _expect("version", awq.version.lower(), ("gemm",))
    _expect("zero_point", awq.zero_point, (True,))
    return Quantization("awq", "awq", group=awq.group_size)


def _read_compressed(content: Json) -> Quantization:
    config = check_json(content, "quantization_config", _CompressedTensors)
    kinds = {
        (group.format or config.format, *msgspec.structs.astuple(group.weights))
        for group in config.config_groups.values()
        if group.weights is not None
    }
    if len(kinds) != 1:
        raise ValueError(f"config_groups has {len(kinds)} kinds of weights, expected one")
    (kind,) = kinds
    stored_format, args = kind[0], _Weights(*kind[1:])
    sparsity = config.sparsity_config or {}
    _expect("sparsity_config.format", sparsity.get("format"), (None, "dense"))
    if stored_format == "pack-quantized":
        _expect("num_bits", args.num_bits, _PACKED)
        _expect("type", args.type, ("int",))
        _expect("strategy", args.strategy, ("group", "channel"))
        return Quantization(
            "compressed-tensors",
            "rows",
            scale_dtype=True,
            bits=args.num_bits,
            group=args.group_size or -1,
        )
    _expect("format", stored_format, ("float-quantized", "int-quantized", "naive-quantized"))
    _expect("num_bits", args.num_bits, (8,))
    _expect("strategy", args.strategy, ("tensor", "channel", "block"))
    _expect("symmetric", args.symmetric, (True,))
    block = args.block_structure if args.strategy == "block" else None
    return Quantization("compressed-tensors", "scaled", block=block, scale_dtype=True)


_METHODS: Mapping[str, Callable[[Json], Quantization]] = {
    "awq": _read_awq,
    "compressed-tensors": _read_compressed,
    "fbgemm_fp8": _read_fbgemm,
    "fp8": _read_fp8,
    "gptq": _read_gptq,
    "mxfp4": _read_mxfp4,
}


def read_quantization(config: Json) -> Quantization | None:
    """The quantization that a `config.json` states; None if its matrices are plain numbers.

    Raises:
        ValueError: If the method or one of its settings is not supported.
    """
    text = config.get("text_config")
    inner = text.get("quantization_config") if isinstance(text, Mapping) else None
    content = config.get("quantization_config") or inner
    if not content:
        return None
    method = content.get("quant_method") if isinstance(content, Mapping) else None
    if not isinstance(method, str) or method not in _METHODS:
        _refuse(f"weights quantised by {method or 'an unnamed method'} are not supported")
    try:
        return _METHODS[method](content)
    except ValueError as error:
        _refuse(str(error).removeprefix("quantization_config: "))


def quantization_of(folder: pathlib.Path) -> Quantization | None:
    """`read_quantization` for a folder; None if it has no `config.json`."""
    path = folder / "config.json"
    if not path.exists():
        return None
    try:
        return read_quantization(read_json(path, dict[str, Any]))
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
