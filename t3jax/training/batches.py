"""What a run reads: tokens on the device, held-out sequences, and the rows of every batch.

Sequences are ragged and never padded one by one: the host plans each epoch as rows of the feature
array, and one step gathers the rows of its batch. Tokens are dealt out to the devices one by one:
each has its share of every sequence, and of a batch it reads what it has. Features never travel. An
epoch is one pass over the forget sequences, each paired with a retain sequence drawn at random.

Axes: K members, S shards (parts into which the mesh splits rows), N answer tokens of a shard, D
features, U tokens of the vocabulary that are trained, M tokens of a batch in a shard.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from t3jax import sharding
from t3jax.batching import round_up
from t3jax.features import Features
from t3jax.head import HeadConfig
from t3jax.training.recipe import Member, TrainConfig

_HOLDOUT_SEED = 0
_BATCH_STEP = 64


class Tokens(NamedTuple):
    """Answer tokens on the devices: those of retain sequences, of forget sequences, padding.

    Token i of all is token i // S of shard i % S.

    Attributes:
        pooled: Features, `[S, N, D]`.
        targets: Row of the trained W2 of the token that came next, `[S, N]`.
        forget_starts: First token of the forget sequences in each shard, `[S]`.
    """

    pooled: jax.Array
    targets: jax.Array
    forget_starts: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Data:
    """Training and held-out tokens, placed, and where on the host their sequences are.

    Attributes:
        train: Tokens to train on.
        held_out: Tokens of the held-out sequences; None if there are none.
        starts: Of the retain and of the forget sequences among all tokens of `train`, one each
            and their end.
        held_out_starts: The same in `held_out`.
        vocabulary: Token ids of the trained rows of W2, sorted, `[U]`.
    """

    train: Tokens
    held_out: Tokens | None
    starts: tuple[np.ndarray, np.ndarray]
    held_out_starts: tuple[np.ndarray, np.ndarray]
    vocabulary: np.ndarray

    @classmethod
    def build(
        cls,
        retain: Features,
        forget: Features,
        head_config: HeadConfig,
        config: TrainConfig,
        mesh: Mesh,
    ) -> "Data":
        """Splits the sets and places them on the mesh."""
        seen = np.union1d(retain.targets, forget.targets)
        # Unseen tokens fill up, so that the rows divide among the devices.
        unseen = np.setdiff1d(np.arange(head_config.vocab_size), seen)
        vocabulary = np.union1d(seen, unseen[: -len(seen) % mesh.shape[sharding.MODEL]])

        parts = [
            split(features, config.holdout_fraction, name, stream)
            for stream, (name, features) in enumerate((("retain", retain), ("forget", forget)))
        ]

        shards = sharding.row_shards(mesh)

        def placed(sets: Sequence[Features]) -> Tokens:
            padded = round_up(sum(features.num_tokens for features in sets), shards)
            pooled = np.zeros((padded, head_config.hidden_size), retain.pooled.dtype)
            targets = np.zeros(padded, np.int32)
            end = 0
            for features in sets:
                start, end = end, end + features.num_tokens
                pooled[start:end] = features.pooled
                targets[start:end] = np.searchsorted(vocabulary, features.targets)
            forget_starts = _before(sets[0].num_tokens, shards)
            pooled, targets = (
                np.swapaxes(x.reshape(-1, shards, *x.shape[1:]), 0, 1) for x in (pooled, targets)
            )
            arrays = Tokens(pooled, targets, forget_starts.astype(np.int32))
            return jax.device_put(arrays, sharding.batch_sharding(mesh, (shards,)))

        def starts(sets: Sequence[Features]) -> tuple[np.ndarray, np.ndarray]:
            first, second = sets
            return first.starts, second.starts + first.num_tokens

        train, held_out = zip(*parts, strict=True)
        return cls(
            train=placed(train),
            held_out=placed(held_out) if config.holdout_fraction else None,
            starts=starts(train),
            held_out_starts=starts(held_out),
            vocabulary=vocabulary,
        )


class Planner:
    """Which rows of the training tokens each step of each epoch reads, for every member.

    Attributes:
        steps: Batches of an epoch.
    """

    def __init__(self, data: Data, members: Sequence[Member], mesh: Mesh):
        self._retain, self._forget = data.starts
        self._shards = sharding.row_shards(mesh)
        config = members[0].config  # what counts here is the same in all
        self._seeds = [member.seed for member in members]
        self._batch_size = config.batch_size
        forget_sequences = len(self._forget) - 1
        self._firsts = np.arange(0, forget_sequences, config.batch_size)
        self.steps = len(self._firsts)
        # The largest batch that will ever come, so that one compiled program serves all epochs.
        largest = max(
            self._counts(seed, epoch).max()
            for seed in set(self._seeds)
            for epoch in range(1, config.epochs + 1)
        )
        # Rounded up, so that it serves other seeds too.
        size = round_up(int(largest), _BATCH_STEP)
        self._shape = (len(members), self.steps, self._shards, size)
        self._sharding = sharding.fitting(mesh, P(None, None, sharding.ROWS), self._shape)

    def epoch(self, epoch: int) -> tuple[jax.Array, np.ndarray]:
        """Rows `[K, steps, S, M]`, -1 where there are fewer; tokens of a batch `[K, steps]`."""
        rows = np.full(self._shape, -1, np.int32)
        counts = {seed: self._counts(seed, epoch) for seed in self._seeds}
        for seed in counts:
            mine = np.equal(self._seeds, seed)
            forget, retain = self._pairs(seed, epoch)
            for step, first in enumerate(self._firsts):
                batch = slice(first, first + self._batch_size)
                read = np.concatenate(
                    [_rows(self._forget, forget[batch]), _rows(self._retain, retain[batch])]
                )
                for shard in range(self._shards):
                    here = read[read % self._shards == shard] // self._shards
                    rows[mine, step, shard, : len(here)] = here
        tokens = np.stack([counts[seed].sum(axis=1) for seed in self._seeds])
        return jax.device_put(rows, self._sharding), tokens

    def _pairs(self, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The forget sequences in this epoch's order, and the retain sequence drawn for each."""
        rng = np.random.default_rng((seed, epoch))
        forget = rng.permutation(len(self._forget) - 1)
        retain = rng.integers(len(self._retain) - 1, size=len(forget))
        return forget, retain

    def _counts(self, seed: int, epoch: int) -> np.ndarray:
        """Tokens of each batch in each shard, `[steps, S]`."""
        forget, retain = self._pairs(seed, epoch)
        of_forget, of_retain = (
            np.diff(_before(starts, self._shards), axis=0)
            for starts in (self._forget, self._retain)
        )
        return np.add.reduceat(of_forget[forget] + of_retain[retain], self._firsts)


def split(features: Features, fraction: float, name: str, stream: int) -> tuple[Features, Features]:
    """Sequences to train on and held-out ones, both in their order."""
    if not fraction:
        return features, features.select([])
    count = max(1, round(fraction * features.num_sequences))
    if count >= features.num_sequences:
        raise ValueError(
            f"the {name} set has {features.num_sequences} sequences, of which holdout_fraction = "
            f"{fraction} leaves none to train on; give more sequences or set it to 0"
        )
    order = np.random.default_rng((_HOLDOUT_SEED, stream)).permutation(features.num_sequences)
    return features.select(np.sort(order[count:])), features.select(np.sort(order[:count]))


def _before(tokens: int | np.ndarray, shards: int) -> np.ndarray:
    """How many of the first so many tokens are in each shard, `[..., S]`."""
    return -((np.arange(shards) - np.asarray(tokens)[..., None]) // shards)


def _rows(starts: np.ndarray, sequences: np.ndarray) -> np.ndarray:
    """The rows of some sequences, one sequence after the other."""
    lengths = starts[sequences + 1] - starts[sequences]
    offsets = np.cumsum(lengths) - lengths
    return np.repeat(starts[sequences] - offsets, lengths) + np.arange(lengths.sum())
