"""Batches of texts of similar length, for features and scoring.

Lengths are rounded up so that few programs are compiled, texts are padded on the right, and the
device computes one batch while the host handles the previous one. The computation is the caller's.
Axes: B batch, T time.
"""

import collections
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import jax
import numpy as np
import tqdm

from t3jax import hosts, sharding
from t3jax.data.chat import Example
from t3jax.lm.config import LMConfig
from t3jax.lm.model import LM

Result = TypeVar("Result")

TOKENS_PER_SHARD = 16384  # of a batch, on each part of the rows: enough for an accelerator


def check_examples(lm: LM | LMConfig, examples: Sequence[Example]) -> None:
    """Raises a ValueError unless there are texts, and the model can read them.

    A text may not be longer than the model's context, nor hold a token without an embedding.
    """
    if not examples:
        raise ValueError("no examples: a set to run the model over must not be empty")
    name = lm.name if isinstance(lm, LM) else "the model"
    for i, example in enumerate(examples):
        if len(example.tokens) > lm.max_position:
            raise ValueError(
                f"example {i} has {len(example.tokens)} tokens, more than the {lm.max_position} of "
                f"{name}'s context; shorten it or leave it out"
            )
        tokens = np.asarray(example.tokens)
        beyond = tokens[(tokens < 0) | (tokens >= lm.vocab_size)]
        if len(beyond):
            raise ValueError(
                f"example {i} holds token id {beyond[0]}, but {name} has {lm.vocab_size} tokens "
                "only: the tokenizer knows more than the model; take that token out of the text"
            )


def map_batches(
    lm: LM,
    examples: Sequence[Example],
    compute: Callable[[list[int], jax.Array, jax.Array], Result],
    keep: Callable[[list[int], Result], None],
    *,
    tokens_per_batch: int | None,
    progress: str | None,
) -> None:
    """Runs a computation on all texts, once each, in batches of similar length.

    The texts have passed `check_examples`. `compute(indices, tokens [B, T], mask [B, T])` starts
    the computation of a batch whose first rows are the texts of these indices; further rows are
    padding. `keep(indices, result)` copies a result to the host. B · T is at most
    `tokens_per_batch`, padding included; None: by the device.
    """
    rows = sharding.row_shards(lm.mesh)
    if tokens_per_batch is None:
        # On a CPU products of 512 rows are as fast as larger ones, and small batches pad less.
        tokens_per_batch = 1024 if jax.default_backend() == "cpu" else TOKENS_PER_SHARD * rows
    total = sum(len(example.tokens) for example in examples)
    bar = tqdm.tqdm(
        total=total,
        desc=progress,
        unit="tok",
        unit_scale=True,
        delay=1,
        disable=not progress or not hosts.is_lead(),
    )
    pending: collections.deque[tuple[list[int], Result]] = collections.deque()

    def finish() -> None:
        batch, result = pending.popleft()
        keep(batch, result)
        bar.update(sum(len(examples[i].tokens) for i in batch))

    for batch, shape in _batches(examples, tokens_per_batch, rows, lm.max_position):
        tokens = np.zeros(shape, np.int32)
        mask = np.zeros(shape, bool)
        for row, i in enumerate(batch):
            tokens[row, : len(examples[i].tokens)] = examples[i].tokens
            mask[row, : len(examples[i].tokens)] = True
        place = sharding.batch_sharding(lm.mesh, tokens.shape)
        pending.append((batch, compute(batch, *hosts.place((tokens, mask), place))))
        if len(pending) > 1:
            finish()
    while pending:
        finish()
    bar.close()


def _batches(
    examples: Sequence[Example], tokens_per_batch: int, rows: int, longest: int
) -> Iterator[tuple[list[int], tuple[int, int]]]:
    """Batches of texts of similar length: their indices, and the shape of the padded batch."""
    by_length: dict[int, list[int]] = collections.defaultdict(list)
    for i, example in enumerate(examples):
        by_length[min(_round_up_length(len(example.tokens)), longest)].append(i)
    waiting: list[int] = []
    for length, indices in sorted(by_length.items()):
        # Texts that do not fill a batch of their length join longer texts.
        waiting += indices
        size = max(rows, tokens_per_batch // length // rows * rows)
        while len(waiting) >= size:
            yield waiting[:size], (size, length)
            waiting = waiting[size:]
    if waiting:
        # A small set has a small last batch; powers of two keep the number of programs low.
        yield waiting, (min(size, round_up(1 << (len(waiting) - 1).bit_length(), rows)), length)


def _round_up_length(length: int) -> int:
    """The length of a compiled program for a text: few lengths, all less than 1/8 apart."""
    return round_up(length, max(8, (1 << length.bit_length()) // 16))


def round_up(value: int, step: int) -> int:
    """The smallest multiple of `step` that is at least `value`."""
    return -(-value // step) * step
