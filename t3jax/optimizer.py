"""A step of the optimizer, and its state, for the trainers of heads and language models."""

import jax
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from t3jax.sharding import place_abstract


def step(optimizer: optax.GradientTransformation, state: PyTree, grads: PyTree) -> PyTree:
    """One step of an optimizer on the training state `(trained, optimizer state)`."""
    trained, opt_state = state
    # Optax relies on implicit promotion in its bias correction.
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = optimizer.update(grads, opt_state, trained)
    return optax.apply_updates(trained, updates), opt_state


def abstract_state(
    optimizer: optax.GradientTransformation, state: PyTree, placed: PyTree, mesh: Mesh
) -> PyTree:
    """`(trained, optimizer state)` as shapes with shardings: moments are placed as their weights.

    `placed` are the shardings of the trained weights; counts and the like are replicated.
    """
    trained, opt_state = state
    replicated = NamedSharding(mesh, P())
    placed_opt = optax.tree.map_params(
        optimizer, lambda _, s: s, opt_state, placed, transform_non_params=lambda _: replicated
    )
    return place_abstract((trained, opt_state), (placed, placed_opt))


def reproducible() -> dict[str, bool] | None:
    """Compiler options with which a program gives the same bits in every run."""
    # Without it, scatter-adds and the choice of kernels differ between runs on a GPU.
    return {"xla_gpu_deterministic_ops": True} if jax.default_backend() == "gpu" else None
