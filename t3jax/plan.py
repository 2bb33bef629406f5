"""How much memory a job takes on each device, before anything is loaded.

    python -m t3jax.plan --config=configs/NAME.py --device=v5e --devices=8 [--config.FIELD=...]

Only `config.json` of the model is read. The programs are those that run (prefill, chunks of decoding,
the feature pass, an epoch of head training, a step of fine-tuning), on arrays that have a shape, a
dtype and a sharding and no bytes. What is kept (weights, cache, features, optimizer state) is
summed over a device's shards: exact. What lives for a moment is estimated from the program that one
device runs, see `peak_bytes`. Nothing is compiled; docs/planning.md compares with what compilers say.

Axes: B batch, P prompt slots, T time, S cache slots, N answer tokens, M tokens of a batch.
"""

import collections
import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags
from jax.extend import core as jex
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from t3jax import batching, cli, features, finetuning, pipeline, sharding
from t3jax.finetuning import FinetuneConfig
from t3jax.finetuning import trainer as finetuning_trainer
from t3jax.finetuning.batches import Batch
from t3jax.head import HeadConfig, head_shapes
from t3jax.lm import LM, LMConfig, from_params, lm_config, read_config
from t3jax.lm.decoder import abstract_params
from t3jax.lm.model import DTYPES
from t3jax.sampling import loop
from t3jax.sampling.next_token import Controls
from t3jax.sampling.sampler import cache_slots
from t3jax.training import TrainConfig
from t3jax.training import trainer as head_trainer
from t3jax.training.batches import Tokens

GIB = 2**30
# Memory of a device that a program may have.
DEVICES = {
    "v5e": int(15.75 * GIB),
    "v5p": int(95.74 * GIB),
    "H100": 80 * 10**9,
    "H200": 141 * 10**9,
}
USABLE = 0.9  # of it: the rest is for programs, fragments, and what the estimate does not see

_LLAMA = {
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
}


