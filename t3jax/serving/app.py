"""The routes of the HTTP server.

In `generation.py` a body is read by `protocol.py`, answered by the engine, and the answer is
written by `answers.py`. A client without the server key gets answers of the unlearned model and
nothing else: no head off, no other T or s, no number of the base model. See `docs/serving.md`.
"""

import asyncio
import contextlib
import dataclasses
import importlib.resources
import time
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from t3jax.serving.access import Access, Keys
from t3jax.serving.engine import Engine
from t3jax.serving.errors import BadRequest, error_response
from t3jax.serving.fields import Fields, read_object
from t3jax.serving.forget_routes import ForgetRoutes
from t3jax.serving.generation import GenerationRoutes, Routes
from t3jax.serving.messages import ServerOptions
from t3jax.serving.metrics import Metrics
from t3jax.serving.protocol import Reader
from t3jax.serving.requests import RequestBook


def make_app(
    engine: Engine,
    reader: Reader,
    options: ServerOptions,
    keys: Keys,
    book: RequestBook | None = None,
) -> Starlette:
    """Makes an ASGI application for a started engine.

    The first name of the reader is the model's. Without a book the server takes no requests to
    forget.
    """
    access, metrics = Access(keys), Metrics(engine)
    parts = engine, reader, options, access, metrics
    about, answers = _About(*parts), GenerationRoutes(*parts)
    forget = ForgetRoutes(book, options, access)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        if book is not None:
            await asyncio.to_thread(book.close)
        await asyncio.to_thread(engine.stop)

    routes = [
        Route("/", about.page),
        Route("/health", about.health),
        Route("/health_generate", answers.health_generate),
        Route("/metrics", about.metrics_text),
        Route("/tokenizer_info", about.tokenizer_info),
        Route("/v1/models", about.models),
        Route("/v1/completions", answers.completions, methods=["POST"]),
        Route("/v1/chat/completions", answers.chat_completions, methods=["POST"]),
        Route("/tokenize", about.tokenize, methods=["POST"]),
        Route("/detokenize", about.detokenize, methods=["POST"]),
        Route("/v1/forget_requests", forget.list_requests),
        Route("/v1/forget_requests", forget.add_request, methods=["POST"]),
        Route("/v1/forget_requests/{id}", forget.show_request),
        Route("/v1/forget_requests/{id}", forget.change_request, methods=["PATCH"]),
        Route("/v1/forget_requests/{id}", forget.revoke_request, methods=["DELETE"]),
        Route("/v1/audit_log", forget.audit_log),
    ]
    return Starlette(
        routes=routes,
        lifespan=lifespan,
        exception_handlers={
            BadRequest: about.refuse,
            HTTPException: about.refuse_route,
            Exception: about.fail,
        },
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _About(Routes):
    """Routes that need no answer of the model, and the responses to errors."""

    started: int = dataclasses.field(default_factory=lambda: int(time.time()))

    # ---- errors

    async def refuse(self, _: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, BadRequest)
        self.metrics.refused.labels(str(error.status)).inc()
        return error_response(error.status, str(error), error.param, error.code)

    async def refuse_route(self, request: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        self.metrics.refused.labels(str(error.status_code)).inc()
        allowed = (error.headers or {}).get("Allow")
        path, method = request.url.path, request.method
        message = f"{path} takes {allowed}, not {method}" if allowed else f"there is no {path}"
        return error_response(error.status_code, message, None, "route")

    async def fail(self, _: HttpRequest, error: Exception) -> Response:
        return error_response(500, f"{type(error).__name__}: {error}", None, "internal_error")

    # ---- small routes

    async def page(self, _: HttpRequest) -> Response:
        page = importlib.resources.files("t3jax.serving") / "page.html"
        return HTMLResponse(
            page.read_text(encoding="utf-8"),
            headers={
                "content-security-policy": "default-src 'self'; style-src 'unsafe-inline'; "
                "script-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'"
            },
        )

    async def health(self, _: HttpRequest) -> Response:
        if self.engine.is_alive:
            return JSONResponse({"status": "ok"})
        return error_response(503, "the engine has stopped", None, "unavailable")

    async def metrics_text(self, request: HttpRequest) -> Response:
        self.access.has_server_key(request)
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self, request: HttpRequest) -> Response:
        self.access.has_server_key(request)
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
        self.access.has_server_key(request)
        tokenizer = self.reader.lm.tokenizer
        names = ("bos_token", "eos_token", "pad_token")
        return JSONResponse(
            {
                "tokenizer_class": type(tokenizer).__name__,
                "chat_template": tokenizer.chat_template,
                **{name: tokenizer.special_tokens_map.get(name) for name in names},
                "vocab_size": self.reader.lm.vocab_size,
                "max_model_len": self.engine.max_length,
            }
        )

    async def tokenize(self, request: HttpRequest) -> Response:
        self.access.has_server_key(request)
        body = read_object(await self.access.read_body(request, self.options.max_body))
        fields = Fields(body, ("model", "prompt", "messages", "add_special_tokens"))
        self.reader.check_model(fields)
        prompt, messages = fields.take("prompt", str), fields.take("messages", list)
        special = fields.take("add_special_tokens", bool, True)
        if (prompt is None) == (messages is None):
            raise BadRequest("give one of prompt, a text, and messages, a list", "prompt")
        if prompt is None:
            ids = await asyncio.to_thread(self.reader.encode_messages, messages)
        else:
            ids = self.reader.encode(prompt, special=special)
        return JSONResponse(
            {"tokens": ids.tolist(), "count": len(ids), "max_model_len": self.engine.max_length}
        )

    async def detokenize(self, request: HttpRequest) -> Response:
        self.access.has_server_key(request)
        body = read_object(await self.access.read_body(request, self.options.max_body))
        fields, vocabulary = Fields(body, ("model", "tokens")), self.reader.lm.vocab_size
        self.reader.check_model(fields)
        tokens = fields.take("tokens", list)
        if tokens is None or not all(type(id) is int and 0 <= id < vocabulary for id in tokens):
            raise BadRequest(f"tokens must be a list of ids in [0, {vocabulary})", "tokens")
        return JSONResponse({"prompt": self.reader.lm.tokenizer.decode(tokens)})
