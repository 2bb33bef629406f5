"""The exactness theorems of MinNorm-OG on random instances, in float64.

Each function draws one instance, solves the first-order problem, and returns the distance from an
answer that is known in another way: 0 up to rounding. The first-order problem is

    minimise R(theta + delta)   where delta is orthogonal to every retain point's gradient.

Axes: N retain points, P points with those to forget, D inputs, H width.

References:
    Machine Unlearning under Overparameterization, arXiv 2505.22601, theorems 1 to 5.
"""

from collections.abc import Callable

import numpy as np
import scipy.linalg
from jaxtyping import Float

from t3jax.minnorm.projection import span_coefficients


def loss_gradient(rng: np.random.Generator) -> float:
    """Theorem 1: where all points are interpolated, every gradient of a squared loss is 0.

    The losses are the retain and forget losses of a two-layer perceptron; descent, ascent and their
    sums combine these gradients. Returned is the largest entry, relative to the gradients for
    labels that are off by 1.
    """
    x, y, retained = _draw_points(rng)
    inner = rng.normal(size=(2 * len(x), x.shape[1]))
    features = np.tanh(x @ inner.T)
    outer = np.linalg.lstsq(features, y, rcond=None)[0]
    interpolated, off = features @ outer - y, np.ones(len(y))
    largest = []
    for error in (interpolated, off):
        for part in (slice(None, retained), slice(retained, None)):
            back = error[part, None] * outer * (1 - features[part] ** 2)
            gradients = (features[part].T @ error[part], back.T @ x[part])
            largest.append(max(np.abs(gradient).max() for gradient in gradients))
    return max(largest[:2]) / min(largest[2:])


def linear_model(rng: np.random.Generator) -> float:
    """Theorem 2: one whole projection of a linear model is the retain set's least-norm model.

    The relative distance of the two is returned.
    """
    x, y, retained = _draw_points(rng)
    theta = _draw_interpolator(rng, x, y)
    x = x[:retained]
    cut = rng.integers(1, x.shape[1])  # in two blocks
    projected = x.T @ span_coefficients([(x[:, :cut], theta[:cut]), (x[:, cut:], theta[cut:])])
    return _distance(projected, np.linalg.pinv(x) @ y[:retained])


def deep_linear_net(rng: np.random.Generator) -> float:
    """Lemma 1 and theorem 3: a deep linear net, R the norm of the product w of its layers.

    R_hat allows changes of the first layer alone: it is 0 there and infinite elsewhere. Then w is
    linear in delta and the first-order problem is a least-squares problem. Returned is the relative
    distance of its solution w to the retain set's least-norm w.
    """
    x, y, retained = _draw_points(rng)
    w = _draw_interpolator(rng, x, y)
    depth, width = int(rng.integers(2, 5)), int(rng.integers(2, 6))
    above = np.linalg.multi_dot(
        [rng.normal(size=(1, width)), *rng.normal(size=(depth - 2, width, width)), np.eye(width)]
    )[0]
    first = rng.normal(size=(width, x.shape[1]))
    first += np.outer(above, w - above @ first) / (above @ above)  # so that the product is w
    gradients = np.stack([np.outer(above, point).ravel() for point in x[:retained]])
    free = scipy.linalg.null_space(gradients)  # the deltas that are allowed
    product = np.kron(above[None], np.eye(x.shape[1]))  # of delta to the change of w
    delta = free @ np.linalg.lstsq(product @ free, -(above @ first), rcond=1e-10)[0]
    solution = above @ (first + delta.reshape(first.shape))
    return _distance(solution, np.linalg.pinv(x[:retained]) @ y[:retained])