def _llama(width: int, mlp: int, layers: int, heads: int) -> dict[str, Any]:
    return _LLAMA | {
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


# What `config.json` says of models that need not be at hand to be planned for.
SHAPES = {
    "llama-3.1-8b": _llama(4096, 14336, 32, 32),
    "llama-3.1-70b": _llama(8192, 28672, 80, 64),
    "llama-3.1-405b": _llama(16384, 53248, 126, 128),
}


class Step(NamedTuple):
    """A program and its arguments, abstract and placed: can be traced, lowered and compiled.

    Attributes:
        function: Jitted.
        arguments: Static values and `jax.ShapeDtypeStruct` leaves with shardings.
    """

    function: Any
    arguments: tuple[Any, ...]

    def lower(self) -> Any:
        """The program, ready to be compiled for the devices of the arguments' mesh."""
        return self.function.lower(*self.arguments)

    def peak_bytes(self) -> int:
        """The most that is alive at once besides the arguments, as if on one device."""
        traced = self.function.trace(*self.arguments)
        donated = [leaf.donated for leaf in jax.tree.leaves(traced.args_info)]
        return peak_bytes(traced.jaxpr.jaxpr, donated)


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a stage of a job keeps on each device, and what lives for a moment.

    Attributes:
        kept: Bytes, by what they are.
        temporary: Bytes of activations, logits and results of the largest step.
    """

    kept: dict[str, int]
    temporary: int

    @property
    def total(self) -> int:
        """Bytes on each device."""
        return sum(self.kept.values()) + self.temporary


@dataclasses.dataclass(frozen=True)
class Job:
    """What is planned for.

    Attributes:
        config: The model's shape.
        dtype: Of weights, activations and cache.
        mesh: Of devices that need not be there.
        heads: The heads that are served together.
        rows: Answers decoded together.
        prompt: Longest prompt, tokens.
        chunks: Chunks of decoding, at most.
        chunk: Steps of one.
        text: Longest text of the feature pass, and of fine-tuning, tokens.
        texts: Texts of the forget and of the retain set together.
        answer: Mean length of their answers, tokens.
        feature_dtype: Of the features.
        recipe: How heads are trained.
        members: Heads that are trained together.
        finetuning: How the model is fine-tuned; None if it is not.
    """

    config: LMConfig
    dtype: Any
    mesh: Mesh
    heads: tuple[HeadConfig, ...]
    rows: int = 16
    prompt: int = 128
    chunks: int = 13
    chunk: int = 16
    text: int = 1024
    texts: int = 4000
    answer: int = 40
    feature_dtype: Any = jnp.float32
    recipe: TrainConfig = TrainConfig()
    members: int = 1
    finetuning: FinetuneConfig | None = None

    @property
    def row_shards(self) -> int:
        """Parts into which the mesh splits rows."""
        rows = self.mesh.size
        return rows // sharding.batch_sharding(self.mesh, (rows,)).shard_shape((rows,))[0]


# The steps of a job, abstract.


def abstract_lm(job: Job) -> LM:
    """The model without bytes, placed by the rules."""
    params = abstract_params(job.config, job.dtype)
    params = _placed(params, sharding.param_shardings(job.mesh, params))
    return from_params(job.config, params, None, (), job.config.model_type, job.mesh)


def prefill_step(job: Job, slots: int) -> Step:
    """Reading the prompts, into a cache of so many slots."""
    lm, whole = abstract_lm(job), NamedSharding(job.mesh, P())
    heads = tuple(head_shapes(head) for head in job.heads)
    heads = tuple(_placed(head, sharding.param_shardings(job.mesh, head)) for head in heads)
    program = loop.Program(
        lm.apply,
        lm.unembed,
        lm.init_cache,
        tuple(head.activation for head in job.heads),
        truncate_on="base",
        with_logprobs=False,
        mesh=job.mesh,
    )
    shifts = tuple(jax.ShapeDtypeStruct((), jnp.float32, sharding=whole) for _ in heads)
    controls = Controls(
        **{
            name: jax.ShapeDtypeStruct((job.rows,), jnp.int32 if name == "top_k" else jnp.float32)
            for name in Controls._fields
        }
    )
    tokens, mask = _texts(job.rows, job.prompt)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), job.rows))
    stop_ids = jax.ShapeDtypeStruct((2,), jnp.int32, sharding=whole)
    return Step(
        loop.prefill,
        (
            program,
            loop.Weights(lm.params, heads, shifts),
            *_by_rows(job.mesh, (tokens, mask, keys, controls)),
            slots,
            stop_ids,
        ),
    )


def decode_step(job: Job, slots: int, shardings: Any = None) -> Step:
    """A chunk of decoding, with a cache of so many slots.

    Args:
        job: What is planned for.
        slots: S.
        shardings: Of the state; None: of the cache as the rules have it, of the rest by rows.

    Returns:
        The step.
    """
    program, weights, *batch, controls, _, stop_ids = prefill_step(job, slots).arguments
    state = abstract_state(job, slots)
    if shardings is not None:
        state = _placed(state, shardings)
    stopped = _by_rows(job.mesh, jax.ShapeDtypeStruct((job.rows,), bool))
    return Step(
        loop.decode_chunk, (program, weights, state, stopped, controls, stop_ids, job.chunk)
    )


def abstract_state(job: Job, slots: int) -> loop.State:
    """The state of decoding: its cache by the rules, what else it has by rows."""
    program, *batch, slots, stop_ids = prefill_step(job, slots).arguments
    state, _ = jax.eval_shape(
        lambda *arrays: loop.prefill(program, *arrays[:-1], slots, arrays[-1]), *batch, stop_ids
    )
    cache = _placed(state.cache, sharding.cache_shardings(job.mesh, state.cache))
    return _by_rows(job.mesh, state)._replace(cache=cache)


def feature_step(job: Job, rows: int | None = None) -> Step:
    """The feature pass over a batch of so many rows; None: as many as it takes by itself."""
    lm = abstract_lm(job)
    rows = feature_rows(job) if rows is None else rows
    return Step(features.feature_pass, (lm.apply, lm.params, *_by_rows(job.mesh, _texts(rows, job.text))))


def feature_rows(job: Job) -> int:
    """Rows of a batch of features, texts being of the longest kind."""
    return job.row_shards * max(1, batching.TOKENS_PER_SHARD // job.text)


def head_training_step(job: Job) -> Step:
    """An epoch of head training."""
    mesh, whole = job.mesh, NamedSharding(job.mesh, P())
    tokens = batching.round_up(job.texts * job.answer, job.row_shards)
    # At most every answer token is another one: as many rows of W2 are trained.
    head = dataclasses.replace(job.heads[0], vocab_size=min(job.heads[0].vocab_size, tokens))
    # Half of the texts are forget texts at most, and each has its retain text in the same batch.
    steps = max(1, math.ceil(job.texts / 2 / job.recipe.batch_size))
    size = batching.round_up(2 * job.recipe.batch_size * job.answer, 64 * job.row_shards)
    programs = head_trainer.compile_programs(head, job.recipe, steps, job.members, mesh)
    data = Tokens(
        *_by_rows(
            mesh,
            (
                jax.ShapeDtypeStruct((tokens, head.hidden_size), job.feature_dtype),
                jax.ShapeDtypeStruct((tokens,), jnp.int32),
            ),
        ),
        jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
    )
    rows = jax.ShapeDtypeStruct(
        (job.members, steps, size),
        jnp.int32,
        sharding=NamedSharding(mesh, P(None, None, *sharding.batch_sharding(mesh, (size,)).spec)),
    )
    knob = jax.ShapeDtypeStruct((job.members,), jnp.float32, sharding=whole)
    return Step(programs.epoch, (programs.abstract_state, data, rows, (knob, knob)))


def finetuning_step(job: Job) -> Step:
    """The gradient of a step of fine-tuning, half of each text being scored."""
    assert job.finetuning is not None
    recipe, shards = job.finetuning, job.row_shards
    programs = finetuning_trainer.compile_programs(job.config, recipe, 1, job.mesh)
    rows = batching.round_up(-(-recipe.batch_size // recipe.microbatches), shards)
    scored = rows * job.text // (2 * shards)
    shape = (recipe.microbatches, shards, scored)
    batch = Batch(
        jax.ShapeDtypeStruct((recipe.microbatches, rows, job.text), jnp.int32),
        jax.ShapeDtypeStruct(shape, jnp.int32),
        jax.ShapeDtypeStruct(shape, jnp.int32),
        jax.ShapeDtypeStruct(shape, jnp.float32),
    )
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape,
            x.dtype,
            sharding=NamedSharding(
                job.mesh, P(None, *sharding.batch_sharding(job.mesh, x.shape[1:]).spec)
            ),
        ),
        batch,
    )
    trained, _ = programs.abstract_state
    frozen = abstract_lm(job).params if recipe.lora_rank else {}
    return Step(programs.gradient, (trained, frozen, batch))


# Bytes.


def shard_bytes(tree: Any) -> int:
    """Bytes of a tree on each device.

    Args:
        tree: Leaves with shape, dtype and sharding.

    Returns:
        The sum over the leaves' shards.
    """
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def decoding(job: Job) -> Stage:
    """Bytes of decoding: the largest of prefill, a growing cache, and a chunk of steps."""
    slots = cache_slots(batching.round_up(job.prompt, 32), job.chunks, job.chunk)
    last = abstract_state(job, slots[-1])
    weights = prefill_step(job, slots[-1]).arguments[1]
    # While the cache grows both are in memory.
    before = max((s for s in slots if s < slots[-1]), default=0)
    growing = shard_bytes(abstract_state(job, before).cache) if before else 0
    # The cache is counted as it is in the end, also where prefill makes a smaller one.
    local = _on_one_device(job)
    steps = prefill_step(local, slots[0]), decode_step(local, slots[-1])
    gathered = _gathered(job)
    return Stage(
        {
            "weights": shard_bytes(weights.params),
            "heads": shard_bytes(weights.heads),
            "key-value cache": shard_bytes(last.cache),
            "decoding state": shard_bytes(last._replace(cache=None)),
        },
        max(growing, *(step.peak_bytes() + gathered for step in steps)),
    )


def feature_pass(job: Job, rows: int | None = None) -> Stage:
    """Bytes of the feature pass over batches of so many rows; None: as many as it takes."""
    rows = feature_rows(job) if rows is None else rows
    step = feature_step(_on_one_device(job), rows // job.row_shards)
    # The result of the batch before is on its way to the host.
    pending = rows // job.row_shards * job.text * job.config.hidden_size * 4
    return Stage(
        {"weights": shard_bytes(abstract_lm(job).params)},
        step.peak_bytes() + pending + _gathered(job),
    )


def head_training(job: Job) -> Stage:
    """Bytes of head training, beside the weights that the features came from."""
    state, data, rows, _ = head_training_step(job).arguments
    return Stage(
        {
            "weights": shard_bytes(abstract_lm(job).params),
            "features": shard_bytes(data) + shard_bytes(rows),
            "heads": shard_bytes(state[0]),
            "optimizer state": shard_bytes(state[1]),
        },
        head_training_step(_on_one_device(job)).peak_bytes(),
    )


def fine_tuning(job: Job) -> Stage:
    """Bytes of a step of fine-tuning, beside the weights that it began with."""
    recipe = job.finetuning
    assert recipe is not None
    start = job if recipe.lora_rank else dataclasses.replace(job, dtype=jnp.float32)
    programs = finetuning_trainer.compile_programs(job.config, recipe, 1, job.mesh)
    trained, opt_state = programs.abstract_state
    dtype = jnp.dtype(recipe.dtype)
    # Two layers say what each further one adds: what the backward pass needs of it. Gradients are
    # split as the weights are, which the program of one device does not know.
    one, two = (
        finetuning_step(local).peak_bytes() - _gradient_bytes(local)
        for local in (_on_one_device(job, layers) for layers in (1, 2))
    )
    return Stage(
        {
            "weights": shard_bytes(abstract_lm(start).params),
            "trained": shard_bytes(trained),
            "optimizer state": shard_bytes(opt_state),
            "gradient": _gradient_bytes(job),
            "copy in the dtype of the pass": (
                0 if dtype == jnp.float32 else shard_bytes(trained) * dtype.itemsize // 4
            ),
        },
        max(0, one + (job.config.num_layers - 1) * (two - one)) + _gathered(job),
    )


def largest_rows(job: Job, stage: Callable[[int], Stage], capacity: int) -> int:
    """The largest batch that fits: the parts of the mesh that split rows, times a power of two.

    Args:
        job: What is planned for.
        stage: Of so many rows.
        capacity: Bytes of a device.

    Returns:
        Rows; 0 if not even one row on each part fits.
    """
    rows = 0
    following = job.row_shards
    while stage(following).total <= USABLE * capacity and following < 2**20:
        rows, following = following, 2 * following
    return rows


def peak_bytes(jaxpr: jex.Jaxpr, donated: Sequence[bool] = ()) -> int:
    """The most bytes alive at once in a program that runs on one device, besides its arguments.

    The steps run in the order of the program. A value lives from where it is computed to its last use.
    Reshaping, broadcasting and casting cost nothing, since compilers do them where the result is
    read; an elementwise result takes the place of an operand of its size that is not needed any
    more. What else compilers fuse, pad or reorder is not seen.

    Args:
        jaxpr: The program.
        donated: For each argument whether its memory may be written to; empty: none.

    Returns:
        Bytes, those of the results included.
    """
    memory = _Memory()
    donated = donated or [False] * len(jaxpr.invars)
    arguments = [
        _Buffer(_bytes(var.aval), holders=1 if free else 2)
        for var, free in zip(jaxpr.invars, donated, strict=True)
    ]
    memory.run(jaxpr, arguments)
    return memory.peak


@dataclasses.dataclass(eq=False)
class _Buffer:
    """A piece of memory: how many values stand in it, and whether it counts (arguments do not)."""

    size: int
    holders: int = 1
    counted: bool = False


class _Memory:
    """What is alive while a program runs, and the most that ever was."""

    def __init__(self) -> None:
        self.live = self.peak = 0

    def run(self, jaxpr: jex.Jaxpr, arguments: Sequence[_Buffer]) -> list[_Buffer]:
        """Runs a program that holds each of its arguments once; the caller holds the results."""
        last = {var: i for i, eqn in enumerate(jaxpr.eqns) for var in _variables(eqn.invars)}
        last |= dict.fromkeys(_variables(jaxpr.outvars), len(jaxpr.eqns))
        known = dict(zip(jaxpr.invars, arguments, strict=True))
        known |= {var: _Buffer(0, holders=2) for var in jaxpr.constvars}
        for var in [var for var in known if var not in last]:
            self.release(known.pop(var))
        for i, eqn in enumerate(jaxpr.eqns):
            operands = [known[var] for var in _variables(eqn.invars)]
            for buffer in operands:
                buffer.holders += 1
            for var in {var for var in _variables(eqn.invars) if last[var] == i}:
                self.release(known.pop(var))
            for var, buffer in zip(eqn.outvars, self.step(eqn, operands), strict=True):
                known[var] = buffer
                if var not in last:
                    self.release(known.pop(var))
        results = [
            _Buffer(0) if isinstance(var, jex.Literal) else known[var] for var in jaxpr.outvars
        ]
        for buffer in results:
            buffer.holders += 1
        for buffer in known.values():
            self.release(buffer)
        return results

    def step(self, eqn: jex.JaxprEqn, operands: list[_Buffer]) -> list[_Buffer]:
        """One equation, which holds each of its operands once; the caller holds the results."""
        name = eqn.primitive.name
        inner = [_open(x) for x in eqn.params.values() if isinstance(x, _PROGRAMS)]
        if name in _CALLS:
            given = iter(operands)
            return self.run(
                inner[0],
                [_Buffer(0) if isinstance(x, jex.Literal) else next(given) for x in eqn.invars],
            )
        if name in _VIEWS and operands:
            operands[0].holders += len(eqn.outvars)
            for buffer in operands:
                self.release(buffer)
            return [operands[0]] * len(eqn.outvars)
        # What dies here: nobody but this equation holds it.
        holds = collections.Counter(operands)
        spare = [buffer for buffer, count in holds.items() if buffer.holders == count]
        inside = 0
        if name == "cond":
            inside = max(_inside(_open(x), len(eqn.invars) - 1) for x in eqn.params["branches"])
            self.peak = max(self.peak, self.live + inside)
        results = []
        for var in eqn.outvars:
            size = _bytes(var.aval)
            reused = next((b for b in spare if b.size == size and name not in _FRESH), None)
            if reused is not None:
                spare.remove(reused)
                reused.holders += 1
                results.append(reused)
                continue
            self.live += size
            results.append(_Buffer(size, counted=True))
        if name == "scan":
            inside = _inside(_open(eqn.params["jaxpr"]), eqn.params["num_carry"], eqn.params["num_consts"])
        elif name == "while":
            inside = max(_inside(body, len(eqn.outvars), len(body.invars) - len(eqn.outvars)) for body in inner)
        self.peak = max(self.peak, self.live + (0 if name == "cond" else inside))
        for buffer in operands:
            self.release(buffer)
        return results

    def release(self, buffer: _Buffer) -> None:
        """One holder less; memory that nobody holds is free."""
        buffer.holders -= 1
        if not buffer.holders and buffer.counted:
            self.live -= buffer.size


_PROGRAMS = (jex.ClosedJaxpr, jex.Jaxpr)
_CALLS = {"checkpoint", "closed_call", "custom_jvp_call", "custom_vjp_call", "jit"}
_VIEWS = {
    "bitcast_convert_type",
    "broadcast_in_dim",
    "convert_element_type",
    "expand_dims",
    "optimization_barrier",
    "random_wrap",
    "random_unwrap",
    "reshape",
    "sharding_constraint",
    "slice",
    "split",
    "squeeze",
    "stop_gradient",
    "transpose",
}
_FRESH = {"concatenate", "cumsum", "dot_general", "gather", "sort"}  # not in an operand's place


def _inside(body: jex.Jaxpr, owned: int, before: int = 0) -> int:
    """`peak_bytes` of a loop's body or a branch, which may write to some of its arguments."""
    return peak_bytes(body, [before <= i < before + owned for i in range(len(body.invars))])


def _open(program: Any) -> jex.Jaxpr:
    return program.jaxpr if isinstance(program, jex.ClosedJaxpr) else program


def _variables(atoms: Sequence[Any]) -> list[Any]:
    return [atom for atom in atoms if not isinstance(atom, jex.Literal)]


def _bytes(aval: Any) -> int:
    return math.prod(aval.shape) * aval.dtype.itemsize if hasattr(aval, "shape") else 0


def _on_one_device(job: Job, layers: int = 1) -> Job:
    """What one device of the mesh computes, as a job of its own: as wide as its shards.

    What lives for a moment does not grow with the layers, unless there is a backward pass.
    """
    config = job.config
    shares = jax.tree.map(lambda leaf: leaf.sharding.shard_shape(leaf.shape), abstract_lm(job).params)
    cache = jax.eval_shape(functools.partial(abstract_lm(job).init_cache, job.rows, 1))
    keys = sharding.cache_shardings(job.mesh, cache).keys[0].shard_shape(cache.keys[0].shape)
    one = sharding.make_mesh((1,) * job.mesh.devices.ndim, jax.local_devices(backend="cpu")[:1])
    shards, recipe = job.row_shards, job.finetuning
    if recipe is not None:
        rows = -(-recipe.batch_size // (recipe.microbatches * shards))
        recipe = dataclasses.replace(recipe, batch_size=rows * recipe.microbatches)
    vocabulary = shares["embed"]["weight"][0]
    return dataclasses.replace(
        job,
        config=dataclasses.replace(
            config,
            vocab_size=vocabulary,
            intermediate_size=shares["layers"][0]["mlp"]["up"]["weight"][0],
            num_layers=layers,
            num_heads=config.num_heads // config.num_kv_heads * keys[1],
            num_kv_heads=keys[1],
            local=config.local[:layers],
        ),
        mesh=one,
        heads=tuple(dataclasses.replace(head, vocab_size=vocabulary) for head in job.heads),
        rows=-(-job.rows // shards),
        texts=-(-job.texts // shards),
        recipe=dataclasses.replace(job.recipe, batch_size=-(-job.recipe.batch_size // shards)),
        finetuning=recipe,
    )


def _gathered(job: Job) -> int:
    """Bytes of what must be gathered to be used: a layer's weights, or a table, at a time."""
    stored, used = abstract_lm(job).params, abstract_lm(_on_one_device(job)).params
    groups = [(stored["layers"][0], used["layers"][0])]
    groups += [(stored[name], used[name]) for name in ("embed", "lm_head") if name in stored]
    return max(
        sum(
            shard_bytes(mine) if shard_bytes(mine) > shard_bytes(share) else 0
            for share, mine in zip(jax.tree.leaves(share_tree), jax.tree.leaves(mine_tree), strict=True)
        )
        for share_tree, mine_tree in groups
    )


def _gradient_bytes(job: Job) -> int:
    """Bytes of a gradient: of one microbatch, and the sum in float32."""
    assert job.finetuning is not None
    trained, _ = finetuning_trainer.compile_programs(
        job.config, job.finetuning, 1, job.mesh
    ).abstract_state
    return shard_bytes(trained) * (jnp.dtype(job.finetuning.dtype).itemsize + 4) // 4


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def _by_rows(mesh: Mesh, tree: Any) -> Any:
    return _placed(tree, jax.tree.map(lambda x: sharding.batch_sharding(mesh, x.shape), tree))


def _texts(rows: int, length: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Tokens and mask of a batch."""
    shape = (rows, length)
    return jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, bool)
