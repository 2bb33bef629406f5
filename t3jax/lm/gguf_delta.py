"""Gated delta nets in GGUF files: their tensors as folders have them.

In a file the heads of values that share a head of keys stand apart: first one of each head of
keys, then the next of each. In folders those of one head of keys are neighbours. A file has a rate
as it is used, negative, and a folder has its logarithm.
"""

import dataclasses
from typing import Any

import numpy as np

from t3jax.lm.config import DeltaConfig


def group_heads(view: Any, name: str, delta: DeltaConfig) -> Any:
    """A view of a tensor of such a layer, its heads of values in the order of folders.

    Args:
        view: A view of the stored tensor.
        name: The tensor's name.
        delta: The shape of the layers.

    Returns:
        A view that is read by slices, as the stored one is.
    """
    kind = name.split(".")[2]
    if kind == "ssm_norm":  # one for all heads
        return view
    of_heads = kind in ("ssm_a", "ssm_dt", "ssm_alpha", "ssm_beta")
    order = _order(delta, 1 if of_heads else delta.value_dim)
    if kind == "ssm_out":
        return _Columns(view, order)
    if kind in ("attn_qkv", "ssm_conv1d"):  # after queries and keys
        before = 2 * delta.key_heads * delta.key_dim
        order = np.concatenate([np.arange(before), before + order])
    rows = _Rows(view, order)
    return _Logarithms(rows) if kind == "ssm_a" else rows


def _order(delta: DeltaConfig, width: int) -> np.ndarray:
    """Where each row is stored, `width` of them for a head."""
    stored = np.arange(delta.value_heads * width)
    sharing = delta.value_heads // delta.key_heads
    return stored.reshape(sharing, delta.key_heads, width).swapaxes(0, 1).reshape(-1)


@dataclasses.dataclass(frozen=True)
class _View:
    """A view of a view of a stored tensor, of the same shape."""

    view: Any

    def get_shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return tuple(self.view.get_shape())


@dataclasses.dataclass(frozen=True)
class _Rows(_View):
    """Rows in another order."""

    order: np.ndarray

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """Rows, or rows and columns."""
        rows, *columns = index
        return self.view.read_rows(self.order[rows], tuple(columns))


@dataclasses.dataclass(frozen=True)
class _Columns(_View):
    """Columns in another order, which lie in other blocks: whole rows are read."""

    order: np.ndarray

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """Rows and columns."""
        rows, columns = index
        return self.view[(rows, slice(0, self.get_shape()[1]))][:, self.order[columns]]


@dataclasses.dataclass(frozen=True)
class _Logarithms(_View):
    """The logarithms of what is stored with a minus."""

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """Some of them."""
        with np.errstate(invalid="ignore", divide="ignore"):  # NaN and Inf are refused when loaded
            return np.log(-self.view[index])
