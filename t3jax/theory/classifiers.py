"""Classifiers of retain against forget: one of a known excess risk, and two trained on samples.

A classifier is a function from points to the logit g of P(retain | z). Training takes a fixed
number of samples, of which the first n have weight, so that sample sizes share one program.

Axes: N samples or nodes, D dimensions, P features, H hidden width.

References:
    Temper-Then-Tilt, arXiv 2602.10217, the surrogate loss.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from t3jax import optimizer

_HALVINGS = 30
_NEWTON_STEPS = 12
_RIDGE = 1.0  # added to the sum of the losses, not to their mean
_WIDTH, _STEPS, _RATE = 32, 400, 1e-2

Perceptron = dict[str, Array]


def bernoulli_kl(exact: Float[Array, " N"], learned: Float[Array, " N"]) -> Float[Array, " N"]:
    """KL(f* || f̂) of two Bernoulli distributions, from logits, nats: the excess log-loss."""
    heads = jax.nn.sigmoid(exact) * (jax.nn.log_sigmoid(exact) - jax.nn.log_sigmoid(learned))
    tails = jax.nn.sigmoid(-exact) * (jax.nn.log_sigmoid(-exact) - jax.nn.log_sigmoid(-learned))
    return jnp.maximum(heads + tails, 0.0)


def leak(exact: Float[Array, " N"], log_rate: Float[Array, ""]) -> Float[Array, " N"]:
    """Logits of f̂ = f* + a (1 - f*): a share a of the forget part passes as retain."""
    passed = jnp.logaddexp(exact, jnp.broadcast_to(log_rate, exact.shape))
    return passed - jnp.log1p(-jnp.exp(log_rate))


def leak_at_risk(
    exact: Float[Array, " N"], log_mass: Float[Array, " N"], excess_risk: Float[Array, ""]
) -> Float[Array, ""]:
    """Log a, at which `leak` has a given excess risk, by bisection.

    `log_mass` is the logarithm of each node's mass under p.
    """

    def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = 0.5 * (low + high)
        risk = jnp.sum(jnp.exp(log_mass) * bernoulli_kl(exact, leak(exact, middle)))
        below = risk < excess_risk
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    ends = (jnp.float32(-25.0), jnp.float32(-1e-6))
    return jax.lax.fori_loop(0, _HALVINGS, halve, ends)[0]


def quadratic_features(z: Float[Array, "N D"]) -> Float[Array, "N P"]:
    """1, z and |z|², each of order 1: the Bayes logit of two Gaussians is linear in them."""
    size = z.shape[1]
    square = jnp.sum(z**2, axis=1, keepdims=True) / size
    return jnp.concatenate([jnp.ones_like(square), z, square], axis=1)


def fit_logistic(
    features: Float[Array, "N P"], labels: Float[Array, " N"], weights: Float[Array, " N"]
) -> Float[Array, " P"]:
    """Logistic regression by damped Newton steps, with a ridge of 1/2 |w|².

    Labels are 1 for retain and 0 for forget; a sample of weight 0 has no effect.
    """
    ridge = _RIDGE * jnp.eye(features.shape[1])

    def step(_: Array, w: Array) -> Array:
        prob = jax.nn.sigmoid(features @ w)
        gradient = features.T @ (weights * (prob - labels)) + _RIDGE * w
        curvature = features.T @ ((weights * prob * (1.0 - prob))[:, None] * features) + ridge
        change = jnp.linalg.solve(curvature, gradient)
        norm = jnp.sqrt(jnp.sum(change**2))
        return w - change * jnp.minimum(1.0, 5.0 / jnp.maximum(norm, 1e-6))

    return jax.lax.fori_loop(0, _NEWTON_STEPS, step, jnp.zeros(features.shape[1]))


def fit_perceptron(
    key: PRNGKeyArray,
    z: Float[Array, "N D"],
    labels: Float[Array, " N"],
    weights: Float[Array, " N"],
) -> Perceptron:
    """A perceptron with one hidden layer of 32, trained on the log-loss by Adam on all samples.

    Labels and weights are as for `fit_logistic`.
    """
    inner, bias, outer = jax.random.split(key, 3)
    params = {
        "in": jax.random.normal(inner, (z.shape[1], _WIDTH)) / jnp.sqrt(float(z.shape[1])),
        "bias": jax.random.normal(bias, (_WIDTH,)),
        "out": jax.random.normal(outer, (_WIDTH,)) / jnp.sqrt(float(_WIDTH)),
        "shift": jnp.zeros(()),
    }
    adam = optax.adam(_RATE)

    def loss(params: Perceptron) -> Array:
        losses = optax.sigmoid_binary_cross_entropy(perceptron(params, z), labels)
        return jnp.sum(weights * losses) / jnp.sum(weights)

    def step(_: Array, state: PyTree) -> PyTree:
        return optimizer.step(adam, state, jax.grad(loss)(state[0]))

    return jax.lax.fori_loop(0, _STEPS, step, (params, adam.init(params)))[0]


def perceptron(params: Perceptron, z: Float[Array, "N D"]) -> Float[Array, " N"]:
    """A perceptron's logits of "retain"."""
    hidden = jnp.tanh(z @ params["in"] + params["bias"][None])
    return hidden @ params["out"] + params["shift"]
