"""Keys of clients, and the size limit of bodies."""

import dataclasses
import secrets

from starlette.requests import Request as HttpRequest

from t3jax.serving.errors import BadRequest


@dataclasses.dataclass(frozen=True)
class Keys:
    """Secrets of a server.

    Every client sends the key `api`, or none if it is None. The key `server` allows to set what is
    unlearned; None: nobody may.
    """

    api: str | None = None
    server: str | None = None


class Access:
    """Checks keys and reads bodies."""

    def __init__(self, keys: Keys):
        self.keys = keys

    def has_server_key(self, request: HttpRequest) -> bool:
        """Whether the client may set what is unlearned; raises if it has no valid API key."""
        header = request.headers.get("authorization", "")
        token = header[7:] if header[:7].lower() == "bearer " else ""
        is_server = self.keys.server is not None and _equal(token, self.keys.server)
        if self.keys.api is not None and not is_server and not _equal(token, self.keys.api):
            raise BadRequest("the API key is missing or wrong", None, 401)
        return is_server

    def need_server_key(self, request: HttpRequest) -> None:
        """Raises a `BadRequest` unless the client may set what is unlearned."""
        if not self.has_server_key(request):
            raise BadRequest(
                "requests to forget need the server key"
                + ("" if self.keys.server else ", and this server was started without one"),
                None,
                403,
            )

    async def read_body(self, request: HttpRequest, most: int) -> bytes:
        """Reads the body; raises a `BadRequest` if it has more than `most` bytes."""
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


def _equal(given: str, secret: str) -> bool:
    return secrets.compare_digest(given.encode(), secret.encode())
