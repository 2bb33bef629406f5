"""The highest speeds of the machine, for benchmarks that report shares of them."""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peer import Peer
from benchmarks.side_by_side import seconds
from t3jax.lm import LMConfig
from t3jax.lm.decoder import Params

_REPEATS = 5


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """The speeds of the fastest library.

    Attributes:
        bandwidth: Bytes a second of a sum over float32 numbers that fit no cache.
        arithmetic: Floating-point operations a second of a large product.
        found: Every library's speeds, for the report.
    """

    bandwidth: float
    arithmetic: float
    found: dict[str, float]


def measure_ceilings() -> Ceilings:
    """A CPU's: a sum over 512 MB, products in float32 (in bfloat16 too by PyTorch)."""
    return _measure(512 * 2**20, 4096, ("float32", "bfloat16"), "cpu")


def measure_accelerator_ceilings(device: str) -> Ceilings:
    """An accelerator's: a sum over 4 GB, products in bfloat16; PyTorch works on that device."""
    return _measure(4 * 2**30, 8192, ("bfloat16",), device)


def _measure(size: int, side: int, dtypes: Sequence[str], device: str) -> Ceilings:
    """Measures reading and square products; the first dtype's product is the ceiling."""
    numbers = np.ones(size // 4, np.float32)
    placed = jax.device_put(numbers)
    total = jax.jit(jnp.sum)
    reads = {"jax": _time(lambda: jax.block_until_ready(total(placed)))}
    if device == "cpu":
        reads["numpy"] = _time(lambda: numbers.sum())
    del numbers, placed
    square = jax.random.normal(jax.random.key(0), (side, side), dtypes[0])
    product = jax.jit(lambda a: a @ a)
    products = {(dtypes[0], "jax"): _time(lambda: jax.block_until_ready(product(square)))}
    with Peer("Machine", device) as peer:
        reads["torch"] = peer("read", size, _REPEATS)
        for dtype in dtypes:
            products[dtype, "torch"] = peer("product", side, dtype, _REPEATS)
    bandwidths = {f"bytes a second, {name}": size / time for name, time in reads.items()}
    speeds = {key: 2 * side**3 / time for key, time in products.items()}
    named = {f"operations a second, {', '.join(key)}": speed for key, speed in speeds.items()}
    best = max(speed for (dtype, _), speed in speeds.items() if dtype == dtypes[0])
    return Ceilings(max(bandwidths.values()), best, bandwidths | named)


def weight_bytes(config: LMConfig, params: Params) -> int:
    """Bytes of the weights that a step of decoding for one row reads.

    They are all weights but an untied embedding table, and only the chosen experts.
    """
    total = sum(
        _scale_experts(config, path, leaf.nbytes)
        for path, leaf in jax.tree.leaves_with_path(params)
    )
    return total if config.tied else total - params["embed"]["weight"].nbytes


def _scale_experts(config: LMConfig, path: tuple, count: int) -> int:
    """The part of a leaf of the parameters that a token uses: the chosen share of experts."""
    names = [None, *(part.key for part in path)]  # the path of the embedding has two names
    if config.experts is None or names[-3] != "experts" or names[-2] not in ("gate", "up", "down"):
        return count
    return count * config.experts.chosen // config.experts.count


def forward_operations(config: LMConfig, params: Params, length: int) -> float:
    """Floating-point operations of the hidden states of a text, without logits.

    They are two for each token and each weight of a matrix, only the chosen experts, and
    attention's two products over the pairs of positions in causal order.
    """
    matrices = sum(
        _scale_experts(config, path, leaf.size)
        for path, leaf in jax.tree.leaves_with_path(params)
        if path[-1].key == "weight" and leaf.ndim > 1
    )
    weights = matrices - params["embed"]["weight"].size * (1 if config.tied else 2)
    pairs = length * (length + 1) / 2
    return 2 * weights * length + 4 * pairs * config.num_heads * config.head_dim * config.num_layers


def _time(work: Callable[[], Any]) -> float:
    """Median seconds; the smallest may be an outlier on a shared machine."""
    work()
    return statistics.median(seconds(work) for _ in range(_REPEATS))
