"""The place of each parameter of a decoder in a checkpoint, by the table of its family."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from t3jax.lm.config import LMConfig
from t3jax.lm.decoder import Params
from t3jax.lm.family import Family


@runtime_checkable
class Sliceable(Protocol):
    """An array or a stored tensor, of which slices are read."""

    def __getitem__(self, index: Any, /) -> np.ndarray:
        """Reads a slice of each axis, from a start to a stop."""
        ...


@runtime_checkable
class View(Sliceable, Protocol):
    """A stored tensor, as safetensors' `get_slice` gives it."""

    def get_shape(self) -> Sequence[int]:
        """Shape of the whole tensor."""
        ...


Tensors = Mapping[str, tuple[View, str]]  # by the family's name: a view, and the stored name


class Computed(View):
    """A view whose numbers are computed when they are read, best a few rows at a time."""


class Place(NamedTuple):
    """The place of a parameter in a checkpoint: rows of a tensor that others may share.

    The rows of the tensor are in equal groups, each with some rows of every parameter in turn. A
    tensor of one parameter is one group. The matrices of a layer's experts, or their biases, are
    one group in each expert, or one for each row where gate and up are interleaved.

    Attributes:
        name: Name of the tensor, in the family's table.
        groups: Number of groups.
        start: The parameter's first row in a group.
        rows: The parameter's rows in a group.
        group_rows: Rows of a group.
        columns: The other dimension, `(in,)`; () for a vector.
        transposed: The tensor is stored [in, out].
        experts: Number of experts whose matrices or biases it holds; 0 for other tensors.
        channelwise: The tensor is stored [out, 1, in].
        in_row: The tensor, a vector, is stored [1, out].
    """

    name: str
    groups: int
    start: int
    rows: int
    group_rows: int
    columns: tuple[int, ...]
    transposed: bool
    experts: int = 0
    channelwise: bool = False
    in_row: bool = False

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        shape = (self.groups * self.group_rows, *self.columns)
        if self.channelwise:
            return (shape[0], 1, *shape[1:])
        if self.in_row:
            return (1, *shape)
        shape = shape[::-1] if self.transposed else shape
        return (self.experts, *shape) if self.experts else shape

    def read(self, view: Sliceable, index: tuple[slice, ...]) -> np.ndarray:
        """Reads a part of the parameter from the tensor, and nothing else.

        Between interleaved rows the others are read too, since safetensors does not take every
        step.
        """
        if self.experts:
            return self._read_experts(view, *index)
        rows, *columns = index
        if self.in_row:
            return np.asarray(view[(slice(0, 1), rows)])[0]
        parts = []
        for group in range(rows.start // self.rows, -(-rows.stop // self.rows)):
            first = max(rows.start, group * self.rows)
            last = min(rows.stop, (group + 1) * self.rows)
            shift = group * (self.group_rows - self.rows) + self.start
            stored = slice(first + shift, last + shift)
            if self.channelwise:
                part = np.asarray(view[(stored, slice(0, 1), *columns)])[:, 0]
            elif self.transposed:
                part = view[(*columns, stored)].T
            else:
                part = view[(stored, *columns)]
            parts.append(part)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _read_experts(
        self, view: Sliceable, experts: slice, rows: slice, *columns: slice
    ) -> np.ndarray:
        step = 1 if self.groups == 1 else self.group_rows
        stored = slice(self.start + rows.start * step, self.start + (rows.stop - 1) * step + 1)
        if self.transposed:
            return np.asarray(view[(experts, *columns, stored)])[..., ::step].swapaxes(1, 2)
        return np.asarray(view[(experts, stored, *columns)])[:, ::step]


def find_places(config: LMConfig, family: Family, params: Params) -> list[Place]:
    """The place of every parameter, in the order of the tree's leaves."""
    order = list(family.weights)
    stacks: dict[str, dict[str, tuple[int, ...]]] = {}  # tensor: the shapes of its parameters
    names = []
    for path, leaf in jax.tree.leaves_with_path(params):
        *parts, kind = [str(part.key) for part in path]
        layer = next((part for part in parts if part.isdigit()), "")
        key = ".".join("{i}" if part.isdigit() else part for part in parts)
        if f"{key}.{kind}" in family.weights:
            key = f"{key}.{kind}"
            name = family.weights[key]
        else:
            name = f"{family.weights[key]}.{kind}"
        name = name.replace("{i}", layer)
        names.append((key, name, leaf.ndim == (2 if kind == "bias" else 3)))
        stacks.setdefault(name, {})[key] = leaf.shape
    places = []
    for key, name, has_experts in names:
        shapes = {k: stacks[name][k] for k in sorted(stacks[name], key=order.index)}
        experts = shapes[key][0] if has_experts else 0
        module = name.rsplit(".", 1)[0]
        groups = _count_groups(config, family, module) if len(shapes) > 1 else 1
        if experts:
            shapes = {k: shape[1:] for k, shape in shapes.items()}
            groups = shapes[key][0] if family.by_row and len(shapes) > 1 else 1
        rows = {k: shape[0] // groups for k, shape in shapes.items()}
        before = list(rows)[: list(rows).index(key)]
        places.append(
            Place(
                name,
                groups,
                start=sum(rows[k] for k in before),
                rows=rows[key],
                group_rows=sum(rows.values()),
                columns=shapes[key][1:],
                transposed=name.removesuffix(".weight").endswith(family.transposed),
                experts=experts,
                channelwise=module.endswith(family.channelwise),
                in_row=name.endswith(family.in_row),
            )
        )
    return places


def _count_groups(config: LMConfig, family: Family, module: str) -> int:
    """Number of groups in which parameters are stacked in a module."""
    fields = (field for end, field in family.grouped.items() if module.endswith(end))
    field = next(fields, None)
    return 1 if field is None else operator.attrgetter(field)(config)


def join_parts(parts: list[tuple[Place, np.ndarray]]) -> np.ndarray:
    """Joins parameters into the tensor of a checkpoint that holds them."""
    place = parts[0][0]
    parts = sorted(parts, key=lambda part: part[0].start)
    experts = (place.experts,) if place.experts else ()
    grouped = [array.reshape(*experts, p.groups, p.rows, *p.columns) for p, array in parts]
    tensor = np.concatenate(grouped, axis=len(experts) + 1)
    tensor = tensor.reshape(*experts, -1, *place.columns)
    if place.channelwise:
        return tensor[:, None]
    if place.in_row:
        return tensor[None]
    return tensor.swapaxes(-1, -2) if place.transposed else tensor


def cast(array: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    """Casts stored numbers to a dtype; those beyond its range become Inf.

    Raises:
        ValueError: If they are not float32, float16 or bfloat16.
    """
    if array.dtype not in (np.float32, np.float16, np.dtype(ml_dtypes.bfloat16)):
        raise ValueError(
            f"weights of dtype {array.dtype} are not supported; expected float32, float16, bfloat16"
        )
    with np.errstate(over="ignore"):  # weights are searched for Inf later
        return array.astype(dtype, copy=False)
