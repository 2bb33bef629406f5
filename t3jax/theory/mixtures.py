"""Continuous mixtures p = (1 - γ) p_r + γ p_f with known densities, and rules to integrate.

Both parts are mixtures of isotropic Gaussians; p_f may be as narrow as one likes. Integrals come
from a rule of nodes and weights: quadrature in one and two dimensions, importance sampling in more.
Densities are with respect to Lebesgue measure over (2π)^(D/2), so that a unit Gaussian has peak 1
in every dimension. All densities are logarithms: peaks exceed 1e100. Nothing is trained here.

Axes: N nodes or samples, D dimensions, K components.

References:
    Temper-Then-Tilt, arXiv 2602.10217, the mixture model.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

_CLOSEST, _FARTHEST, _STEP = 1e-4, 25.0, 0.08  # of quadrature; _CLOSEST in widths of the spike
_ANGLES = 96


class Gaussians(NamedTuple):
    """A mixture of isotropic Gaussians.

    Attributes:
        mean: `[K, D]`.
        log_std: `[K]`.
        log_weight: `[K]`, of the components; their exponentials sum to 1.
    """

    mean: Float[Array, "K D"]
    log_std: Float[Array, " K"]
    log_weight: Float[Array, " K"]


class World(NamedTuple):
    """The distribution that a model learned: p = (1 - γ) p_r + γ p_f.

    Attributes:
        retain: p_r.
        forget: p_f.
        gamma: γ, in (0, 1), a scalar.
    """

    retain: Gaussians
    forget: Gaussians
    gamma: Float[Array, ""]


class Rule(NamedTuple):
    """Nodes and weights: the integral of F is the sum of exp(log_weight) F(z).

    Attributes:
        z: Nodes, `[N, D]`.
        log_weight: Logarithms of the weights, `[N]`.
    """

    z: Float[Array, "N D"]
    log_weight: Float[Array, " N"]


def make_world(
    key: PRNGKeyArray,
    log_peak: Float[Array, ""],
    gamma: Float[Array, ""],
    dimensions: int,
    retain_components: int = 1,
    forget_components: int = 1,
) -> World:
    """Draws a mixture whose p_f has a given peak.

    p_r is made of unit Gaussians a distance of about 1 apart. The first spike of p_f is at the
    origin, which is a typical point of p_r; further ones are typical points too, and all weigh the
    same. Float32 has the finest grid around 0. `log_peak` is relative to the peak of a unit
    Gaussian: -D log(width) - log(K).
    """
    where, apart, further = jax.random.split(key, 3)
    centre = jax.random.normal(where, (1, dimensions))
    offset = jax.random.normal(apart, (retain_components, dimensions)) / math.sqrt(dimensions)
    spikes = jax.random.normal(further, (forget_components, dimensions))
    log_std = -(log_peak + math.log(forget_components)) / dimensions
    return World(
        Gaussians(
            centre + (offset if retain_components > 1 else jnp.zeros_like(offset)),
            jnp.zeros(retain_components),
            jnp.full(retain_components, -math.log(retain_components)),
        ),
        Gaussians(
            jnp.where(jnp.arange(forget_components)[:, None] > 0, centre + spikes, 0.0),
            jnp.full(forget_components, log_std),
            jnp.full(forget_components, -math.log(forget_components)),
        ),
        gamma,
    )


def log_density(gaussians: Gaussians, z: Float[Array, "N D"]) -> Float[Array, " N"]:
    """Logarithm of a mixture's density at points, relative to the peak of a unit Gaussian."""
    square = jnp.sum((z[:, None] - gaussians.mean[None]) ** 2, axis=-1)  # [N, K]
    log_std = gaussians.log_std[None]
    parts = -0.5 * square * jnp.exp(-2.0 * log_std) - z.shape[1] * log_std
    return jax.nn.logsumexp(parts + gaussians.log_weight[None], axis=1)


def log_parts(
    world: World, z: Float[Array, "N D"]
) -> tuple[Float[Array, " N"], Float[Array, " N"], Float[Array, " N"]]:
    """Logarithms of p_r, p_f and p at points, nats."""
    retain, forget = log_density(world.retain, z), log_density(world.forget, z)
    return (
        retain,
        forget,
        jnp.logaddexp(jnp.log1p(-world.gamma) + retain, jnp.log(world.gamma) + forget),
    )


def bayes_logit(world: World, z: Float[Array, "N D"]) -> Float[Array, " N"]:
    """The exact classifier: the logit of P(retain | z), `log((1 - γ) p_r / (γ p_f))`."""
    retain, forget, _ = log_parts(world, z)
    return retain - forget + jnp.log1p(-world.gamma) - jnp.log(world.gamma)


