"""Errors of the API: requests that are refused, and their responses."""

import json

from starlette.responses import JSONResponse, Response

_RETRY_SECONDS = "1"


class BadRequest(ValueError):
    """A body that is refused: the field, the HTTP status and OpenAI's error code."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str = ""):
        super().__init__(message)
        self.param = param
        self.status = status
        self.code = code or {401: "invalid_api_key", 403: "forbidden", 404: "not_found"}.get(
            status, "invalid_value"
        )


def error_body(message: str, param: str | None, code: str) -> dict[str, object]:
    """An error in the OpenAI API's format."""
    kind = "server_error" if code in ("internal_error", "unavailable") else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(status: int, message: str, param: str | None, code: str) -> Response:
    """The response to a request that is not answered, with Retry-After where a retry may help."""
    headers = {"retry-after": _RETRY_SECONDS} if status in (429, 503) else None
    return JSONResponse(error_body(message, param, code), status_code=status, headers=headers)


def describe(value: object) -> str:
    """The kind of a body's value and its beginning."""
    if value is None:
        return "null"
    shown = json.dumps(value, ensure_ascii=False)
    return f"{KINDS[type(value)]}: {shown if len(shown) <= 60 else shown[:57] + '...'}"


KINDS = {
    bool: "true or false",
    dict: "an object",
    float: "a number",
    int: "a whole number",
    list: "a list",
    str: "a text",
}
