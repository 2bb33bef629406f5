"""A mixture of experts instead of a layer's MLP or beside it: the router and the experts.

A token's output is the sum over its chosen experts of the router's weight times the expert's MLP;
a shared expert, which every token is sent to, is added. No token is dropped. The router's noise and
its balancing loss, which are for training only, are not implemented.

Each platform has its own program. On a CPU, `jax.lax.ragged_dot` multiplies every token by every
expert: there the tokens of an expert are split into tiles, and a loop reads a tile and the expert's
matrices. Elsewhere a few tokens gather the matrices of their experts, and many are sorted by expert
for `ragged_dot`; this is not measured yet.

Axes: B batch, T time, N tokens, D features, E experts, K chosen experts of a token, F width of an
expert. Weights are `[E, out, in]`. The router is computed in float32.

References:
    Outrageously Large Neural Networks, arXiv 1701.06538, equations 1 to 5.
    DeepSeek-V3 Technical Report, arXiv 2412.19437, section 2.1.2: sigmoid, its bias, groups.
    GRIN: GRadient-INformed MoE, arXiv 2409.12136: SparseMixer at inference time.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from t3jax import sharding
from t3jax.lm import quantized
from t3jax.lm.config import ExpertsConfig, LMConfig
from t3jax.lm.layers import ACTIVATIONS, MLP, Linear, normalize
from t3jax.lm.product import full_precision, product

# All experts' "weight" [E, out, in], "scale" [E, out] of int8, and "bias" [E, out] if any.
Matrices = dict[str, Array]
Gate = Callable[[Array, Array], Array]  # from the outputs of gate and up to the input of down
_LEAST = 1e-12  # lower bound of a sum of weights
_TILE = 64  # most tokens of an expert that a CPU multiplies at a time


class _Stack(nnx.Module):
    """A matrix of each expert, int8 or not, with a bias or without."""

    def __init__(self, count: int, fan_in: int, fan_out: int, bias: bool, quantized: bool):
        shape = (count, fan_out, fan_in)
        self.weight = nnx.Param(jnp.zeros(shape, jnp.int8 if quantized else None))
        if quantized:
            self.scale = nnx.Param(jnp.ones(shape[:2]))
        if bias:
            self.bias = nnx.Param(jnp.zeros(shape[:2]))
        self.has_bias = bias
        self.quantized = quantized

    def matrices(self) -> Matrices:
        scale = {"scale": self.scale[...]} if self.quantized else {}
        bias = {"bias": self.bias[...]} if self.has_bias else {}
        return {"weight": self.weight[...], **scale, **bias}


class _Router(nnx.Module):
    def __init__(self, config: LMConfig, experts: ExpertsConfig):
        # Rounded to int8, it would choose other experts.
        self.weight = nnx.Param(jnp.zeros((experts.count, config.hidden_size)))
        if experts.bias:
            self.bias = nnx.Param(jnp.zeros((experts.count,)))
        if experts.corrected:
            self.correction = nnx.Param(jnp.zeros((experts.count,)))
        if experts.scaled:
            self.input_scale = nnx.Param(jnp.ones((config.hidden_size,)))
            self.expert_scale = nnx.Param(jnp.ones((experts.count,)))
        self.experts, self.eps = experts, config.norm_eps

    def __call__(self, x: Array) -> tuple[Array, Array]:
        if self.experts.scaled:
            scale = self.input_scale[...].astype(jnp.float32) * x.shape[-1] ** -0.5
            x = (normalize(x, self.eps) * jnp.broadcast_to(scale, x.shape)).astype(x.dtype)
        logits = product(x.reshape(-1, x.shape[-1]), self.weight[...], jnp.float32)
        if self.experts.bias:
            bias = self.bias[...].astype(jnp.float32)
            logits = logits + jnp.broadcast_to(bias, logits.shape)
        corrected = self.experts.corrected
        correction = self.correction[...].astype(jnp.float32) if corrected else None
        chosen, weights = choose_experts(self.experts, logits, correction)
        if self.experts.scaled:
            weights = weights * self.expert_scale[...].astype(jnp.float32)[chosen]
        shape = (*x.shape[:-1], self.experts.chosen)
        return chosen.reshape(shape), weights.reshape(shape)


class Experts(nnx.Module):
    """The experts of a layer, with their router and a shared one if there is one."""

    def __init__(self, config: LMConfig):
        e = config.experts
        assert e is not None
        width = config.hidden_size
        self.router = _Router(config, e)
        self.gate = _Stack(e.count, width, e.size, e.bias, config.quantized)
        self.up = _Stack(e.count, width, e.size, e.bias, config.quantized)
        self.down = _Stack(e.count, e.size, width, e.bias, config.quantized)
        if e.shared:
            self.shared = MLP(config, e.shared)
        if e.shared_gate:
            self.shared_gate = Linear(width, 1)
        self.gate_fn = make_gate(config.activation, e.clamp)
        self.experts = e

    def __call__(self, x: Array, mesh: Mesh | None, routed: Array | None = None) -> Array:
        """The sum of the experts' outputs for `x`; `routed` is the router's input, if another."""
        chosen, weights = self.router(x if routed is None else routed)
        matrices = {name: getattr(self, name).matrices() for name in ("gate", "up", "down")}
        y = _mix_on_mesh(x, chosen, weights, matrices, self.gate_fn, mesh)
        if not self.experts.shared:
            return y
        shared = self.shared(x)
        if self.experts.shared_gate:
            gate = jax.nn.sigmoid(self.shared_gate(x))
            shared = shared * jnp.broadcast_to(gate, shared.shape)
        return y + shared


@functools.cache
def make_gate(activation: str, clamp: float | None = None) -> Gate:
    """The gate of an expert; the same object for the same arguments, so that jit caches."""
    activate = ACTIVATIONS[activation]
    if clamp is None:
        return lambda gate, up: activate(gate) * up
    return lambda gate, up: activate(jnp.minimum(gate, clamp)) * (jnp.clip(up, -clamp, clamp) + 1)


@functools.partial(jax.jit, static_argnames="experts", inline=True)  # traced once for all layers
def choose_experts(
    experts: ExpertsConfig,
    logits: Float[Array, "N E"],
    correction: Float[Array, " E"] | None = None,
) -> tuple[Int[Array, "N K"], Float[Array, "N K"]]:
    """The experts that tokens are sent to, and the weights of their outputs.

    The correction is added to the scores for the choice, not to the weights.
    """
    if experts.router == "sparsemixer":
        return _mix_sparsely(logits, experts.jitter)
    sigmoid = experts.router == "sigmoid"
    scores = jax.nn.sigmoid(logits) if sigmoid else jax.nn.softmax(logits, axis=-1)
    ranked = scores
    if experts.corrected:
        assert correction is not None
        ranked = scores + jnp.broadcast_to(correction, scores.shape)
    if experts.groups > 1:
        ranked = _keep_groups(ranked, experts.groups, experts.chosen_groups)
    _, chosen = jax.lax.top_k(ranked, experts.chosen)
    weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if experts.normed:
        # A correction may choose experts whose scores are 0 in float32.
        total = jnp.sum(weights, axis=-1, keepdims=True)
        total = jnp.maximum(total, _LEAST) if experts.corrected else total
        weights = weights / (total + experts.smoothing)
    return chosen, weights if experts.scale == 1 else weights * experts.scale


def _keep_groups(ranked: Array, groups: int, count: int) -> Array:
    """Keeps the scores of groups whose two best experts have the highest sums; -inf elsewhere."""
    grouped = ranked.reshape(len(ranked), groups, -1)
    sums = jnp.sum(jax.lax.top_k(grouped, 2)[0], axis=-1)
    _, best = jax.lax.top_k(sums, count)
    allowed = jnp.any(jax.nn.one_hot(best, groups, dtype=bool), axis=1)
    return jnp.where(allowed[:, :, None], grouped, -jnp.inf).reshape(ranked.shape)


def _mix_sparsely(logits: Array, jitter: float) -> tuple[Array, Array]:
    """The two best experts; the weight of each is a softmax over those nearly as good."""

    def choose(remaining: Array) -> tuple[Array, Array]:
        best = jnp.max(remaining, axis=-1, keepdims=True)
        chosen = jnp.argmax(remaining, axis=-1, keepdims=True)
        far = (best - logits) / jnp.maximum(jnp.abs(logits), best) > 2 * jitter
        weights = jax.nn.softmax(jnp.where(far, -jnp.inf, remaining), axis=-1)
        return chosen, jnp.take_along_axis(weights, chosen, axis=-1)

    first, first_weight = choose(logits)
    taken = jax.nn.one_hot(first[:, 0], logits.shape[-1], dtype=bool)
    second, second_weight = choose(jnp.where(taken, -jnp.inf, logits))
    chosen = jnp.concatenate([first, second], axis=-1)
    return chosen, jnp.concatenate([first_weight, second_weight], axis=-1)


def _mix_on_mesh(
    x: Array,
    chosen: Array,
    weights: Array,
    matrices: dict[str, Matrices],
    gate: Gate,
    mesh: Mesh | None,
) -> Array:
    """`mix_experts` for `[B, T, D]`; each device has some rows and some experts.

    If `model` does not divide the experts, each device has all of them.
    """

    def mix(x: Array, chosen: Array, weights: Array, matrices: dict[str, Matrices]) -> Array:
        tokens, *pairs = (part.reshape(-1, part.shape[-1]) for part in (x, chosen, weights))
        return mix_experts(tokens, *pairs, matrices, gate).reshape(x.shape)

    if mesh is None or mesh.size == 1:
        return mix(x, chosen, weights, matrices)
    (rows,) = sharding.fit_sharding(mesh, P(sharding.ROWS), x.shape[:1]).spec or (None,)
    (model,) = sharding.fit_sharding(
        mesh, P(sharding.MODEL), matrices["gate"]["weight"].shape[:1]
    ).spec or (None,)

    def mix_local(x: Array, chosen: Array, weights: Array, matrices: dict[str, Matrices]) -> Array:
        if model is None:
            return mix(x, chosen, weights, matrices)
        first = jax.lax.axis_index(model) * len(matrices["gate"]["weight"])
        return jax.lax.psum(mix(x, chosen - first, weights, matrices), model)

    return jax.shard_map(
        mix_local,
        mesh=mesh,
        in_specs=(P(rows), P(rows), P(rows), P(model)),
        out_specs=P(rows),
        check_vma=False,
    )(x, chosen, weights, matrices)


@functools.partial(jax.jit, static_argnames="gate", inline=True)
def mix_experts(
    x: Float[Array, "N D"],
    chosen: Int[Array, "N K"],
    weights: Float[Array, "N K"],
    matrices: dict[str, Matrices],
    gate: Gate,
) -> Float[Array, "N D"]:
    """The sum of the chosen experts' outputs by their weights, taken in float32.

    An expert outside of 0 to E - 1 adds nothing. The matrices are "gate" and "up", `[E, F, D]`, and
    "down", `[E, D, F]`; the gate is from `make_gate`.
    """
    present = (chosen >= 0) & (chosen < len(matrices["gate"]["weight"]))
    programs = {
        platform: functools.partial(program, gate=gate)
        for platform, program in (("cpu", _in_tiles), ("default", _on_accelerator))
    }
    y = jax.lax.platform_dependent(x, jnp.where(present, chosen, -1), matrices, **programs)
    weighed = y.astype(jnp.float32) * jnp.where(present, weights, 0.0)[:, :, None]
    return jnp.sum(weighed, axis=1).astype(x.dtype)


def _assign_places(chosen: Array, experts: int, tile: int) -> tuple[Array, Array]:
    """Gives each token and expert a place such that no tile of places has two experts.

    Returns the places `[N K]`, out of range where there is no expert, and the number of tiles of
    each expert.
    """
    flat = chosen.reshape(-1)
    hot = jax.nn.one_hot(flat, experts, dtype=jnp.int32)  # zeros where there is no expert
    rank = jnp.sum((jnp.cumsum(hot, axis=0) - 1) * hot, axis=1)
    tiles = -(-jnp.sum(hot, axis=0) // tile)
    first = (jnp.cumsum(tiles) - tiles) * tile
    beyond = jnp.iinfo(jnp.int32).max
    return jnp.where(flat < 0, beyond, first[flat] + rank), tiles


def _arrange(x: Array, chosen: Array, places: Array, size: int) -> Array:
    """Gathers the tokens into their places, `[size, D]`; empty places are zeros."""
    tokens = jnp.arange(len(places)) // chosen.shape[1]
    source = jnp.full((size,), len(x)).at[places].set(tokens, mode="drop")
    return jnp.take(x, source, axis=0, mode="fill", fill_value=0)


def _in_tiles(x: Array, chosen: Array, matrices: dict[str, Matrices], gate: Gate) -> Array:
    """Outputs `[N, K, D]`; a tile has at most as many tokens as an expert has on average."""
    experts, pairs = len(matrices["gate"]["weight"]), chosen.size
    tile = min(_TILE, 1 << (-(-pairs // experts) - 1).bit_length())
    if tile == 1:
        rows = jnp.repeat(x, chosen.shape[1], axis=0)[:, None]
        expert, places = chosen.reshape(-1), jnp.arange(pairs)
        real = expert >= 0
    else:
        places, tiles = _assign_places(chosen, experts, tile)
        count = min(pairs, pairs // tile + experts)  # most tiles
        rows = _arrange(x, chosen, places, count * tile).reshape(count, tile, -1)
        ends = jnp.cumsum(tiles)
        expert = jnp.searchsorted(ends, jnp.arange(count), side="right")
        real = jnp.arange(count) < ends[-1]

    @jax.checkpoint  # else the backward pass would keep the matrices of every tile
    def run(rows: Array, expert: Array, real: Array) -> Array:
        def multiply(rows: Array) -> Array:
            m = jax.tree.map(
                lambda leaf: jax.lax.dynamic_index_in_dim(leaf, expert, keepdims=False), matrices
            )
            inner = gate(_multiply(rows, m["gate"]), _multiply(rows, m["up"]))
            return _multiply(inner, m["down"])

        return jax.lax.cond(real, multiply, jnp.zeros_like, rows)

    y = jax.lax.map(lambda tile: run(*tile), (rows, expert, real))
    y = jnp.take(y.reshape(-1, x.shape[-1]), places, axis=0, mode="fill", fill_value=0)
    return y.reshape(*chosen.shape, -1)


def _multiply(x: Array, matrix: Matrices) -> Array:
    if "scale" in matrix:
        y = quantized.product(x, matrix["weight"], matrix["scale"])
    else:
        y = product(x, matrix["weight"])
    return y + jnp.broadcast_to(matrix["bias"], y.shape) if "bias" in matrix else y


def _on_accelerator(x: Array, chosen: Array, matrices: dict[str, Matrices], gate: Gate) -> Array:
    """Outputs `[N, K, D]`, from gathered matrices if that moves less than reading all of them."""
    experts, pairs = len(matrices["gate"]["weight"]), chosen.size
    if 3 * pairs <= experts:  # gathered matrices are read, written and read again
        expert = jnp.maximum(chosen.reshape(-1), 0)
        rows = jnp.repeat(x, chosen.shape[1], axis=0)
        times = functools.partial(_multiply_gathered, expert)
        places = jnp.arange(pairs)
    else:
        places, sizes = _assign_places(chosen, experts, 1)
        rows = _arrange(x, chosen, places, pairs)
        times = functools.partial(_multiply_ragged, sizes)
    inner = gate(times(rows, matrices["gate"]), times(rows, matrices["up"]))
    y = jnp.take(times(inner, matrices["down"]), places, axis=0, mode="fill", fill_value=0)
    return y.reshape(*chosen.shape, -1)


def _multiply_gathered(expert: Array, rows: Array, matrix: Matrices) -> Array:
    y = jnp.einsum(
        "ni,noi->no",
        rows,
        matrix["weight"][expert].astype(rows.dtype),
        precision=full_precision(rows),
        preferred_element_type=jnp.float32,
    )
    y = y * matrix["scale"][expert].astype(jnp.float32) if "scale" in matrix else y
    y = y + matrix["bias"][expert].astype(jnp.float32) if "bias" in matrix else y
    return y.astype(rows.dtype)


def _multiply_ragged(sizes: Array, rows: Array, matrix: Matrices) -> Array:
    y = jax.lax.ragged_dot(
        rows,
        matrix["weight"].astype(rows.dtype).swapaxes(1, 2),
        sizes,
        precision=full_precision(rows),
        preferred_element_type=jnp.float32,
    )
    expert = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(len(rows)), side="right")

    def gather(leaf: Array) -> Array:
        return jnp.take(leaf, expert, axis=0, mode="fill", fill_value=0).astype(jnp.float32)

    y = y * gather(matrix["scale"]) if "scale" in matrix else y
    y = y + gather(matrix["bias"]) if "bias" in matrix else y
    return y.astype(rows.dtype)
