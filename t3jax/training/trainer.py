"""The compiled programs of a run: whole epochs in one scan, several heads at once.

Only rows of W2 whose token occurs in the data get a gradient, so only those are trained. The other
rows only shrink by weight decay, by a factor that is known in closed form. Learning rates and
weight decays are traced: one program serves heads that differ in them.

Heads of one seed read the same batches: their features are gathered once, and multiplied by the
weights of all these heads in one product.

Axes: K members, a grid of C recipes and S seeds (K = C S, seeds the inner one), P parts into which
the mesh splits rows, N answer tokens of a part, D features, R rank, V vocabulary, U tokens of the
vocabulary that are trained, M tokens of a batch in a part.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from t3jax import hosts, optimizer, sharding
from t3jax.distillation import distillation_loss
from t3jax.head import (
    HeadConfig,
    HeadParams,
    candidate_scores,
    classifier_loss,
    head_shapes,
    init_head,
    target_scores,
)
from t3jax.training.batches import Data, Tokens
from t3jax.training.recipe import Member, TrainConfig, learning_rate_schedule, make_optimizer


class Programs(NamedTuple):
    """The compiled programs of one shape of run.

    The training state is `(params, optimizer state)`, each leaf with a leading axis of members, and
    W2 with the rows of the trained tokens only, `[K, U, R]`.

    Attributes:
        abstract_state: The training state as shapes with shardings.
        init_optimizer: `params -> optimizer state`.
        epoch: `(state, tokens, rows, knobs) -> (state, losses [K, steps], finite [K])`; the state
            is donated, `rows` `[S, steps, P, M]` are the tokens of a batch in each part, -1 for
            padding, `knobs` are peak learning rates and weight decays, `[K]` each.
        score: `(params, tokens) -> [K, P, N]`: the head's score of each token that came next, or
            for distillation the loss of each position.
    """

    abstract_state: PyTree
    init_optimizer: Callable[[HeadParams], PyTree]
    epoch: Callable[[PyTree, Tokens, jax.Array, PyTree], tuple[PyTree, jax.Array, jax.Array]]
    score: Callable[[HeadParams, Tokens], jax.Array]


@functools.cache
def compile_programs(
    head_config: HeadConfig, config: TrainConfig, steps: int, grid: tuple[int, int], mesh: Mesh
) -> Programs:
    """The programs for a grid of heads whose vocabulary has the trained tokens alone."""
    adamw = make_optimizer(config, steps)
    activation = head_config.activation
    loss_fn = functools.partial(_batch_loss, config, activation)

    def train_one(state: PyTree, tokens: Tokens, rows: jax.Array, knobs: PyTree) -> tuple:
        tuned = make_optimizer(config, steps, *knobs)

        def step(state: PyTree, rows: jax.Array) -> tuple[PyTree, jax.Array]:
            loss, grads = jax.value_and_grad(loss_fn)(state[0], tokens, rows)
            return optimizer.step(tuned, state, grads), loss

        state, losses = jax.lax.scan(step, state, rows)
        finite = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state[0])]
        return state, losses, jnp.stack(finite).all()

    def train_all(state: PyTree, tokens: Tokens, rows: jax.Array, knobs: PyTree) -> tuple:
        train_recipes = jax.vmap(train_one, in_axes=(0, None, None, 0))
        train_seeds = jax.vmap(train_recipes, in_axes=(1, None, 0, 1), out_axes=1)
        state, knobs = jax.tree.map(lambda x: x.reshape(*grid, *x.shape[1:]), (state, knobs))
        results = train_seeds(state, tokens, rows, knobs)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), results)

    def score_one(params: HeadParams, tokens: Tokens) -> jax.Array:
        if tokens.soft is not None:
            return _distillation_losses(
                config, activation, params, tokens.pooled, tokens.targets, tokens.soft
            )
        return target_scores(params, tokens.pooled, tokens.targets, activation)

    shapes = head_shapes(head_config)
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((math.prod(grid), *x.shape), x.dtype), shapes
    )
    init_optimizer = jax.vmap(adamw.init)
    whole = NamedSharding(mesh, P())
    placed = jax.tree.map(
        lambda s: NamedSharding(mesh, P(None, *s.spec)), sharding.param_shardings(mesh, shapes)
    )
    abstract = params, jax.eval_shape(init_optimizer, params)
    abstract = optimizer.abstract_state(adamw, abstract, placed, mesh)
    placed_state = jax.tree.map(lambda x: x.sharding, abstract)
    return Programs(
        abstract_state=abstract,
        init_optimizer=jax.jit(init_optimizer, out_shardings=placed_state[1]),
        epoch=jax.jit(
            train_all,
            donate_argnums=0,
            out_shardings=(placed_state, whole, whole),
            compiler_options=optimizer.reproducible(),
        ),
        score=jax.jit(jax.vmap(score_one, in_axes=(0, None)), out_shardings=whole),
    )


def _batch_loss(
    config: TrainConfig, activation: str, params: HeadParams, tokens: Tokens, rows: jax.Array
) -> jax.Array:
    """The loss of one head on the rows `[P, M]` of a batch."""

    def read(x: jax.Array) -> jax.Array:
        """Reads the batch, `[P M, ...]`; each part reads its own tokens."""
        take = jax.vmap(lambda values, index: values.at[index].get(mode="promise_in_bounds"))
        return take(x, jnp.maximum(rows, 0)).reshape(-1, *x.shape[2:])

    mask = rows.reshape(-1) >= 0
    retain = (rows < tokens.forget_starts[:, None]).reshape(-1)
    if tokens.soft is not None:
        soft = [read(x) for x in tokens.soft]
        pooled, targets = read(tokens.pooled), read(tokens.targets)
        losses = _distillation_losses(config, activation, params, pooled, targets, soft)
        losses = losses * jnp.where(retain, config.retain_weight, 1.0)
        count = jnp.maximum(jnp.sum(mask.astype(jnp.float32)), 1.0)
        return jnp.sum(jnp.where(mask, losses, 0.0)) / count
    scores = target_scores(params, read(tokens.pooled), read(tokens.targets), activation)
    return classifier_loss(scores, retain, mask=mask)


def _distillation_losses(
    config: TrainConfig,
    activation: str,
    params: HeadParams,
    pooled: jax.Array,
    tokens: jax.Array,
    soft: Sequence[jax.Array],
) -> jax.Array:
    scores = candidate_scores(params, pooled, tokens, activation)
    logprobs, log_weights, probs = soft
    return distillation_loss(scores, logprobs, log_weights, probs, config.distilled_temperature)


_init_head = jax.jit(init_head, static_argnames=("config", "zero_output"))


class Trainer:
    """A run: its data, its programs, and the rows of W2 that are not trained."""

    def __init__(
        self,
        data: Data,
        head_config: HeadConfig,
        members: Sequence[Member],
        steps: int,
        mesh: Mesh,
        start: HeadParams | None = None,
    ):
        """Compiles nothing yet; `members` are as `make_members` returns them."""
        self._start = start
        self._data, self._head_config, self._members = data, head_config, members
        self._steps = steps
        trained = dataclasses.replace(head_config, vocab_size=len(data.vocabulary))
        peaks, decays = (
            np.array([getattr(member.config, name) for member in members], np.float32)
            for name in ("learning_rate", "weight_decay")
        )
        config = dataclasses.replace(members[0].config, learning_rate=1.0, weight_decay=0.0)
        seeds = len({member.seed for member in members})
        grid = (len(members) // seeds, seeds)
        self._programs = compile_programs(trained, config, steps, grid, mesh)
        self._knobs = hosts.place((peaks, decays), NamedSharding(mesh, P()))
        self.abstract_state = self._programs.abstract_state
        schedule = learning_rate_schedule(config, steps)
        shape = np.asarray(jax.jit(schedule)(np.arange(config.epochs * steps)))
        self.learning_rates = peaks[:, None] * shape  # [K, steps of all epochs]

    def init(self) -> PyTree:
        """The training state before the first step."""
        drawn = [self._draw(member.seed) for member in self._members]
        trained = [{**p, "output": p["output"][self._data.vocabulary]} for p in drawn]
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *trained)
        places = jax.tree.map(lambda x: x.sharding, self.abstract_state[0])
        params = hosts.place(stacked, places)
        return params, self._programs.init_optimizer(params)

    def train_epoch(self, state: PyTree, rows: jax.Array) -> tuple[PyTree, jax.Array, jax.Array]:
        """The state after an epoch, losses `[K, steps]`, whether the weights are finite `[K]`.

        They are promises: the device may still compute them.
        """
        with jax.transfer_guard("disallow"):
            return self._programs.epoch(state, self._data.train, rows, self._knobs)

    def check_finite(self, losses: np.ndarray, finite: np.ndarray, epoch: int) -> None:
        """Raises FloatingPointError if a loss or a weight is not finite, `[K]` each."""
        wrong = np.flatnonzero(~(np.isfinite(losses) & finite))
        if not wrong.size:
            return
        k, member = wrong[0], self._members[wrong[0]]
        if not bool(jnp.isfinite(self._data.train.pooled).all()):
            advice = "the features hold values that are not finite: compute them anew, in float32"
        else:
            advice = "train with a smaller learning_rate, in another workdir"
        raise FloatingPointError(
            f"epoch {epoch}, seed {member.seed}: the loss is {losses[k]} and the weights are "
            f"{'finite' if finite[k] else 'not finite'} (learning_rate "
            f"{member.config.learning_rate}); {advice}. Nothing of this epoch was saved"
        )

    def evaluate(self, state: PyTree) -> list[dict[str, float]] | None:
        """Metrics on the held-out sequences for each member; None if there are none."""
        if self._data.held_out is None:
            return None
        scores = jax.device_get(self._programs.score(state[0], self._data.held_out))
        scores = np.swapaxes(scores, 1, 2).reshape(len(scores), -1)  # in the tokens' order
        starts = self._data.held_out_starts
        if self._data.held_out.soft is not None:
            return [_held_out_losses(row, *starts) for row in scores]
        return [_held_out_metrics(row, *starts) for row in scores]

    def full_params(self, state: PyTree, k: int, epoch: int) -> HeadParams:
        """The parameters of one head after an epoch, on the host, W2 with all rows `[V, R]`.

        Rows that were not trained had gradients of zero, hence no step but weight decay.
        """
        params = jax.tree.map(lambda leaf: leaf[k], hosts.fetch(state[0]))
        member = self._members[k]
        rates = self.learning_rates[k, : epoch * self._steps].astype(np.float64)
        shrunk = np.prod(1.0 - rates * member.config.weight_decay)
        output = self._draw(member.seed)["output"] * np.float32(shrunk)
        output[self._data.vocabulary] = params["output"]
        return {**params, "output": output}

    def _draw(self, seed: int) -> HeadParams:
        """The whole head of a seed before the first step, on the host; its leaves are copies."""
        if self._start is not None:
            return jax.tree.map(np.array, hosts.fetch(self._start))
        key = jax.random.key(seed)
        zero_output = self._members[0].config.zero_output
        return jax.device_get(_init_head(key, config=self._head_config, zero_output=zero_output))


def _held_out_losses(
    losses: np.ndarray, retain_starts: np.ndarray, forget_starts: np.ndarray
) -> dict[str, float]:
    """Mean loss of a distilled head in nats per position; both sets weigh the same."""
    means = {
        f"held_out_{name}_loss": float(losses[starts[0] : starts[-1]].astype(np.float64).mean())
        for name, starts in (("retain", retain_starts), ("forget", forget_starts))
    }
    return {"held_out_loss": sum(means.values()) / len(means), **means}


def _held_out_metrics(
    scores: np.ndarray, retain_starts: np.ndarray, forget_starts: np.ndarray
) -> dict[str, float]:
    """Loss in nats per token, and the shares of tokens and of sequences on the right side of 0.

    A sequence is judged by the mean score of its answer tokens.
    """
    metrics, losses = {}, []
    for name, starts, sign in (("retain", retain_starts, 1.0), ("forget", forget_starts, -1.0)):
        signed = sign * scores[starts[0] : starts[-1]].astype(np.float64)
        means = np.add.reduceat(signed, starts[:-1] - starts[0]) / np.diff(starts)
        losses.append(np.logaddexp(0.0, -signed))
        metrics[f"held_out_{name}_loss"] = float(losses[-1].mean())
        metrics[f"held_out_{name}_token_accuracy"] = float((signed > 0).mean())
        metrics[f"held_out_{name}_sequence_accuracy"] = float((means > 0).mean())
    return {"held_out_loss": float(np.concatenate(losses).mean()), **metrics}
