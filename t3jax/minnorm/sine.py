"""The sine wave with poisoned points: the error of each method after a few epochs.

A perceptron with two hidden layers is fitted to 50 points of a sine wave and to 5 points with label
1.5. The 5 are to be forgotten. A method has some epochs, each one step on all retain points, and is
judged by its largest error against the sine wave.

Axes: N points, W width.

References:
    Machine Unlearning under Overparameterization, arXiv 2505.22601, the data poisoning experiment.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from t3jax import optimizer
from t3jax.minnorm.projection import span_coefficients

Params = Any  # a list of layers, "w" and "b" of each
Method = Literal["minnorm", "retrain", "ridge", "l1", "gd", "ngd", "ngp", "ga"]
METHODS: tuple[Method, ...] = ("minnorm", "retrain", "ridge", "l1", "gd", "ngd", "ngp", "ga")
_EDGE = 5 * np.pi  # points lie in [-_EDGE, _EDGE]
_FALSE = 1.5  # label of the poisoned points
RETAIN, FORGET = 50, 5
_WIDTH = 300


@dataclasses.dataclass(frozen=True)
class SineConfig:
    """A method and its settings.

    Attributes:
        method: "gd" is gradient descent on the retain points; "ngd" adds noise to the gradient,
            "ngp" also ascends on the forget points, "ga" ascends on them alone, "ridge" and "l1"
            add a penalty, "retrain" starts from random weights.
        epochs: Steps, each on all points.
        learning_rate: AdamW's.
        strength: Share of the off-span part that a projection removes ("minnorm"), weight of the
            squared norm ("ridge"), of the sum of absolutes ("l1") or of the ascent ("ngp"), or
            the deviation of the noise ("ngd").
        decay: Factor of the strength after each projection or, for "ridge", epoch.
        every: Epochs from one projection to the next.
        last_epochs: Epochs at the end without a projection.
        stale: A projecting step takes its gradient as the published code does: activations from
            before the projection, weights from after it.
    """

    method: Method
    epochs: int
    learning_rate: float = 1e-3
    strength: float = 0.0
    decay: float = 1.0
    every: int = 1
    last_epochs: int = 0
    stale: bool = False


def make_points(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The points of a seed, retain points first: x and y."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-_EDGE, _EDGE, RETAIN + FORGET).astype(np.float32)
    return x, np.where(np.arange(len(x)) < RETAIN, np.sin(x), _FALSE).astype(np.float32)


def init_perceptron(key: PRNGKeyArray, width: int = _WIDTH) -> Params:
    """Weights and biases uniform within in^-1/2, as PyTorch's linear layers begin."""
    layers = []
    for k, fan_in, fan_out in zip(
        jax.random.split(key, 3), (1, width, width), (width, width, 1), strict=True
    ):
        w, b = jax.random.split(k)
        edge = fan_in**-0.5
        layers.append(
            {
                "w": jax.random.uniform(w, (fan_in, fan_out), jnp.float32, -edge, edge),
                "b": jax.random.uniform(b, (fan_out,), jnp.float32, -edge, edge),
            }
        )
    return layers


def predict(params: Params, x: Float[Array, "N"]) -> Float[Array, "N"]:
    """The perceptron's outputs."""
    hidden = x[:, None]
    for layer in params[:-1]:
        hidden = jax.nn.silu(hidden @ layer["w"] + layer["b"][None])
    return (hidden @ params[-1]["w"] + params[-1]["b"][None])[:, 0]


def squared_error(params: Params, x: Float[Array, "N"], y: Float[Array, "N"]) -> Float[Array, ""]:
    """Mean squared error."""
    return jnp.mean((predict(params, x) - y) ** 2)


def largest_error(params: Params) -> Float[Array, ""]:
    """The largest error against the sine wave over 1,000 even points."""
    x = jnp.linspace(-_EDGE, _EDGE, 1000, dtype=jnp.float32)
    return jnp.max(jnp.abs(predict(params, x) - jnp.sin(x)))


def init_fit(seeds: Sequence[int]) -> tuple[PyTree, Array, Array]:
    """Random weights and the points of some seeds: the state of `fit`, and x and y `[seeds, N]`."""
    points = [make_points(seed) for seed in seeds]
    params = jax.vmap(lambda seed: init_perceptron(jax.random.key(seed)))(jnp.asarray(seeds))
    state = params, _adamw(jnp.float32(1e-3)).init(params)
    return state, jnp.stack([p[0] for p in points]), jnp.stack([p[1] for p in points])


