"""Linear maps: one base fitted to all tasks (SR), or a base with an adapter a task (LoRA-ML).

Task t is y = (A* + U*_t U*_t^T) x + noise with x standard normal. Both methods fit T tasks; their
base is then adapted to one more task from few samples, by a low-rank update.

The squared loss of N samples is, but for a constant,

    |(M - M_t) S_t|^2 / 2,    S_t^2 = the mean of x x^T,    M_t = ordinary least squares,

so that a fit reads d x d numbers a task and no samples. `samples=None` is the limit of infinitely
many: S_t = 1 and M_t = A* + U*_t U*_t^T.

SR is solved in closed form; LoRA-ML with A in closed form for given adapters, and the adapters by
`minimize_squares`; the adaptation, a regression of reduced rank, by one singular value
decomposition.

Axes: T tasks, d inputs and outputs, k rank of an adapter, N samples of a task.

References:
    Provable Meta-Learning with Low-Rank Adaptations, arXiv 2410.22264, sections 2 to 4.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jaxtyping import Array, Float, PRNGKeyArray

from t3jax.lora_ml.least_squares import minimize_squares

_DRAWN = 10_000  # least number of samples drawn for a task: one program serves every N below it


@dataclasses.dataclass(frozen=True)
class LinearConfig:
    """One setting of the experiment; the defaults are the published ones.

    Attributes:
        width: d.
        tasks: T.
        rank: k, of the tasks' and of the trained adapters.
        samples: N, of each task; None means infinitely many.
        test_samples: n, of the test task; None means infinitely many.
        noise: Deviation of the noise of y.
        test_rank: Rank of the adapter of the test task; 0 means k.
        start: Standard deviation of the adapters' initial entries.
        steps: Steps of the joint fit.
    """

    width: int = 10
    tasks: int = 3
    rank: int = 1
    samples: int | None = 5000
    test_samples: int | None = 100
    noise: float = 0.01
    test_rank: int = 0
    start: float = 0.1
    steps: int = 100

    def __post_init__(self):
        for name in ("width", "tasks", "rank", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("samples", "test_samples"):
            count = getattr(self, name)
            if count is not None and count < self.width:
                raise ValueError(
                    f"{name} = {count} determines no map of {self.width} inputs; give at least "
                    f"{self.width}, or None for infinitely many"
                )


class Result(NamedTuple):
    """The results of one seed.

    Attributes:
        sr: SR's base, `[d, d]`.
        lora_ml: LoRA-ML's base, `[d, d]`.
        base: A*, `[d, d]`.
        updates: U_t U_t^T of the fit, `[T, d, d]`.
        true_updates: U*_t U*_t^T, `[T, d, d]`.
        test_task: A* + U* U*^T of the test task, `[d, d]`.
        sr_error: Mean of |y - prediction|^2 over x, without the noise, after SR's adaptation.
        lora_ml_error: The same after LoRA-ML's adaptation.
        loss: The joint loss after the fit, without the part of the noise.
    """

    sr: Array
    lora_ml: Array
    base: Array
    updates: Array
    true_updates: Array
    test_task: Array
    sr_error: Array
    lora_ml_error: Array
    loss: Array


class Task(NamedTuple):
    """The statistics of a task's samples in its squared loss: S, and the least-squares map."""

    root: Array
    least: Array


def run(config: LinearConfig, seeds: Sequence[int]) -> Result:
    """Runs both methods on one random instance for each seed.

    The seed decides the instance, its noise and the first adapters.
    """
    keys = jax.vmap(jax.random.key)(jnp.asarray(np.asarray(seeds), jnp.uint32))
    counts = [np.inf if n is None else n for n in (config.samples, config.test_samples)]
    knobs = (*counts, config.noise, config.start, config.test_rank or config.rank)
    drawn = max([_DRAWN, *(n for n in counts if np.isfinite(n))])
    shape = (config.width, config.tasks, config.rank, config.steps, int(drawn))
    return _run(shape, keys, [jnp.float32(knob) for knob in knobs])


@functools.partial(jax.jit, static_argnums=0)
def _run(shape: tuple[int, ...], keys: Array, knobs: list[Array]) -> Result:
    return jax.vmap(lambda key: _run_one(shape, key, knobs))(keys)


def _run_one(shape: tuple[int, ...], key: PRNGKeyArray, knobs: list[Array]) -> Result:
    d, tasks, k, steps, drawn = shape
    samples, test_samples, noise, deviation, test_rank = knobs
    of_base, of_tasks, of_samples, of_start = jax.random.split(key, 4)
    square = jax.random.normal(of_base, (d, d), jnp.float32)
    base = (square + square.T) / jnp.float32(2)
    updates = _products(jax.random.normal(of_tasks, (tasks + 1, d, k), jnp.float32))
    maps = base[None] + updates
    counts = jnp.where(jnp.arange(tasks + 1) < tasks, samples, test_samples)
    statistics = jax.vmap(lambda key, m, count: draw_task(key, m, count, noise, drawn))(
        jax.random.split(of_samples, tasks + 1), maps, counts
    )
    seen, test = (jax.tree.map(lambda x, at=at: x[at], statistics) for at in (slice(tasks), -1))
    start = deviation * jax.random.normal(of_start, (tasks, d, k), jnp.float32)
    sr = retrain(seen)
    lora_ml, fitted, loss = meta_learn(seen, start, steps)
    errors = [jnp.sum((adapt(x, test, test_rank) - maps[-1]) ** 2) for x in (sr, lora_ml)]
    return Result(sr, lora_ml, base, fitted, updates[:-1], maps[-1], errors[0], errors[1], loss)


