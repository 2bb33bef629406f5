"""What a run reads: tokens on the device, held-out sequences, and the rows of every batch.

Sequences are ragged and never padded one by one: the host plans each epoch as rows of the feature
array, and one step gathers the rows of its batch. An epoch is one pass over the forget sequences,
each paired with a retain sequence drawn at random.

Axes: K members, N answer tokens of all sequences, D features, U tokens of the vocabulary that are
trained, M tokens of a batch.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from t3jax import sharding
from t3jax.features import Features
from t3jax.head import HeadConfig
from t3jax.training.recipe import Member, TrainConfig

_HOLDOUT_SEED = 0
_BATCH_STEP = 64


class Tokens(NamedTuple):
    """Answer tokens on the device: those of retain sequences, of forget sequences, padding.

    Attributes:
        pooled: Features, `[N, D]`.
        targets: Row of the trained W2 of the token that came next, `[N]`.
        forget_start: First token of the forget sequences.
    """

    pooled: jax.Array
    targets: jax.Array
    forget_start: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Data:
    """Training and held-out tokens, placed, and where on the host their sequences are.

    Attributes:
        train: Tokens to train on.
        held_out: Tokens of the held-out sequences; None if there are none.
        starts: Of the retain and of the forget sequences in `train`, `[S + 1]` each.
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

        def placed(sets: Sequence[Features]) -> Tokens:
            total = sum(features.num_tokens for features in sets)
            padded = total + -total % sharding.row_shards(mesh)
            pooled = np.zeros((padded, head_config.hidden_size), retain.pooled.dtype)
            targets = np.zeros(padded, np.int32)
            end = 0
            for features in sets:
                start, end = end, end + features.num_tokens
                pooled[start:end] = features.pooled
                targets[start:end] = np.searchsorted(vocabulary, features.targets)
            rows, whole = sharding.batch_sharding(mesh, targets.shape), NamedSharding(mesh, P())
            arrays = (pooled, targets, np.int32(sets[0].num_tokens))
            return Tokens(*jax.device_put(arrays, (rows, rows, whole)))

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
        # Rounded up, so that it serves other seeds too and divides among the devices.
        size = int(largest) + -int(largest) % math.lcm(_BATCH_STEP, sharding.row_shards(mesh))
        self._shape = (len(members), self.steps, size)
        self._sharding = sharding.fitting(mesh, P(None, None, sharding.ROWS), self._shape)

    def epoch(self, epoch: int) -> tuple[jax.Array, np.ndarray]:
        """Rows `[K, steps, M]`, -1 where a batch has fewer, and tokens per batch `[K, steps]`."""
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
                rows[mine, step, : len(read)] = read
        return jax.device_put(rows, self._sharding), np.stack([counts[s] for s in self._seeds])

    def _pairs(self, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The forget sequences in this epoch's order, and the retain sequence drawn for each."""
        rng = np.random.default_rng((seed, epoch))
        forget = rng.permutation(len(self._forget) - 1)
        retain = rng.integers(len(self._retain) - 1, size=len(forget))
        return forget, retain

    def _counts(self, seed: int, epoch: int) -> np.ndarray:
        forget, retain = self._pairs(seed, epoch)
        lengths = np.diff(self._forget)[forget] + np.diff(self._retain)[retain]
        return np.add.reduceat(lengths, self._firsts)


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


def _rows(starts: np.ndarray, sequences: np.ndarray) -> np.ndarray:
    """The rows of some sequences, one sequence after the other."""
    lengths = starts[sequences + 1] - starts[sequences]
    offsets = np.cumsum(lengths) - lengths
    return np.repeat(starts[sequences] - offsets, lengths) + np.arange(lengths.sum())
