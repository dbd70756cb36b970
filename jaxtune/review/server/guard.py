"""What stands before every route: sizes, rates and headers. Pure ASGI, so that a body is counted while it comes."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from time import monotonic
from typing import Any

MAX_BODY_BYTES = 1_000_000  # an edited answer of tasks.MAX_TEXT characters, four bytes each, and more
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-frame-options": "DENY",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


class Limiter:
    """Token buckets by key: `burst` at once, then `per_second`. Keys that are full again are forgotten first."""

    def __init__(self, per_second: float, burst: float, most_keys: int = 20_000) -> None:
        self.per_second, self.burst, self._most_keys = per_second, burst, most_keys
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    def _now(self, key: str) -> float:
        left, at = self._left.get(key, (self.burst, 0.0))
        return min(self.burst, left + (monotonic() - at) * self.per_second)

    def take(self, key: str) -> float:
        """Takes one; returns 0.0, or the seconds after which there will be one."""
        with self._lock:
            left = self._now(key)
            if left < 1.0:
                return (1.0 - left) / self.per_second
            self._put(key, left - 1.0)
            return 0.0

    def give_back(self, key: str) -> None:
        with self._lock:
            self._put(key, min(self.burst, self._now(key) + 1.0))

    def _put(self, key: str, left: float) -> None:
        self._left[key] = (left, monotonic())
        self._left.move_to_end(key)
        while len(self._left) > self._most_keys:
            self._left.popitem(last=False)


class Guard:
    """Refuses what is too large, too often, or another site's; adds the headers that a browser obeys."""

    def __init__(self, app: Any, limiter: Limiter, secure: bool) -> None:
        self.app, self.limiter = app, limiter
        own = HEADERS | ({"strict-transport-security": "max-age=31536000"} if secure else {})
        self.headers = [(key.encode(), value.encode()) for key, value in own.items()]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        cache = b"no-cache" if scope["path"].startswith("/static/") else b"no-store"

        async def sent(message: Any) -> None:
            if message["type"] == "http.response.start":
                given = list(message.get("headers", ()))
                names = {key.lower() for key, _ in given}  # a page may bring a policy of its own: the report does
                own = [one for one in (*self.headers, (b"cache-control", cache)) if one[0] not in names]
                message = {**message, "headers": [*given, *own]}
            await send(message)

        refused = self._refused(scope)
        if refused is not None:
            return await _answer(scope, sent, *refused)
        if scope["method"] in ("GET", "HEAD"):
            return await self.app(scope, receive, sent)
        body = await _read(receive)
        if body is None:
            return await _answer(scope, sent, 413, "This is too large to be taken.")
        await self.app(scope, _given(body, receive), sent)

    def _refused(self, scope: Any) -> tuple[int, str] | None:
        headers = dict(scope["headers"])
        wait = self.limiter.take((scope.get("client") or ("",))[0])
        if wait:
            return 429, f"Too many requests came at once. Try again in {max(1, round(wait))} s."
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > MAX_BODY_BYTES:
            return 413, "This is too large to be taken."
        if scope["method"] not in ("GET", "HEAD") and headers.get(b"sec-fetch-site", b"same-origin") not in (
            b"same-origin",
            b"none",
        ):
            return 403, "This request came from another site and was not carried out."
        return None


async def _read(receive: Any) -> bytes | None:
    """The whole body; None where it is longer than may be."""
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            break
        body, more = body + message.get("body", b""), message.get("more_body", False)
        if len(body) > MAX_BODY_BYTES:
            return None
    return body


def _given(body: bytes, receive: Any) -> Any:
    told = False

    async def receive_again() -> Any:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again


async def _answer(scope: Any, send: Any, status: int, text: str) -> None:
    if scope["path"].startswith("/api/"):
        body, kind = json.dumps({"error": text, "reason": ""}).encode(), b"application/json"
    else:
        body, kind = text.encode(), b"text/plain; charset=utf-8"
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
