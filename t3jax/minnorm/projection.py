"""The simplest nearby model with the same outputs on the retain set, to first order.

A change of the parameters that is orthogonal to the gradients g_1, ..., g_N of the outputs on
retain points does not change those outputs, to first order. Among such changes, the one with the
smallest |theta + delta|^2 + lambda |delta|^2 is

    delta = -share (theta - P theta),        share = 1 / (1 + lambda),

where P theta is the part of theta in the span of the gradients.

The gradients are read block by block (a few weights of all N gradients at a time), so that they are
never all in memory: the triangle of a QR factorisation of [gradients, theta] is carried from one
block to the next, in float64. It gives the coefficients of P theta, with which the gradients are
summed.

Axes: N gradients, D weights of a block.

References:
    Machine Unlearning under Overparameterization, arXiv 2505.22601, section 5.
    Communication-optimal parallel and sequential QR and LU factorizations, arXiv 0808.2664,
    section 4 (a triangle carried over blocks).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated

import jax
import numpy as np
from jaxtyping import Array, Float, PyTree

from t3jax import hosts
from t3jax.ranges import SHARE, Ranged, whole

# Relative to the largest singular value: gradients are in float32, smaller values are rounding.
_RANK_TOLERANCE = 1e-6
_COLUMNS = 2**14  # weights of a block of the factorisation, which is in float64
Output = Callable[[PyTree, PyTree, PyTree], Array]  # parameters, frozen ones, a row -> a scalar


@dataclasses.dataclass(frozen=True)
class MinNormConfig(Ranged):
    """When the parameters are projected, and how far.

    Attributes:
        n_pert: N, number of gradients of a projection.
        share: Share of the off-span part that the first projection removes, 1 / (1 + lambda).
        decay: Factor of the share after each projection.
        every: Epochs from one projection to the next.
        last_epochs: Epochs at the end without a projection.
    """

    n_pert: Annotated[int, whole(1, 2**12)] = 50
    share: Annotated[float, SHARE] = 0.1
    decay: Annotated[float, SHARE] = 0.9
    every: Annotated[int, whole(1)] = 1
    last_epochs: Annotated[int, whole(0)] = 2

    def share_at(self, step: int, steps_per_epoch: int, epochs: int) -> float:
        """The share that a step's projection removes, 0 for a step without one.

        Steps count from 0. All steps of an epoch project, or none does.
        """
        epoch, place = divmod(step, steps_per_epoch)
        if epoch % self.every or epoch >= epochs - self.last_epochs:
            return 0.0
        return self.share * self.decay ** (epoch // self.every * steps_per_epoch + place)


def span_coefficients(
    blocks: Iterable[tuple[Float[np.ndarray, "N _"], Float[np.ndarray, "_"]]],
) -> Float[np.ndarray, "N"]:
    """The weights c with which the gradients sum to the part of theta in their span, float64.

    A block has a slice of all gradients `[N, D]` and of theta `[D]`; D may differ from block to
    block. Where gradients are linearly dependent, c is the smallest solution of sum_i c_i g_i = P
    theta.
    """
    triangle: np.ndarray | None = None
    for gradients, theta in blocks:
        columns = np.concatenate([gradients, theta[None]]).astype(np.float64).T  # [D, N + 1]
        if not np.all(np.isfinite(columns)):
            raise FloatingPointError(
                "the projection met an infinite or NaN gradient or weight, expected finite ones; "
                "lower the learning rate, or start from weights that are finite"
            )
        stacked = columns if triangle is None else np.concatenate([triangle, columns])
        triangle = np.asarray(np.linalg.qr(stacked, mode="r"))
    if triangle is None:
        raise ValueError("no weights to project: expected at least one block")
    n = triangle.shape[1] - 1
    scale = np.linalg.norm(triangle[:, :n], axis=0)  # gradients of like length: better conditioned
    scale[scale == 0] = 1
    scaled, *_ = np.linalg.lstsq(triangle[:, :n] / scale, triangle[:, n], rcond=_RANK_TOLERANCE)
    return scaled / scale


def project(
    output: Output,
    params: PyTree,
    rows: PyTree,
    share: float,
    frozen: PyTree = None,
    block_bytes: int = 2**30,
) -> PyTree:
    """Removes a share of the part of the parameters that the outputs do not need.

    The gradients of a group of leaves are in memory together. A group has at most `block_bytes`;
    a larger leaf is a group alone. Each group costs two backward passes of every row, a single
    group one.

    `output` maps the float32 parameters, `frozen` and a row to the scalar that must not change; it
    is compiled once for each function object. The first axis of the arrays of `rows` counts the N
    rows. A share of 0 removes nothing, 1 all of the part. The new parameters are on the host.

    Raises:
        FloatingPointError: If a gradient or a weight is infinite or NaN.
    """
    leaves, tree = jax.tree.flatten(params)
    count = len(jax.tree.leaves(rows)[0])
    groups = _group([4 * count * leaf.size for leaf in leaves], block_bytes)

    def read() -> Iterator[tuple[int, np.ndarray]]:
        for group in groups:
            of_leaves = _compute_gradients(output, group, params, frozen, rows)
            for index, gradients in zip(group, of_leaves, strict=True):
                yield index, np.asarray(hosts.fetch(gradients)).reshape(count, -1)

    held = list(read()) if len(groups) == 1 else None
    flat = [np.asarray(hosts.fetch(leaf)).reshape(-1) for leaf in leaves]
    weights = span_coefficients(
        (gradients[:, part], flat[index][part])
        for index, gradients in held or read()
        for part in _cut(flat[index].size)
    )
    moved = [np.empty_like(leaf) for leaf in flat]
    for index, gradients in held or read():
        for part in _cut(flat[index].size):
            theta = flat[index][part].astype(np.float64)
            moved[index][part] = theta - share * (theta - weights @ gradients[:, part])
    shaped = [new.reshape(leaf.shape) for new, leaf in zip(moved, leaves, strict=True)]
    return jax.tree.unflatten(tree, shaped)


def _cut(size: int) -> list[slice]:
    return [slice(start, start + _COLUMNS) for start in range(0, size, _COLUMNS)]


def _group(sizes: list[int], limit: int) -> list[tuple[int, ...]]:
    """Groups neighbours, up to a limit."""
    groups: list[list[int]] = []
    held = 0
    for index, size in enumerate(sizes):
        if not groups or held + size > limit:
            groups.append([])
            held = 0
        groups[-1].append(index)
        held += size
    return [tuple(group) for group in groups]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compute_gradients(
    output: Output, group: tuple[int, ...], params: PyTree, frozen: PyTree, rows: PyTree
) -> list[Array]:
    leaves, tree = jax.tree.flatten(params)

    def of_row(row: PyTree) -> list[Array]:
        def value(chosen: list[Array]) -> Array:
            mixed = dict(enumerate(leaves)) | dict(zip(group, chosen, strict=True))
            return output(jax.tree.unflatten(tree, list(mixed.values())), frozen, row)

        return jax.grad(value)([leaves[index] for index in group])

    return jax.lax.map(of_row, rows)
