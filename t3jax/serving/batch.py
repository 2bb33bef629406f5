"""The running answers: prompts that are read, rows that decode, and their events.

A prompt is read in pieces, so that a long one does not stall the others, and then joins the batch.
This module sends the events; the engine has the queue and switches heads.
"""

import collections
import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from t3jax.sampling.batch import describe_fault
from t3jax.sampling.loop import SOUND
from t3jax.sampling.text import Detokenizer
from t3jax.serving.device import Device, pad
from t3jax.serving.heads import HeadSet
from t3jax.serving.messages import (
    SHORT_PIECE,
    EngineOptions,
    Event,
    Scores,
    Stats,
    Ticket,
    split_prompt,
)
from t3jax.serving.mirror import Mirror
from t3jax.serving.prefixes import Prefixes
from t3jax.serving.state import Emitted


@dataclasses.dataclass(eq=False)
class _Reading:
    """A prompt that is being read: its number on the device, and the remaining pieces."""

    ticket: Ticket
    number: int
    pieces: collections.deque[tuple[int, int]]  # first token, size
    end: int = 0  # tokens read, padding included
    scores: list[tuple[np.ndarray, ...]] = dataclasses.field(default_factory=list)

    @property
    def left(self) -> int:
        return sum(size for _, size in self.pieces)


@dataclasses.dataclass(eq=False)
class _Row:
    """A row that decodes: its request, the answer so far, and the length of the text sent."""

    ticket: Ticket
    tokens: list[int] = dataclasses.field(default_factory=list)
    sent: int = 0

    @property
    def length(self) -> int:
        return len(self.ticket.request.prompt) + len(self.tokens)


