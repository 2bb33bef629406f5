"""Routes of completions: from a body to requests of the engine, from its events to a response."""

import asyncio
import contextlib
import dataclasses
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping

import numpy as np
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse

from t3jax.sampling.options import SamplingOptions
from t3jax.serving.access import Access
from t3jax.serving.answers import Writer
from t3jax.serving.engine import Engine
from t3jax.serving.errors import BadRequest, error_body, error_response
from t3jax.serving.fields import read_object
from t3jax.serving.messages import Event, FieldError, QueueFull, Request, ServerOptions
from t3jax.serving.metrics import Metrics
from t3jax.serving.protocol import Ask, Reader

_HEALTH_SECONDS = 30.0


@dataclasses.dataclass(frozen=True, eq=False)
class Routes:
    """The parts of a server that its routes call; the reader's first name is the model's."""

    engine: Engine
    reader: Reader
    options: ServerOptions
    access: Access
    metrics: Metrics


class GenerationRoutes(Routes):
    """Completions and chats."""

    async def completions(self, request: HttpRequest) -> Response:
        """Continues texts."""
        return await self._answer(request, chat=False)

    async def chat_completions(self, request: HttpRequest) -> Response:
        """Answers a conversation."""
        return await self._answer(request, chat=True)

    async def _answer(self, request: HttpRequest, chat: bool) -> Response:
        has_key = self.access.has_server_key(request)
        body = read_object(await self.access.read_body(request, self.options.max_body))
        # Rendering a template may take a while.
        ask = await asyncio.to_thread(self.reader.read, body, chat, has_key)
        writer = Writer(ask, self.reader, self.reader.names[0])
        events = self._events(ask.requests)
        first = await anext(events)  # refused requests have a status of their own
        if ask.stream:
            return StreamingResponse(
                self._stream(writer, ask, first, events),
                media_type="text/event-stream",
                headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
            )
        collected: list[list[Event]] = [[] for _ in ask.requests]

        async def collect() -> None:
            collected[first[0]].append(first[1])
            async for i, event in events:
                collected[i].append(event)

        await _wait_unless_gone(request, collect(), events)
        return JSONResponse(writer.whole(collected))

    async def _stream(
        self,
        writer: Writer,
        ask: Ask,
        first: tuple[int, Event],
        events: AsyncGenerator[tuple[int, Event], None],
    ) -> AsyncIterator[bytes]:
        try:
            for chunk in writer.first():
                yield _line(chunk)
            if (piece := writer.piece(*first)) is not None:
                yield _line(piece)
            async for i, event in events:
                if (piece := writer.piece(i, event)) is not None:
                    yield _line(piece)
            for chunk in writer.last():
                yield _line(chunk)
            yield b"data: [DONE]\n\n"
        except BadRequest as error:  # the status is sent already
            yield _line(error_body(str(error), error.param, error.code))
        finally:
            await events.aclose()

    async def _events(self, requests: list[Request]) -> AsyncGenerator[tuple[int, Event], None]:
        """The events of requests until all have ended; closing it cancels the requests."""
        queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(i: int, event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(queue.put_nowait, (i, event))

        try:
            tickets = self.engine.submit(requests, deliver)
        except QueueFull:
            raise BadRequest(
                f"the queue is full ({self.engine.options.queue} requests); try again",
                None,
                429,
                "queue_full",
            ) from None
        except FieldError as error:
            raise BadRequest(str(error), error.param) from None
        except RuntimeError as error:
            raise BadRequest(str(error), None, 503, "unavailable") from None
        arrived = time.monotonic()
        begun: dict[int, float] = {}
        counts = [0] * len(requests)
        left = len(requests)
        deadline = arrived + self.options.timeout
        try:
            while left:
                # No timeout around the loop: another task may continue this generator.
                async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                    i, event = await queue.get()
                now = time.monotonic()
                if event.tokens and i not in begun:
                    begun[i] = now
                    self.metrics.first_token.observe(now - arrived)
                counts[i] += len(event.tokens)
                if event.finish == "error":
                    raise BadRequest(event.error or "", None, 500, "internal_error")
                if event.finish == "cancelled":
                    raise BadRequest("the server is ending", None, 503, "unavailable")
                if event.finish:
                    left -= 1
                    if counts[i] > 1:
                        seconds = (now - begun[i]) / (counts[i] - 1)
                        self.metrics.per_token.observe(seconds)
                yield i, event
        except TimeoutError:
            raise BadRequest(
                f"no answer in {self.options.timeout:g} seconds", None, 504, "timeout"
            ) from None
        finally:
            if left:
                self.engine.cancel(tickets)

    async def health_generate(self, request: HttpRequest) -> Response:
        """Whether the engine answers a request of one token."""
        self.access.has_server_key(request)
        ids = np.asarray([self.engine.lm.eos_ids[0] if self.engine.lm.eos_ids else 0], np.int32)
        probe = Request(ids, SamplingOptions(max_new_tokens=1))
        try:
            async with asyncio.timeout(_HEALTH_SECONDS):
                async for _ in self._events([probe]):
                    pass
        except (TimeoutError, BadRequest):
            return error_response(
                503, f"no token in {_HEALTH_SECONDS:g} seconds", None, "unavailable"
            )
        return JSONResponse({"status": "ok"})


async def _wait_unless_gone(
    request: HttpRequest,
    work: Coroutine[None, None, None],
    events: AsyncGenerator[tuple[int, Event], None],
) -> None:
    """Waits for work, and cancels it when the client hangs up."""
    task = asyncio.ensure_future(work)

    async def hang_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    gone = asyncio.ensure_future(hang_up())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise BadRequest("the client hung up", None, 499, "cancelled")
        task.result()
    finally:
        for future in (task, gone):
            future.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)
        await events.aclose()


def _line(body: Mapping[str, object]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"
