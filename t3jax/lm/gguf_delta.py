"""Gated delta nets in GGUF files: their tensors in the layout of folders.

A file has the first value head of every key head, then the second of every key head, and so on. In
folders the value heads of a key head are neighbours. A file has the negative of a rate, and a
folder has its logarithm.
"""

import dataclasses
from typing import Protocol, runtime_checkable

import numpy as np

from t3jax.lm.config import DeltaConfig
from t3jax.lm.places import View


@runtime_checkable
class _RowView(View, Protocol):
    """A view that also reads rows by their numbers."""

    def read_rows(self, rows: np.ndarray, columns: tuple[slice, ...]) -> np.ndarray: ...


def group_heads(view: _RowView, name: str, delta: DeltaConfig) -> View:
    """A view of a tensor of a delta net with its value heads in the order of folders."""
    kind = name.split(".")[2]
    if kind == "ssm_norm":  # one for all heads
        return view
    per_head = kind in ("ssm_a", "ssm_dt", "ssm_alpha", "ssm_beta")
    order = _find_order(delta, 1 if per_head else delta.value_dim)
    if kind == "ssm_out":
        return _Columns(view, order)
    if kind in ("attn_qkv", "ssm_conv1d"):  # after queries and keys
        before = 2 * delta.key_heads * delta.key_dim
        order = np.concatenate([np.arange(before), before + order])
    return (_Logarithms if kind == "ssm_a" else _Rows)(view, order)


def _find_order(delta: DeltaConfig, width: int) -> np.ndarray:
    """The stored index of each row, `width` rows for a head."""
    stored = np.arange(delta.value_heads * width)
    sharing = delta.value_heads // delta.key_heads
    return stored.reshape(sharing, delta.key_heads, width).swapaxes(0, 1).reshape(-1)


@dataclasses.dataclass(frozen=True)
class _Reordered:
    """A view of the same shape as another."""

    view: _RowView
    order: np.ndarray

    def get_shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return tuple(self.view.get_shape())


class _Rows(_Reordered):
    """Rows in another order."""

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """Reads rows, or rows and columns."""
        rows, *columns = index
        return self.view.read_rows(self.order[rows], tuple(columns))


class _Columns(_Reordered):
    """Columns in another order, which crosses blocks of numbers: whole rows are read."""

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """Reads rows and columns."""
        rows, columns = index
        return self.view[(rows, slice(0, self.get_shape()[1]))][:, self.order[columns]]


class _Logarithms(_Rows):
    """Rows in another order: the logarithms of numbers that are stored negative."""

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """Reads rows."""
        with np.errstate(invalid="ignore", divide="ignore"):  # NaN and Inf are refused when loaded
            return np.log(-super().__getitem__(index))
