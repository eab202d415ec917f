"""LimitBody: a request's body is read whole, up to a size and a time, before anything else sees it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from starlette.responses import JSONResponse

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["LimitBody"]


class LimitBody:
    """ASGI middleware: 413 for a body of more than `max_body` bytes, 408 for one slower than `timeout` seconds."""

    def __init__(self, app: ASGIApp, max_body: int, timeout: float) -> None:
        self._app = app
        self._max_body = max_body
        self._timeout = timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the body and pass it on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            body = await asyncio.wait_for(self._read(scope, receive), self._timeout)
        except TimeoutError:
            refusal = JSONResponse({"detail": f"the request did not arrive within {self._timeout:g} s."}, 408)
            await refusal(scope, receive, send)
            return
        if body is None:
            detail = f"a request must have at most {self._max_body} bytes. Send less, or several requests."
            await JSONResponse({"detail": detail}, 413)(scope, receive, send)
            return
        first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return first.pop() if first else await receive()

        await self._app(scope, replay, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """Return the body, or None if it is too large."""
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if int(announced) > self._max_body:  # the server has checked that it is a number
            return None
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._max_body:
                return None
            more = message.get("more_body", False)  # false also when the client has gone
        return b"".join(parts)
