"""The compiled programs of fine-tuning: gradient and update, and the loss of held-out rows.

The trained parameters (all weights, or LoRA's factors) and their moments are float32, and split
over the mesh as the weights are. They are cast once a step to the dtype of the forward and backward
pass; gradients are summed in float32.

With tasks (LoRA-ML) the trained parameters are `{"base": all weights, "adapters": {"0": factors,
...}}`. A gradient is taken for one task after the other, on its batch, with respect to `{"base":
..., "lora": factors}`. With Reptile it is with respect to `{"lora": factors}` alone, and the base
moves when a round ends.

Axes: M microbatches, B rows of one, T time, S shards, A scored tokens of a shard, D features, V
vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PRNGKeyArray, PyTree

from t3jax import hosts, optimizer, sharding
from t3jax.batching import round_up
from t3jax.data import Example
from t3jax.finetuning.batches import Batch, choose_outputs, make_batch
from t3jax.finetuning.lora import init_lora, merge_lora, scale_lora
from t3jax.finetuning.recipe import FinetuneConfig, make_optimizer
from t3jax.lm import LMConfig, decoder
from t3jax.lm.decoder import Lora
from t3jax.minnorm import project

Params = decoder.Params


class Programs(NamedTuple):
    """The compiled programs of a model and a recipe; a state is `(trained, optimizer state)`.

    Attributes:
        abstract_state: The state as shapes with shardings.
        init: `params -> state`.
        gradient: `(trained, frozen, batch) -> (loss, gradient)`, compiled for each shape of batch.
        add: `(tree, tree) -> their sum`; the first is donated.
        update: `(state, gradient) -> (state, norm of the gradient)`, compiled once; the state is
            donated. With tasks the gradient is summed over them, and divided by their number;
            with Reptile each adapter has its own.
        end_round: `(trained, step) -> trained` of Reptile: the base moved by the mean of the
            adapters, and adapters that begin anew; the first is donated.
        loss: `(trained, frozen, batch) -> sum of the weighted losses`.
        output: `(trained, frozen, row) -> largest logit` at the place of a row of `choose_outputs`;
            not compiled.
    """

    abstract_state: PyTree
    init: Callable[[Params], PyTree]
    gradient: Callable[[PyTree, Params, Batch], tuple[jax.Array, PyTree]]
    add: Callable[[PyTree, PyTree], PyTree]
    update: Callable[[PyTree, PyTree], tuple[PyTree, jax.Array]]
    end_round: Callable[[PyTree, np.uint32], PyTree]
    loss: Callable[[PyTree, Params, Batch], jax.Array]
    output: Callable[[PyTree, Params, dict[str, jax.Array]], jax.Array]


@dataclasses.dataclass(frozen=True)
class _Model:
    """The functions of a model and a recipe that do not need the optimizer."""

    lm_config: LMConfig
    config: FinetuneConfig
    mesh: Mesh

    def init_trained(self, params: Params) -> PyTree:
        """What is trained, before the first step."""
        config, key = self.config, jax.random.key(self.config.seed)
        if config.freezes_weights:
            return init_lora(params, config.lora_rank, config.lora_layers, key)
        weights = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
        if not config.tasks:
            return weights
        return {"base": weights, "adapters": self.init_adapters(params, key)}

    def init_adapters(self, params: Params, key: PRNGKeyArray) -> dict[str, Lora]:
        config = self.config
        return {
            str(task): init_lora(params, config.lora_rank, config.lora_layers, task_key)
            for task, task_key in enumerate(jax.random.split(key, config.tasks or 1))
        }

    def cast(self, trained: PyTree) -> PyTree:
        return decoder.cast_params(trained, jnp.dtype(self.config.dtype))

    def read(self, working: PyTree, frozen: Params) -> tuple[Params, Lora | None]:
        """The weights, and LoRA's factors, scaled."""
        config = self.config
        if config.tasks:  # held-out texts are read without an adapter
            lora = working.get("lora")
            base = working.get("base") or self.cast(frozen)
            return base, lora and scale_lora(lora, config.lora_scale)
        if config.lora_rank:
            return frozen, scale_lora(working, config.lora_scale)
        return working, None

    def sum_losses(self, trained: PyTree, frozen: Params, part: Batch) -> jax.Array:
        """The loss summed over one microbatch; the arrays of `part` lack their first axis."""
        params, lora = self.read(trained, frozen)
        hidden, _ = decoder.apply(
            self.lm_config, params, part.tokens, lora=lora, remat=self.config.remat, mesh=self.mesh
        )
        hidden = hidden.reshape(part.places.shape[0], -1, hidden.shape[-1])  # [S, B T / S, D]
        scored = jax.vmap(lambda rows, at: rows.at[at].get(mode="promise_in_bounds"))(
            hidden, part.places
        )
        logits = decoder.unembed(self.lm_config, params, scored, self.mesh)  # [S, A, V]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, part.labels)
        return jnp.sum(losses * part.weights)

    def loss(self, trained: PyTree, frozen: Params, batch: Batch) -> jax.Array:
        working = self.cast(trained)
        return jnp.sum(jax.lax.map(lambda part: self.sum_losses(working, frozen, part), batch))

    def gradient(self, trained: PyTree, frozen: Params, batch: Batch) -> tuple[jax.Array, PyTree]:
        working = self.cast(trained)

        def add(total: PyTree, part: Batch) -> tuple[PyTree, None]:
            result = jax.value_and_grad(self.sum_losses)(working, frozen, part)
            return jax.tree.map(lambda t, x: t + x.astype(jnp.float32), total, result), None

        zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, trained))
        total, _ = jax.lax.scan(add, zero, batch)
        share = 1 / jnp.sum(batch.weights)
        return jax.tree.map(lambda x: x * share, total)

    def output(self, trained: PyTree, frozen: Params, row: dict[str, jax.Array]) -> jax.Array:
        params, lora = self.read(self.cast(trained), frozen)
        hidden, _ = decoder.apply(self.lm_config, params, row["tokens"][None], lora=lora)
        return jnp.max(decoder.unembed(self.lm_config, params, hidden[:, row["place"]]))


