"""Low-rank updates (LoRA): a linear layer multiplies by W + s B A, and only A and B are trained.

While training the sum is never formed: the decoder adds s B (A x) to W x, which costs neither a
second copy of the weights nor their full gradients. The saved weights are merged.

Axes: R rank.

References:
    LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685, section 4.1.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from t3jax.lm.decoder import Lora, Params


def init_lora(params: Params, rank: int, layers: Sequence[str], key: PRNGKeyArray) -> Lora:
    """Factors whose product is 0: A normal with deviation in^-1/2, B zero.

    `layers` are names of linear layers, such as "q" or "down"; all layers of these names are
    updated. The result has, by path of the layer, "a" `[R, in]` and "b" `[out, R]`, float32.
    """
    shapes = {}
    for path, leaf in jax.tree.leaves_with_path(params):
        *module, kind = [str(part.key) for part in path]
        if "experts" in module and module[-1] in layers:
            raise ValueError(
                f"lora_layers: {module[-1]} is a matrix of each expert in this model, and experts "
                "have no low-rank updates here; expected layers of the attention: q, k, v, o"
            )
        if kind == "weight" and module[-1] in layers and leaf.ndim == 2:
            shapes["/".join(module)] = leaf.shape
    if unknown := sorted(set(layers) - {path.split("/")[-1] for path in shapes}):
        raise ValueError(f"lora_layers: the model has no linear layer named {unknown}")
    keys = jax.random.split(key, len(shapes))
    return {
        path: {
            "a": jax.random.normal(k, (rank, fan_in), jnp.float32) * jnp.float32(fan_in**-0.5),
            "b": jnp.zeros((fan_out, rank), jnp.float32),
        }
        for (path, (fan_out, fan_in)), k in zip(shapes.items(), keys, strict=True)
    }


def scale_lora(lora: Lora, scale: float) -> Lora:
    """The factors of s B A."""
    return {
        path: {"a": factors["a"], "b": factors["b"] * jnp.asarray(scale, factors["b"].dtype)}
        for path, factors in lora.items()
    }


def merge_lora(params: Params, lora: Lora, scale: float) -> Params:
    """The weights W + s B A, a tree like `params`.

    Each sum is taken in float32 and cast to the weight's dtype; other leaves are not copied.
    """
    scaled = scale_lora(lora, scale)

    def merge(path: tuple, leaf: jax.Array) -> jax.Array:
        *module, kind = [str(part.key) for part in path]
        factors = scaled.get("/".join(module)) if kind == "weight" else None
        return leaf if factors is None else _merge(leaf, factors["a"], factors["b"])

    return jax.tree.map_with_path(merge, params)


@jax.jit
def _merge(weight: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    update = jnp.matmul(b, a, precision=jax.lax.Precision.HIGHEST)
    return (weight.astype(jnp.float32) + update).astype(weight.dtype)
