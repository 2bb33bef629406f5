"""Where arrays live: one mesh, `(data, model)`, and readable rules, first match wins.

Rows of a batch are split over `data`; the vocabulary, attention heads and MLP width over `model`.
A dimension that its mesh axis does not divide is kept whole. On one device the same code runs and
every rule means "here".
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

DATA, MODEL = "data", "model"

# Weights of the language model and the head, [out, in], by path.
PARAM_RULES: tuple[tuple[str, P], ...] = (
    (r"(embed|lm_head)/weight$", P(MODEL, None)),  # vocabulary
    (r"lm_head/bias$", P(MODEL)),
    (r"/(q|k|v|gate|up)/weight$", P(MODEL, None)),  # heads, MLP width
    (r"/(q|k|v|gate|up)/bias$", P(MODEL)),
    (r"/(o|down)/weight$", P(None, MODEL)),
    (r"/(q|k|v|gate|up)/b$", P(MODEL, None)),  # LoRA's factors, split as what they update
    (r"/(o|down)/a$", P(None, MODEL)),
    (r"^output$", P(MODEL, None)),  # the head's W2, vocabulary
    (r"", P()),  # norms, learned positions, remaining biases and factors, the head's hidden layers
)


def make_mesh(shape: Sequence[int] = (-1, 1), devices: Sequence[Any] | None = None) -> Mesh:
    """A `(data, model)` mesh.

    Args:
        shape: Devices along `data` and `model`; at most one -1 takes what remains.
        devices: The devices to use; None means all.

    Returns:
        A mesh with automatic axes: the compiler places what the rules leave open.

    Raises:
        ValueError: If the shape does not use every device exactly once.
    """
    devices = jax.devices() if devices is None else list(devices)
    if len(shape) != 2 or list(shape).count(-1) > 1 or any(n < 1 and n != -1 for n in shape):
        raise ValueError(
            f"mesh {tuple(shape)}: expected (data, model), positive, with at most one -1"
        )
    known = int(np.prod([n for n in shape if n != -1]))
    sizes = [len(devices) // known if n == -1 else n for n in shape]
    if int(np.prod(sizes)) != len(devices):
        raise ValueError(
            f"mesh (data, model) = {tuple(shape)} does not fit {len(devices)} devices; their "
            "product must be the number of devices, and one of the two may be -1"
        )
    return jax.make_mesh(sizes, (DATA, MODEL), (AxisType.Auto, AxisType.Auto), devices=devices)


def param_shardings(mesh: Mesh, params: Any) -> Any:
    """Shardings of a tree of weights by `PARAM_RULES`, a tree of the same structure."""

    def place(path: tuple, leaf: Any) -> NamedSharding:
        name = "/".join(str(getattr(part, "key", getattr(part, "idx", part))) for part in path)
        spec = next(spec for pattern, spec in PARAM_RULES if re.search(pattern, name))
        return fitting(mesh, spec, leaf.shape)

    return jax.tree.map_with_path(place, params)


def batch_sharding(mesh: Mesh, shape: Sequence[int]) -> NamedSharding:
    """Rows split over `data`, everything else whole."""
    return fitting(mesh, P(DATA), shape)


def cache_shardings(mesh: Mesh, cache: Any) -> Any:
    """Shardings of a key-value cache: rows over `data`, key heads (or their width) over `model`."""

    def place(path: tuple, leaf: Any) -> NamedSharding:
        if len(leaf.shape) != 4:
            return batch_sharding(mesh, leaf.shape)
        if leaf.shape[1] % mesh.shape[MODEL] == 0:
            return fitting(mesh, P(DATA, MODEL), leaf.shape)
        transposed = "keys" in jax.tree_util.keystr(path)  # [B, K, h, S]
        spec = P(DATA, None, MODEL) if transposed else P(DATA, None, None, MODEL)
        return fitting(mesh, spec, leaf.shape)

    return jax.tree.map_with_path(place, cache)


def fitting(mesh: Mesh, spec: P, shape: Sequence[int]) -> NamedSharding:
    """`spec` on `mesh`, without the axes that do not divide the dimension they split."""
    parts = [
        axis if axis is not None and size % mesh.shape[axis] == 0 else None
        for axis, size in zip(spec, shape, strict=False)
    ]
    while parts and parts[-1] is None:
        parts.pop()
    return NamedSharding(mesh, P(*parts))
