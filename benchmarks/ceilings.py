"""What the machine can do at best: the speeds that benchmarks are shares of."""

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peer import Peer
from benchmarks.side_by_side import seconds
from t3jax.lm import LMConfig

_READ = 512 * 2**20  # bytes
_SIDE = 4096  # of the matrices that are multiplied
_REPEATS = 5


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """The fastest of what any library here does.

    Attributes:
        bandwidth: Bytes a second of a sum over 512 MB of float32.
        arithmetic: Floating-point operations a second of a large float32 product.
        found: Every library's speeds, for the report.
    """

    bandwidth: float
    arithmetic: float
    found: dict[str, float]


def measure_ceilings() -> Ceilings:
    """Measures both, by NumPy, JAX and PyTorch (which also multiplies in bfloat16)."""
    numbers = np.ones(_READ // 4, np.float32)
    placed = jax.device_put(numbers)
    total = jax.jit(jnp.sum)
    reads = {
        "numpy": _typical(lambda: numbers.sum()),
        "jax": _typical(lambda: jax.block_until_ready(total(placed))),
    }
    del numbers, placed
    square = jax.random.normal(jax.random.key(0), (_SIDE, _SIDE), jnp.float32)
    product = jax.jit(lambda a: a @ a)
    products = {"jax": _typical(lambda: jax.block_until_ready(product(square)))}
    with Peer("Machine") as peer:
        reads["torch"] = peer("read", _READ, _REPEATS)
        products["torch"] = peer("product", _SIDE, "float32", _REPEATS)
        products["torch, bfloat16"] = peer("product", _SIDE, "bfloat16", _REPEATS)
    bandwidths = {f"bytes a second, {name}": _READ / time for name, time in reads.items()}
    speeds = {f"operations a second, {name}": 2 * _SIDE**3 / t for name, t in products.items()}
    float32 = [speed for name, speed in speeds.items() if "bfloat16" not in name]
    return Ceilings(max(bandwidths.values()), max(float32), bandwidths | speeds)


def weight_bytes(config: LMConfig, params: Any) -> int:
    """What a step of decoding has to read: all weights but an embedding table of its own."""
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return total if config.tied else total - params["embed"]["weight"].nbytes


def forward_operations(config: LMConfig, params: Any, length: int) -> float:
    """Floating-point operations that the hidden states of a text of so many tokens need.

    Two for each weight of a matrix and token, and attention's two products over the pairs of
    positions in causal order. No logits.
    """
    matrices = sum(leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim > 1)
    weights = matrices - params["embed"]["weight"].size * (1 if config.tied else 2)
    pairs = length * (length + 1) / 2
    return 2 * weights * length + 4 * pairs * config.num_heads * config.head_dim * config.num_layers


def _typical(work: Callable[[], Any]) -> float:
    """Median seconds: a freak of a shared machine once was twice as fast."""
    work()
    return statistics.median(seconds(work) for _ in range(_REPEATS))