class Batch:
    """Reads prompts and decodes answers, at most `EngineOptions.rows` of them."""

    def __init__(
        self,
        device: Device | Mirror,
        options: EngineOptions,
        heads: HeadSet,
        detokenizer: Detokenizer,
        eos_ids: Sequence[int],
        stats: Stats,
    ):
        self.device = device
        self._options = options
        self._heads = heads
        self._detokenizer = detokenizer
        self._eos_ids = eos_ids
        self._stats = stats
        self._prefixes = Prefixes(options.prefixes, device.give_up)
        self._rows: dict[int, _Row] = {}
        self._readings: list[_Reading] = []
        self._numbers = itertools.count()

    @property
    def running(self) -> int:
        """Requests whose prompt is read or answer decoded."""
        return len(self._rows) + len(self._readings)

    @property
    def tickets(self) -> list[Ticket]:
        """The tickets of the running requests."""
        return [*(r.ticket for r in self._readings), *(r.ticket for r in self._rows.values())]

    def finish(self, ticket: Ticket, event: Event) -> None:
        """Sends the last event of a request."""
        self._stats.finished[event.finish or "error"] += 1
        ticket.on_event(event)

    def drop_cancelled(self) -> None:
        """Frees the rows of cancelled requests."""
        cancelled = [ticket for ticket in self.tickets if ticket.cancelled]
        for reading in self._readings:
            if reading.ticket.cancelled:
                self.device.drop(reading.number)
        self._readings = [reading for reading in self._readings if not reading.ticket.cancelled]
        self._rows = {i: row for i, row in self._rows.items() if not row.ticket.cancelled}
        for ticket in cancelled:
            self.finish(ticket, Event(finish="cancelled"))

    def reset(self) -> list[Ticket]:
        """Drops all answers without an event, but not the device's state; returns their tickets."""
        tickets = self.tickets
        self._rows, self._readings = {}, []
        self._prefixes.clear()
        return tickets

    def begin(self, ticket: Ticket) -> None:
        """Begins to read a prompt; a row has to be free."""
        number = next(self._numbers)
        self.device.begin(number)
        pieces = split_prompt(len(ticket.request.prompt), self._options)
        reading = _Reading(ticket, number, collections.deque(pieces))
        self._resume(reading)
        self._readings.append(reading)

    def read(self) -> None:
        """Reads pieces of prompts, those with the fewest tokens left first.

        Beside rows that decode, about one long piece is read, or a few if most rows are free:
        answers then begin together, and a chunk is not decoded for a few rows alone.
        """
        free = self._options.rows - len(self._rows)
        budget = self._options.piece * max(1, free // 4)
        while budget > 0 and self._readings:
            reading = min(self._readings, key=lambda reading: reading.left)
            self._resume(reading)
            budget -= reading.pieces[0][1] if reading.pieces else SHORT_PIECE
            if reading.pieces:
                self._read_piece(reading)
            if not reading.pieces:
                self._join(reading)

    def decode(self) -> None:
        """Decodes a chunk for the rows with an answer."""
        if not self._rows:
            return
        longest = max(row.length for row in self._rows.values())
        self._fit(longest + self._options.chunk)
        rows = [self._rows.get(i) for i in range(self.device.rows)]
        requests = [None if row is None else row.ticket.request for row in rows]
        self._collect(self.device.decode(requests), {row: row for row in self._rows})

    # ---- reading

    def _resume(self, reading: _Reading) -> None:
        """Continues from the longest kept prefix, if it is longer than the part that was read."""
        request = reading.ticket.request
        if request.scores_prompt:
            return  # the tokens of a kept prefix have no scores
        for i in reversed(range(len(reading.pieces))):
            end = sum(reading.pieces[i])
            name = self._prefixes.find(request.prompt[:end])
            if name is None:
                continue
            self.device.resume(reading.number, name)
            self._stats.shared_tokens += min(end, len(request.prompt)) - reading.pieces[0][0]
            reading.end = end
            for _ in range(i + 1):
                reading.pieces.popleft()
            return

    def _read_piece(self, reading: _Reading) -> None:
        request = reading.ticket.request
        start, size = reading.pieces.popleft()
        reading.end = end = start + size
        piece, following = request.prompt[start:end], request.prompt[start + 1 : end + 1]
        scored = self.device.read(
            reading.number, pad(piece, size), pad(following, size), end, request
        )
        self._stats.prompt_tokens += len(piece)
        if scored is not None:
            reading.scores.append(tuple(x[0, : len(following)] for x in scored))
        elif name := self._prefixes.add(request.prompt[:end], self.device.slots_for(end)):
            self.device.keep(reading.number, name)

    def _join(self, reading: _Reading) -> None:
        request = reading.ticket.request
        lengths = [len(request.prompt), *(row.length for row in self._rows.values())]
        self._fit(max(max(lengths) + self._options.chunk, reading.end))
        row = next(i for i in range(self.device.rows) if i not in self._rows)
        emitted = self.device.join(reading.number, row, request)
        self._readings.remove(reading)
        self._rows[row] = _Row(reading.ticket)
        prompt_scores = None
        if request.scores_prompt:
            joined = [np.concatenate(parts) for parts in zip(*reading.scores, strict=True)]
            prompt_scores = _scores(joined, request.likeliest)
        self._collect(emitted, {0: row}, prompt_scores)

    # ---- decoding

    def _fit(self, length: int) -> None:
        moved = self.device.fit(sorted(self._rows), self.running, length)
        self._rows = {moved[number]: row for number, row in sorted(self._rows.items())}

    def _collect(
        self,
        emitted: Emitted,
        rows: Mapping[int, int],
        prompt_scores: Scores | None = None,
    ) -> None:
        """Sends events with the new tokens, and frees rows that are done."""
        tokens, scored, changed_by, faults, done = jax.tree.map(np.asarray, tuple(emitted))
        for i, number in rows.items():
            row = self._rows[number]
            request = row.ticket.request
            count = int(np.sum(tokens[i] >= 0))
            if np.any(faults[i, :count] != SOUND):
                del self._rows[number]
                fault = int(faults[i, np.argmax(faults[i] != SOUND)])
                self.finish(row.ticket, Event(finish="error", error=describe_fault(fault)))
                continue
            row.tokens += tokens[i, :count].tolist()
            end = self._detokenizer.stop_at(row.tokens, count, request.options.stop)
            finish = None
            if end is not None:
                count -= len(row.tokens) - end
                del row.tokens[end:]
                finish = "stop"
            elif done[i]:
                closing = {*self._eos_ids, *request.options.stop_ids}
                finish = "stop" if row.tokens[-1] in closing else "length"
            self._stats.answer_tokens += count
            for place in changed_by[i, :count].tolist():
                if (name := self._heads.name_of(place)) is not None:
                    self._stats.changed_tokens[name] += 1
            give = self._detokenizer.text if finish else self._detokenizer.settled_text
            text = give(row.tokens, request.options.stop)
            event = Event(
                text=text[row.sent :],
                tokens=tuple(row.tokens[len(row.tokens) - count :]),
                scores=_scores([x[i, :count] for x in scored], request.likeliest),
                prompt_scores=prompt_scores,
                finish=finish,
                changed=tuple(bool(place >= 0) for place in changed_by[i, :count]),
            )
            row.sent = max(row.sent, len(text))
            if finish:
                del self._rows[number]
                self.finish(row.ticket, event)
            else:
                row.ticket.on_event(event)


def _scores(scored: Sequence[np.ndarray], count: int) -> Scores:
    chosen, base, retain, tokens, logprobs = scored
    likeliest = [
        list(zip(ids[:count].tolist(), values[:count].tolist(), strict=True))
        for ids, values in zip(tokens, logprobs, strict=True)
    ]
    return Scores(chosen.tolist(), base.tolist(), retain.tolist(), likeliest if count else [])
