"""Gated delta nets: layers that keep a memory of fixed size instead of keys and values.

Each head has a memory M that maps a key to its value. A token decays it, looks up the value of its
key, corrects that, and reads the memory with its query:

    M ← a M,    M ← M + b k ⊗ (v - M' k),    y = M' q

with a = exp(-rate softplus(...)) and b = sigmoid(...) of the token. Queries, keys and values are
the outputs of a short convolution of each channel over the last tokens. A text is read in chunks of
tokens: the correction of a token depends on those of earlier tokens of its chunk, a triangular
system. Padding at any position leaves memory and convolution unchanged.

Axes: B batch, T time, D features, K heads of queries and keys, G heads of values for each, d width
of a key, e width of a value, C channels, W taps of the convolution, t tokens of a chunk. The memory
and its products are float32.

References:
    Gated Delta Networks, arXiv 2412.06464: the rule, equation 10; in chunks, section 3.3.
    Parallelizing Linear Transformers with the Delta Rule, arXiv 2406.06484: the triangular system.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from t3jax import sharding
from t3jax.lm.cache import DeltaState
from t3jax.lm.config import LMConfig
from t3jax.lm.convolution import Order, convolve, last_inputs
from t3jax.lm.layers import ACTIVATIONS, Linear, make_norm

_CHUNK = 64  # tokens
_EPSILON = 1e-6  # for the length of queries and keys, whatever the epsilon of norms


class DeltaNet(nnx.Module):
    """A gated delta net; it also updates its state."""

    def __init__(self, config: LMConfig):
        delta = config.delta
        assert delta is not None
        width, heads = config.hidden_size, delta.value_heads
        k_width, v_width = delta.key_heads * delta.key_dim, heads * delta.value_dim
        self.q = Linear(width, k_width, quantized=config.quantized)
        self.k = Linear(width, k_width, quantized=config.quantized)
        self.v = Linear(width, v_width, quantized=config.quantized)
        self.q_conv = Linear(delta.taps, k_width)
        self.k_conv = Linear(delta.taps, k_width)
        self.v_conv = Linear(delta.taps, v_width)
        self.gate = Linear(width, v_width, quantized=config.quantized)
        self.o = Linear(v_width, width, quantized=config.quantized)
        # Rounded to int8, they would let the memory fade at another pace.
        self.strength = Linear(width, heads)
        self.fading = Linear(width, heads)
        self.fading_bias = nnx.Param(jnp.zeros((heads,)))
        self.log_rate = nnx.Param(jnp.zeros((heads,)))
        self.norm = make_norm(dataclasses.replace(config, norm="rms"), delta.value_dim)
        self.activation = ACTIVATIONS[config.activation]
        self.delta = delta

    def __call__(
        self, x: Array, order: Order, past: DeltaState | None, mesh: Mesh | None
    ) -> tuple[Array, DeltaState | None]:
        """The output for inputs `[B, T, D]`, and the state after them.

        Without a past state, as for a text by itself, none is returned.
        """
        d = self.delta
        b, t, _ = x.shape
        if t > 1:
            x = jnp.take_along_axis(x, order.sources[..., None], axis=1)
        group = d.value_heads // d.key_heads
        heads = (b, t, d.key_heads)
        tail = jnp.zeros((b, d.taps - 1, d.channels), x.dtype) if past is None else past.tail
        ends = (d.key_heads * d.key_dim, 2 * d.key_heads * d.key_dim)
        outputs, tails = [], []
        for name, past_inputs in zip(("q", "k", "v"), jnp.split(tail, ends, axis=-1), strict=True):
            inputs = self._gather_heads(getattr(self, name)(x), mesh)
            window = jnp.concatenate([past_inputs, inputs], axis=1)  # [B, W-1+T, C]
            convolved = convolve(window, getattr(self, f"{name}_conv").weight[...])
            outputs.append(self.activation(convolved).astype(jnp.float32))
            tails.append(last_inputs(window, order.real, d.taps - 1))
        q, k, v = outputs
        real = jnp.arange(t)[None, :, None, None] < order.real[:, None, None, None]
        strengths = jax.nn.sigmoid(self.strength(x).astype(jnp.float32).reshape(*heads, group))
        bias = jnp.broadcast_to(self.fading_bias[...].astype(jnp.float32), (b, t, d.value_heads))
        fading = jax.nn.softplus(self.fading(x).astype(jnp.float32) + bias)
        rates = jnp.broadcast_to(jnp.exp(self.log_rate[...].astype(jnp.float32)), fading.shape)
        log_decays = (-rates * fading).reshape(*heads, group)
        memory = jnp.zeros((b, d.key_heads, group, d.key_dim, d.value_dim), jnp.float32)
        values, memory = _apply_on_mesh(
            mesh,
            _normalize(q.reshape(*heads, d.key_dim)) * d.key_dim**-0.5,
            _normalize(k.reshape(*heads, d.key_dim)),
            v.reshape(*heads, group, d.value_dim),
            jnp.where(real, strengths, 0.0),
            jnp.where(real, log_decays, 0.0),
            memory if past is None else past.memory,
        )
        gate = self._gather_heads(self.gate(x), mesh).reshape(b, t, d.value_heads, d.value_dim)
        normed = self.norm(values.reshape(gate.shape).astype(x.dtype))
        gated = normed.astype(jnp.float32) * jax.nn.silu(gate.astype(jnp.float32))
        out = self.o(self._gather_heads(gated.astype(x.dtype).reshape(b, t, -1), mesh))
        if t > 1:
            out = jnp.take_along_axis(out, order.steps[..., None], axis=1)
        state = DeltaState(jnp.concatenate(tails, axis=-1), memory)
        return out, None if past is None else state

    def _gather_heads(self, x: Array, mesh: Mesh | None) -> Array:
        """Gathers `[B, T, heads d]` over `model`, unless that splits whole heads."""
        if mesh is None or self.delta.key_heads % mesh.shape[sharding.MODEL] == 0:
            return x
        return sharding.constrain(x, mesh, [sharding.ROWS])


def _normalize(x: Array) -> Array:
    """Scales vectors to length 1."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + _EPSILON)


