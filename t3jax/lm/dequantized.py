"""Quantised matrices of a checkpoint, dequantised when they are read.

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

import ml_dtypes
import numpy as np

from t3jax.lm.places import Computed, Tensors, View
from t3jax.lm.quantization_json import Quantization

_Stored = dict[str, tuple[View, str]]  # `Tensors` to which views are added

_SCALES = ("weight_scale_inv", "weight_scale")
# Scales of activations and of the cache, for programs that compute in fp8.
_UNREAD = re.compile(r"\.(activation_scale|(input|output|[qkv])_scale|input_scale_ub)$")
_BLOCK = 32  # numbers of MXFP4 with the same scale
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # of the 8 numbers in an int32 of AWQ


def dequantize(tensors: Tensors, quantization: Quantization | None) -> Tensors:
    """Replaces the tensors of each quantised matrix by a view that dequantises; reads no weight.

    Raises:
        ValueError: If a tensor of a matrix is missing or of another shape.
    """
    if quantization is None:
        return tensors
    tensors = {name: entry for name, entry in tensors.items() if not _UNREAD.search(name)}
    if quantization.layout == "mxfp4":
        return _dequantize_mxfp4(tensors)
    if quantization.layout == "scaled":
        return _dequantize_scaled(tensors, quantization)
    return _dequantize_packed(tensors, quantization)


def _shape(view: View) -> tuple[int, ...]:
    return tuple(view.get_shape())


def _take(tensors: _Stored, name: str, shape: tuple[int, ...], beside: str) -> View:
    """Takes a tensor out, which must have a shape beside another tensor."""
    if name not in tensors:
        raise ValueError(f"{name}: missing, as is needed with {beside}")
    view, stored_name = tensors.pop(name)
    if _shape(view) != shape:
        raise ValueError(f"{stored_name}: shape {_shape(view)}, expected {shape} beside {beside}")
    return view


def _dequantize_mxfp4(tensors: _Stored) -> Tensors:
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
    """Matrices of experts in MXFP4, stored [out, in] and read as transformers' [in, out]."""

    def __init__(self, blocks: View, scales: View):
        self._blocks, self._scales = blocks, scales

    def get_shape(self) -> list[int]:
        experts, rows, blocks = self._scales.get_shape()
        return [experts, blocks * _BLOCK, rows]

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        experts, columns, rows = index
        first, last = columns.start // _BLOCK, -(-columns.stop // _BLOCK)
        step = rows.step or 1
        stored = (experts, slice(rows.start, rows.stop), slice(first, last))
        scales = np.asarray(self._scales[stored])[:, ::step]
        blocks = np.asarray(self._blocks[(*stored, slice(0, _BLOCK // 2))])[:, ::step]
        pairs = _mxfp4_pairs()[scales[..., None], blocks]
        numbers = pairs.view(ml_dtypes.bfloat16).reshape(*scales.shape[:2], -1)
        within = slice(columns.start - first * _BLOCK, columns.stop - first * _BLOCK)
        return numbers[..., within].swapaxes(1, 2)


@functools.cache
def _mxfp4_pairs() -> np.ndarray:
    """A table of two bfloat16 numbers, as one uint32, by the bytes of their scale and of the pair.

    Bfloat16 holds every number of MXFP4 up to its largest. The last scale means NaN.
    """
    magnitudes = np.array(_MAGNITUDES, np.float64)
    with np.errstate(over="ignore"):
        exponents = np.append(np.ldexp(1.0, np.arange(255) - 127), np.nan)
        values = exponents[:, None] * np.concatenate([magnitudes, -magnitudes])
        values = values.astype(np.float32).astype(ml_dtypes.bfloat16)
    byte = np.arange(256)
    pairs = np.stack([values[:, byte & 15], values[:, byte >> 4]], axis=-1)
    return np.ascontiguousarray(pairs).view(np.uint32)[..., 0]


def _dequantize_scaled(tensors: _Stored, quantization: Quantization) -> Tensors:
    for name in [name for name in tensors if name.rpartition(".")[2] in _SCALES]:
        scale, stored_name = tensors.pop(name)
        matrix = f"{name.rpartition('.')[0]}.weight"
        if matrix not in tensors:
            raise ValueError(f"{stored_name}: there is no {matrix} that it scales")
        view, stored_matrix = tensors[matrix]
        shape, scales = _shape(view), _shape(scale)
        if len(shape) != 2:
            raise ValueError(f"{stored_matrix}: shape {shape}, expected a matrix with scales")
        rows, columns = shape
        if scales in ((), (1,), (1, 1)):
            block = rows, columns
        elif scales in ((rows,), (rows, 1)):
            block = 1, columns
        else:
            block = quantization.block or (1, columns)
            grid = -(-rows // block[0]), -(-columns // block[1])
            if scales != grid:
                raise ValueError(f"{stored_name}: shape {scales}, expected {grid} for {shape}")
        scaled = _Scaled(view, scale, block, quantization.scale_dtype)
        tensors[matrix] = (scaled, stored_matrix)
    return tensors


class _Scaled(Computed):
    """A matrix of float8 or int8 numbers with a scale for each block."""

    def __init__(self, view: View, scale: View, block: tuple[int, int], rounded: bool):
        self._view, self._scale, self._block, self._rounded = view, scale, block, rounded

    def get_shape(self) -> list[int]:
        return list(self._view.get_shape())

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        numbers = np.asarray(self._view[index])
        if numbers.itemsize != 1:
            raise ValueError(f"weights of dtype {numbers.dtype} have scales; expected 8 bits")
        blocks = [
            np.arange(axis.start, axis.stop) // size
            for axis, size in zip(index, self._block, strict=True)
        ]
        scales = self._scales
        exact = scales.astype(np.float32)[np.ix_(*blocks)]
        exact *= numbers.astype(np.float32)
        return exact.astype(scales.dtype) if self._rounded else exact

    @functools.cached_property
    def _scales(self) -> np.ndarray:
        whole = tuple(slice(0, size) for size in self._scale.get_shape())
        scales = np.asarray(self._scale[whole or ...])
        return scales.reshape(-1, 1) if scales.ndim < 2 else scales


_PARTS = {  # of a packed matrix, by layout: numbers, scales, zero points, groups of columns
    "gptq": ("qweight", "scales", "qzeros", "g_idx"),
    "awq": ("qweight", "scales", "qzeros", "g_idx"),
    "rows": ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx"),
}


def _dequantize_packed(tensors: _Stored, quantization: Quantization) -> Tensors:
    words, *parts = _PARTS[quantization.layout]
    for name in [name for name in tensors if name.endswith(f".{words}")]:
        module = name.removesuffix(words)
        view, stored_name = tensors.pop(name)
        tensors.pop(f"{module}weight_shape", None)  # the shape of the numbers says the same
        if len(_shape(view)) != 2:
            raise ValueError(f"{stored_name}: shape {_shape(view)}, expected a matrix")
        matrix = _Packed(quantization, view)
        for part, shape, needed in zip(parts, matrix.shapes, matrix.needed, strict=True):
            present = needed or f"{module}{part}" in tensors
            matrix.parts.append(
                _take(tensors, f"{module}{part}", shape, stored_name) if present else None
            )
        tensors[f"{module}weight"] = (matrix, stored_name)
    return tensors


class _Packed(Computed):
    """A matrix with several numbers in each int32.

    GPTQ and AWQ store all tensors of a matrix [in, out], "rows" stores them [out, in]. Rows,
    columns and groups of columns here are those of [out, in].

    Attributes:
        parts: Scales, zero points and the group of each column; the last two may be None.
    """

    def __init__(self, quantization: Quantization, words: View):
        self._words, self._bits = words, quantization.bits
        self._quantization = quantization
        self._transposed = quantization.layout != "rows"
        self._packed = 0 if quantization.layout == "awq" else 1  # rows, or columns
        self.parts: list[View | None] = []

    @property
    def _per_word(self) -> int:
        return 32 // self._bits

    def get_shape(self) -> list[int]:
        shape = list(self._words.get_shape())[:: -1 if self._transposed else 1]
        shape[self._packed] *= self._per_word
        return shape

    @property
    def _group(self) -> int:
        """Columns of a group."""
        return self._quantization.group if self._quantization.group > 0 else self.get_shape()[1]

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The expected shapes of the parts, as stored."""
        rows, columns = self.get_shape()
        groups = -(-columns // self._group)
        sides = (rows, groups), (-(-rows // self._per_word), groups)
        scales, zeros = (side[::-1] if self._transposed else side for side in sides)
        return scales, zeros, (columns,)

    @property
    def needed(self) -> tuple[bool, bool, bool]:
        """Whether each of the parts is required."""
        return True, self._transposed, False

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        scales, zeros, group_ids = self.parts
        assert scales is not None
        rows, columns = index
        if group_ids is None:
            groups = np.arange(columns.start, columns.stop) // self._group
        else:
            groups = np.asarray(group_ids[(columns,)])
        first, last = int(groups.min()), int(groups.max()) + 1
        groups = groups - first
        numbers = self._unpack(self._words, (rows, columns), self._packed)
        if zeros is None:
            zero = np.full((1, last - first), 1 << (self._bits - 1), np.int32)
        else:
            zero = self._unpack(zeros, (rows, slice(first, last)), 0)
            zero = zero + self._quantization.zero_shift
        scale = self._read(scales, (rows, slice(first, last)))
        product = (numbers - zero[:, groups]).astype(np.float32)
        product *= scale.astype(np.float32)[:, groups]
        return product.astype(scale.dtype) if self._quantization.scale_dtype else product

    def _read(self, view: View, index: tuple[slice, slice]) -> np.ndarray:
        """Reads rows and columns of a tensor."""
        return np.asarray(view[index[::-1]]).T if self._transposed else np.asarray(view[index])

    def _unpack(self, view: View, index: tuple[slice, slice], packed: int) -> np.ndarray:
        """Reads rows and columns of numbers, int32, that are packed along one of the two axes."""
        per = self._per_word
        axis = index[packed]
        first = axis.start // per
        stored = slice(first, -(-axis.stop // per))
        words = self._read(view, (stored, index[1]) if packed == 0 else (index[0], stored))
        order = _AWQ_ORDER if self._quantization.layout == "awq" else range(per)
        shifts = self._bits * np.array(order, np.uint32)
        numbers = (words.view(np.uint32)[..., None] >> shifts) & np.uint32((1 << self._bits) - 1)
        numbers = np.moveaxis(numbers, -1, packed + 1)
        shape = [words.shape[0], words.shape[1]]
        shape[packed] *= per
        within = slice(axis.start - first * per, axis.stop - first * per)
        numbers = numbers.reshape(shape).astype(np.int32)
        return numbers[within] if packed == 0 else numbers[:, within]
