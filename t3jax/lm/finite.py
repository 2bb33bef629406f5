"""The search for NaN and Inf among weights."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

MAX_REPORTED = 12
_CHUNK = 1 << 18  # numbers, which fit into a CPU's cache


def is_finite(x: jax.Array) -> bool | jax.Array:
    """Whether an array holds finite numbers only."""
    if jax.process_count() > 1 or any(device.platform != "cpu" for device in x.devices()):
        return _all_finite(x)
    # On a CPU compilation would take longer than the search.
    parts = {str(shard.index): shard.data for shard in x.addressable_shards}
    return not any(holds_no_number(np.asarray(part)) for part in parts.values())


@jax.jit
def _all_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()


def holds_no_number(array: np.ndarray) -> bool:
    """Whether an array holds NaN or Inf: all bits of an exponent are set."""
    exponent = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}[array.dtype.name]
    mask = np.array(exponent, f"uint{8 * array.itemsize}")
    bits = np.ascontiguousarray(array).view(mask.dtype).reshape(-1)
    parts = (bits[i : i + _CHUNK] for i in range(0, len(bits), _CHUNK))
    return any(bool(((part & mask) == mask).any()) for part in parts)


def describe_not_finite(names: list[str], dtype: DTypeLike) -> str:
    """The message for tensors with NaN or Inf; the dtype is the weights' in memory."""
    more = f" and {len(names) - MAX_REPORTED} more" if len(names) > MAX_REPORTED else ""
    cause = (
        "or numbers too large for float16, which ends at 65504; load it as bfloat16 or float32"
        if jnp.dtype(dtype) == jnp.float16
        else "expected finite numbers; was it trained until it diverged, or is the file damaged?"
    )
    return f"NaN or Inf in {', '.join(names[:MAX_REPORTED])}{more}, {cause}"
