"""What every request passes: it gets an id, shows the key, and hears of errors in one form."""

import hmac
import uuid

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from alaya_jax.errors import (
    AlayaError,
    CacheFullError,
    ContextError,
    DatabaseError,
    EngineClosedError,
    RequestError,
    TokenizerError,
)
from alaya_jax.serve.fields import Refusal

_OPEN = ("/", "/health")
"""Paths that need no key: they show nothing of anybody."""


class Door:
    """Gives each request an id, and asks for the key."""

    def __init__(self, app: ASGIApp, api_key: str | None, hosts: frozenset[str] | None):
        self._app, self._key, self._hosts = app, api_key, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request in, or not."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        given = request.headers.get("x-request-id", "")
        id = given if _is_id(given) else uuid.uuid4().hex
        request.state.id = id

        async def stamped(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", id.encode())]
            await send(message)

        if self._hosts is not None and request.url.hostname not in self._hosts:
            refusal = Refusal(
                f"this server is {', '.join(sorted(self._hosts))}, not {request.url.hostname}: a "
                "page of another site may have been led here. If it was you, start it with "
                "--host or --api-key",
                status=403,
                code="wrong_host",
            )
            await answer(refusal)(scope, receive, stamped)
            return
        if self._key is not None and scope["path"] not in _OPEN:
            said = request.headers.get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(said, f"Bearer {self._key}".encode()):
                refusal = Refusal(
                    "this server asks for its key: Authorization: Bearer KEY",
                    status=401,
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await answer(refusal)(scope, receive, stamped)
                return
        await self._app(scope, receive, stamped)


def _is_id(text: str) -> bool:
    return 0 < len(text) <= 128 and text.isascii() and text.isprintable() and " " not in text


_STATUS: dict[type[Exception], int] = {
    CacheFullError: 400,
    RequestError: 400,
    TokenizerError: 400,
    ContextError: 409,
    DatabaseError: 503,
    EngineClosedError: 503,
}
_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_OF_HTTP = {404: "there is no such path here", 405: "this path takes another method"}


def answer(error: Exception) -> JSONResponse:
    """An error as OpenAI's API says it."""
    match error:
        case Refusal():
            status, headers = error.status, error.headers
        case HTTPException():
            status, headers = error.status_code, dict(error.headers or {})
        case _:
            status = next((s for kind, s in _STATUS.items() if isinstance(error, kind)), 500)
            headers = {}
    message = str(error)
    if isinstance(error, HTTPException):
        message = _OF_HTTP.get(status, error.detail)
    elif not isinstance(error, AlayaError):
        message = f"the server failed: {type(error).__name__}: {error}"
    kind = "server_error" if status >= 500 else _KINDS.get(status, "invalid_request_error")
    code = "context_length_exceeded" if isinstance(error, CacheFullError) else None
    said = {
        "message": message,
        "type": kind,
        "param": getattr(error, "param", None),
        "code": getattr(error, "code", code),
    }
    return JSONResponse({"error": said}, status, headers)


async def refused(_: Request, error: Exception) -> Response:
    """`answer`, as a handler of exceptions."""
    return answer(error)
