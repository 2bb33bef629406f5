"""Routes of requests to forget: they need the server key."""

import asyncio
import time

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from t3jax.serving.access import Access
from t3jax.serving.entry import PENDING
from t3jax.serving.errors import BadRequest
from t3jax.serving.fields import read_object
from t3jax.serving.messages import QueueFull, ServerOptions
from t3jax.serving.requests import RequestBook

_LONGEST_WAIT = 3600  # seconds, for a head that is made


class ForgetRoutes:
    """Lists, adds, switches and revokes requests."""

    def __init__(self, book: RequestBook | None, options: ServerOptions, access: Access):
        """Without a book the server takes no requests to forget."""
        self.book = book
        self.options = options
        self.access = access

    async def list_requests(self, request: HttpRequest) -> Response:
        """All requests, the oldest first."""
        book = self._need_book(request)
        return JSONResponse({"object": "list", "data": book.entries()})

    async def show_request(self, request: HttpRequest) -> Response:
        """One request; `wait` is the time to wait for its head, seconds."""
        book = self._need_book(request)
        entry = self._find(book, request)
        wait = request.query_params.get("wait", "0")
        if not wait.isdecimal() or int(wait) > _LONGEST_WAIT:
            raise BadRequest(f"wait must be in [0, {_LONGEST_WAIT}] seconds, got {wait!r}", "wait")
        deadline = time.monotonic() + int(wait)
        while entry["state"] in PENDING and time.monotonic() < deadline:
            await asyncio.sleep(0.2)
            entry = self._find(book, request)
        return JSONResponse(entry)

    async def add_request(self, request: HttpRequest) -> Response:
        """Takes rows to forget."""
        book = self._need_book(request)
        content = await self.access.read_body(request, self.options.max_rows_body)
        query = dict(request.query_params)
        try:
            if _is_object(content):
                fields = {**query, **read_object(content)}
            else:  # JSON lines, with the other fields in the query
                fields = {**query, "rows": content}
            added = await asyncio.to_thread(book.add, fields, _who(request))
        except QueueFull:
            raise BadRequest("too many requests to forget wait", None, 429) from None
        except ValueError as error:
            raise BadRequest(str(error), getattr(error, "param", None)) from None
        return JSONResponse(added, status_code=202)

    async def change_request(self, request: HttpRequest) -> Response:
        """Turns a request's head on or off."""
        book = self._need_book(request)
        self._find(book, request)
        body = read_object(await self.access.read_body(request, self.options.max_body))
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
        """Revokes a request."""
        book = self._need_book(request)
        self._find(book, request)
        revoked = await asyncio.to_thread(book.revoke, request.path_params["id"], _who(request))
        return JSONResponse(revoked)

    async def audit_log(self, request: HttpRequest) -> Response:
        """The audit log."""
        book = self._need_book(request)
        return JSONResponse({"object": "list", "data": await asyncio.to_thread(book.audit)})

    def _find(self, book: RequestBook, request: HttpRequest) -> dict[str, object]:
        entry = book.show(request.path_params["id"])
        if entry is None:
            raise BadRequest(f"no request {request.path_params['id']!r}", "id", 404)
        return entry

    def _need_book(self, request: HttpRequest) -> RequestBook:
        self.access.need_server_key(request)
        if self.book is None:
            raise BadRequest("this server was started without a folder for requests", None, 404)
        return self.book


def _is_object(content: bytes) -> bool:
    """Whether a body is one JSON object with rows, and not JSON lines of rows."""
    try:
        return "rows" in read_object(content)
    except BadRequest:
        return False


def _who(request: HttpRequest) -> str:
    return f"server key, from {request.client.host if request.client else 'unknown'}"
