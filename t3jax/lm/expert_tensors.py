"""Experts in a checkpoint: a tensor for each matrix of an expert, or two tensors for a layer.

Here a layer's experts are two tensors, as the modules of transformers 5 have them: gate and up,
`[E, 2 F, D]`, and down, `[E, D, F]`. Most folders have three matrices of each expert instead, which
are read as parts of these two and written back.
"""

import itertools
import re
from collections.abc import Mapping

import numpy as np

from t3jax.lm.family import Family
from t3jax.lm.places import Computed, Tensors, View

_MATRIX = re.compile(r"^(.*\.experts)\.(\d+)\.(\w+)\.weight$")


class _Stack(Computed):
    """The matrices of a layer's experts as one tensor, which is read in parts."""

    def __init__(self, experts: list[list[View]]):
        self._experts = experts  # the stacked matrices of each
        self._rows, self._columns = experts[0][0].get_shape()

    def get_shape(self) -> list[int]:
        return [len(self._experts), len(self._experts[0]) * self._rows, self._columns]

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        experts, rows, columns = index
        matrix, first = divmod(rows.start, self._rows)
        part = slice(first, first + rows.stop - rows.start)
        if part.stop > self._rows:
            raise ValueError(f"rows {rows.start} to {rows.stop} are of two matrices")
        return np.stack(
            [np.asarray(views[matrix][part, columns]) for views in self._experts[experts]]
        )


def stack_experts(tensors: Tensors, family: Family) -> Tensors:
    """Replaces the matrices of experts by `….experts.gate_up_proj` and `….experts.down_proj`.

    Raises:
        ValueError: If an expert lacks a matrix, has one of another shape, or is there twice.
    """
    if family.expert_names is None:
        return tensors
    gate, up, down = family.expert_names
    layers: dict[str, dict[str, dict[int, tuple[View, str]]]] = {}
    rest = {}
    for name, entry in tensors.items():
        match = _MATRIX.match(name)
        if match is None or match[3] not in family.expert_names:
            rest[name] = entry
        else:
            layers.setdefault(match[1], {}).setdefault(match[3], {})[int(match[2])] = entry
    for prefix, matrices in layers.items():
        for stacked, names in (("gate_up_proj", (gate, up)), ("down_proj", (down,))):
            kinds = {name: matrices.get(name, {}) for name in names}
            count = 1 + max((expert for kind in kinds.values() for expert in kind), default=-1)
            absent = [
                f"{prefix}.{expert}.{name}.weight"
                for name, kind in kinds.items()
                for expert in range(count)
                if expert not in kind
            ]
            if absent:
                raise ValueError(f"{absent[0]}: missing, as are {len(absent) - 1} more of its kind")
            if count == 0:
                continue
            experts = [[kind[expert] for kind in kinds.values()] for expert in range(count)]
            shape = tuple(experts[0][0][0].get_shape())
            for view, stored_name in itertools.chain.from_iterable(experts):
                if tuple(view.get_shape()) != shape or len(shape) != 2:
                    raise ValueError(
                        f"{stored_name}: shape {tuple(view.get_shape())}, expected {shape}, "
                        "as the other experts have it"
                    )
            whole = f"{prefix}.{stacked}"
            if whole in rest:
                raise ValueError(
                    f"{whole} and {experts[0][0][1]} are the same; expected one of them"
                )
            views = [[view for view, _ in expert] for expert in experts]
            rest[whole] = (_Stack(views), f"{prefix}.*.{'/'.join(names)}.weight")
    return rest


def split_experts(tensors: Mapping[str, np.ndarray], family: Family) -> dict[str, np.ndarray]:
    """The inverse of `stack_experts`, for arrays that are written."""
    if family.expert_names is None:
        return dict(tensors)
    *pair, down = family.expert_names
    split = {}
    for name, tensor in tensors.items():
        module, _, last = name.rpartition(".")
        if not module.endswith(".experts"):
            split[name] = tensor
            continue
        names = [down] if last == "down_proj" else pair
        for expert, matrix in enumerate(tensor):
            for kind, part in zip(names, np.split(matrix, len(names)), strict=True):
                split[f"{module}.{expert}.{kind}.weight"] = np.ascontiguousarray(part)
    return split
