"""The device's side of an engine: its programs with the state of the batch.

Prompts are read in states of their own, one each, and join the batch when they are read. The batch
has as many slots as its longest row needs, in powers of two. Axes as in `programs`.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from t3jax.batching import round_up
from t3jax.lm.model import LM
from t3jax.refinements import Refinements
from t3jax.sampling.batch import row_keys
from t3jax.sampling.loop import State, placed
from t3jax.sampling.next_token import Controls
from t3jax.serving import programs
from t3jax.serving.heads import HeadSet
from t3jax.serving.messages import MOST_STOP_IDS, EngineOptions, Request, piece_sizes
from t3jax.serving.stack import on_mask

_LEAST_SLOTS = 128


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
        """Makes an empty batch; compiles nothing.

        Args:
            lm: The model.
            options: Rows, steps of a chunk and tokens of a piece.
            heads: The heads; which are on is looked up at each call.
            base_temperature: T where a request does not say.
            guidance_scale: s where a request does not say.
            truncate_on: What decides top-k, top-p and min-p.
            refinements: Which are on.
            max_length: Longest prompt and answer together, tokens.
        """
        self._lm = lm
        self._options = options
        self._heads = heads
        self._guidance = base_temperature, guidance_scale
        self._max_length = max_length
        self._program = programs.Program(
            lm.apply, lm.unembed, lm.init_cache, truncate_on, refinements, lm.mesh
        )
        self.reset()

    def reset(self) -> None:
        """Forgets the batch."""
        self._state = self._make_state(self._options.rows, _LEAST_SLOTS)

    def begin(self, length: int) -> State:
        """The state to read a prompt in, whose pieces have this many tokens together."""
        return self._make_state(1, self._slots_for(length))

    def read(
        self, state: State, piece: np.ndarray, following: np.ndarray, size: int, request: Request
    ) -> tuple[State, Any, programs.Scored | None]:
        """Reads a piece of a prompt.

        Args:
            state: From `begin` or the piece before.
            piece: Its tokens, at most `size`.
            following: The tokens after each; one fewer at the prompt's end.
            size: Tokens of the program, padding included.
            request: Whose prompt it is.

        Returns:
            The state, the hidden state of the last token, and the scores of the tokens that
            follow, if the request asks for them.
        """
        state, last, scored = programs.read_piece(
            self._program,
            self._weights,
            state,
            _padded(piece, size),
            _padded(following, size),
            self._settings([request]),
            request.scores_prompt,
        )
        if scored is not None:
            scored = jax.tree.map(lambda x: np.asarray(x)[0, : len(following)], scored)
        return state, last, scored

    def join(
        self, state: State, last: Any, row: int, request: Request, length: int
    ) -> programs.Emitted:
        """Chooses the first token of an answer, and gives it a row of the batch.

        Args:
            state: From the prompt's last piece.
            last: The hidden state of its last token.
            row: The row.
            request: Whose answer it is.
            length: Tokens that the longest row of the batch has, this one included.

        Returns:
            The first token.
        """
        keys = row_keys(request.options.seed, [(0, request.sample)], 1)
        settings = self._settings([request])
        state, emitted = programs.choose_first(
            self._program, self._weights, state, last, keys, settings
        )
        self._fit(max(length + self._options.chunk, state.cache.positions.shape[1]))
        rows = np.asarray([row], np.int32)
        self._state = programs.join(self._program, self._state, state, rows)
        return emitted

    def decode(self, requests: Sequence[Request | None], length: int) -> programs.Emitted:
        """Decodes a chunk.

        Args:
            requests: The request of each row; None where no answer is decoded.
            length: Tokens that the longest row has.

        Returns:
            What came out.
        """
        self._fit(length + self._options.chunk)
        running = np.asarray([request is not None for request in requests])
        self._state, emitted = programs.decode(
            self._program,
            self._weights,
            self._state,
            running,
            self._settings(requests),
            self._options.chunk,
        )
        return emitted

    def warm_up(self, report: Callable[[str], None]) -> None:
        """Compiles what requests need, but for prompt scores; the batch has to be empty."""
        nobody = [None] * self._options.rows
        for slots in self._slot_sizes():
            report(f"compiling for {slots} tokens")
            for size in piece_sizes(self._options):
                if size > slots:
                    continue
                state = self._make_state(1, slots)
                token = _padded(np.zeros(1, np.int32), size)
                settings = self._settings([None])
                state, last, _ = programs.read_piece(
                    self._program, self._weights, state, token, token, settings, False
                )
                keys = row_keys(0, [(0, 0)], 1)
                state, _ = programs.choose_first(
                    self._program, self._weights, state, last, keys, settings
                )
            self._state = programs.resize(self._program, self._state, slots)
            row = np.full(1, self._options.rows, np.int32)  # none
            self._state = programs.join(self._program, self._state, state, row)
            self.decode(nobody, slots - self._options.chunk)
        self.reset()
        jax.block_until_ready(self._state.token)

    @property
    def _weights(self) -> programs.Weights:
        return programs.Weights(self._lm.params, self._heads.stack)

    def _fit(self, length: int) -> None:
        """Gives the batch slots for rows of this length; it shrinks when few are needed."""
        needed, slots = self._slots_for(length), self._state.cache.positions.shape[1]
        if needed > slots or 4 * needed <= slots:
            self._state = programs.resize(self._program, self._state, needed)

    def _slots_for(self, length: int) -> int:
        return next(size for size in self._slot_sizes() if size >= length)

    def _slot_sizes(self) -> list[int]:
        """Powers of two, and what the longest request takes with the padding of its pieces."""
        padding = max(self._options.piece, self._options.chunk)
        most = round_up(self._max_length + padding, _LEAST_SLOTS)
        sizes = itertools.accumulate(itertools.repeat(_LEAST_SLOTS), lambda size, _: 2 * size)
        return [*itertools.takewhile(lambda size: 3 * size <= 2 * most, sizes), most]

    def _make_state(self, rows: int, slots: int) -> State:
        state = programs.empty_state(
            self._program, self._lm.vocab_size, self._lm.hidden_size, rows, slots
        )
        return placed(self._program.mesh, state)

    def _settings(self, requests: Sequence[Request | None]) -> programs.Settings:
        """What differs from row to row; a row without a request is greedy and has no heads."""
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
        others: tuple[Any, ...] = (on_mask(on, self._options.heads), stop_ids, limit, wants)
        return programs.Settings(Controls(**arrays), *others)


def _padded(tokens: np.ndarray, size: int) -> np.ndarray:
    """Tokens as a row of a program, -1 where there is none, int32 `[1, size]`."""
    row = np.full((1, size), -1, np.int32)
    row[0, : len(tokens)] = tokens
    return row


def _or(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value
