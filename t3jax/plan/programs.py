"""The programs of a job on arrays without bytes: to be traced, lowered or compiled, never run.

They are the functions of a real run: prefill and chunks of decoding, the feature pass, an epoch of
head training, the gradient of a step of fine-tuning. Their arguments are `jax.ShapeDtypeStruct`
leaves, placed on a mesh by the rules of `t3jax.sharding`; the mesh's devices may be simulated, or
the description of a topology.

Axes: B batch, P prompt slots, T time, S cache slots, M tokens of a batch.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from t3jax import batching, features, sharding
from t3jax.finetuning import FinetuneConfig
from t3jax.finetuning import trainer as finetuning_trainer
from t3jax.finetuning.batches import Batch
from t3jax.head import HeadConfig, head_shapes
from t3jax.lm import LM, LMConfig, from_params
from t3jax.lm.decoder import abstract_params
from t3jax.plan.liveness import peak_bytes
from t3jax.sampling import loop
from t3jax.sampling.cache import cache_slots
from t3jax.sampling.next_token import Controls
from t3jax.sharding import place_abstract
from t3jax.training import TrainConfig
from t3jax.training import trainer as head_trainer
from t3jax.training.batches import Tokens

_Abstract = jax.ShapeDtypeStruct


class Step(NamedTuple):
    """A jitted program and its arguments: static values, and abstract arrays with shardings."""

    function: Any
    arguments: tuple[Any, ...]

    def compile(self) -> Any:
        """Compiles for the devices of the arguments' mesh."""
        return self.function.lower(*self.arguments).compile()

    def peak_bytes(self) -> int:
        """Peak bytes besides the arguments on one device."""
        traced = self.function.trace(*self.arguments)
        donated = [leaf.donated for leaf in jax.tree.leaves(traced.args_info)]
        return peak_bytes(traced.jaxpr.jaxpr, donated)


@dataclasses.dataclass(frozen=True)
class Job:
    """A job to plan; lengths are in tokens.

    Attributes:
        dtype: Dtype of activations, cache, and weights that are not int8.
        heads: The heads that are served together; the first is trained.
        rows: Answers decoded together.
        prompt: Longest prompt.
        new_tokens: Longest answer.
        chunk: Steps of a chunk of decoding.
        text: Longest text of the feature pass, and of fine-tuning.
        text_rows: Texts of a batch of the feature pass.
        texts: Texts of the forget and of the retain set together.
        answer: Mean length of their answers.
        members: Number of heads that are trained together, as if of different seeds.
        finetuning: How the model is fine-tuned; None if it is not.
    """

    config: LMConfig
    dtype: Any
    mesh: Mesh
    heads: tuple[HeadConfig, ...]
    rows: int = 16
    prompt: int = 128
    new_tokens: int = 200
    chunk: int = 8
    text: int = 1024
    text_rows: int = 16
    texts: int = 4000
    answer: int = 40
    feature_dtype: Any = jnp.float32
    recipe: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    members: int = 1
    finetuning: FinetuneConfig | None = None

    @property
    def row_shards(self) -> int:
        """Number of parts of the rows on the mesh."""
        return sharding.row_shards(self.mesh)

    @property
    def slots(self) -> list[int]:
        """Slots of the cache in prefill and in each chunk."""
        return cache_slots(self.prompt, self.new_tokens, self.chunk)