@functools.cache
def compile_programs(
    lm_config: LMConfig, config: FinetuneConfig, steps: int, mesh: Mesh
) -> Programs:
    """The programs of a run of `steps` steps."""
    model = _Model(lm_config, config, mesh)
    adamw = make_optimizer(config, steps)
    moved = (lambda tree: tree["adapters"]) if config.reptile else (lambda tree: tree)

    def init(params: Params) -> PyTree:
        trained = model.init_trained(params)
        return trained, adamw.init(moved(trained))

    def add(a: PyTree, b: PyTree) -> PyTree:
        return jax.tree.map(jnp.add, a, b)

    def update(state: PyTree, grads: PyTree) -> tuple[PyTree, jax.Array]:
        if config.reptile:
            grads = grads["adapters"]
            adapters, moments = optimizer.step(adamw, (state[0]["adapters"], state[1]), grads)
            return ({**state[0], "adapters": adapters}, moments), optax.tree.norm(grads)
        if config.tasks:
            grads = jax.tree.map(lambda x: x / config.tasks, grads)
        return optimizer.step(adamw, state, grads), optax.tree.norm(grads)

    def end_round(trained: PyTree, step: jax.Array) -> PyTree:
        base = trained["base"]
        for factors in trained["adapters"].values():
            base = merge_lora(base, factors, config.lora_scale / len(trained["adapters"]))
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        return {"base": base, "adapters": model.init_adapters(base, key)}

    abstract = jax.eval_shape(init, decoder.abstract_params(lm_config, jnp.float32))
    whole = NamedSharding(mesh, P())
    placed = sharding.param_shardings(mesh, abstract[0])
    _, moments = optimizer.abstract_state(
        adamw, (moved(abstract[0]), abstract[1]), moved(placed), mesh
    )
    abstract = sharding.place_abstract(abstract[0], placed), moments
    placed_state = jax.tree.map(lambda x: x.sharding, abstract)
    return Programs(
        abstract_state=abstract,
        init=jax.jit(init, out_shardings=placed_state),
        gradient=jax.jit(
            model.gradient,
            out_shardings=(whole, of_task(placed, 0, config)),
            compiler_options=optimizer.reproducible(),
        ),
        add=jax.jit(add, donate_argnums=0),
        update=jax.jit(update, donate_argnums=0, out_shardings=(placed_state, whole)),
        end_round=jax.jit(end_round, donate_argnums=0, out_shardings=placed),
        loss=jax.jit(model.loss, out_shardings=whole),
        output=model.output,
    )


def of_task(trained: PyTree, task: int, config: FinetuneConfig) -> PyTree:
    """The parameters of a task's gradient; without tasks, all trained ones."""
    if not config.tasks:
        return trained
    lora = {"lora": trained["adapters"][str(task)]}
    return lora if config.reptile else {"base": trained["base"], **lora}


