"""Experts in a checkpoint: one tensor for each, or those of a layer in one.

Here a layer's experts are two tensors, as the modules of transformers 5 have them: gate and up,
`[E, 2 F, D]`, and down, `[E, D, F]`. Most folders have three matrices of each expert instead, which
are read as parts of these two and written back.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from t3jax.lm.family import Family
from t3jax.lm.places import Computed

Tensors = Mapping[str, tuple[Any, str]]  # by name: a view, and the tensor's own name
_OWN = re.compile(r"^(.*\.experts)\.(\d+)\.(\w+)\.weight$")


class _Stack(Computed):
    """The matrices of a layer's experts as one tensor, of which nothing else than asked is read."""

    def __init__(self, experts: list[list[Any]]):
        self._experts = experts  # of each, the matrices that stand one after the other
        self._rows, self._columns = experts[0][0].get_shape()

    def get_shape(self) -> list[int]:
        return [len(self._experts), len(self._experts[0]) * self._rows, self._columns]

    def __getitem__(self, index: tuple[slice, slice, slice]) -> np.ndarray:
        experts, rows, columns = index
        which, first = divmod(rows.start, self._rows)
        own = slice(first, first + rows.stop - rows.start)
        if own.stop > self._rows:
            raise ValueError(f"rows {rows.start} to {rows.stop} are of two matrices")
        found = [np.asarray(each[which][own, columns]) for each in self._experts[experts]]
        return np.stack(found)


def stack_experts(tensors: Tensors, family: Family) -> Tensors:
    """The tensors with those of experts put together.

    Args:
        tensors: By the family's names.
        family: Its row.

    Returns:
        The same, with `….experts.gate_up_proj` and `….experts.down_proj` in the place of the
        matrices of each expert.

    Raises:
        ValueError: If an expert lacks a matrix, has one of another shape, or is there twice.
    """
    if family.expert_names is None:
        return tensors
    gate, up, down = family.expert_names
    layers: dict[str, dict[str, dict[int, tuple[Any, str]]]] = {}
    rest = {}
    for name, found in tensors.items():
        own = _OWN.match(name)
        if own is None or own[3] not in family.expert_names:
            rest[name] = found
        else:
            layers.setdefault(own[1], {}).setdefault(own[3], {})[int(own[2])] = found
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
            both = [[kind[expert] for kind in kinds.values()] for expert in range(count)]
            shape = tuple(both[0][0][0].get_shape())
            for view, stored_name in (each for expert in both for each in expert):
                if tuple(view.get_shape()) != shape or len(shape) != 2:
                    raise ValueError(
                        f"{stored_name}: shape {tuple(view.get_shape())}, expected {shape}, "
                        "as the other experts have it"
                    )
            whole = f"{prefix}.{stacked}"
            if whole in rest:
                raise ValueError(f"{whole} and {both[0][0][1]} are the same; expected one of them")
            views = [[view for view, _ in expert] for expert in both]
            rest[whole] = (_Stack(views), f"{prefix}.*.{'/'.join(names)}.weight")
    return rest


def split_experts(tensors: Mapping[str, np.ndarray], family: Family) -> dict[str, np.ndarray]:
    """The opposite of `stack_experts`, for arrays that are written."""
    return dict(_split(tensors, family))


def _split(tensors: Mapping[str, np.ndarray], family: Family) -> Iterator[tuple[str, np.ndarray]]:
    for name, tensor in tensors.items():
        module, _, last = name.rpartition(".")
        if family.expert_names is None or not module.endswith(".experts"):
            yield name, tensor
            continue
        *pair, down = family.expert_names
        names = [down] if last == "down_proj" else pair
        for expert, matrix in enumerate(tensor):
            for own, part in zip(names, np.split(matrix, len(names)), strict=True):
                yield f"{module}.{expert}.{own}.weight", np.ascontiguousarray(part)
