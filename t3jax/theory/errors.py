"""Retain and forget error of p^(1/T) f̂^s, for a whole grid of mixtures and classifiers at once.

The estimate is q̂ = p^(1/T) f̂^s over its integral. The retain error is KL(p_r || q̂) in nats. The
forget error is the integral of p_f |q̂ - p_r|, a density, in units of a unit Gaussian's peak; q*
is q̂ with the exact classifier. docs/theory.md has proved bounds of these errors.

Axes: N nodes, D dimensions, I instances of a grid, C classifiers.

References:
    Temper-Then-Tilt, arXiv 2602.10217, retain and forget error.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from t3jax.theory import classifiers, mixtures
from t3jax.theory.mixtures import Rule, World

Values = Sequence[float] | Sequence[int] | np.ndarray
CLASSIFIERS = ("exact", "leaky", "logistic", "perceptron")
_TOGETHER = 16  # instances computed at once


class Errors(NamedTuple):
    """The errors of an estimate; scalars, or one for each instance.

    Attributes:
        excess_risk: ε, the classifier's log-loss above the Bayes risk, nats.
        retain: KL(p_r || q̂), nats.
        log_forget: Logarithm of the forget error.
        log_from_classifier: Logarithm of the error with q* for p_r: the classifier's part.
        log_bias: Logarithm of the error with q* for q̂: the bias of tempering.
        leak: Mass of q̂ that the exact classifier assigns to p_f.
    """

    excess_risk: Array
    retain: Array
    log_forget: Array
    log_from_classifier: Array
    log_bias: Array
    leak: Array


class Point(NamedTuple):
    """An instance of a grid, or arrays `[I]` of them.

    Attributes:
        log_peak: Logarithm of the peak of p_f relative to the peak of a unit Gaussian.
        gamma: γ.
        samples: n, samples that a classifier is trained on.
        excess_risk: ε of the leaky classifier, nats.
        seed: Decides the mixture, the samples and the nodes; integers.
    """

    log_peak: Array
    gamma: Array
    samples: Array
    excess_risk: Array
    seed: Array


@dataclasses.dataclass(frozen=True)
class Shape:
    """The settings that all instances of a grid share; each shape compiles a program.

    Attributes:
        dimensions: D.
        classifier: One of `CLASSIFIERS`.
        retain_components: Gaussians of p_r.
        forget_components: Gaussians of p_f.
        most_samples: The largest n.
        nodes: Nodes of each part of importance sampling; 0: quadrature.
        narrowest: The narrowest spike, for quadrature.
    """

    dimensions: int
    classifier: str
    retain_components: int = 1
    forget_components: int = 1
    most_samples: int = 1
    nodes: int = 1000
    narrowest: float = 1e-4

    def __post_init__(self):
        if self.classifier not in CLASSIFIERS:
            raise ValueError(f"classifier must be one of {CLASSIFIERS}, got {self.classifier!r}")


def measure(
    world: World,
    rule: Rule,
    learned: Float[Array, " N"],
    temperature: Float[Array, ""],
    scale: Float[Array, ""],
) -> Errors:
    """Errors of a classifier's estimate, from its logits at the rule's nodes."""
    retain, forget, base = mixtures.log_parts(world, rule.z)
    exact = mixtures.bayes_logit(world, rule.z)

    def estimate(logits: Array) -> Array:
        log_q = base / temperature + scale * jax.nn.log_sigmoid(logits)
        return log_q - jax.nn.logsumexp(rule.log_weight + log_q)

    def distance(a: Array, b: Array) -> Array:
        gap = -jnp.abs(a - b)
        log_gap = jnp.maximum(a, b) + jnp.log(jnp.maximum(-jnp.expm1(gap), 1e-30))
        return jax.nn.logsumexp(rule.log_weight + forget + log_gap)

    log_q, target = estimate(learned), estimate(exact)
    of_retain, of_base = jnp.exp(rule.log_weight + retain), jnp.exp(rule.log_weight + base)
    return Errors(
        excess_risk=jnp.sum(of_base * classifiers.bernoulli_kl(exact, learned)),
        retain=jnp.sum(of_retain * (retain - log_q)),
        log_forget=distance(log_q, retain),
        log_from_classifier=distance(log_q, target),
        log_bias=distance(target, retain),
        leak=jnp.exp(jax.nn.logsumexp(rule.log_weight + log_q + jax.nn.log_sigmoid(-exact))),
    )


def run_one(
    shape: Shape, temperatures: Float[Array, " T"], scales: Float[Array, " S"], point: Point
) -> Errors:
    """One instance: draws the mixture, trains the classifier, integrates at every T and s.

    The errors are `[T, S]`.
    """
    of_world, of_samples, of_training, of_nodes = jax.random.split(jax.random.key(point.seed), 4)
    world = mixtures.make_world(
        of_world,
        point.log_peak,
        point.gamma,
        shape.dimensions,
        shape.retain_components,
        shape.forget_components,
    )
    classify = _train(shape, point, world, of_samples, of_training)

    def at(temperature: Array, scale: Array) -> Errors:
        if shape.nodes:
            rule = mixtures.importance_rule(of_nodes, world, temperature, shape.nodes)
        else:
            rule = mixtures.quadrature_rule(world, shape.narrowest)
        return measure(world, rule, classify(rule), temperature, scale)

    return jax.vmap(lambda t: jax.vmap(lambda s: at(t, s))(scales))(temperatures)


def _train(
    shape: Shape, point: Point, world: World, of_samples: Array, of_training: Array
) -> Callable[[Rule], Array]:
    """Trains the classifier, a function from a rule to logits at its nodes."""
    if shape.classifier == "exact":
        return lambda rule: mixtures.bayes_logit(world, rule.z)
    if shape.classifier == "leaky":

        def leak(rule: Rule) -> Array:
            exact = mixtures.bayes_logit(world, rule.z)
            log_mass = rule.log_weight + mixtures.log_parts(world, rule.z)[2]
            rate = classifiers.leak_at_risk(exact, log_mass, point.excess_risk)
            return classifiers.leak(exact, rate)

        return leak
    z, labels = mixtures.draw_labelled(of_samples, world, shape.most_samples)
    weights = (jnp.arange(shape.most_samples) < point.samples).astype(jnp.float32)
    if shape.classifier == "logistic":
        w = classifiers.fit_logistic(classifiers.quadratic_features(z), labels, weights)
        return lambda rule: classifiers.quadratic_features(rule.z) @ w
    params = classifiers.fit_perceptron(of_training, z, labels, weights)
    return lambda rule: classifiers.perceptron(params, rule.z)


def run_grid(
    shape: Shape,
    *,
    log_peaks: Values,
    temperatures: Values,
    gammas: Values = (0.1,),
    scales: Values = (1.0,),
    samples: Values = (1,),
    excess_risks: Values = (0.01,),
    seeds: Values = (0,),
) -> Errors:
    """Computes the errors of all combinations, in one program.

    `samples` are n of a trained classifier, `excess_risks` are ε of the leaky one, and each seed is
    another mixture. The results are NumPy arrays with the axes (log_peaks, gammas, samples,
    excess_risks, seeds, temperatures, scales).
    """
    if max(samples) > shape.most_samples:
        raise ValueError(
            f"n = {max(samples)} is more than most_samples = {shape.most_samples}; raise that"
        )
    if min(temperatures) < 1:
        raise ValueError(f"T must be at least 1, got {min(temperatures)}")
    if not all(0 < gamma < 1 for gamma in gammas):
        raise ValueError(f"gammas must lie in (0, 1), got {gammas}")
    values: tuple[Values, ...] = (log_peaks, gammas, samples, excess_risks, seeds)
    kinds = (np.float32, np.float32, np.int32, np.float32, np.int32)
    axes = [np.asarray(value, kind) for value, kind in zip(values, kinds, strict=True)]
    count = math.prod(len(value) for value in values)
    together = min(_TOGETHER, count)
    # A smaller last batch would compile a second program: instances are repeated instead.
    padded = -(-count // together) * together
    flat = Point(*(jnp.asarray(np.resize(x, padded)) for x in np.meshgrid(*axes, indexing="ij")))
    knobs = [jnp.asarray(value, jnp.float32) for value in (temperatures, scales)]
    errors = _run(shape, together, *knobs, flat)
    sizes = [*(len(value) for value in values), len(temperatures), len(scales)]
    return jax.tree.map(lambda leaf: np.asarray(leaf)[:count].reshape(sizes), errors)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(shape: Shape, together: int, temperatures: Array, scales: Array, points: Point) -> Errors:
    run = functools.partial(run_one, shape, temperatures, scales)
    return jax.lax.map(run, points, batch_size=together)


def fit_slopes(
    log_peaks: Float[np.ndarray, " I"], log_errors: Float[np.ndarray, "I S"]
) -> tuple[float, float, float]:
    """The power of the peak by which an error grows: the slope of a line in logarithms.

    `log_errors` are by peak and mixture. The slope's median over the mixtures is returned, with the
    2.5 and the 97.5 percentile.
    """
    slopes = np.polyfit(np.asarray(log_peaks, np.float64), np.asarray(log_errors, np.float64), 1)[0]
    median, low, high = np.percentile(slopes, [50, 2.5, 97.5])
    return float(median), float(low), float(high)


def predict_total(
    log_peak: float,
    gamma: float,
    excess_risk: float,
    dimensions: int,
    temperatures: Float[np.ndarray, " K"],
) -> Float[np.ndarray, " K"]:
    """Leading terms of forget plus retain error, for a spike in a unit Gaussian, by T.

    The forget error is statement 4 of docs/theory.md where p_r has no mass in the spike, with the
    mean of p_f^(1/T) over a Gaussian spike instead of its peak, and the normaliser of a unit
    Gaussian. The retain error is the bias of statement 6, which is exact for a unit Gaussian. The
    forget error is in units of the peak of p_r, the retain error in nats.
    """
    power = 1 / temperatures
    log_widest = power * (math.log(gamma) + log_peak) - math.log(gamma)
    log_mean = -0.5 * dimensions * np.log1p(power)
    log_total = power * math.log1p(-gamma) + 0.5 * dimensions * np.log(temperatures)
    bias = 0.5 * dimensions * (np.log(temperatures) - 1 + power)
    return excess_risk * np.exp(log_widest + log_mean - log_total) + bias
