"""A shallow network: the same two methods where nothing has a closed form.

Task t is y = c^T relu((A* + U*_t U*_t^T) x) + noise with x standard normal and c known. The
published description leaves open the activation, c and the scale of the weights. Here c, A* and U*
are normal, A* and the products divided by the root of d, so that the activation's inputs are of
order 1.

All three fits (SR's base, LoRA-ML's base and adapters, and the adaptation U V^T to the test task)
minimise the mean squared error by `minimize_squares` from random starts; the fit with the smallest
training loss counts. The publication uses AdamW over tens of thousands of epochs.

Axes: T tasks, d inputs and width, k rank of an adapter, N samples of a task.

References:
    Provable Meta-Learning with Low-Rank Adaptations, arXiv 2410.22264, experiments.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from t3jax.lora_ml.least_squares import minimize_squares

_FRESH = 2000  # points of the test task that a base's adaptation is judged on


@dataclasses.dataclass(frozen=True)
class ShallowConfig:
    """One setting of the experiment; the defaults are published ones.

    Attributes:
        width: d.
        tasks: T.
        rank: k, of the tasks' and of the trained adapters.
        samples: N, of each task.
        test_samples: n, of the test task.
        noise: Deviation of the noise of y.
        test_rank: Rank of the adapter of the test task; 0 means k.
        starts: Random starts of each fit.
        steps: Steps from each start.
    """

    width: int = 10
    tasks: int = 3
    rank: int = 1
    samples: int = 1000
    test_samples: int = 100
    noise: float = 0.1
    test_rank: int = 0
    starts: int = 3
    steps: int = 60


class Result(NamedTuple):
    """The results of one seed, mean squared errors.

    Attributes:
        sr_loss: SR's on its samples.
        lora_ml_loss: LoRA-ML's on its samples; a perfect fit has noise^2.
        sr_error: On fresh points of the test task, without noise, after SR's adaptation.
        lora_ml_error: The same after LoRA-ML's adaptation.
        unadapted_error: The same for LoRA-ML's base without adaptation.
    """

    sr_loss: Array
    lora_ml_loss: Array
    sr_error: Array
    lora_ml_error: Array
    unadapted_error: Array


def predict(
    weights: Float[Array, "d d"], outer: Float[Array, "d"], x: Float[Array, "N d"]
) -> Float[Array, "N"]:
    """c^T relu(M x) of each point, M the weights and c the outer weights."""
    return jax.nn.relu(x @ weights.T) @ outer


def run(config: ShallowConfig, seeds: Sequence[int]) -> Result:
    """Runs both methods on one random instance for each seed.

    The seed decides the instance, its samples and the starts.
    """
    keys = jax.vmap(jax.random.key)(jnp.asarray(np.asarray(seeds), jnp.uint32))
    return _run(config, keys)


@functools.partial(jax.jit, static_argnums=0)
def _run(config: ShallowConfig, keys: Array) -> Result:
    return jax.lax.map(functools.partial(_run_one, config), keys)


def _run_one(config: ShallowConfig, key: PRNGKeyArray) -> Result:
    d, tasks, k = config.width, config.tasks, config.rank
    of_base, of_tasks, of_outer, of_samples, of_fits = jax.random.split(key, 5)
    root = jnp.float32(d**0.5)
    outer = jax.random.normal(of_outer, (d,), jnp.float32)
    factors = jax.random.normal(of_tasks, (tasks + 1, d, k), jnp.float32)
    maps = jax.random.normal(of_base, (d, d), jnp.float32)[None] + factors @ factors.mT
    maps = maps / root

    draw = functools.partial(_draw_samples, config, outer)
    of_seen, of_test, of_fresh = jax.random.split(of_samples, 3)
    x, y, _ = jax.vmap(lambda key, m: draw(key, m, config.samples))(
        jax.random.split(of_seen, tasks), maps[:-1]
    )
    test_x, test_y, _ = draw(of_test, maps[-1], config.test_samples)
    fresh_x, _, fresh_y = draw(of_fresh, maps[-1], _FRESH)

    def residuals(weights: Array) -> Array:
        return (jax.vmap(predict, (0, None, 0))(weights, outer, x) - y).reshape(-1)

    def sr_residuals(base: Array) -> Array:
        return residuals(jnp.broadcast_to(base, (tasks, d, d)))

    def lora_ml_residuals(params: tuple[Array, Array]) -> Array:
        base, adapters = params
        return residuals(base[None] + adapters @ adapters.mT)

    def start_base(key: PRNGKeyArray) -> Array:
        return jax.random.normal(key, (d, d), jnp.float32) / root

    def start_both(key: PRNGKeyArray) -> tuple[Array, Array]:
        of_base, of_adapters = jax.random.split(key)
        adapters = 0.1 * jax.random.normal(of_adapters, (tasks, d, k), jnp.float32)
        return start_base(of_base), adapters

    rank = config.test_rank or k

    def adapt(base: Array, key: PRNGKeyArray) -> Array:
        def test_residuals(update: tuple[Array, Array]) -> Array:
            return predict(base + update[0] @ update[1].T, outer, test_x) - test_y

        def start(key: PRNGKeyArray) -> tuple[Array, Array]:
            drawn = jax.random.normal(key, (2, d, rank), jnp.float32) / root
            return drawn[0], 0.1 * drawn[1]

        (left, right), _ = _fit(test_residuals, start, key, config)
        return base + left @ right.T

    of_base, of_both, *of_adapting = jax.random.split(of_fits, 4)
    sr, sr_sum = _fit(sr_residuals, start_base, of_base, config)
    (lora_ml, _), lora_ml_sum = _fit(lora_ml_residuals, start_both, of_both, config)
    adapted = [adapt(base, key) for base, key in zip((sr, lora_ml), of_adapting, strict=True)]
    errors = [
        jnp.mean((predict(weights, outer, fresh_x) - fresh_y) ** 2)
        for weights in (*adapted, lora_ml)
    ]
    share = jnp.float32(2 / (tasks * config.samples))
    return Result(sr_sum * share, lora_ml_sum * share, *errors)


def _draw_samples(
    config: ShallowConfig, outer: Array, key: PRNGKeyArray, weights: Array, count: int
) -> tuple[Array, Array, Array]:
    """Draws x, and y with noise and without."""
    of_x, of_noise = jax.random.split(key)
    x = jax.random.normal(of_x, (count, config.width), jnp.float32)
    clean = predict(weights, outer, x)
    return x, clean + config.noise * jax.random.normal(of_noise, (count,), jnp.float32), clean


def _fit(
    residuals: Callable[[PyTree], Array],
    start: Callable[[PRNGKeyArray], PyTree],
    key: PRNGKeyArray,
    config: ShallowConfig,
) -> tuple[PyTree, Array]:
    """Fits from random starts and returns the fit with the smallest training loss."""
    starts = jax.vmap(start)(jax.random.split(key, config.starts))
    fits, sums = jax.lax.map(lambda x: minimize_squares(residuals, x, config.steps), starts)
    best = jnp.argmin(sums)
    return jax.tree.map(lambda leaf: leaf[best], fits), sums[best]
