"""The batches of fine-tuning: the rows of each step, and their tokens and labels as arrays.

Axes: M microbatches, B rows of one, T time, S shards (devices along `data`), A scored tokens of a
shard.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from t3jax.batching import round_up
from t3jax.data import Example

_LENGTH_STEP = 16  # lengths are rounded up to a multiple: each length compiles a program
_PARTS = 8  # A is a multiple of 1 / _PARTS of a shard's tokens: few programs, little padding


class Batch(NamedTuple):
    """The rows of a step. Only scored tokens get logits; a shard scores tokens of its own rows.

    The fields are arrays, or their shapes (`jax.ShapeDtypeStruct`).

    Attributes:
        tokens: Padded on the right, `[M, B, T]`; the B rows are in the order of the shards.
        places: Index of each scored token's hidden state among the B T / S of its shard: one place
            before the token itself, `[M, S, A]`.
        labels: The scored tokens, `[M, S, A]`.
        weights: Their weights in the loss, 0 for padding, `[M, S, A]`.
    """

    tokens: Any
    places: Any
    labels: Any
    weights: Any


def epoch_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The rows of every batch of an epoch, each row once; seed and epoch decide them.

    A batch has rows of like length, drawn anew in each epoch. The order of the batches is random,
    and any of them may be the one that is not full.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths))
    order = order[np.argsort(-(-lengths[order] // _LENGTH_STEP), kind="stable")]
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def make_batch(
    examples: Sequence[Example],
    shape: tuple[int, int, int],
    longest: int,
    prompt_weight: float = 0.0,
) -> Batch:
    """Rows as arrays of few different shapes, on the host; `shape` is M, B and S.

    Fewer than M B rows are padded with empty ones. A prompt token weighs `prompt_weight`, an answer
    token 1.
    """
    microbatches, rows, shards = shape
    parts, height = microbatches * shards, rows // shards
    length = max(len(example.tokens) for example in examples)
    length = min(round_up(length, _LENGTH_STEP), longest)
    # Dealt out by length, so that the parts have about the same number of tokens.
    ordered = sorted(examples, key=lambda example: len(example.tokens))
    dealt = [ordered[part::parts] for part in range(parts)]

    def first(example: Example) -> int:
        return 1 if prompt_weight else example.answer_start

    most = max(sum(len(example.tokens) - first(example) for example in part) for part in dealt)
    width = round_up(most, -(-height * length // _PARTS))
    tokens = np.zeros((parts, height, length), np.int32)
    places, labels = np.zeros((2, parts, width), np.int32)
    weights = np.zeros((parts, width), np.float32)
    for part, part_examples in enumerate(dealt):
        end = 0
        for row, example in enumerate(part_examples):
            count = len(example.tokens)
            scored = np.arange(first(example), count)
            start, end = end, end + len(scored)
            tokens[part, row, :count] = example.tokens
            places[part, start:end] = row * length + scored - 1
            labels[part, start:end] = example.tokens[scored]
            weights[part, start:end] = np.where(scored < example.answer_start, prompt_weight, 1)
    split = (microbatches, shards, width)
    return Batch(
        tokens.reshape(microbatches, rows, length),
        places.reshape(split),
        labels.reshape(split),
        weights.reshape(split),
    )


def choose_outputs(
    examples: Sequence[Example], count: int, longest: int, seed: int, step: int
) -> dict[str, np.ndarray]:
    """Chooses answer tokens of a batch whose predictions a projection must not change.

    The numbers of tokens of any two texts differ by at most one. Seed and step decide the choice.
    "tokens" `[N, T]` are padded on the right; "place" `[N]` is one place before each chosen token,
    where the model predicts it.
    """
    rng = np.random.default_rng((seed, step))
    chosen = np.resize(rng.permutation(len(examples)), count).tolist()
    length = max(len(example.tokens) for example in examples)
    length = min(round_up(length, _LENGTH_STEP), longest)
    tokens = np.zeros((count, length), np.int32)
    for row, index in enumerate(chosen):
        tokens[row, : len(examples[index].tokens)] = examples[index].tokens
    ends = [(examples[index].answer_start, len(examples[index].tokens)) for index in chosen]
    place = np.array([rng.integers(first, end) - 1 for first, end in ends], np.int32)
    return {"tokens": tokens, "place": place}
