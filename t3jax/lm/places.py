"""Where a decoder's parameters stand in a checkpoint, by the table of their family."""

import operator
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from t3jax.lm.config import LMConfig
from t3jax.lm.decoder import Params
from t3jax.lm.family import Family


class Computed:
    """A tensor whose numbers are worked out as they are read, best a few rows at a time."""


class Place(NamedTuple):
    """Where a parameter stands in a checkpoint: in rows of a tensor that others may share.

    The rows of the tensor fall into equal groups; each holds some rows of the parameter in turn. A
    tensor of one parameter alone is one group. The matrices of a layer's experts, or their biases,
    are one group in each expert, or one for each row where gate and up are interleaved.

    Attributes:
        name: Name of the tensor, in the family's table.
        groups: Number of groups.
        start: The parameter's first row in a group.
        rows: Its rows in a group.
        group_rows: Rows of a group, those of all parameters.
        columns: The other dimension, `(in,)`; () of a vector.
        transposed: The tensor is stored [in, out].
        experts: Of the matrices or biases of experts, how many there are; 0 of others.
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

    def read(self, view: Any, index: tuple[slice, ...]) -> np.ndarray:
        """Reads a part of the parameter from the tensor, and nothing else.

        Of interleaved rows those between are read too: safetensors takes no steps everywhere.
        """
        if self.experts:
            return self._read_experts(view, *index)
        wanted, *columns = index
        if self.in_row:
            return np.asarray(view[(slice(0, 1), wanted)])[0]
        parts = []
        for group in range(wanted.start // self.rows, -(-wanted.stop // self.rows)):
            first = max(wanted.start, group * self.rows)
            last = min(wanted.stop, (group + 1) * self.rows)
            shift = group * (self.group_rows - self.rows) + self.start
            rows = slice(first + shift, last + shift)
            if self.channelwise:
                parts.append(np.asarray(view[(rows, slice(0, 1), *columns)])[:, 0])
                continue
            parts.append(view[(*columns, rows)].T if self.transposed else view[(rows, *columns)])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _read_experts(
        self, view: Any, experts: slice, wanted: slice, *columns: slice
    ) -> np.ndarray:
        step = 1 if self.groups == 1 else self.group_rows
        rows = slice(self.start + wanted.start * step, self.start + (wanted.stop - 1) * step + 1)
        if self.transposed:
            return np.asarray(view[(experts, *columns, rows)])[..., ::step].swapaxes(1, 2)
        return np.asarray(view[(experts, rows, *columns)])[:, ::step]


def find_places(config: LMConfig, family: Family, params: Params) -> list[Place]:
    """The place of every parameter, in the order of the tree's leaves."""
    order = list(family.weights)
    stacks: dict[str, dict[str, tuple[int, ...]]] = {}  # tensor: the shapes of what it holds
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
    for key, name, of_experts in names:
        shapes = {k: stacks[name][k] for k in sorted(stacks[name], key=order.index)}
        experts = shapes[key][0] if of_experts else 0
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
    """How many groups what is stacked in a module falls into."""
    fields = (field for end, field in family.grouped.items() if module.endswith(end))
    field = next(fields, None)
    return 1 if field is None else operator.attrgetter(field)(config)


def join_parts(parts: list[tuple[Place, np.ndarray]]) -> np.ndarray:
    """A tensor of a checkpoint from the parameters that it holds."""
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


def cast(array: np.ndarray, dtype: Any) -> np.ndarray:
    """Stored numbers in a dtype; what it cannot hold becomes Inf.

    Raises:
        ValueError: If they are not floating numbers of a dtype that computes.
    """
    if array.dtype not in (np.float32, np.float16, np.dtype(ml_dtypes.bfloat16)):
        raise ValueError(
            f"weights of dtype {array.dtype} are not supported; expected float32, float16, bfloat16"
        )
    with np.errstate(over="ignore"):  # what overflows is found by who looks for Inf
        return array.astype(dtype, copy=False)
