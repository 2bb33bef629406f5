"""The engine: one thread that owns the device and answers requests as they come and go.

Requests wait in a bounded queue. Between two chunks of decoding a free row takes the next one: its
prompt is read in pieces, so that a long prompt does not stall the others for its whole length, and
then joins the batch. A row is free again when its answer is over, or cancelled. Heads are put in,
taken out and switched between two chunks too; nothing is compiled for it. No HTTP here.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from t3jax.head_io import Head
from t3jax.lm.model import LM
from t3jax.refinements import PLAIN, Refinements
from t3jax.sampling.batch import describe_fault
from t3jax.sampling.loop import SOUND, State
from t3jax.sampling.text import Detokenizer
from t3jax.serving import programs
from t3jax.serving.device import Device
from t3jax.serving.heads import HeadSet
from t3jax.serving.messages import (
    MOST_STOP_IDS,
    EngineOptions,
    Event,
    QueueFull,
    Request,
    Scores,
    Stats,
    Ticket,
    piece_sizes,
)


@dataclasses.dataclass(eq=False)
class _Reading:
    """A prompt that is read: its row, its own state, and the pieces that are left."""

    ticket: Ticket
    row: int
    state: State
    pieces: collections.deque[tuple[int, int]]  # first token, size
    scores: list[Any] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(eq=False)
class _Row:
    """A row that decodes: its request, the answer so far, and how much text has been given."""

    ticket: Ticket
    tokens: list[int] = dataclasses.field(default_factory=list)
    given: int = 0

    @property
    def length(self) -> int:
        return len(self.ticket.request.prompt) + len(self.tokens)


class Engine:
    """Answers requests with one model and the heads that are active."""

    def __init__(
        self,
        lm: LM,
        options: EngineOptions | None = None,
        *,
        base_temperature: float = 1.0,
        guidance_scale: float = 1.0,
        truncate_on: str = "guided",
        refinements: Refinements = PLAIN,
    ):
        """Makes an empty batch beside the model; compiles nothing.

        Args:
            lm: The frozen base model, a decoder of `t3jax.lm`.
            options: How much the engine takes on; None takes the defaults.
            base_temperature: T where a request does not say.
            guidance_scale: s where a request does not say.
            truncate_on: What decides top-k, top-p and min-p.
            refinements: Which are on.

        Raises:
            ValueError: If the model is not a decoder of `t3jax.lm`, the mesh splits rows, or heads
                are to be combined by their product.
        """
        if lm.config is None or lm.tokenizer is None:
            raise ValueError(f"{lm.name}: a server needs a model of t3jax.lm and its tokenizer")
        if lm.mesh.shape["data"] * lm.mesh.shape["fsdp"] != 1:
            raise ValueError(
                f"mesh {dict(lm.mesh.shape)}: a server splits the model and not the rows; give "
                f"--config.mesh='(1, 1, {lm.mesh.size})'"
            )
        if refinements.combine != "disjoint":
            raise ValueError('a server combines heads as disjoint requests; drop "product"')
        self.lm = lm
        self.options = options = options or EngineOptions()
        self.base_temperature = base_temperature
        self.guidance_scale = guidance_scale
        self.max_length = min(options.max_length or min(lm.max_position, 2048), lm.max_position)
        self.stats = Stats()
        self.detokenizer = Detokenizer(lm.tokenizer)
        self._heads = HeadSet(lm, options.heads, options.rank)
        self._device = Device(
            lm,
            options,
            self._heads,
            base_temperature=base_temperature,
            guidance_scale=guidance_scale,
            truncate_on=truncate_on,
            refinements=refinements,
            max_length=self.max_length,
        )
        self._rows: dict[int, _Row] = {}
        self._readings: list[_Reading] = []
        self._waiting: collections.deque[Ticket] = collections.deque()
        self._commands: collections.deque[tuple[Callable[[], Any], concurrent.futures.Future]]
        self._commands = collections.deque()
        self._wake = threading.Condition()
        self._stopping: str | None = None  # "drain" or "now"
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # ---- from any thread

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self, drain: bool = True) -> None:
        """Takes no more requests; answers those at hand, or cancels them, and ends the thread."""
        with self._wake:
            self._stopping = "drain" if drain else "now"
            self._wake.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests whose prompt is read or answer decoded."""
        return len(self._rows) + len(self._readings)

    @property
    def is_alive(self) -> bool:
        """Whether requests are taken."""
        return self._thread.is_alive() and self._stopping is None

    @property
    def active_heads(self) -> tuple[str, ...]:
        """Names of the heads that are on for every request that does not say."""
        return self._heads.active

    @property
    def head_names(self) -> tuple[str, ...]:
        """Names of all heads, active or not."""
        return self._heads.names

    def check(self, request: Request) -> None:
        """Raises a ValueError unless the request can be answered; needs no device."""
        length, asked = len(request.prompt), request.options.max_new_tokens
        if not length:
            raise ValueError("the prompt is empty")
        if length + asked > self.max_length:
            raise ValueError(
                f"the prompt has {length} tokens; with an answer of up to {asked} that exceeds the "
                f"{self.max_length} that this server takes: shorten it, or ask for less"
            )
        if len(request.options.stop_ids) > MOST_STOP_IDS:
            raise ValueError(f"stop_token_ids: at most {MOST_STOP_IDS}")
        vocabulary = self.lm.vocab_size
        if not all(0 <= id < vocabulary for id in request.options.stop_ids):
            raise ValueError(f"stop_token_ids must lie in [0, {vocabulary})")
        if request.prompt.min() < 0 or request.prompt.max() >= vocabulary:
            raise ValueError(f"the prompt's token ids must lie in [0, {vocabulary})")
        if unknown := sorted(set(request.heads or ()) - set(self.head_names)):
            raise ValueError(f"unknown heads {unknown}; there are {sorted(self.head_names)}")

    def submit(self, requests: Sequence[Request], on_event: Callable[[int, Event], None]) -> list:
        """Puts requests into the queue, all or none.

        Args:
            requests: The requests.
            on_event: Takes the index of a request and an event of it, in the engine's thread.

        Returns:
            A `Ticket` for each.

        Raises:
            QueueFull: If they do not all fit.
            ValueError: As `check`.
            RuntimeError: If the engine has stopped.
        """
        for request in requests:
            self.check(request)
        now = time.monotonic()

        with self._wake:
            if not self.is_alive:
                raise RuntimeError("the engine has stopped")
            if len(self._waiting) + len(requests) > self.options.queue:
                raise QueueFull
            tickets = [
                Ticket(request, functools.partial(on_event, i), now)
                for i, request in enumerate(requests)
            ]
            self._waiting.extend(tickets)
            self._wake.notify_all()
        return tickets

    def cancel(self, tickets: Sequence[Ticket]) -> None:
        """Gives up requests: their rows are free at the end of the chunk."""
        with self._wake:
            for ticket in tickets:
                ticket.cancelled = True
            self._wake.notify_all()

    def install(self, name: str, head: Head, active: bool = True) -> None:
        """Puts a head in, or in the place of the one of this name; it holds from the next chunk on.

        Args:
            name: Its name.
            head: The head.
            active: Whether it is on for everybody.

        Raises:
            ValueError: If it does not fit the model or the stack, or there is no free place.
        """
        self._heads.check(head)
        self.call(lambda: self._heads.install(name, head, active))

    def activate(self, name: str, active: bool) -> None:
        """Turns a head on or off for everybody, from the next chunk on."""
        self.call(lambda: self._heads.activate(name, active))

    def remove(self, name: str) -> None:
        """Takes a head out."""
        self.call(lambda: self._heads.remove(name))

    def call(self, command: Callable[[], Any]) -> Any:
        """Runs something between two chunks, in the engine's thread, and waits for it."""
        if threading.current_thread() is self._thread or not self._thread.is_alive():
            return command()
        future: concurrent.futures.Future = concurrent.futures.Future()
        with self._wake:
            self._commands.append((command, future))
            self._wake.notify_all()
        return future.result()

    def warm_up(self, report: Callable[[str], None] = lambda _: None) -> None:
        """Compiles what requests need, but for prompt scores, before the thread is started."""
        self._device.warm_up(report)

    # ---- in the engine's thread

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (
                    self._commands
                    or self._waiting
                    or self._rows
                    or self._readings
                    or self._stopping
                ):
                    self._wake.wait()
                commands = [self._commands.popleft() for _ in range(len(self._commands))]
            for command, future in commands:
                try:
                    future.set_result(command())
                except Exception as error:
                    future.set_exception(error)
            if self._stopping == "now":
                self._cancel_all()
            self._drop_cancelled()
            if self._stopping and not (self._waiting or self._rows or self._readings):
                return
            try:
                self._begin_reading()
                self._read_pieces()
                if self._rows:
                    self._decode_chunk()
            except Exception as error:  # the device failed: say so to everybody, and go on
                self._fail_all(error)

    def _cancel_all(self) -> None:
        for ticket in [*self._waiting, *(r.ticket for r in self._readings), *self._tickets()]:
            ticket.cancelled = True

    def _tickets(self) -> list[Ticket]:
        return [row.ticket for row in self._rows.values()]

    def _drop_cancelled(self) -> None:
        with self._wake:
            gone = [ticket for ticket in self._waiting if ticket.cancelled]
            for ticket in gone:
                self._waiting.remove(ticket)
        gone += [one.ticket for one in self._readings if one.ticket.cancelled]
        self._readings = [one for one in self._readings if not one.ticket.cancelled]
        for number, row in list(self._rows.items()):
            if row.ticket.cancelled:
                gone.append(row.ticket)
                del self._rows[number]
        for ticket in gone:
            self._finish(ticket, Event(finish="cancelled"))

    def _fail_all(self, error: Exception) -> None:
        tickets = [*(one.ticket for one in self._readings), *self._tickets()]
        self._readings, self._rows = [], {}
        for ticket in tickets:
            self._finish(ticket, _failure(error))
        try:
            self._device.reset()
        except Exception:  # nothing can be answered any more: those that wait are given up
            self._stopping = "now"

    def _finish(self, ticket: Ticket, event: Event) -> None:
        self.stats.finished[event.finish or "error"] += 1
        ticket.on_event(event)

    def _begin_reading(self) -> None:
        """Gives free rows to requests that wait."""
        taken = {*self._rows, *(one.row for one in self._readings)}
        free = [row for row in range(self.options.rows) if row not in taken]
        while free:
            with self._wake:
                if not self._waiting:
                    return
                ticket = self._waiting.popleft()
            pieces = self._pieces(len(ticket.request.prompt))
            try:
                state = self._device.begin(sum(size for _, size in pieces))
            except Exception as error:  # it is in no list any more
                self._finish(ticket, _failure(error))
                raise
            self._readings.append(_Reading(ticket, free.pop(0), state, collections.deque(pieces)))

    def _pieces(self, length: int) -> list[tuple[int, int]]:
        """Where the pieces of a prompt start, and their sizes; its length alone decides."""
        pieces, start = [], 0
        while start < length:
            sizes = piece_sizes(self.options)
            size = next((size for size in sizes if size >= length - start), sizes[-1])
            pieces.append((start, size))
            start += size
        return pieces

    def _read_pieces(self) -> None:
        """Reads pieces, of the prompts with the least left first.

        Beside rows that decode, about one long piece, or a few if most rows are free: an answer
        then waits for others to begin, and the batch is not decoded for a few of them alone.
        """
        free = self.options.rows - len(self._rows)
        budget = self.options.piece * max(1, free // 4)
        while budget > 0 and self._readings:
            reading = min(self._readings, key=lambda one: sum(size for _, size in one.pieces))
            budget -= reading.pieces[0][1]
            self._read_piece(reading)

    def _read_piece(self, reading: _Reading) -> None:
        request = reading.ticket.request
        start, size = reading.pieces.popleft()
        piece = request.prompt[start : start + size]
        following = request.prompt[start + 1 : start + 1 + size]
        reading.state, last, scored = self._device.read(
            reading.state, piece, following, size, request
        )
        self.stats.prompt_tokens += len(piece)
        if scored is not None:
            reading.scores.append(scored)
        if reading.pieces:
            return
        length = max([len(request.prompt), *(row.length for row in self._rows.values())])
        emitted = self._device.join(reading.state, last, reading.row, request, length)
        self._readings.remove(reading)
        self._rows[reading.row] = _Row(reading.ticket)
        prompt_scores = None
        if request.scores_prompt:
            joined = [np.concatenate(parts) for parts in zip(*reading.scores, strict=True)]
            prompt_scores = _scores(joined, request.likeliest)
        self._collect(emitted, {0: reading.row}, prompt_scores)

    def _decode_chunk(self) -> None:
        rows = (self._rows.get(i) for i in range(self.options.rows))
        emitted = self._device.decode(
            [None if row is None else row.ticket.request for row in rows],
            max(row.length for row in self._rows.values()),
        )
        self._collect(emitted, {row: row for row in self._rows})

    def _collect(
        self,
        emitted: programs.Emitted,
        rows: Mapping[int, int],
        prompt_scores: Scores | None = None,
    ) -> None:
        """Brings a chunk to the host, hands out what is new, and frees rows that are done."""
        tokens, scored, changed_by, faults, done = jax.tree.map(np.asarray, tuple(emitted))
        for i, number in rows.items():
            row = self._rows[number]
            request = row.ticket.request
            count = int(np.sum(tokens[i] >= 0))
            if np.any(faults[i, :count] != SOUND):
                del self._rows[number]
                fault = int(faults[i, np.argmax(faults[i] != SOUND)])
                self._finish(row.ticket, Event(finish="error", error=describe_fault(fault)))
                continue
            row.tokens += tokens[i, :count].tolist()
            end = self.detokenizer.stop_at(row.tokens, count, request.options.stop)
            finish = None
            if end is not None:
                count -= len(row.tokens) - end
                del row.tokens[end:]
                finish = "stop"
            elif done[i]:
                closing = {*self.lm.eos_ids, *request.options.stop_ids}
                finish = "stop" if row.tokens[-1] in closing else "length"
            self.stats.answer_tokens += count
            for place in changed_by[i, :count].tolist():
                if (name := self._heads.name_of(place)) is not None:
                    self.stats.changed_tokens[name] += 1
            give = self.detokenizer.text if finish else self.detokenizer.settled_text
            text = give(row.tokens, request.options.stop)
            event = Event(
                text=text[row.given :],
                tokens=tuple(row.tokens[len(row.tokens) - count :]),
                scores=_scores([x[i, :count] for x in scored], request.likeliest),
                prompt_scores=prompt_scores,
                finish=finish,
                changed=tuple(bool(place >= 0) for place in changed_by[i, :count]),
            )
            row.given = max(row.given, len(text))
            if finish:
                del self._rows[number]
                self._finish(row.ticket, event)
            else:
                row.ticket.on_event(event)


def _failure(error: Exception) -> Event:
    return Event(finish="error", error=f"{type(error).__name__}: {error}")


def _scores(scored: Sequence[np.ndarray], count: int) -> Scores:
    chosen, base, retain, tokens, logprobs = scored
    likeliest = [
        list(zip(ids[:count].tolist(), values[:count].tolist(), strict=True))
        for ids, values in zip(tokens, logprobs, strict=True)
    ]
    return Scores(chosen.tolist(), base.tolist(), retain.tolist(), likeliest if count else [])
