"""The engine: one thread that owns the device and answers requests as they arrive.

Requests wait in a bounded queue. Between two chunks of decoding the batch takes the next ones, if
it has free rows. Heads are added, removed and switched between two chunks too, without compiling.
"""

import collections
import concurrent.futures
import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax

from t3jax.head_io import Head
from t3jax.lm.model import LM
from t3jax.refinements import PLAIN, Refinements
from t3jax.sampling.text import Detokenizer
from t3jax.serving.batch import Batch
from t3jax.serving.device import Device
from t3jax.serving.heads import HeadSet
from t3jax.serving.messages import (
    MOST_STOP_IDS,
    EngineOptions,
    Event,
    FieldError,
    QueueFull,
    Request,
    Stats,
    Ticket,
)
from t3jax.serving.mirror import IDLE_SECONDS, Mirror

T = TypeVar("T")


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
        """Makes an empty batch beside the model, a decoder of `t3jax.lm`; compiles nothing.

        T and s are defaults of requests. A ValueError means that the model is not such a decoder,
        the mesh splits rows, or the refinements combine heads by their product.
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
        self._mirror = Mirror(self._device) if jax.process_count() > 1 else None
        self._batch = Batch(
            self._mirror or self._device,
            options,
            self._heads,
            Detokenizer(lm.tokenizer),
            lm.eos_ids,
            self.stats,
        )
        self._waiting: collections.deque[Ticket] = collections.deque()
        self._commands: collections.deque[tuple[Callable[[], Any], concurrent.futures.Future]] = (
            collections.deque()
        )
        self._wake = threading.Condition()
        self._stopping: str | None = None  # "drain" or "now"
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # ---- from any thread

    def start(self) -> None:
        """Starts to take requests."""
        self._thread.start()

    def stop(self, drain: bool = True) -> None:
        """Refuses new requests, answers or cancels the running ones, and ends the thread."""
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
        return self._batch.running

    @property
    def is_alive(self) -> bool:
        """Whether requests are taken."""
        return self._thread.is_alive() and self._stopping is None

    @property
    def active_heads(self) -> tuple[str, ...]:
        """Names of the heads that are on for every request without `heads` of its own."""
        return self._heads.active

    @property
    def head_names(self) -> tuple[str, ...]:
        """Names of all heads, active or not."""
        return self._heads.names

    def check(self, request: Request) -> None:
        """Raises a `FieldError` unless the request can be answered; needs no device."""
        prompt_length, longest = len(request.prompt), request.options.max_new_tokens
        vocabulary, stop_ids = self.lm.vocab_size, request.options.stop_ids
        if not prompt_length:
            raise FieldError("prompt", "it is empty")
        if prompt_length >= self.max_length:
            raise FieldError(
                "prompt",
                f"it has {prompt_length} tokens; this server takes {self.max_length} with the "
                "answer: shorten it",
            )
        if prompt_length + longest > self.max_length:
            raise FieldError(
                "max_tokens",
                f"{longest} and the {prompt_length} of the prompt exceed the {self.max_length} "
                "that this server takes together: ask for at most "
                f"{self.max_length - prompt_length}",
            )
        if len(stop_ids) > MOST_STOP_IDS:
            raise FieldError(
                "stop_token_ids", f"expected at most {MOST_STOP_IDS}, got {len(stop_ids)}"
            )
        if not all(0 <= id < vocabulary for id in stop_ids):
            raise FieldError("stop_token_ids", f"expected ids in [0, {vocabulary})")
        if request.prompt.min() < 0 or request.prompt.max() >= vocabulary:
            raise FieldError("prompt", f"expected token ids in [0, {vocabulary})")
        if unknown := sorted(set(request.heads or ()) - set(self.head_names)):
            raise FieldError("heads", f"unknown {unknown}; there are {sorted(self.head_names)}")

    def submit(self, requests: Sequence[Request], on_event: Callable[[int, Event], None]) -> list:
        """Queues all requests or none; returns a `Ticket` for each.

        `on_event` is called with the index of a request and its event, in the engine's thread.
        Raises `QueueFull` if there is no room for all, a `FieldError` as `check`, and a
        RuntimeError if the engine has stopped.
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
        """Adds a head, or replaces the one of this name, from the next chunk on.

        An active head is on for everybody. A ValueError means that the head does not fit the model
        or the stack, or that there is no free place.
        """
        self._heads.check(head)
        self.call(lambda: self._heads.install(name, head, active))

    def activate(self, name: str, active: bool) -> None:
        """Turns a head on or off for everybody, from the next chunk on."""
        self.call(lambda: self._heads.activate(name, active))

    def remove(self, name: str) -> None:
        """Removes a head, from the next chunk on."""
        self.call(lambda: self._heads.remove(name))

    def call(self, command: Callable[[], T]) -> T:
        """Runs a command between two chunks, in the engine's thread, and waits for its result."""
        if threading.current_thread() is self._thread or not self._thread.is_alive():
            return command()
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        with self._wake:
            self._commands.append((command, future))
            self._wake.notify_all()
        return future.result()

    def follow(self) -> None:
        """Repeats the device calls of process 0 until it stops, in each other process."""
        assert self._mirror is not None
        self._mirror.follow()

    def warm_up(self, report: Callable[[str], None] = lambda _: None) -> None:
        """Compiles all programs but prompt scores, before the thread is started."""
        self._device.warm_up(report)

    # ---- in the engine's thread

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._wake.wait_for(self._has_work, IDLE_SECONDS):
                    if self._mirror is not None:
                        self._mirror.ping()
                commands = [self._commands.popleft() for _ in range(len(self._commands))]
            for command, future in commands:
                try:
                    future.set_result(command())
                except Exception as error:
                    future.set_exception(error)
            if self._stopping == "now":
                self.cancel([*self._waiting, *self._batch.tickets])
            self._drop_cancelled()
            if self._stopping and not (self._waiting or self._batch.running):
                if self._mirror is not None:
                    self._mirror.end()
                return
            try:
                self._begin_waiting()
                self._batch.read()
                self._batch.decode()
            except Exception as error:  # the device failed: all requests fail, and the loop goes on
                self._fail_all(error)

    def _has_work(self) -> bool:
        return bool(self._commands or self._waiting or self._batch.running or self._stopping)

    def _drop_cancelled(self) -> None:
        with self._wake:
            gone = [ticket for ticket in self._waiting if ticket.cancelled]
            for ticket in gone:
                self._waiting.remove(ticket)
        for ticket in gone:
            self._batch.finish(ticket, Event(finish="cancelled"))
        self._batch.drop_cancelled()

    def _begin_waiting(self) -> None:
        """Gives free rows to requests that wait."""
        while self._batch.running < self.options.rows:
            with self._wake:
                if not self._waiting:
                    return
                ticket = self._waiting.popleft()
            try:
                self._batch.begin(ticket)
            except Exception as error:  # the ticket is in no list any more
                self._batch.finish(ticket, _failure(error))
                raise

    def _fail_all(self, error: Exception) -> None:
        for ticket in self._batch.reset():
            self._batch.finish(ticket, _failure(error))
        if self._mirror is not None:  # the other processes' states are unknown
            os.kill(os.getpid(), signal.SIGTERM)
            self._stopping = "now"
            return
        try:
            self._device.reset()
        except Exception:  # no request can be answered any more: the waiting ones are cancelled
            self._stopping = "now"


def _failure(error: Exception) -> Event:
    return Event(finish="error", error=f"{type(error).__name__}: {error}")
