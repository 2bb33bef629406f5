"""Decoding many prompts in one batch: a row that is finished takes the next prompt.

This is the host's part of the loop, on token ids. It reads the new tokens after each chunk. When a
few rows have ended, waiting prompts take them, which are read together. The longest prompts are
first, so that each later one fits into the slots that the batch has filled.
"""

import collections
import dataclasses
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from t3jax import hosts, sharding
from t3jax.batching import round_up
from t3jax.sampling.cache import admit, cache_slots, compact, resize
from t3jax.sampling.loop import (
    BASE_FAULT,
    SOUND,
    Emitted,
    Program,
    State,
    Weights,
    decode_chunk,
    prefill,
)
from t3jax.sampling.next_token import Controls, Logprobs

_PROMPT_STEP = 32  # prompt lengths are rounded up to a multiple: one compiled program for each
_AT_ONCE = 8  # new prompts are admitted for an eighth of the rows at a time


class Prompt(NamedTuple):
    """Token ids to answer, and two numbers that, with the seed, make the key of the draws."""

    tokens: np.ndarray
    draw: tuple[int, int]


class Answering(NamedTuple):
    """Options that all prompts of a batch share.

    `controls` makes the controls of a number of rows; `seed` is in [0, 2^64 - 1]. `find_end` gives,
    from an answer's tokens so far and the number of new ones among them, the length of the answer,
    or None if it goes on. None: no answer ends so.
    """

    controls: Callable[[int], Controls]
    stop_ids: Sequence[int]
    max_new_tokens: int
    seed: int
    find_end: Callable[[list[int], int], int | None] | None = None


class Piece(NamedTuple):
    """The new tokens of one prompt, by its index, in one chunk.

    `logprobs` are theirs, see `token_logprobs`; `last` is whether the answer ends with them.
    """

    prompt: int
    tokens: list[int]
    logprobs: Logprobs | None
    last: bool


@dataclasses.dataclass
class _Row:
    """An unfinished row: its prompt, the slot of the prompt's first token, the answer so far."""

    prompt: int
    start: int
    tokens: list[int] = dataclasses.field(default_factory=list)


