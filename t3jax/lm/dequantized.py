"""Quantised matrices of a checkpoint as the numbers that they stand for, when they are read.

    scaled    W[o, i] = s[o / b, i / c] q[o, i]            blocks of b rows and c columns, or all
    mxfp4     W[o, i] = 2^(s[o, i / 32] - 127) q[o, i]     q = ±0, 0.5, 1, 1.5, 2, 3, 4, 6
    packed    W[o, i] = s[o, g(i)] (q[o, i] - z[o, g(i)])  g(i) the group of a column

Products are taken in float32. Nothing computes with quantised weights.

Axes: o rows (out), i columns (in). An int32 holds several numbers, the first in its lowest bits.

References:
    DeepSeek-V3 Technical Report, arXiv 2412.19437, section 3.3: float8 with a scale for each block.
    OCP Microscaling Formats (MX) Specification 1.0, sections 5.3.3 and 5.4.1: MXFP4.
    GPTQ, arXiv 2210.17323; AWQ, arXiv 2306.00978: packed numbers, in their authors' layouts.
"""

import functools
import re
from typing import Any

import ml_dtypes
import numpy as np

from t3jax.lm.places import Computed
from t3jax.lm.quantization_json import Quantization

Tensors = dict[str, tuple[Any, str]]  # by name: a view, and the tensor's own name

_SCALES = ("weight_scale_inv", "weight_scale")
# For programs that compute in fp8: scales of activations and of the cache.
_UNREAD = re.compile(r"\.(activation_scale|(input|output|[qkv])_scale|input_scale_ub)$")
_BLOCK = 32  # numbers of MXFP4 with the same scale
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # in which an int32 of AWQ has 8 numbers


def dequantize(tensors: Tensors, quantization: Quantization | None) -> Tensors:
    """The tensors of a checkpoint with quantised matrices as views of what they stand for.

    Args:
        tensors: By name, as stored.
        quantization: How they are.

    Returns:
        The same, with one view in the place of the tensors of a matrix; nothing is read.

    Raises:
        ValueError: If a tensor of a matrix is missing or of another shape.
    """
    if quantization is None:
        return tensors
    tensors = {name: found for name, found in tensors.items() if not _UNREAD.search(name)}
    if quantization.layout == "mxfp4":
        return _dequantize_mxfp4(tensors)
    if quantization.layout == "scaled":
        return _dequantize_scaled(tensors, quantization)
    return _dequantize_packed(tensors, quantization)


def _shape(view: Any) -> tuple[int, ...]:
    return tuple(view.get_shape())


def _take(tensors: Tensors, name: str, shape: tuple[int, ...], beside: str) -> Any:
    """Takes the tensor of a name out, if it has the shape that it must have beside another."""
    if name not in tensors:
        raise ValueError(f"{name}: missing, as is needed with {beside}")
    view, stored_name = tensors.pop(name)
    if _shape(view) != shape:
        raise ValueError(f"{stored_name}: shape {_shape(view)}, expected {shape} beside {beside}")
    return view


def _dequantize_mxfp4(tensors: Tensors) -> Tensors:
    for name in [name for name in tensors if name.endswith("_blocks")]:
        blocks, stored_name = tensors.pop(name)
        *rest, width = _shape(blocks)
        if len(rest) != 3 or 2 * width != _BLOCK:
            raise ValueError(
                f"{stored_name}: shape {_shape(blocks)}, expected experts, rows, blocks and "
                f"{_BLOCK // 2} bytes"
            )
        matrix = name.removesuffix("_blocks")
        scales = _take(tensors, f"{matrix}_scales", tuple(rest), stored_name)
        tensors[matrix] = (_MXFP4(blocks, scales), stored_name)
    return tensors