def least_parameters(rng: np.random.Generator) -> float:
    """Theorem 4: the least-norm w, spread evenly over the layers, has the least parameter norm.

    It is compared with a hundred other nets that interpolate the retain set, some with layers of
    other scale and rank. Returned is how far the lowest squared norm of them is below its own,
    relative; 0 where none is below.
    """
    x, y, retained = _draw_points(rng)
    x, y = x[:retained], y[:retained]
    depth, width = int(rng.integers(2, 5)), int(rng.integers(2, 6))
    inverse = np.linalg.pinv(x)
    least = inverse @ y
    best = depth * np.linalg.norm(least) ** (2 / depth)
    lowest = np.inf
    for scale in np.repeat(np.logspace(-4, 1, 10), 10):
        other = scale * rng.normal(size=x.shape[1])
        w = least + other - inverse @ (x @ other)
        units = [u / np.linalg.norm(u) for u in rng.normal(size=(depth - 1, width))]
        gains = np.exp(min(scale, 1.0) * rng.normal(size=depth))
        gains *= (np.linalg.norm(w) / np.prod(gains)) ** (1 / depth)
        ends = [np.ones(1), *units, w / np.linalg.norm(w)]
        layers = [
            gain * np.outer(a, b) for gain, a, b in zip(gains, ends[:-1], ends[1:], strict=True)
        ]
        layers[0] += scale * (lambda z: z - (z @ units[0]) * units[0])(rng.normal(size=width))
        assert _distance(np.linalg.multi_dot(layers)[0], w) < 1e-6
        lowest = min(lowest, float(sum(np.sum(layer**2) for layer in layers)))
    return max(0.0, float(1 - lowest / best))


def perceptron_width(rng: np.random.Generator) -> float:
    """Lemma 2 and theorem 5: a two-layer perceptron needs no more than s neurons.

    s is the dimension of the span of the retain points' hidden activations. Delta moves the outer
    weights, in which the perceptron is linear: a basic solution has at most s that are not 0.
    Returned is the relative error of its outputs on the retain set; infinity if more neurons than s
    are left, or s is more than N.
    """
    x, y, retained = _draw_points(rng)
    inner = rng.normal(size=(3 * len(x), x.shape[1]))
    x, y = x[:retained], y[:retained]
    if rng.random() < 0.5 and retained > 2:
        x[-1], y[-1] = x[0], y[0]  # a repeated point: s < N
    activations = np.maximum(0, x @ inner.T)  # [N, H]
    outer = rng.normal(size=len(inner))
    outer += np.linalg.pinv(activations) @ (y - activations @ outer)
    s = np.linalg.matrix_rank(activations)
    _, _, order = scipy.linalg.qr(activations, pivoting=True, mode="economic")
    chosen = order[:s]
    new = np.zeros_like(outer)
    new[chosen] = np.linalg.lstsq(activations[:, chosen], y, rcond=None)[0]
    if np.count_nonzero(new) > s or s > retained:
        return np.inf
    before = activations @ outer  # delta = new - outer is orthogonal to the gradients
    return _distance(activations @ new, before)


THEOREMS: dict[str, Callable[[np.random.Generator], float]] = {
    "1: loss gradients vanish": loss_gradient,
    "2: linear models": linear_model,
    "3: deep linear nets": deep_linear_net,
    "4: least parameter norm": least_parameters,
    "5: width of two-layer perceptrons": perceptron_width,
}


def largest_deviation(theorem: str, instances: int, seed: int = 0) -> float:
    """The largest deviation from one of `THEOREMS` over random instances.

    Rounding alone gives about 1e-12.
    """
    rngs = np.random.default_rng(seed).spawn(instances)
    return float(max(THEOREMS[theorem](rng) for rng in rngs))


def _draw_points(
    rng: np.random.Generator,
) -> tuple[Float[np.ndarray, "P D"], Float[np.ndarray, "P"], int]:
    """Inputs and labels, retain points first, and N; fewer points than inputs."""
    retained, forgotten = rng.integers(2, 10, 2)
    inputs = retained + forgotten + rng.integers(1, 20)
    x = rng.normal(size=(retained + forgotten, inputs))
    return x, rng.normal(size=len(x)), int(retained)


def _draw_interpolator(
    rng: np.random.Generator, x: np.ndarray, y: np.ndarray
) -> Float[np.ndarray, "D"]:
    """Weights of a linear model with outputs y at x; beside the least-norm part they are random."""
    inverse, other = np.linalg.pinv(x), rng.normal(size=x.shape[1])
    return inverse @ y + other - inverse @ (x @ other)


def _distance(solution: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(solution - expected) / np.linalg.norm(expected))
