"""What the machine can do at best: the speeds that benchmarks are shares of."""

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

_REPEATS = 5


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """The fastest of what any library here does.

    Attributes:
        bandwidth: Bytes a second of a sum over float32 numbers that fit no cache.
        arithmetic: Floating-point operations a second of a large product.
        found: Every library's speeds, for the report.
    """

    bandwidth: float
    arithmetic: float
    found: dict[str, float]


def measure_ceilings() -> Ceilings:
    """A CPU's: a sum over 512 MB, products in float32 (by PyTorch in bfloat16 too, to compare)."""
    return _measure(512 * 2**20, 4096, ("float32", "bfloat16"), "cpu")


def measure_accelerator_ceilings(device: str) -> Ceilings:
    """An accelerator's: a sum over 4 GB, products in bfloat16; PyTorch works on that device."""
    return _measure(4 * 2**30, 8192, ("bfloat16",), device)


def _measure(size: int, side: int, dtypes: Sequence[str], device: str) -> Ceilings:
    """Speeds of reading bytes and of square products; the first dtype's is the ceiling."""
    numbers = np.ones(size // 4, np.float32)
    placed = jax.device_put(numbers)
    total = jax.jit(jnp.sum)
    reads = {"jax": _typical(lambda: jax.block_until_ready(total(placed)))}
    if device == "cpu":
        reads["numpy"] = _typical(lambda: numbers.sum())
    del numbers, placed
    square = jax.random.normal(jax.random.key(0), (side, side), dtypes[0])
    product = jax.jit(lambda a: a @ a)
    products = {(dtypes[0], "jax"): _typical(lambda: jax.block_until_ready(product(square)))}
    with Peer("Machine", device) as peer:
        reads["torch"] = peer("read", size, _REPEATS)
        for dtype in dtypes:
            products[dtype, "torch"] = peer("product", side, dtype, _REPEATS)
    bandwidths = {f"bytes a second, {name}": size / time for name, time in reads.items()}
    speeds = {key: 2 * side**3 / time for key, time in products.items()}
    named = {f"operations a second, {', '.join(key)}": speed for key, speed in speeds.items()}
    best = max(speed for (dtype, _), speed in speeds.items() if dtype == dtypes[0])
    return Ceilings(max(bandwidths.values()), best, bandwidths | named)


def weight_bytes(config: LMConfig, params: Any) -> int:
    """What a step of decoding for one row has to read.

    All weights but an embedding table of its own, and of a layer's experts the chosen ones.
    """
    total = sum(_met(config, path, leaf.nbytes) for path, leaf in jax.tree.leaves_with_path(params))
    return total if config.tied else total - params["embed"]["weight"].nbytes


def _met(config: LMConfig, path: tuple, count: int) -> int:
    """How much of a leaf of the parameters a token meets: of experts its share."""
    names = [None, *(part.key for part in path)]  # of the embedding there are two
    if config.experts is None or names[-3] != "experts" or names[-2] not in ("gate", "up", "down"):
        return count
    return count * config.experts.chosen // config.experts.count


def forward_operations(config: LMConfig, params: Any, length: int) -> float:
    """Floating-point operations that the hidden states of a text need.

    Two for each weight of a matrix and token, of experts the chosen ones, and attention's two
    products over the pairs of positions in causal order. No logits.
    """
    matrices = sum(
        _met(config, path, leaf.size)
        for path, leaf in jax.tree.leaves_with_path(params)
        if path[-1].key == "weight" and leaf.ndim > 1
    )
    weights = matrices - params["embed"]["weight"].size * (1 if config.tied else 2)
    pairs = length * (length + 1) / 2
    return 2 * weights * length + 4 * pairs * config.num_heads * config.head_dim * config.num_layers


def _typical(work: Callable[[], Any]) -> float:
    """Median seconds: a freak of a shared machine once was twice as fast."""
    work()
    return statistics.median(seconds(work) for _ in range(_REPEATS))