class Trainer:
    """Fine-tunes a model step by step; the caller chooses the rows of a step.

    `params` are never changed: LoRA reads them in every step, full-parameter training only in
    `init`. `steps` are of the whole run, for the learning rate.

    Attributes:
        abstract_state: The training state as `jax.ShapeDtypeStruct` leaves with shardings.
    """

    def __init__(
        self, lm_config: LMConfig, params: Params, config: FinetuneConfig, steps: int, mesh: Mesh
    ):
        self._programs = compile_programs(lm_config, config, steps, mesh)
        self._config, self._mesh = config, mesh
        self._longest = lm_config.max_position
        self._params = params
        self._frozen = {}
        if config.freezes_weights:
            cast = decoder.cast_params(params, config.dtype)
            self._frozen = hosts.place(cast, sharding.param_shardings(mesh, cast))
        self.abstract_state = self._programs.abstract_state

    def init(self) -> PyTree:
        """The training state before the first step."""
        return self._programs.init(self._params)

    def step(
        self, state: PyTree, *examples: Sequence[Example]
    ) -> tuple[PyTree, jax.Array | float, jax.Array]:
        """One optimizer step; `state` is donated.

        It takes at most `batch_size` texts; with tasks, as many of each task. Returned are the new
        state, the weighted loss before the step in nats a token (with tasks their mean), and the
        norm of its gradient.
        """
        weight = self._config.prompt_weight
        batches = [self._place(self._make_batch(rows, weight)) for rows in examples]
        programs = self._programs
        if not self._config.tasks:
            (batch,) = batches
            with jax.transfer_guard("disallow"):
                loss, grads = programs.gradient(state[0], self._frozen, batch)
                state, norm = programs.update(state, grads)
            return state, loss, norm
        base, adapters, losses = None, {}, []
        with jax.transfer_guard("disallow"):
            for task, batch in enumerate(batches):
                trained = of_task(state[0], task, self._config)
                frozen = state[0]["base"] if self._config.reptile else self._frozen
                loss, grads = programs.gradient(trained, frozen, batch)
                if not self._config.reptile:
                    base = grads["base"] if base is None else programs.add(base, grads["base"])
                adapters[str(task)] = grads["lora"]
                losses.append(loss)
            state, norm = programs.update(state, {"base": base, "adapters": adapters})
        return state, float(np.mean([float(loss) for loss in losses])), norm

    def end_round(self, state: PyTree, step: int) -> PyTree:
        """Moves the base by the mean of the tasks' adapters, which begin anew (Reptile).

        `state` is donated; AdamW's moments stay. The seed and `step`, the number of steps so far,
        decide the adapters' first factors.
        """
        return self._programs.end_round(state[0], np.uint32(step)), state[1]

    def project(
        self, state: PyTree, examples: Sequence[Example], step: int, share: float
    ) -> PyTree:
        """Removes a share of the parameters' part that a batch's predictions do not need.

        The predictions of the texts stay, to first order (MinNorm-OG). Seed and step decide the
        answer tokens. A share of 0 removes nothing, 1 all of the part. Optimizer moments stay.
        """
        assert self._config.minnorm is not None
        trained, moments = state
        count, seed = self._config.minnorm.n_pert, self._config.seed
        rows = choose_outputs(examples, count, self._longest, seed, step)
        rows = jax.tree.map(lambda x: hosts.place(x, NamedSharding(self._mesh, P())), rows)
        moved = project(self._programs.output, trained, rows, share, self._frozen)
        placed = jax.tree.map(lambda x: x.sharding, self.abstract_state[0])
        return hosts.place(moved, placed), moments

    def loss(self, trained: PyTree, examples: Sequence[Example]) -> float:
        """Mean cross-entropy of the answer tokens of any number of texts, nats.

        `trained` is the first half of a training state; with tasks only its base is read.
        """
        size, total, count = self._config.batch_size, 0.0, 0.0
        if self._config.tasks:
            trained = {"base": trained["base"]}
        ordered = sorted(examples, key=lambda example: len(example.tokens))
        for start in range(0, len(ordered), size):
            batch = self._make_batch(ordered[start : start + size], prompt_weight=0.0)
            total += float(self._programs.loss(trained, self._frozen, self._place(batch)))
            count += float(batch.weights.sum())
        return total / count

    def _make_batch(self, examples: Sequence[Example], prompt_weight: float) -> Batch:
        microbatches, shards = self._config.microbatches, sharding.row_shards(self._mesh)
        rows = round_up(-(-self._config.batch_size // microbatches), shards)
        return make_batch(examples, (microbatches, rows, shards), self._longest, prompt_weight)

    def _place(self, batch: Batch) -> Batch:
        return jax.tree.map(
            lambda x: hosts.place(
                x, sharding.fit_sharding(self._mesh, P(None, sharding.ROWS), np.shape(x))
            ),
            batch,
        )
