"""The data of a run: tokens on the device, held-out sequences, and the rows of every batch.

Sequences are ragged and never padded one by one: the host plans each epoch as rows of the feature
array, and one step gathers the rows of its batch. Tokens are dealt out to the devices one by one:
each has a share of every sequence, and reads its share of a batch. Features are never moved between
devices. An epoch is one pass over the forget sequences, each paired with a retain sequence drawn at
random. All retain sources (retain rows, the base model's own samples) are drawn from equally often.

Axes: K members, S different seeds among them, P parts into which the mesh splits rows, N answer
tokens of a part, D features, U tokens of the vocabulary that are trained, M tokens of a batch in a
part, E tokens of a soft target.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from t3jax import hosts, sharding
from t3jax.batching import round_up
from t3jax.features import Features
from t3jax.head import HeadConfig
from t3jax.training.recipe import Member, TrainConfig

_HOLDOUT_SEED = 0
_VOCABULARY_STEPS = (64, 32, 16, 8, 4, 2, 1)
_BATCH_STEP = 64


class Tokens(NamedTuple):
    """Answer tokens on the devices: of the retain sequences, of the forget sequences, padding.

    Token i is token i // P of part i % P.

    Attributes:
        pooled: Features, `[P, N, D]`.
        targets: Row of the trained W2 of the token that came next, `[P, N]`; for distillation the
            rows of all tokens of a target, `[P, N, E]`.
        forget_starts: First token of the forget sequences in each part, `[P]`.
        soft: For distillation the other arrays of `SoftTargets`, `[P, N, ...]`; else None.
    """

    pooled: jax.Array
    targets: jax.Array
    forget_starts: jax.Array
    soft: tuple[jax.Array, ...] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Data:
    """Training and held-out tokens on the mesh, and the starts of their sequences on the host.

    Attributes:
        train: Tokens to train on.
        held_out: Tokens of the held-out sequences; None if there are none.
        starts: Starts of the retain and of the forget sequences among the tokens of `train`, each
            with their end.
        held_out_starts: The same in `held_out`.
        vocabulary: Token ids of the trained rows of W2, sorted, `[U]`.
        sources: Number of training sequences of each retain source.
    """

    train: Tokens
    held_out: Tokens | None
    starts: tuple[np.ndarray, np.ndarray]
    held_out_starts: tuple[np.ndarray, np.ndarray]
    vocabulary: np.ndarray
    sources: tuple[int, ...]

    @classmethod
    def build(
        cls,
        retain_sources: Sequence[Features],
        forget: Features,
        head_config: HeadConfig,
        config: TrainConfig,
        mesh: Mesh,
    ) -> "Data":
        """Splits the sets and places them on the mesh."""
        retain = Features.concatenate(retain_sources)
        distils = config.loss == "distillation"
        seen = np.union1d(*(_trained_tokens(features, distils) for features in (retain, forget)))
        # Unseen tokens pad the rows to a multiple that most meshes divide: a checkpoint has the
        # same shape on any number of devices.
        unseen = np.setdiff1d(np.arange(head_config.vocab_size), seen)
        missing = (-len(seen) % step for step in _VOCABULARY_STEPS)
        vocabulary = np.union1d(seen, unseen[: next(n for n in missing if n <= len(unseen))])

        of_sources = [
            split(features, config.holdout_fraction, "retain", 0) for features in retain_sources
        ]
        ends = np.cumsum([0, *(features.num_sequences for features in retain_sources)])
        of_retain = (
            np.concatenate([end + sequences for end, sequences in zip(ends, side, strict=False)])
            for side in zip(*of_sources, strict=True)
        )
        of_forget = split(forget, config.holdout_fraction, "forget", 1)
        train, held_out = (
            _Subset(retain, forget, *sequences)
            for sequences in zip(of_retain, of_forget, strict=True)
        )
        return cls(
            train=train.place(vocabulary, distils, mesh),
            held_out=held_out.place(vocabulary, distils, mesh) if config.holdout_fraction else None,
            starts=train.starts(),
            held_out_starts=held_out.starts(),
            vocabulary=vocabulary,
            sources=tuple(len(sequences) for sequences, _ in of_sources),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class _Subset:
    """The training sequences of both sets, or the held-out ones."""

    retain: Features
    forget: Features
    retain_sequences: np.ndarray
    forget_sequences: np.ndarray

    def place(self, vocabulary: np.ndarray, distils: bool, mesh: Mesh) -> Tokens:
        """Places the tokens of the sequences on the mesh."""
        retain, forget, num_parts = self.retain, self.forget, sharding.row_shards(mesh)
        rows = (
            _list_rows(retain.starts, self.retain_sequences),
            _list_rows(forget.starts, self.forget_sequences),
        )
        padding = -(len(rows[0]) + len(rows[1])) % num_parts

        def deal(of_retain: np.ndarray, of_forget: np.ndarray) -> np.ndarray:
            """Deals a value for each token out to the parts, `[P, N, ...]`."""
            both = np.concatenate([of_retain[rows[0]], of_forget[rows[1]]])
            both = np.pad(both, [(0, padding)] + [(0, 0)] * (both.ndim - 1))
            return np.swapaxes(both.reshape(-1, num_parts, *both.shape[1:]), 0, 1)

        soft = None
        if distils:
            assert retain.soft is not None
            assert forget.soft is not None
            tokens, *rest = (deal(*pair) for pair in zip(retain.soft, forget.soft, strict=True))
            soft = tuple(map(np.ascontiguousarray, rest))
        else:
            tokens = deal(retain.targets, forget.targets)
        targets = np.minimum(np.searchsorted(vocabulary, tokens), len(vocabulary) - 1)
        targets = np.ascontiguousarray(targets, np.int32)
        shape = (*targets.shape[:2], retain.pooled.shape[-1])

        def read(index: tuple[slice, ...] | None) -> np.ndarray:
            """Reads the features of one device's tokens, and no others."""
            assert index is not None  # JAX gives one unless asked not to
            here = range(num_parts)[index[0]]
            pooled = np.empty((len(here), *shape[1:]), retain.pooled.dtype)
            for part, out in zip(here, pooled, strict=True):
                of_retain = rows[0][part::num_parts]
                of_forget = rows[1][(part - len(rows[0])) % num_parts :: num_parts]
                end = len(of_retain) + len(of_forget)
                out[: len(of_retain)] = _take(retain.pooled, of_retain)
                out[len(of_retain) : end] = _take(forget.pooled, of_forget)
                out[end:] = 0
            return pooled

        by_parts = sharding.batch_sharding(mesh, shape)
        forget_starts = _count_before(len(rows[0]), num_parts).astype(np.int32)
        targets, forget_starts = hosts.place((targets, forget_starts), by_parts)
        return Tokens(
            jax.make_array_from_callback(shape, by_parts, read),
            targets,
            forget_starts,
            None if soft is None else hosts.place(soft, by_parts),
        )

    def starts(self) -> tuple[np.ndarray, np.ndarray]:
        """Starts of the retain and of the forget sequences among all tokens, and their ends."""
        of_retain = np.diff(self.retain.starts)[self.retain_sequences]
        of_forget = np.diff(self.forget.starts)[self.forget_sequences]
        first, second = (np.concatenate([[0], np.cumsum(x)]) for x in (of_retain, of_forget))
        return first, second + first[-1]