def _apply_on_mesh(mesh: Mesh | None, *arrays: Array) -> tuple[Array, Array]:
    """`apply_delta_rule`; each device has some rows and, if `model` divides them, some heads."""
    if mesh is None or mesh.size == 1:
        return apply_delta_rule(*arrays)
    b, _, k, _ = arrays[0].shape
    fitted = sharding.fit_sharding(mesh, P(sharding.ROWS, sharding.MODEL), (b, k)).spec
    rows, heads = (*fitted, None, None)[:2]
    text, memory = P(rows, None, heads), P(rows, heads)
    return jax.shard_map(
        apply_delta_rule,
        mesh=mesh,
        in_specs=(text,) * 5 + (memory,),
        out_specs=(text, memory),
        check_vma=False,
    )(*arrays)


@functools.partial(jax.jit, inline=True)  # traced once for all layers
def apply_delta_rule(
    queries: Float[Array, "B T K d"],
    keys: Float[Array, "B T K d"],
    values: Float[Array, "B T K G e"],
    strengths: Float[Array, "B T K G"],
    log_decays: Float[Array, "B T K G"],
    memory: Float[Array, "B K G d e"],
) -> tuple[Float[Array, "B T K G e"], Float[Array, "B K G d e"]]:
    """The value that each query reads from the memory after its token, and the last memory.

    All arrays are float32. Keys have length 1. Strengths are b, from 0 (no correction) to 1;
    log decays are log a, 0 for none; the memory is M before the first token.
    """
    length = queries.shape[1]
    size = min(_CHUNK, length)
    count = -(-length // size)

    def split(x: Array) -> Array:
        """Splits tokens into chunks, `[n, B, t, ...]`; the zeros in the last do nothing."""
        widths = [(0, count * size - length if axis == 1 else 0) for axis in range(x.ndim)]
        x = jnp.pad(x, widths).reshape(x.shape[0], count, size, *x.shape[2:])
        return jnp.moveaxis(x, 0, 1)

    memory, out = jax.lax.scan(
        _read_chunk, memory, [split(x) for x in (queries, keys, values, strengths, log_decays)]
    )
    out = jnp.moveaxis(out, 0, 1).reshape(len(memory), count * size, *values.shape[2:])
    return out[:, :length], memory


def _read_chunk(memory: Array, chunk: list[Array]) -> tuple[Array, Array]:
    """The memory after a chunk, and the values that its queries read, `[B, t, K, G, e]`."""
    q, k, v, strengths, log_decays = chunk
    q, k = jnp.moveaxis(q, 1, 2), jnp.moveaxis(k, 1, 2)  # [B, K, t, d]
    v, strengths, log_decays = (jnp.moveaxis(x, 1, 3) for x in (v, strengths, log_decays))
    faded = jnp.cumsum(log_decays, axis=-1)  # since the start of the chunk, [B, K, G, t]
    between = faded[..., :, None] - faded[..., None, :]
    seen = jnp.tril(jnp.ones((q.shape[2],) * 2, bool))[None, None, None]
    since = jnp.exp(jnp.where(seen, between, -jnp.inf))  # from each earlier token on
    from_start = jnp.exp(faded)[..., None]
    corrections = strengths[..., None] * (v - from_start * _times("bktd,bkgde->bkgte", k, memory))
    if q.shape[2] > 1:
        overlaps = _times("bktd,bksd->bkts", k, k)[:, :, None]
        corrections = jax.lax.linalg.triangular_solve(
            strengths[..., None] * overlaps * since,
            corrections,
            left_side=True,
            lower=True,
            unit_diagonal=True,
        )
    scores = _times("bktd,bksd->bkts", q, k)[:, :, None] * since
    out = from_start * _times("bktd,bkgde->bkgte", q, memory)
    out = out + _times("bkgts,bkgse->bkgte", scores, corrections)
    to_end = jnp.exp(faded[..., -1:] - faded)[..., None]
    memory = from_start[..., -1:, :] * memory
    memory = memory + _times("bktd,bkgte->bkgde", k, to_end * corrections)
    return memory, jnp.moveaxis(out, 3, 1)


_times = functools.partial(jnp.einsum, precision="highest")
