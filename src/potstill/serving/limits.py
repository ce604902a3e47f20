"""Limits of a server, around any application: who may ask, how much, and for how long."""

import asyncio
import hmac
import json
from typing import Any

# An ASGI application takes what it was asked, and functions to read the question and to answer.
App = Any
Receive = Any
Send = Any


class Limits:
    """An application behind limits. A token, where there is one, must come as `Authorization:
    Bearer TOKEN`; a body has at most `max_bytes`; each part of a body that is read, and each part
    of an answer that is taken, has at most `seconds`."""

    def __init__(self, app: App, *, token: str | None, max_bytes: int, seconds: float):
        self.app, self.token = app, token
        self.max_bytes, self.seconds = max_bytes, seconds

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request, or refuse it with 401, 408 or 413."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if not self._is_allowed(scope):
            await _refuse(send, 401, "a token is wanted: Authorization: Bearer TOKEN")
            return
        try:
            body = await self._read(receive)
        except TimeoutError:
            await _refuse(send, 408, f"no more of the request came for {self.seconds:g} seconds")
            return
        if body is None:
            await _refuse(send, 413, f"the request is longer than {self.max_bytes} bytes")
            return
        waiting = [{"type": "http.request", "body": body, "more_body": False}]

        async def whole() -> dict[str, Any]:
            return waiting.pop() if waiting else await receive()

        async def in_time(message: dict[str, Any]) -> None:
            await asyncio.wait_for(send(message), self.seconds)

        await self.app(scope, whole, in_time)

    def _is_allowed(self, scope: dict[str, Any]) -> bool:
        if self.token is None or scope["path"] == "/health":
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, f"Bearer {self.token}".encode())

    async def _read(self, receive: Receive) -> bytes | None:
        """The whole body; None where it is too long. What is too long is not kept."""
        parts, length, more = [], 0, True
        while more:
            message = await asyncio.wait_for(receive(), self.seconds)
            parts.append(message.get("body", b""))
            length += len(parts[-1])
            if length > self.max_bytes:
                return None
            more = message.get("more_body", False)
        return b"".join(parts)


async def _refuse(send: Send, status: int, says: str) -> None:
    body = json.dumps({"error": {"message": says}}).encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