class Planner:
    """Plans which rows of the training tokens each step of each epoch reads, for every seed.

    Attributes:
        steps: Batches of an epoch.
    """

    def __init__(self, data: Data, members: Sequence[Member], mesh: Mesh):
        self._retain, self._forget = data.starts
        self._parts = sharding.row_shards(mesh)
        config = members[0].config  # members share batch size and epochs
        self._members = [member.seed for member in members]
        self._seeds = list(dict.fromkeys(self._members))
        self._batch_size = config.batch_size
        self._sources = data.sources
        forget_sequences = len(self._forget) - 1
        self._firsts = np.arange(0, forget_sequences, config.batch_size)
        self.steps = len(self._firsts)
        # The largest batch of all epochs: one compiled program serves all of them.
        largest = max(
            self._count(seed, epoch).max()
            for seed in self._seeds
            for epoch in range(1, config.epochs + 1)
        )
        # Rounded up, so that the program serves other seeds too.
        size = round_up(int(largest), _BATCH_STEP)
        self._shape = (len(self._seeds), self.steps, self._parts, size)
        self._sharding = sharding.fit_sharding(mesh, P(None, None, sharding.ROWS), self._shape)

    def epoch(self, epoch: int) -> tuple[jax.Array, np.ndarray]:
        """Rows `[S, steps, P, M]`, -1 where there are fewer; tokens of a batch `[K, steps]`."""
        rows = np.full(self._shape, -1, np.int32)
        for s, seed in enumerate(self._seeds):
            forget, retain = self._draw_pairs(seed, epoch)
            for step, first in enumerate(self._firsts):
                batch = slice(first, first + self._batch_size)
                read = np.concatenate(
                    [
                        _list_rows(self._forget, forget[batch]),
                        _list_rows(self._retain, retain[batch]),
                    ]
                )
                for part in range(self._parts):
                    here = read[read % self._parts == part] // self._parts
                    rows[s, step, part, : len(here)] = here
        counts = {seed: self._count(seed, epoch).sum(axis=1) for seed in self._seeds}
        return hosts.place(rows, self._sharding), np.stack([counts[s] for s in self._members])

    def _draw_pairs(self, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Draws the order of the forget sequences, and a retain sequence for each."""
        rng = np.random.default_rng((seed, epoch))
        forget = rng.permutation(len(self._forget) - 1)
        if len(self._sources) == 1:
            return forget, rng.integers(len(self._retain) - 1, size=len(forget))
        source = rng.permutation(len(forget)) % len(self._sources)
        sizes = np.array(self._sources)
        return forget, (np.cumsum(sizes) - sizes)[source] + rng.integers(sizes[source])

    def _count(self, seed: int, epoch: int) -> np.ndarray:
        """Counts the tokens of each batch in each part, `[steps, P]`."""
        forget, retain = self._draw_pairs(seed, epoch)
        of_forget, of_retain = (
            np.diff(_count_before(starts, self._parts), axis=0)
            for starts in (self._forget, self._retain)
        )
        return np.add.reduceat(of_forget[forget] + of_retain[retain], self._firsts)


def _trained_tokens(features: Features, distils: bool) -> np.ndarray:
    """The tokens whose rows of W2 get a gradient."""
    return features.soft.tokens if distils and features.soft is not None else features.targets


def split(
    features: Features, fraction: float, name: str, stream: int
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the sequences to train on and of the held-out ones, both in their order."""
    if not fraction:
        return np.arange(features.num_sequences), np.arange(0)
    count = max(1, round(fraction * features.num_sequences))
    if count >= features.num_sequences:
        raise ValueError(
            f"the {name} set has {features.num_sequences} sequences, of which holdout_fraction = "
            f"{fraction} leaves none to train on; give more sequences or set it to 0"
        )
    order = np.random.default_rng((_HOLDOUT_SEED, stream)).permutation(features.num_sequences)
    return np.sort(order[count:]), np.sort(order[:count])


def _count_before(tokens: int | np.ndarray, parts: int) -> np.ndarray:
    """Counts the tokens with an index below `tokens` in each part, `[..., P]`."""
    return -((np.arange(parts) - np.asarray(tokens)[..., None]) // parts)


def _take(pooled: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Reads rows in ascending order; evenly spaced ones are a view, not a copy."""
    if len(rows) < 2:
        return pooled[rows]
    step = rows[1] - rows[0]
    evenly = bool(np.all(np.diff(rows) == step))
    return pooled[rows[0] : rows[-1] + 1 : step] if evenly else pooled[rows]


def _list_rows(starts: np.ndarray, sequences: np.ndarray) -> np.ndarray:
    """The rows of some sequences, one sequence after the other."""
    lengths = starts[sequences + 1] - starts[sequences]
    offsets = np.cumsum(lengths) - lengths
    return np.repeat(starts[sequences] - offsets, lengths) + np.arange(lengths.sum())