class _MXFP4(Computed):
    """Matrices of experts in MXFP4, stored [out, in]; [in, out], as transformers has them."""

    def __init__(self, blocks: Any, scales: Any):
        self._blocks, self._scales = blocks, scales

    def get_shape(self) -> list[int]:
        experts, rows, blocks = self._scales.get_shape()
        return [experts, blocks * _BLOCK, rows]

    def __getitem__(self, index: tuple[slice, slice, slice]) -> np.ndarray:
        experts, columns, rows = index
        first, last = columns.start // _BLOCK, -(-columns.stop // _BLOCK)
        step = rows.step or 1
        wanted = (experts, slice(rows.start, rows.stop), slice(first, last))
        scales = np.asarray(self._scales[wanted])[:, ::step]
        blocks = np.asarray(self._blocks[(*wanted, slice(0, _BLOCK // 2))])[:, ::step]
        pairs = _mxfp4_pairs()[scales[..., None], blocks]
        numbers = pairs.view(ml_dtypes.bfloat16).reshape(*scales.shape[:2], -1)
        within = slice(columns.start - first * _BLOCK, columns.stop - first * _BLOCK)
        return numbers[..., within].swapaxes(1, 2)


@functools.cache
def _mxfp4_pairs() -> np.ndarray:
    """Two bfloat16 numbers, as one uint32, by the byte of a scale and that of two numbers.

    Every number of MXFP4 is one of bfloat16, but for those beyond its largest. The last scale
    stands for NaN.
    """
    magnitudes = np.array(_MAGNITUDES, np.float64)
    with np.errstate(over="ignore"):
        exponents = np.append(np.ldexp(1.0, np.arange(255) - 127), np.nan)
        values = exponents[:, None] * np.concatenate([magnitudes, -magnitudes])
        values = values.astype(np.float32).astype(ml_dtypes.bfloat16)
    byte = np.arange(256)
    pairs = np.stack([values[:, byte & 15], values[:, byte >> 4]], axis=-1)
    return np.ascontiguousarray(pairs).view(np.uint32)[..., 0]


def _dequantize_scaled(tensors: Tensors, quantization: Quantization) -> Tensors:
    for ending in _SCALES:
        for name in [name for name in tensors if name.endswith(f".{ending}")]:
            scale, stored_name = tensors.pop(name)
            matrix = f"{name.removesuffix(ending)}weight"
            if matrix not in tensors:
                raise ValueError(f"{stored_name}: there is no {matrix} that it scales")
            view, stored_matrix = tensors[matrix]
            shape, found = _shape(view), _shape(scale)
            if len(shape) != 2:
                raise ValueError(f"{stored_matrix}: shape {shape}, expected a matrix with scales")
            rows, columns = shape
            if found in ((), (1,), (1, 1)):
                block = rows, columns
            elif found in ((rows,), (rows, 1)):
                block = 1, columns
            else:
                block = quantization.block or (1, columns)
                grid = -(-rows // block[0]), -(-columns // block[1])
                if found != grid:
                    raise ValueError(f"{stored_name}: shape {found}, expected {grid} for {shape}")
            scaled = _Scaled(view, scale, block, quantization.scale_dtype)
            tensors[matrix] = (scaled, stored_matrix)
    return tensors


class _Scaled(Computed):
    """A matrix of float8 or int8 numbers with scales of its blocks."""

    def __init__(self, view: Any, scale: Any, block: tuple[int, int], rounded: bool):
        self._view, self._scale, self._block, self._rounded = view, scale, block, rounded

    def get_shape(self) -> list[int]:
        return list(self._view.get_shape())

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        numbers = np.asarray(self._view[index])
        if numbers.itemsize != 1:
            raise ValueError(f"weights of dtype {numbers.dtype} have scales; expected 8 bits")
        places = [
            np.arange(axis.start, axis.stop) // size
            for axis, size in zip(index, self._block, strict=True)
        ]
        scales = self._scales
        exact = scales.astype(np.float32)[np.ix_(*places)]
        exact *= numbers.astype(np.float32)
        return exact.astype(scales.dtype) if self._rounded else exact

    @functools.cached_property
    def _scales(self) -> np.ndarray:
        whole = tuple(slice(0, size) for size in self._scale.get_shape())
        scales = np.asarray(self._scale[whole or ...])
        return scales.reshape(-1, 1) if scales.ndim < 2 else scales


_PARTS = {  # of a packed matrix, by layout: its numbers, scales, zero points, groups of columns
    "gptq": ("qweight", "scales", "qzeros", "g_idx"),
    "awq": ("qweight", "scales", "qzeros", "g_idx"),
    "rows": ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx"),
}


def _dequantize_packed(tensors: Tensors, quantization: Quantization) -> Tensors:
    words, *others = _PARTS[quantization.layout]
    for name in [name for name in tensors if name.endswith(f".{words}")]:
        module = name.removesuffix(words)
        view, stored_name = tensors.pop(name)
        tensors.pop(f"{module}weight_shape", None)  # as the numbers have it
        if len(_shape(view)) != 2:
            raise ValueError(f"{stored_name}: shape {_shape(view)}, expected a matrix")
        matrix = _Packed(quantization, view)
        for part, shape, needed in zip(others, matrix.shapes, matrix.needed, strict=True):
            if needed or f"{module}{part}" in tensors:
                found = _take(tensors, f"{module}{part}", shape, stored_name)
                matrix.parts.append(found)
            else:
                matrix.parts.append(None)
        tensors[f"{module}weight"] = (matrix, stored_name)
    return tensors


class _Packed(Computed):
    """A matrix of several numbers in each int32.

    GPTQ and AWQ have all tensors of a matrix [in, out], "rows" has them [out, in]. Here they are
    taken as [out, in]: rows and columns, and groups of columns.

    Attributes:
        parts: Scales, zero points and the group of each column; the last two may be None.
    """

    def __init__(self, quantization: Quantization, words: Any):
        self._words, self._bits = words, quantization.bits
        self._quantization = quantization
        self._turned = quantization.layout != "rows"
        self._packed = 0 if quantization.layout == "awq" else 1  # rows, or columns
        self.parts: list[Any] = []

    @property
    def _per_word(self) -> int:
        return 32 // self._bits

    def get_shape(self) -> list[int]:
        shape = list(self._words.get_shape())[:: -1 if self._turned else 1]
        shape[self._packed] *= self._per_word
        return shape

    @property
    def _group(self) -> int:
        """Columns of a group."""
        return self._quantization.group if self._quantization.group > 0 else self.get_shape()[1]

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """What the shapes of the parts must be, as stored."""
        rows, columns = self.get_shape()
        groups = -(-columns // self._group)
        sides = (rows, groups), (-(-rows // self._per_word), groups)
        scales, zeros = (side[::-1] if self._turned else side for side in sides)
        return scales, zeros, (columns,)

    @property
    def needed(self) -> tuple[bool, bool, bool]:
        """Which of the parts must be there."""
        return True, self._turned, False

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        scales, zeros, own_groups = self.parts
        rows, columns = index
        if own_groups is None:
            groups = np.arange(columns.start, columns.stop) // self._group
        else:
            groups = np.asarray(own_groups[(columns,)])
        wanted = rows, slice(int(groups.min()), int(groups.max()) + 1)
        groups = groups - wanted[1].start
        numbers = self._unpack(self._words, index, self._packed)
        if zeros is None:
            zero = np.full((1, wanted[1].stop - wanted[1].start), 1 << (self._bits - 1), np.int32)
        else:
            zero = self._unpack(zeros, wanted, 0) + self._quantization.zero_shift
        scale = self._read(scales, wanted)
        product = (numbers - zero[:, groups]).astype(np.float32)
        product *= scale.astype(np.float32)[:, groups]
        return product.astype(scale.dtype) if self._quantization.scale_dtype else product

    def _read(self, view: Any, index: tuple[slice, slice]) -> np.ndarray:
        """Rows and columns of a tensor."""
        return np.asarray(view[index[::-1]]).T if self._turned else np.asarray(view[index])

    def _unpack(self, view: Any, index: tuple[slice, slice], packed: int) -> np.ndarray:
        """Rows and columns of numbers, int32, several of which are packed on one of both axes."""
        per = self._per_word
        wanted = index[packed]
        first = wanted.start // per
        stored = slice(first, -(-wanted.stop // per))
        words = self._read(view, (stored, index[1]) if packed == 0 else (index[0], stored))
        order = _AWQ_ORDER if self._quantization.layout == "awq" else range(per)
        shifts = self._bits * np.array(order, np.uint32)
        numbers = (words.view(np.uint32)[..., None] >> shifts) & np.uint32((1 << self._bits) - 1)
        numbers = np.moveaxis(numbers, -1, packed + 1)
        shape = [words.shape[0], words.shape[1]]
        shape[packed] *= per
        within = slice(wanted.start - first * per, wanted.stop - first * per)
        numbers = numbers.reshape(shape).astype(np.int32)
        return numbers[within] if packed == 0 else numbers[:, within]