def simulate(devices: int) -> None:
    """Simulates devices in this process; to be called before any device is used."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)


@functools.cache
def abstract_lm(config: LMConfig, dtype: jax.typing.DTypeLike, mesh: Mesh) -> LM:
    """A model whose weights have no bytes, placed by the rules."""
    params = abstract_params(config, dtype)
    params = place_abstract(params, sharding.param_shardings(mesh, params))
    return from_params(config, params, None, (), config.model_type, mesh)


class _Inputs(NamedTuple):
    """The inputs of prefill besides weights."""

    tokens: _Abstract
    mask: _Abstract
    keys: _Abstract
    controls: Controls
    stop_ids: _Abstract


def loop_weights(job: Job) -> loop.Weights:
    """The weights that decoding reads."""
    lm, replicated = abstract_lm(job.config, job.dtype, job.mesh), NamedSharding(job.mesh, P())
    heads = [head_shapes(head) for head in job.heads]
    return loop.Weights(
        lm.params,
        tuple(place_abstract(head, sharding.param_shardings(job.mesh, head)) for head in heads),
        tuple(_Abstract((), jnp.float32, sharding=replicated) for _ in heads),  # type: ignore[misc]
    )


def _loop_program(job: Job) -> loop.Program:
    lm = abstract_lm(job.config, job.dtype, job.mesh)
    model = lm.apply, lm.unembed, lm.init_cache
    return loop.Program(*model, job.heads, "guided", with_logprobs=False, mesh=job.mesh)


def _inputs(job: Job) -> _Inputs:
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), job.rows))
    controls = jax.eval_shape(lambda: Controls.filled(job.rows))
    stop_ids = _Abstract((2,), jnp.int32, sharding=NamedSharding(job.mesh, P()))
    batch = by_rows(job.mesh, (*_texts(job.rows, job.prompt), keys, controls))
    return _Inputs._make([*batch, stop_ids])


def prefill(job: Job) -> Step:
    """Reading the prompts."""
    *batch, stop_ids = _inputs(job)
    arguments = _loop_program(job), loop_weights(job), *batch, job.slots[0], stop_ids
    return Step(loop.prefill, arguments)


def decode(job: Job, shardings: PyTree = None) -> Step:
    """The last chunk of decoding, with the longest cache.

    The state has the `shardings` of a compiled prefill; None: those of `state`.
    """
    inputs, before = _inputs(job), state(job, job.slots[-1])
    if shardings is not None:
        before = place_abstract(before, shardings)
    stopped = by_rows(job.mesh, _Abstract((job.rows,), bool))
    rest = before, stopped, inputs.controls, inputs.stop_ids, job.chunk
    return Step(loop.decode_chunk, (_loop_program(job), loop_weights(job), *rest))


def state(job: Job, slots: int) -> loop.State:
    """The state of decoding, placed by the rules."""
    # The rest of the state does not depend on the layers, and one layer is quick to trace.
    shallow = dataclasses.replace(job, config=job.config.keep_layers([0]))
    program = _loop_program(shallow)

    def begin(weights: loop.Weights, inputs: _Inputs) -> loop.State:
        *batch, stop_ids = inputs
        return loop.prefill(program, weights, *batch, job.slots[0], stop_ids)[0]

    begun = jax.eval_shape(begin, loop_weights(shallow), _inputs(shallow))
    lm = abstract_lm(job.config, job.dtype, job.mesh)
    cache = jax.eval_shape(functools.partial(lm.init_cache, job.rows, slots))
    begun = begun._replace(cache=cache)
    return place_abstract(begun, loop.state_shardings(job.mesh, begun))


def feature_pass(job: Job) -> Step:
    """The feature pass over a batch."""
    lm = abstract_lm(job.config, job.dtype, job.mesh)
    batch = by_rows(job.mesh, _texts(job.text_rows, job.text))
    return Step(features.feature_pass, (lm.apply, lm.params, *batch))


def head_training(job: Job) -> Step:
    """An epoch of head training."""
    mesh, parts, head = job.mesh, job.row_shards, job.heads[0]
    tokens = math.ceil(job.texts * job.answer / parts)
    # At most every answer token is distinct: each trains a row of W2.
    head = dataclasses.replace(head, vocab_size=min(head.vocab_size, parts * tokens))
    # At most half of the texts are forget texts, each paired with a retain text in its batch.
    steps = math.ceil(job.texts / 2 / job.recipe.batch_size)
    size = batching.round_up(math.ceil(2 * job.recipe.batch_size * job.answer / parts), 64)
    programs = head_trainer.compile_programs(head, job.recipe, steps, (1, job.members), mesh)
    arrays = (
        _Abstract((parts, tokens, head.feature_size), job.feature_dtype),
        _Abstract((parts, tokens), jnp.int32),
        _Abstract((parts,), jnp.int32),
    )
    data = Tokens(*by_rows(mesh, arrays))
    rows = _split_after(2, mesh, _Abstract((job.members, steps, parts, size), jnp.int32))
    knob = _Abstract((job.members,), jnp.float32, sharding=NamedSharding(mesh, P()))
    return Step(programs.epoch, (programs.abstract_state, data, rows, (knob, knob)))


def finetuning_programs(job: Job) -> finetuning_trainer.Programs:
    """The programs of fine-tuning."""
    assert job.finetuning is not None
    return finetuning_trainer.compile_programs(job.config, job.finetuning, 1, job.mesh)


def gradient(job: Job) -> Step:
    """The gradient of a step of fine-tuning on texts of the longest kind, scored by half."""
    programs, recipe, shards = finetuning_programs(job), job.finetuning, job.row_shards
    assert recipe is not None
    rows = batching.round_up(-(-recipe.batch_size // recipe.microbatches), shards)
    scored = (recipe.microbatches, shards, rows // shards * job.text // 2)
    batch = Batch(
        tokens=_Abstract((recipe.microbatches, rows, job.text), jnp.int32),
        places=_Abstract(scored, jnp.int32),
        labels=_Abstract(scored, jnp.int32),
        weights=_Abstract(scored, jnp.float32),
    )
    trained = finetuning_trainer.of_task(programs.abstract_state[0], 0, recipe)
    frozen = {}
    if recipe.freezes_weights:
        frozen = abstract_lm(job.config, recipe.dtype, job.mesh).params
    elif recipe.reptile:
        frozen = programs.abstract_state[0]["base"]
    batch = jax.tree.map(functools.partial(_split_after, 1, job.mesh), batch)
    return Step(programs.gradient, (trained, frozen, batch))


def on_one_device(job: Job, layers: Sequence[int]) -> Job:
    """The share of a job that one device computes, as a job on a mesh of one device.

    It has only these `layers` of the model: few are quick to trace.
    """
    config, shards, recipe = _share_model(job, layers), job.row_shards, job.finetuning
    if recipe is not None:
        rows = -(-recipe.batch_size // (recipe.microbatches * shards))
        recipe = dataclasses.replace(recipe, batch_size=rows * recipe.microbatches)
    return dataclasses.replace(
        job,
        config=config,
        mesh=sharding.make_mesh(devices=jax.local_devices(backend="cpu")[:1]),
        heads=tuple(dataclasses.replace(head, vocab_size=config.vocab_size) for head in job.heads),
        rows=-(-job.rows // shards),
        text_rows=-(-job.text_rows // shards),
        texts=-(-job.texts // shards),
        recipe=dataclasses.replace(job.recipe, batch_size=-(-job.recipe.batch_size // shards)),
        finetuning=recipe,
    )


def _share_model(job: Job, layers: Sequence[int]) -> LMConfig:
    """The shape of one device's share of some layers."""
    config = job.config.keep_layers(layers)

    def share(size: int) -> int:
        split = sharding.fit_sharding(job.mesh, P(sharding.MODEL), (size,))
        return split.shard_shape((size,))[0]

    experts = config.experts
    if experts is not None:
        experts = dataclasses.replace(
            experts,
            count=max(experts.chosen, share(experts.count)),
            shared=share(experts.shared),
            groups=1,
            chosen_groups=1,
        )
    delta = config.delta
    if delta is not None:
        shared_out = delta.key_heads // share(delta.key_heads)
        delta = dataclasses.replace(
            delta,
            key_heads=delta.key_heads // shared_out,
            value_heads=delta.value_heads // shared_out,
        )
    conv = config.conv
    if conv is not None:
        conv = dataclasses.replace(conv, channels=share(conv.channels))
    heads = max(1, share(config.num_heads * config.head_dim) // config.head_dim)

    def share_keys(kv_heads: int) -> int:
        """Key heads of a device; with more devices than key heads, some devices share one."""
        group = config.num_heads // kv_heads
        return heads // group if heads % group == 0 else math.gcd(heads, kv_heads)

    whole = config.whole_heads
    if whole is not None:
        whole = dataclasses.replace(whole, num_kv_heads=share_keys(whole.num_kv_heads))
    return dataclasses.replace(
        config,
        vocab_size=share(config.vocab_size),
        intermediate_size=share(config.intermediate_size),
        experts=experts,
        delta=delta,
        conv=conv,
        num_heads=heads,
        num_kv_heads=share_keys(config.num_kv_heads),
        whole_heads=whole,
        borrowing_size=share(config.borrowing_size),
    )


def by_rows(mesh: Mesh, tree: PyTree) -> PyTree:
    """A tree of abstract arrays, each split by rows."""
    return place_abstract(
        tree, jax.tree.map(lambda x: sharding.batch_sharding(mesh, x.shape), tree)
    )


def _split_after(axes: int, mesh: Mesh, leaf: _Abstract) -> _Abstract:
    """Splits an abstract array like rows, along the axis after the first `axes`."""
    return place_abstract(
        leaf, sharding.fit_sharding(mesh, P(*(None,) * axes, sharding.ROWS), leaf.shape)
    )


def _texts(rows: int, length: int) -> tuple[_Abstract, _Abstract]:
    """Tokens and mask of a batch."""
    return _Abstract((rows, length), jnp.int32), _Abstract((rows, length), bool)
