"""The HTTP server: routes, keys, limits; the work is the engine's.

Whoever has no server key gets answers of the unlearned model and nothing else: no head off, no
other T or s, no number of the base model. See `docs/serving.md`.
"""

import asyncio
import contextlib
import dataclasses
import importlib.resources
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from t3jax.sampling.sampler import SamplingOptions
from t3jax.serving.answers import Writer
from t3jax.serving.engine import Engine
from t3jax.serving.messages import Event, QueueFull, Request, ServerOptions
from t3jax.serving.metrics import Metrics
from t3jax.serving.protocol import Ask, BadRequest, Reader, read_object
from t3jax.serving.requests import PENDING, RequestBook

_HEALTH_SECONDS = 30.0
_RETRY_SECONDS = "1"
_LONGEST_WAIT = 3600  # seconds, for a head that is made


@dataclasses.dataclass(frozen=True)
class Keys:
    """Secrets of a server.

    Attributes:
        api: What every client has to send; None: nothing.
        server: What allows to say what is unlearned; None: nobody may.
    """

    api: str | None = None
    server: str | None = None


Handler = Callable[[HttpRequest], Awaitable[Response]]


def make_app(
    engine: Engine,
    reader: Reader,
    options: ServerOptions,
    keys: Keys,
    book: RequestBook | None = None,
) -> Starlette:
    """Makes the application.

    Args:
        engine: A started engine.
        reader: Reads bodies; its first name is the model's.
        options: How the server talks to its clients.
        keys: Its secrets.
        book: The requests to forget; None: the server has those that it started with.

    Returns:
        An ASGI application.
    """
    server = _Server(engine, reader, options, keys, book)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        if book is not None:
            await asyncio.to_thread(book.close)
        await asyncio.to_thread(engine.stop)

    routes = [
        Route("/", server.page),
        Route("/health", server.health),
        Route("/health_generate", server.health_generate),
        Route("/metrics", server.metrics_text),
        Route("/tokenizer_info", server.tokenizer_info),
        Route("/v1/models", server.models),
        Route("/v1/completions", server.completions, methods=["POST"]),
        Route("/v1/chat/completions", server.chat_completions, methods=["POST"]),
        Route("/tokenize", server.tokenize, methods=["POST"]),
        Route("/detokenize", server.detokenize, methods=["POST"]),
        Route("/v1/forget_requests", server.list_requests),
        Route("/v1/forget_requests", server.add_request, methods=["POST"]),
        Route("/v1/forget_requests/{id}", server.show_request),
        Route("/v1/forget_requests/{id}", server.change_request, methods=["PATCH"]),
        Route("/v1/forget_requests/{id}", server.revoke_request, methods=["DELETE"]),
        Route("/v1/audit_log", server.audit_log),
    ]
    return Starlette(
        routes=routes,
        lifespan=lifespan,
        exception_handlers={
            BadRequest: server.refuse,
            HTTPException: server.refuse_route,
            Exception: server.fail,
        },
    )