def draw(key: PRNGKeyArray, gaussians: Gaussians, number: int) -> Float[Array, "N D"]:
    """Draws from a mixture of Gaussians."""
    which, noise = jax.random.split(key)
    z = jax.random.normal(noise, (number, gaussians.mean.shape[1]))
    if len(gaussians.mean) == 1:  # XLA would take long to fold the gather at compile time
        return gaussians.mean + jnp.exp(gaussians.log_std)[:, None] * z
    k: Int[Array, " N"] = jax.random.categorical(which, gaussians.log_weight, shape=(number,))
    return gaussians.mean[k] + jnp.exp(gaussians.log_std[k])[:, None] * z


def draw_labelled(
    key: PRNGKeyArray, world: World, number: int
) -> tuple[Float[Array, "N D"], Float[Array, " N"]]:
    """Draws the samples that a classifier is trained on, with labels: 1 retain, 0 forget."""
    retain, forget, label = jax.random.split(key, 3)
    retained = jax.random.uniform(label, (number,)) >= world.gamma
    z = jnp.where(
        retained[:, None], draw(retain, world.retain, number), draw(forget, world.forget, number)
    )
    return z, retained.astype(jnp.float32)


def importance_rule(
    key: PRNGKeyArray, world: World, temperature: Float[Array, ""], number: int
) -> Rule:
    """Importance sampling for every integral of `theory.errors` at one T.

    The proposal is a fifth each of p_r, p_f, both widened as in p^(1/T), and p_f narrowed as in
    p_f · p^(1/T): each integrand is at most a few times one of these. Each fifth has `number`
    nodes.
    """

    def scaled(gaussians: Gaussians, log_factor: Array) -> Gaussians:
        return gaussians._replace(log_std=gaussians.log_std + log_factor)

    wide = 0.5 * jnp.log(temperature)
    narrow = -0.5 * jnp.log1p(1.0 / temperature)
    parts = [
        world.retain,
        world.forget,
        scaled(world.retain, wide),
        scaled(world.forget, wide),
        scaled(world.forget, narrow),
    ]
    keys = jax.random.split(key, len(parts))
    z = jnp.concatenate([draw(k, part, number) for k, part in zip(keys, parts, strict=True)])
    proposal = jax.nn.logsumexp(jnp.stack([log_density(part, z) for part in parts]), axis=0)
    # The proposal's density is that sum over 5; each of N nodes counts 1 / N.
    return Rule(z, -proposal - math.log(number))


def quadrature_rule(world: World, narrowest: float) -> Rule:
    """Quadrature that resolves every spike, in one or two dimensions alone.

    It has polar coordinates around each spike, with the trapezoidal rule in the logarithm of the
    radius. With several spikes, weights that sum to 1 assign each point to the spikes near it.
    `narrowest` is the width of the narrowest spike among the mixtures that use the rule; it decides
    N. The integral of a Gaussian is exact to about 1e-4 in one dimension and 1e-6 in two.
    """
    spikes, dimensions = world.forget.mean.shape
    if dimensions not in (1, 2):
        raise ValueError(
            f"quadrature is for 1 or 2 dimensions, got {dimensions}; use importance_rule"
        )
    steps = math.ceil(math.log(_FARTHEST / (_CLOSEST * narrowest)) / _STEP)
    log_radius = math.log(_FARTHEST) - _STEP * jnp.arange(steps, dtype=jnp.float32)
    if dimensions == 1:
        directions, share = jnp.array([[1.0], [-1.0]]), 1.0
    else:
        angle = 2 * math.pi / _ANGLES * jnp.arange(_ANGLES, dtype=jnp.float32)
        directions = jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1)
        share = 2 * math.pi / _ANGLES
    around = (jnp.exp(log_radius)[:, None, None] * directions[None]).reshape(-1, dimensions)
    z = (world.forget.mean[:, None] + around[None]).reshape(-1, dimensions)
    unit = math.log(_STEP * share) - 0.5 * dimensions * math.log(2 * math.pi)
    of_radius = jnp.repeat(unit + dimensions * log_radius, len(directions))
    of_radius = jnp.tile(of_radius, spikes)
    square = jnp.sum((z[:, None] - world.forget.mean[None]) ** 2, axis=-1)  # [N, K]
    # A node that rounds to a centre in float32 belongs to that centre.
    near = jax.nn.log_softmax(-2.0 * jnp.log(jnp.maximum(square, 1e-30)), axis=1)
    spike = jnp.repeat(jnp.arange(spikes), around.shape[0])
    return Rule(z, of_radius + jnp.take_along_axis(near, spike[:, None], axis=1)[:, 0])