class Batch:
    """Prompts that are answered together, a few rows at a time."""

    def __init__(
        self,
        program: Program,
        weights: Weights,
        prompts: Sequence[Prompt],
        answering: Answering,
        rows: int,
        chunk: int,
    ):
        """Sorts the prompts.

        At most `rows` are decoded together, `chunk` steps for each host sync: a finished row wastes
        at most that many steps.
        """
        self._program = program
        self._weights = weights
        self._prompts = prompts
        self._answering = answering
        self._stop_ids = np.asarray(answering.stop_ids, np.int32)
        self._max_new_tokens = answering.max_new_tokens
        self._chunk = chunk
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].tokens))
        self._waiting = collections.deque(order)
        self._most = rows
        self._size = self._pad(min(len(prompts), rows))
        self._at_once = self._pad(max(1, self._size // _AT_ONCE))
        self._rows: dict[int, _Row] = {}

    def run(self) -> Iterator[Piece]:
        """Answers the prompts; the pieces of one answer come in order.

        A FloatingPointError means that a token was chosen by numbers that are not finite.
        """
        admitted = self._take(self._size)
        cursor = self._bucket(admitted)
        slots = cache_slots(cursor, self._max_new_tokens, self._chunk)[0]
        state, emitted = self._prefill(admitted, self._size, cursor, slots)
        self._rows = {row: self._start_row(i, cursor) for row, i in enumerate(admitted)}
        controls = self._place(self._answering.controls(self._size))
        yield from self._collect(emitted, range(self._size))
        while self._rows or self._waiting:
            free = [row for row in range(self._size) if row not in self._rows]
            if self._waiting and len(free) >= min(self._at_once, len(self._waiting)):
                admitted = self._take(self._at_once)
                length = self._bucket(admitted)
                new, emitted = self._prefill(admitted, self._at_once, length, length)
                rows = np.full(self._at_once, self._size, np.int32)  # no row
                rows[: len(admitted)] = free[: len(admitted)]
                state = admit(self._program, state, new, rows, np.int32(cursor - length))
                self._rows |= {
                    row: self._start_row(i, cursor) for row, i in zip(free, admitted, strict=False)
                }
                yield from self._collect(emitted, rows.tolist())
                continue
            if cursor + self._chunk > slots:
                shift, resized = self._measure_room(cursor)
                move = compact if resized == slots else resize
                state, slots = move(self._program, state, np.int32(shift), resized), resized
                cursor -= shift
                for unfinished in self._rows.values():
                    unfinished.start -= shift
            stopped = np.array([row not in self._rows for row in range(self._size)])
            state, emitted = decode_chunk(
                self._program,
                self._weights,
                state,
                self._place(stopped),
                controls,
                self._stop_ids,
                self._chunk,
            )
            cursor += self._chunk
            yield from self._collect(emitted, range(self._size))

    def _take(self, most: int) -> list[int]:
        """The prompts that wait longest, at most `most`."""
        return [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]

    def _measure_room(self, cursor: int) -> tuple[int, int]:
        """Number of leading slots to drop, and number of slots of the cache after that."""
        prompts = [row.prompt for row in self._rows.values()]
        length = self._bucket([*prompts, *list(self._waiting)[:1]])
        shift = min(cursor - length, *(row.start for row in self._rows.values()))
        left = cursor - shift
        sizes = cache_slots(length, self._max_new_tokens, self._chunk)
        # Space for more than one chunk, so that the next move is not soon.
        enough = (s for s in sizes if s >= left + max(self._chunk, s // 8))
        return shift, next(enough, sizes[-1])

    def _bucket(self, prompts: Sequence[int]) -> int:
        """Slots for the longest of some prompts."""
        return round_up(max(len(self._prompts[i].tokens) for i in prompts), _PROMPT_STEP)

    def _start_row(self, prompt: int, cursor: int) -> _Row:
        return _Row(prompt, cursor - len(self._prompts[prompt].tokens))

    def _prefill(
        self, admitted: Sequence[int], rows: int, length: int, slots: int
    ) -> tuple[State, Emitted]:
        tokens = np.zeros((rows, length), np.int32)
        mask = np.zeros((rows, length), bool)
        for row, i in enumerate(admitted):
            ids = self._prompts[i].tokens
            tokens[row, length - len(ids) :] = ids
            mask[row, length - len(ids) :] = True
        keys = row_keys(self._answering.seed, [self._prompts[i].draw for i in admitted], rows)
        return prefill(
            self._program,
            self._weights,
            *self._place((tokens, mask, keys)),
            self._place(self._answering.controls(rows)),
            slots,
            self._stop_ids,
        )

    def _collect(self, emitted: Emitted, rows: Sequence[int]) -> Iterator[Piece]:
        """Copies a chunk to the host, and frees the rows whose answers have ended."""
        columns, logprobs, done, faults = jax.tree.map(np.asarray, emitted)
        for i, number in enumerate(rows):
            if (row := self._rows.get(number)) is None:
                continue
            count = int(np.sum(columns[i] >= 0))
            count = min(count, self._max_new_tokens - len(row.tokens))
            before = len(row.tokens)
            row.tokens += columns[i, :count].tolist()
            last = bool(done[i]) or len(row.tokens) == self._max_new_tokens
            find_end = self._answering.find_end
            end = None if find_end is None else find_end(row.tokens, count)
            if end is not None:
                last, count = True, end - before
                del row.tokens[end:]
            if np.any(faults[i, :count] != SOUND):
                step = int(np.argmax(faults[i, :count] != SOUND))
                self._refuse(row.prompt, before + step, int(faults[i, step]))
            new = row.tokens[before:]
            new_logprobs = jax.tree.map(operator.itemgetter((i, slice(count))), logprobs)
            if last:
                del self._rows[number]
            yield Piece(row.prompt, new, new_logprobs, last)

    def _refuse(self, prompt: int, token: int, fault: int) -> NoReturn:
        where = f"prompt {self._prompts[prompt].draw[0]}, token {token + 1} of the answer"
        raise FloatingPointError(f"{where}: {describe_fault(fault)}")

    def _pad(self, rows: int) -> int:
        """Rows of a compiled program: a power of two up to the batch size, split evenly."""
        size = min(1 << (rows - 1).bit_length(), max(self._most, rows))
        return round_up(size, sharding.row_shards(self._program.mesh))

    def _place(self, tree: PyTree) -> PyTree:
        rows = len(jax.tree.leaves(tree)[0])
        return hosts.place(tree, sharding.batch_sharding(self._program.mesh, (rows,)))


def describe_fault(fault: int) -> str:
    """The message of a fault, see `Emitted`."""
    if fault == BASE_FAULT:
        return (
            "the base model's logits are NaN or infinite, or every token is banned; "
            "float16 has overflowed (take dtype bfloat16 or float32), or the weights are broken"
        )
    return (
        "the head's scores are NaN or infinite, and the base model's logits are not; "
        "the head's weights are broken, or the hidden states of the prompt have overflowed in "
        "float16 (take dtype bfloat16 or float32)"
    )


def row_keys(seed: int, draws: Sequence[tuple[int, int]], size: int) -> jax.Array:
    """A key for each row, from the seed and the row's two numbers."""
    ids = np.zeros((size, 2), np.uint32)
    ids[: len(draws)] = draws
    key = jax.random.key(seed % 2**32)  # JAX takes 32 bits
    if seed >= 2**32:
        key = jax.random.fold_in(key, np.uint32(seed >> 32))
    return _fold(key, jnp.asarray(ids))


@jax.jit
def _fold(key: jax.Array, ids: jax.Array) -> jax.Array:
    return jax.vmap(lambda pair: jax.random.fold_in(jax.random.fold_in(key, pair[0]), pair[1]))(ids)