def _adamw(rate: float | Array) -> optax.GradientTransformation:
    return optax.adamw(rate, weight_decay=0.01)


@functools.partial(jax.jit, static_argnames=("steps", "learning_rate"), donate_argnums=0)
def fit(
    state: PyTree, x: Array, y: Array, steps: int, learning_rate: float = 1e-3
) -> tuple[PyTree, Array]:
    """Fits all points by AdamW, several seeds (the first axis) at once.

    The state is weights and optimizer state. The mean squared error of each seed before the last
    step is returned too.
    """
    adamw = _adamw(learning_rate)

    def step(state: PyTree, _: None) -> tuple[PyTree, Array]:
        loss, grads = jax.vmap(jax.value_and_grad(squared_error))(state[0], x, y)
        return optimizer.step(adamw, state, grads), loss

    state, losses = jax.lax.scan(step, state, None, steps)
    return state, losses[-1]


def unlearn(config: SineConfig, params: Params, x: Array, y: Array, seeds: Sequence[int]) -> Params:
    """Unlearns the poisoned points by a method, several seeds (the first axis) at once.

    `params` are fitted weights and stay as they are. Retain points are first in x and y. The seeds
    decide the noise, and the first weights of "retrain".
    """
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds))
    if config.method == "retrain":
        params = jax.vmap(lambda key: init_perceptron(jax.random.fold_in(key, 1)))(keys)
    state = params, _adamw(jnp.float32(1e-3)).init(params)
    settings = jnp.float32(config.learning_rate), jnp.float32(config.decay)
    done, share = 0, config.strength
    while done < config.epochs:
        steps, strength = config.epochs - done, jnp.float32(config.strength)
        before = state[0]
        if config.method == "minnorm":
            # One run lasts until the next projection, the last one until the end.
            if done < config.epochs - config.last_epochs:
                state = _project_seeds(state[0], x, share), state[1]
                share *= config.decay
                if done + config.every < config.epochs - config.last_epochs:
                    steps = config.every
            if config.stale:
                state = _take_stale_step(before, state, x, y, settings)
                steps, done = steps - 1, done + 1
        if steps:
            state = _run(config.method, steps, state, x, y, keys, strength, settings)
        done += steps
    return state[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(
    method: Method,
    steps: int,
    state: PyTree,
    x: Array,
    y: Array,
    keys: Array,
    strength: Array,
    settings: tuple[Array, Array],
) -> PyTree:
    rate, decay = settings
    adamw = _adamw(rate)

    def loss(params: Params, x: Array, y: Array, weight: Array) -> Array:
        retain = squared_error(params, x[:RETAIN], y[:RETAIN])
        if method in ("ngp", "ga"):
            forget = squared_error(params, x[RETAIN:], y[RETAIN:])
            return -forget if method == "ga" else retain - weight * forget
        if method == "ridge":
            return retain + weight * optax.tree.norm(params, squared=True)
        if method == "l1":
            return retain + weight * optax.tree.norm(params, ord=1)
        return retain

    def step(state: PyTree, epoch: Array) -> tuple[PyTree, None]:
        weight = strength * decay ** epoch.astype(jnp.float32)
        if method == "l1":  # falls to 0 on a line
            weight = strength * (1 - epoch.astype(jnp.float32) / steps)
        grads = jax.vmap(jax.grad(loss), (0, 0, 0, None))(state[0], x, y, weight)
        if method == "ngd":
            noise = jax.vmap(
                lambda key, tree: optax.tree.random_like(jax.random.fold_in(key, epoch), tree)
            )(keys, grads)
            grads = jax.tree.map(lambda g, n: g + strength * n, grads, noise)
        return optimizer.step(adamw, state, grads), None

    return jax.lax.scan(step, state, jnp.arange(steps))[0]


# The projection. A layer's gradient at a point is the outer product of its input and its backward
# value: in bases of the N inputs and the N backward values it has N x N entries, not W x W.


def project_one(params: Params, x: np.ndarray, share: float) -> Params:
    """Removes a share of the part of one seed's weights that the outputs at points do not need.

    The reduced gradients and weights have the same inner products as the whole ones. The new
    weights are on the host.
    """
    layers = jax.device_get(params)
    blocks, bases = [], []
    for layer, given, back in zip(layers, *jax.device_get(_find_factors(params, x)), strict=True):
        left, given = np.linalg.qr(given.T.astype(np.float64))  # [in, n], [n, N]
        right, returned = np.linalg.qr(back.T.astype(np.float64))
        gradients = np.einsum("an,bn->nab", given, returned).reshape(len(x), -1)
        blocks.append((gradients, (left.T @ layer["w"] @ right).ravel()))
        blocks.append((returned.T, right.T @ layer["b"]))
        bases.append((left, given, right, returned))
    weights = span_coefficients(blocks)
    moved = []
    for layer, (left, given, right, returned) in zip(layers, bases, strict=True):
        span = {
            "w": left @ ((given * weights) @ returned.T) @ right.T,
            "b": right @ (returned @ weights),
        }
        moved.append(
            {
                name: (leaf - share * (leaf - span[name])).astype(np.float32)
                for name, leaf in layer.items()
            }
        )
    return moved


@jax.jit
def _find_factors(params: Params, x: Array) -> tuple[list[Array], list[Array]]:
    """Inputs of each layer, and the outputs' derivatives by the layer's outputs, `[N, W]`."""
    inputs, before = _forward(params, x)
    return inputs, _backward(params, before, jnp.ones_like(x))


def _forward(params: Params, x: Array) -> tuple[list[Array], list[Array]]:
    inputs, before = [x[:, None]], []
    for layer in params:
        before.append(inputs[-1] @ layer["w"] + layer["b"][None])
        inputs.append(jax.nn.silu(before[-1]))
    return inputs[:-1], before


def _backward(params: Params, before: list[Array], back: Array) -> list[Array]:
    returns = [back[:, None]]
    for layer, value in zip(params[:0:-1], before[-2::-1], strict=True):
        sigmoid = jax.nn.sigmoid(value)
        slope = sigmoid * (1 + value * (1 - sigmoid))
        returns.append((returns[-1] @ layer["w"].T) * slope)
    return returns[::-1]


def _project_seeds(params: Params, x: Array, share: float) -> Params:
    host, points = jax.device_get(params), np.asarray(x)[:, :RETAIN]
    moved = [
        project_one(jax.tree.map(lambda leaf, i=i: leaf[i], host), x, share)
        for i, x in enumerate(points)
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *moved)


@jax.jit
def _take_stale_step(
    old: Params, state: PyTree, x: Array, y: Array, settings: tuple[Array, Array]
) -> PyTree:
    """A step after a projection, as published: activations of the weights before it."""

    def gradient(old: Params, new: Params, x: Array, y: Array) -> Params:
        inputs, before = _forward(old, x)
        error = 2 * (before[-1][:, 0] - y) / len(x)
        returns = _backward(new, before, error)
        return [
            {"w": given.T @ back, "b": jnp.sum(back, axis=0)}
            for given, back in zip(inputs, returns, strict=True)
        ]

    grads = jax.vmap(gradient)(old, state[0], x[:, :RETAIN], y[:, :RETAIN])
    return optimizer.step(_adamw(settings[0]), state, grads)


def published(epochs: int, stale: bool = False) -> list[SineConfig]:
    """The methods at the settings that the authors found best for 10, 100 or 1000 epochs.

    Where no learning rate is published it is MinNorm-OG's.
    """
    at = (10, 100, 1000).index(epochs)
    return [
        SineConfig(
            "minnorm", epochs, 1e-3, 0.1, 0.9, (1, 2, 10)[at], (2, 50, 500)[at], stale=stale
        ),
        SineConfig("retrain", epochs, 1e-4),
        SineConfig("ridge", epochs, strength=3.0, decay=(0.6, 0.9, 0.9)[at]),
        SineConfig("l1", epochs, strength=0.1),
        SineConfig("gd", epochs),
        SineConfig("ngd", epochs, strength=(0.5, 0.1, 1.0)[at]),
        SineConfig("ngp", epochs, strength=(1.0, 0.01, 0.001)[at]),
        SineConfig("ga", epochs),
    ]
