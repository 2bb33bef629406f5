"""NaN and Inf among weights: looked for in one pass, and named."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MAX_REPORTED = 12
_LOOKED_AT = 1 << 18  # numbers at a time: they stay in the cache


def is_finite(x: jax.Array) -> Any:
    """Whether an array holds finite numbers only, as a truth value or an array of one."""
    if jax.process_count() > 1 or any(device.platform != "cpu" for device in x.devices()):
        return _all_finite(x)
    # A CPU would compile for longer than it looks.
    parts = {str(shard.index): shard.data for shard in x.addressable_shards}
    return not any(holds_no_number(np.asarray(part)) for part in parts.values())


@jax.jit
def _all_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()


def holds_no_number(array: np.ndarray) -> bool:
    """Whether there is NaN or Inf: all bits of an exponent are set."""
    exponent = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}[array.dtype.name]
    mask = np.array(exponent, f"uint{8 * array.itemsize}")
    bits = np.ascontiguousarray(array).view(mask.dtype).reshape(-1)
    parts = (bits[i : i + _LOOKED_AT] for i in range(0, len(bits), _LOOKED_AT))
    return any(bool(((part & mask) == mask).any()) for part in parts)


def describe_not_finite(names: list[str], dtype: Any) -> str:
    """What is wrong with tensors that hold no finite numbers.

    Args:
        names: Theirs.
        dtype: Of the weights in memory.
    """
    more = f" and {len(names) - MAX_REPORTED} more" if len(names) > MAX_REPORTED else ""
    cause = (
        "or numbers too large for float16, which ends at 65504; load it as bfloat16 or float32"
        if jnp.dtype(dtype) == jnp.float16
        else "expected finite numbers; was it trained until it diverged, or is the file damaged?"
    )
    return f"NaN or Inf in {', '.join(names[:MAX_REPORTED])}{more}, {cause}"