class _Server:
    """The routes."""

    def __init__(
        self,
        engine: Engine,
        reader: Reader,
        options: ServerOptions,
        keys: Keys,
        book: RequestBook | None,
    ):
        self.engine = engine
        self.reader = reader
        self.options = options
        self.keys = keys
        self.book = book
        self.metrics = Metrics(engine)
        self.started = int(time.time())

    # ---- errors

    async def refuse(self, _: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, BadRequest)
        self.metrics.refused.labels(str(error.status)).inc()
        return _error(error.status, str(error), error.param, error.code)

    async def refuse_route(self, request: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        self.metrics.refused.labels(str(error.status_code)).inc()
        return _error(
            error.status_code, f"{request.method} {request.url.path}: {error.detail}", None, "route"
        )

    async def fail(self, _: HttpRequest, error: Exception) -> Response:
        return _error(500, f"{type(error).__name__}: {error}", None, "internal_error")

    # ---- who asks

    def _has_server_key(self, request: HttpRequest) -> bool:
        """Whether the client may say what is unlearned; raises if it may not even ask."""
        given = request.headers.get("authorization", "")
        token = given[7:] if given[:7].lower() == "bearer " else ""
        is_server = self.keys.server is not None and _equal(token, self.keys.server)
        if self.keys.api is not None and not is_server and not _equal(token, self.keys.api):
            raise BadRequest("the API key is missing or wrong", None, 401)
        return is_server

    def _need_server_key(self, request: HttpRequest) -> RequestBook:
        if not self._has_server_key(request):
            raise BadRequest(
                "requests to forget need the server key"
                + ("" if self.keys.server else ", and this server was started without one"),
                None,
                403,
            )
        if self.book is None:
            raise BadRequest("this server was started without a folder for requests", None, 404)
        return self.book

    async def _body(self, request: HttpRequest, most: int) -> bytes:
        size = request.headers.get("content-length", "0")
        if size.isdigit() and int(size) > most:
            raise BadRequest(f"the body has {size} bytes, at most {most} are taken", None, 413)
        parts, total = [], 0
        async for part in request.stream():
            total += len(part)
            if total > most:
                raise BadRequest(f"the body has more than {most} bytes", None, 413)
            parts.append(part)
        return b"".join(parts)

    # ---- small routes

    async def page(self, _: HttpRequest) -> Response:
        page = (
            importlib.resources.files("t3jax.serving")
            .joinpath("page.html")
            .read_text(encoding="utf-8")
        )
        return HTMLResponse(
            page,
            headers={
                "content-security-policy": "default-src 'self'; style-src 'unsafe-inline'; "
                "script-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'"
            },
        )

    async def health(self, _: HttpRequest) -> Response:
        if self.engine.is_alive:
            return JSONResponse({"status": "ok"})
        return _error(503, "the engine has stopped", None, "unavailable")

    async def health_generate(self, request: HttpRequest) -> Response:
        self._has_server_key(request)
        ids = np.asarray([self.engine.lm.eos_ids[0] if self.engine.lm.eos_ids else 0], np.int32)
        one = Request(ids, SamplingOptions(max_new_tokens=1))
        try:
            async with asyncio.timeout(_HEALTH_SECONDS):
                async for _ in self._events([one]):
                    pass
        except (TimeoutError, BadRequest):
            return _error(503, f"no token in {_HEALTH_SECONDS:g} seconds", None, "unavailable")
        return JSONResponse({"status": "ok"})

    async def metrics_text(self, request: HttpRequest) -> Response:
        self._has_server_key(request)
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self, request: HttpRequest) -> Response:
        self._has_server_key(request)
        data = [
            {
                "id": name,
                "object": "model",
                "created": self.started,
                "owned_by": "t3jax",
                "max_model_len": self.engine.max_length,
            }
            for name in self.reader.names
        ]
        return JSONResponse({"object": "list", "data": data})

    async def tokenizer_info(self, request: HttpRequest) -> Response:
        self._has_server_key(request)
        tokenizer = self.reader.lm.tokenizer
        special = tokenizer.special_tokens_map
        return JSONResponse(
            {
                "tokenizer_class": type(tokenizer).__name__,
                "chat_template": tokenizer.chat_template,
                "bos_token": special.get("bos_token"),
                "eos_token": special.get("eos_token"),
                "pad_token": special.get("pad_token"),
                "vocab_size": self.reader.lm.vocab_size,
                "max_model_len": self.engine.max_length,
            }
        )

    async def tokenize(self, request: HttpRequest) -> Response:
        self._has_server_key(request)
        body = read_object(await self._body(request, self.options.max_body))
        known = {"model", "prompt", "messages", "add_special_tokens"}
        if unknown := sorted(set(body) - known):
            raise BadRequest(f"unknown fields {unknown}; known: {sorted(known)}", unknown[0])
        special = body.get("add_special_tokens", True)
        if "messages" in body:
            ids = await asyncio.to_thread(self.reader.encode_messages, body["messages"])
        elif isinstance(body.get("prompt"), str) and isinstance(special, bool):
            ids = self.reader.encode(body["prompt"], special=special)
        else:
            raise BadRequest("give prompt, a text, or messages", "prompt")
        return JSONResponse(
            {"tokens": ids.tolist(), "count": len(ids), "max_model_len": self.engine.max_length}
        )

    async def detokenize(self, request: HttpRequest) -> Response:
        self._has_server_key(request)
        body = read_object(await self._body(request, self.options.max_body))
        tokens, vocabulary = body.get("tokens"), self.reader.lm.vocab_size
        if not isinstance(tokens, list) or not all(
            type(id) is int and 0 <= id < vocabulary for id in tokens
        ):
            raise BadRequest(f"tokens must be a list of ids in [0, {vocabulary})", "tokens")
        return JSONResponse({"prompt": self.reader.lm.tokenizer.decode(tokens)})

    # ---- answers

    async def completions(self, request: HttpRequest) -> Response:
        return await self._answer(request, chat=False)

    async def chat_completions(self, request: HttpRequest) -> Response:
        return await self._answer(request, chat=True)

    async def _answer(self, request: HttpRequest, chat: bool) -> Response:
        has_key = self._has_server_key(request)
        body = read_object(await self._body(request, self.options.max_body))
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

        await _unless_gone(request, collect(), events)
        return JSONResponse(writer.whole(collected))

    async def _stream(
        self, writer: Writer, ask: Ask, first: tuple[int, Event], events: Any
    ) -> AsyncIterator[bytes]:
        try:
            for chunk in writer.first():
                yield _line(chunk)
            piece = writer.piece(*first)
            if piece is not None:
                yield _line(piece)
            async for i, event in events:
                piece = writer.piece(i, event)
                if piece is not None:
                    yield _line(piece)
            for chunk in writer.last():
                yield _line(chunk)
            yield b"data: [DONE]\n\n"
        except BadRequest as error:  # the status is sent already
            yield _line(_error_body(str(error), error.param, error.code))
        finally:
            await events.aclose()

    async def _events(self, requests: list[Request]) -> AsyncIterator[tuple[int, Event]]:
        """The events of requests, until all are over; gives them up when it is closed."""
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
        except ValueError as error:
            raise BadRequest(str(error), "prompt") from None
        except RuntimeError as error:
            raise BadRequest(str(error), None, 503, "unavailable") from None
        arrived = time.monotonic()
        begun: dict[int, float] = {}
        counts = [0] * len(requests)
        left = len(requests)
        deadline = arrived + self.options.timeout
        try:
            while left:
                # Not a timeout around all: another task may go on with this generator.
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
                        each = (now - begun[i]) / (counts[i] - 1)
                        self.metrics.per_token.observe(each)
                yield i, event
        except TimeoutError:
            raise BadRequest(
                f"no answer in {self.options.timeout:g} seconds", None, 504, "timeout"
            ) from None
        finally:
            if left:
                self.engine.cancel(tickets)

    # ---- requests to forget

    async def list_requests(self, request: HttpRequest) -> Response:
        book = self._need_server_key(request)
        return JSONResponse({"object": "list", "data": book.entries()})

    async def show_request(self, request: HttpRequest) -> Response:
        book = self._need_server_key(request)
        entry = self._found(book, request)
        wait = request.query_params.get("wait", "0")
        if not wait.isdecimal() or int(wait) > _LONGEST_WAIT:
            raise BadRequest(f"wait must be in [0, {_LONGEST_WAIT}] seconds, got {wait!r}", "wait")
        deadline = time.monotonic() + int(wait)
        while entry["state"] in PENDING and time.monotonic() < deadline:
            await asyncio.sleep(0.2)
            entry = self._found(book, request)
        return JSONResponse(entry)

    async def add_request(self, request: HttpRequest) -> Response:
        book = self._need_server_key(request)
        content = await self._body(request, self.options.max_rows_body)
        query = dict(request.query_params)
        try:
            if request.headers.get("content-type", "").startswith("application/json"):
                fields = read_object(content)
            else:  # JSON lines, the rest in the address
                fields = {"rows": content, **query}
            added = await asyncio.to_thread(book.add, fields, _who(request))
        except QueueFull:
            raise BadRequest("too many requests to forget wait", None, 429) from None
        except ValueError as error:
            raise BadRequest(str(error), getattr(error, "param", None)) from None
        return JSONResponse(added, status_code=202)

    async def change_request(self, request: HttpRequest) -> Response:
        book = self._need_server_key(request)
        self._found(book, request)
        body = read_object(await self._body(request, self.options.max_body))
        if set(body) != {"active"} or not isinstance(body["active"], bool):
            raise BadRequest('expected {"active": true} or {"active": false}', "active")
        try:
            changed = await asyncio.to_thread(
                book.activate, request.path_params["id"], body["active"], _who(request)
            )
        except ValueError as error:
            raise BadRequest(str(error), "active", 409, "conflict") from None
        return JSONResponse(changed)

    async def revoke_request(self, request: HttpRequest) -> Response:
        book = self._need_server_key(request)
        self._found(book, request)
        revoked = await asyncio.to_thread(book.revoke, request.path_params["id"], _who(request))
        return JSONResponse(revoked)

    async def audit_log(self, request: HttpRequest) -> Response:
        book = self._need_server_key(request)
        return JSONResponse({"object": "list", "data": await asyncio.to_thread(book.audit)})

    def _found(self, book: RequestBook, request: HttpRequest) -> dict[str, Any]:
        entry = book.show(request.path_params["id"])
        if entry is None:
            raise BadRequest(f"no request {request.path_params['id']!r}", "id", 404)
        return entry


async def _unless_gone(request: HttpRequest, work: Any, events: Any) -> None:
    """Waits for work, and gives it up when the client hangs up."""
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
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)
        await events.aclose()


def _who(request: HttpRequest) -> str:
    return f"server key, from {request.client.host if request.client else 'unknown'}"


def _equal(given: str, secret: str) -> bool:
    return secrets.compare_digest(given.encode(), secret.encode())


def _line(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"


def _error_body(message: str, param: str | None, code: str) -> dict[str, Any]:
    kind = "server_error" if code in ("internal_error", "unavailable") else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _error(status: int, message: str, param: str | None, code: str) -> Response:
    headers = {"retry-after": _RETRY_SECONDS} if status in (429, 503) else None
    return JSONResponse(_error_body(message, param, code), status_code=status, headers=headers)
