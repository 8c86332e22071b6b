"""Asks for the key on every path of a server; vLLM itself leaves some open.

vLLM 0.32 checks its key below /v1, /v2, /inference and /cohere only. The endpoints that swap
weights, run code in workers or tokenise have other paths.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

_OPEN = ("/health", "/ping")

# as ASGI defines it
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[object]]
Send = Callable[[object], Awaitable[None]]


class KeyOnEveryPath:
    """ASGI middleware for `--middleware`; the key is that of VLLM_API_KEY."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app = app
        self._expected = f"Bearer {os.environ['VLLM_API_KEY']}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on what carries the key; refuses the rest with status 401."""
        if scope["type"] == "lifespan" or scope.get("path") in _OPEN:
            return await self._app(scope, receive, send)
        given = dict(scope.get("headers", ())).get(b"authorization", b"")
        if hmac.compare_digest(given, self._expected):
            return await self._app(scope, receive, send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": b'{"error":"Unauthorized"}'})