def draw_task(
    key: PRNGKeyArray, task: Float[Array, "d d"], samples: Array, noise: Array, drawn: int
) -> Task:
    """Draws samples of a task and computes the statistics of its loss.

    `drawn` samples are drawn, of which the first N have weight; N is traced, and may be infinite.
    """
    d = len(task)
    count = jnp.minimum(samples, jnp.float32(drawn))
    counts = (jnp.arange(drawn, dtype=jnp.float32) < count).astype(jnp.float32)
    normal = jax.random.normal(key, (drawn, 2 * d), jnp.float32)  # in one: quicker to compile
    x, off = counts[:, None] * normal[:, :d], noise * normal[:, d:]
    moment = _dot(x.T, x) / count
    least = task + jnp.linalg.solve(moment, _dot(x.T, off) / count).T
    limit = jnp.isinf(samples)
    identity = jnp.eye(d, dtype=task.dtype)
    return Task(jnp.where(limit, identity, _root(moment)), jnp.where(limit, task, least))


def retrain(tasks: Task) -> Float[Array, "d d"]:
    """SR: the one map with the smallest summed loss; a first axis counts the tasks."""
    moments = _dot(tasks.root, tasks.root)
    return _dot(_dot(tasks.least, moments).sum(axis=0), jnp.linalg.inv(moments.sum(axis=0)))


def meta_learn(
    tasks: Task, start: Float[Array, "T d k"], steps: int
) -> tuple[Float[Array, "d d"], Float[Array, "T d d"], Float[Array, ""]]:
    """LoRA-ML: min over A and U_t of the sum over tasks of the loss of A + U_t U_t^T.

    A first axis counts the tasks, and the U_t begin with `start`. A, the updates U_t U_t^T and half
    the sum of squares are returned.

    References:
        arXiv 2410.22264, the objective of LoRA-ML.
    """
    moments = _dot(tasks.root, tasks.root)
    inverse = jnp.linalg.inv(moments.sum(axis=0))

    def base_for(factors: Array) -> Array:
        return _dot(_dot(tasks.least - _products(factors), moments).sum(axis=0), inverse)

    def residuals(factors: Array) -> Array:
        return _dot(base_for(factors)[None] + _products(factors) - tasks.least, tasks.root).reshape(
            -1
        )

    factors, loss = minimize_squares(residuals, start, steps)
    return base_for(factors), _products(factors), loss


def adapt(base: Float[Array, "d d"], task: Task, rank: int | Array) -> Float[Array, "d d"]:
    """The best A + U V^T for a task, of all updates of a rank, which may be traced.

    References:
        Multivariate Reduced-Rank Regression, Reinsel and Velu, theorem 2.2.
    """
    left, values, right = jnp.linalg.svd(_dot(task.least - base, task.root))
    values = jnp.where(jnp.arange(len(values), dtype=jnp.float32) < rank, values, 0)
    update = _dot(left * values[None], right)
    return base + _dot(update, jnp.linalg.inv(task.root))


def numerical_rank(difference: Float[Array, "*seeds d d"]) -> np.ndarray:
    """Number of singular values that exceed 1e-4 of the largest, `[...]`."""
    values = np.linalg.svd(np.asarray(difference), compute_uv=False)
    return (values > 1e-4 * values[..., :1]).sum(axis=-1)


def relative_error(fitted: Float[Array, "S *rest"], true: Float[Array, "S *rest"]) -> np.ndarray:
    """Frobenius norm of the error relative to the true matrices', of each seed `[S]`."""
    flat = [np.asarray(x).reshape(len(x), -1) for x in (fitted, true)]
    return np.linalg.norm(flat[0] - flat[1], axis=1) / np.linalg.norm(flat[1], axis=1)


def slope(x: Sequence[int], errors: Float[np.ndarray, "S X"]) -> tuple[float, float, float]:
    """Slope of log error against log x: the mean over seeds of least-squares slopes.

    The ends of Student's 95 % interval of the mean are returned too.
    """
    logs = np.log(np.asarray(x, float))
    logs -= logs.mean()
    slopes = np.log(np.asarray(errors, float)) @ logs / (logs @ logs)
    mean, deviation = slopes.mean(), scipy.stats.sem(slopes)
    half = scipy.stats.t.ppf((1 + 0.95) / 2, len(slopes) - 1) * deviation
    return float(mean), float(mean - half), float(mean + half)


def _products(factors: Array) -> Array:
    """U U^T, `[..., d, d]`."""
    return _dot(factors, factors.mT)


def _root(matrix: Array) -> Array:
    """The root of a symmetric positive matrix."""
    values, vectors = jnp.linalg.eigh(matrix)
    return _dot(vectors * jnp.sqrt(values)[None], vectors.T)


def _dot(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
