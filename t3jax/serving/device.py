"""The device part of an engine: its programs, and their states between two calls.

A prompt is read in a state of its own, which has a number until it joins the batch. Arguments and
results of all calls are small and on the host. The batch has as many slots as its longest row
needs, in powers of two, and few rows while few answers are decoded, where that gives the same bits.
Axes as in `state`.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from t3jax import hosts
from t3jax.batching import round_up
from t3jax.head_io import place_head
from t3jax.lm.model import LM
from t3jax.refinements import Refinements
from t3jax.sampling.batch import row_keys
from t3jax.sampling.loop import State
from t3jax.sampling.next_token import Controls
from t3jax.sampling.options import SamplingOptions
from t3jax.serving import programs, state
from t3jax.serving.heads import HeadSet
from t3jax.serving.messages import MOST_STOP_IDS, EngineOptions, Request, piece_sizes
from t3jax.serving.stack import on_mask

_LEAST_SLOTS = 128
# On CPUs steps of 8 rows and of more gave the same bits, and steps of fewer rows did not.
_FEW_ROWS = 8


class Device:
    """Reads prompts and decodes the batch."""

    def __init__(
        self,
        lm: LM,
        options: EngineOptions,
        heads: HeadSet,
        *,
        base_temperature: float,
        guidance_scale: float,
        truncate_on: str,
        refinements: Refinements,
        max_length: int,
    ):
        """Makes an empty batch.

        The heads that are on are looked up at each call. T and s are defaults of requests.
        `max_length` counts prompt and answer together.
        """
        self._lm = lm
        self._options = options
        self._heads = heads
        self._guidance = base_temperature, guidance_scale
        self._max_length = max_length
        self._program = state.Program(
            lm.apply, lm.unembed, lm.init_cache, truncate_on, refinements, lm.mesh
        )
        self._same_bits: dict[int, bool] = {}  # by slots, see `_may_be_few`
        self.reset()

    def reset(self) -> None:
        """Drops the batch and all prompts."""
        self._batch = self._make_state(self._options.rows, _LEAST_SLOTS)
        self._readings: dict[int, tuple[State, Any]] = {}  # with the last hidden state
        self._prefixes: dict[bytes, tuple[State, Any]] = {}

    # ---- prompts

    def begin(self, reading: int) -> None:
        """Makes a state for a prompt, under a number that holds until it joins or is dropped."""
        self._readings[reading] = self._make_state(1, _LEAST_SLOTS), None

    def read(
        self, reading: int, piece: np.ndarray, following: np.ndarray, end: int, request: Request
    ) -> tuple[np.ndarray, ...] | None:
        """Reads a piece of a prompt; returns the scores of the following tokens, if asked for.

        The state has slots for the tokens read so far and no more, so that prompts which begin
        alike are read by the same programs. `piece` and the token after each of its tokens are
        `[1, T]`, padded with -1. `end` counts the prompt's tokens up to the end of the piece,
        padding included.
        """
        prompt, _ = self._readings[reading]
        prompt, last, scored = programs.read_piece(
            self._program,
            self._weights,
            self._resize_slots(prompt, self.slots_for(end)),
            piece,
            following,
            self._settings([request]),
            request.scores_prompt,
        )
        self._readings[reading] = prompt, last
        return None if scored is None else tuple(jax.device_get(scored))

    def drop(self, reading: int) -> None:
        """Drops a prompt."""
        self._readings.pop(reading, None)

    def keep(self, reading: int, name: bytes) -> None:
        """Stores a copy of a prompt's state under a name."""
        prompt, last = self._readings[reading]
        self._prefixes[name] = state.duplicate(self._program, prompt), last

    def resume(self, reading: int, name: bytes) -> None:
        """Continues a prompt from a kept state."""
        prefix, last = self._prefixes[name]
        self._readings[reading] = state.duplicate(self._program, prefix), last

    def give_up(self, name: bytes) -> None:
        """Drops a kept state."""
        del self._prefixes[name]

    def slots_for(self, length: int) -> int:
        """Slots of a state with this many tokens."""
        return next(size for size in self._slot_sizes if size >= length)

    # ---- the batch

    def fit(self, used: Sequence[int], count: int, length: int) -> dict[int, int]:
        """Resizes the batch for `count` answers, of which the longest has `length` tokens.

        Returns the new row of each of the `used` rows.
        """
        needed, slots = self.slots_for(length), self._slots
        if needed > slots or 4 * needed <= slots:
            self._batch = self._resize_slots(self._batch, needed)
        rows = self._batch.token.shape[0]
        few = min(_FEW_ROWS, self._options.rows)
        if count > few or not self._may_be_few(self._slots):
            resized = self._options.rows
        else:  # back to few only at half of them, so that the size does not oscillate
            resized = few if 2 * count <= few else rows
        if resized == rows:
            return {row: row for row in used}
        self._batch = self._resize_rows(self._batch, used, resized)
        return {row: new for new, row in enumerate(used)}

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return int(self._batch.token.shape[0])

    def join(self, reading: int, row: int, request: Request) -> state.Emitted:
        """Chooses the first token of an answer, and gives the answer a row of the batch.

        The batch has at least as many slots as the prompt's state.
        """
        answer, last = self._readings.pop(reading)
        keys = hosts.place(
            row_keys(request.options.seed, [(0, request.sample)], 1),
            NamedSharding(self._lm.mesh, P()),
        )
        settings = self._settings([request])
        answer = self._resize_slots(answer, self._slots)
        answer, emitted = programs.choose_first(
            self._program, self._weights, answer, last, keys, settings
        )
        self._batch = state.join(self._program, self._batch, answer, np.asarray([row], np.int32))
        return jax.device_get(emitted)

    def decode(self, requests: Sequence[Request | None]) -> state.Emitted:
        """Decodes a chunk; `requests` has None in rows without an answer."""
        running = np.asarray([request is not None for request in requests])
        self._batch, emitted = programs.decode(
            self._program,
            self._weights,
            self._batch,
            running,
            self._settings(requests),
            self._options.chunk,
        )
        return jax.device_get(emitted)

    def warm_up(self, report: Callable[[str], None]) -> None:
        """Compiles all programs but prompt scores; the batch has to be empty."""
        sizes = self._slot_sizes
        dummy = Request(np.zeros(1, np.int32), SamplingOptions(max_new_tokens=1))
        self.begin(0)
        for slots in sizes:
            report(f"compiling for {slots} tokens")
            for size in piece_sizes(self._options):
                if size <= slots:
                    token = pad([0], size)
                    self.read(0, token, token, slots, dummy)
            self.keep(0, _name(slots))
            self._may_be_few(slots)
        widths = sorted({min(_FEW_ROWS, self._options.rows), self._options.rows})
        for rows in widths:
            self._batch = self._make_state(rows, sizes[0])
            for slots in sizes:
                self._batch = self._resize_slots(self._batch, slots)
                self.resume(0, _name(slots))
                self.join(0, rows, dummy)  # beyond the last row
                self.decode([None] * rows)
                for other_rows in set(widths) - {rows}:
                    self._resize_rows(self._batch, [], other_rows)
            for slots in reversed(sizes):
                self._batch = self._resize_slots(self._batch, slots)
        self.reset()
        jax.block_until_ready(self._batch.token)

    # ---- inside

    @property
    def _weights(self) -> state.Weights:
        return state.Weights(self._lm.params, self._heads.stack)

    @property
    def _slots(self) -> int:
        return int(self._batch.cache.positions.shape[1])

    @functools.cached_property
    def _slot_sizes(self) -> list[int]:
        """Powers of two, and the slots of the longest request with the padding of its pieces."""
        padding = max(self._options.piece, self._options.chunk)
        most = round_up(self._max_length + padding, _LEAST_SLOTS)
        sizes = itertools.accumulate(itertools.repeat(_LEAST_SLOTS), lambda size, _: 2 * size)
        return [*itertools.takewhile(lambda size: 3 * size <= 2 * most, sizes), most]

    def _make_state(self, rows: int, slots: int) -> State:
        return state.empty_state(
            self._program, self._lm.vocab_size, self._lm.hidden_size, rows, slots
        )

    def _resize_slots(self, batch: State, slots: int) -> State:
        """Resizes step by step, so that only programs for neighbouring sizes are compiled."""
        sizes, order = self._slot_sizes, np.arange(batch.token.shape[0], dtype=np.int32)
        now, goal = sizes.index(batch.cache.positions.shape[1]), sizes.index(slots)
        step = 1 if goal > now else -1
        for i in range(now, goal, step):
            batch = state.resize(self._program, batch, order, sizes[i + step])
        return batch

    def _resize_rows(self, batch: State, used: Sequence[int], rows: int) -> State:
        """A state of `rows` rows, the used ones first."""
        order = np.zeros(rows, np.int32)
        order[: len(used)] = used
        return state.resize(self._program, batch, order, batch.cache.positions.shape[1])

    def _may_be_few(self, slots: int) -> bool:
        """Whether steps of few and of all rows give the same bits; tried once for each size."""
        if self._options.rows <= _FEW_ROWS:
            return False
        if slots not in self._same_bits:
            self._same_bits[slots] = self._try_few(slots)
        return self._same_bits[slots]

    def _try_few(self, slots: int) -> bool:
        chunk, mesh = self._options.chunk, self._lm.mesh
        random = np.random.default_rng(0)
        place, *rest = self._heads.stack
        params = jax.tree.map(
            lambda leaf: random.normal(0, 0.1, leaf.shape).astype(np.float32), place.params
        )
        stack = place._replace(params=place_head(params, mesh)), *rest
        weights = state.Weights(self._lm.params, stack)
        full = state.made_up_state(
            self._program, self._make_state(self._options.rows, slots), np.int32(slots - chunk)
        )
        results = []
        for batch in (self._resize_rows(full, range(_FEW_ROWS), _FEW_ROWS), full):
            rows = batch.token.shape[0]
            changed: dict[str, Any] = {
                "controls": Controls.filled(rows, base_temperature=2.0, guidance_scale=1.0),
                "on": on_mask([[0]] * rows, self._options.heads),
                "limit": np.full(rows, chunk + 1, np.int32),
                "wants_likeliest": np.ones(rows, bool),
            }
            settings = self._settings([None] * rows)._replace(**changed)
            batch, emitted = programs.decode(
                self._program, weights, batch, np.ones(rows, bool), settings, chunk
            )
            results.append(jax.device_get((emitted, batch.pooled)))
        few, every_row = map(jax.tree.leaves, results)
        return all(
            np.array_equal(part, full[:_FEW_ROWS])
            for part, full in zip(few, every_row, strict=True)
        )

    def _settings(self, requests: Sequence[Request | None]) -> state.Settings:
        """The settings of each row; a row without a request is greedy and has no heads."""
        count = len(requests)
        fields = {name: list(value) for name, value in Controls.filled(count)._asdict().items()}
        stop_ids = np.full((count, len(self._lm.eos_ids) + MOST_STOP_IDS), -1, np.int32)
        limit = np.ones(count, np.int32)
        wants = np.zeros(count, bool)
        on: list[list[int]] = []
        for i, request in enumerate(requests):
            places = [] if request is None else self._heads.places(request.heads)
            on.append(places)
            if request is None:
                continue
            options = request.options
            for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
                fields[name][i] = getattr(options, name)
            if places:
                temperature, scale = self._guidance
                fields["base_temperature"][i] = _or(request.base_temperature, temperature)
                fields["guidance_scale"][i] = _or(request.guidance_scale, scale)
            ends = [*self._lm.eos_ids, *options.stop_ids]
            stop_ids[i, : len(ends)] = ends
            limit[i] = options.max_new_tokens
            wants[i] = request.likeliest > 0
        arrays: dict[str, Any] = {
            name: np.asarray(values, np.int32 if name == "top_k" else np.float32)
            for name, values in fields.items()
        }
        per_row: tuple[Any, ...] = (on_mask(on, self._options.heads), stop_ids, limit, wants)
        return state.Settings(Controls(**arrays), *per_row)


def pad(tokens: Sequence[int] | np.ndarray, size: int) -> np.ndarray:
    """Tokens as a row of a program, padded with -1, int32 `[1, size]`."""
    row = np.full((1, size), -1, np.int32)
    row[0, : len(tokens)] = tokens
    return row


def _name(slots: int) -> bytes:
    return str(slots).encode()


def _or(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value
