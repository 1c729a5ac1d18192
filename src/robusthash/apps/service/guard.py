"""The guard before the service's routes: request ids, tokens, rates, sizes, times, metrics and logs."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from robusthash.apps.service.batching import Batcher, Overloaded
from robusthash.apps.service.settings import ServiceSettings, is_loopback
from robusthash.apps.service.tokens import Token, token_of

logger = logging.getLogger("robusthash.service")

_HOST = re.compile(r"(?:\[(?P<six>[^\[\]]*)\]|(?P<name>[^:\[\]]*))(?::[0-9]*)?")
_CLIENTS = 10_000  # whose rates are remembered
_ROUTES = "v1 search items info healthz readyz metrics reload samples story image {id}"
_KNOWN = {"", *_ROUTES.split()}  # parts of paths
_ENCODING = ("/v1/search", "/v1/items")  # by the batcher; a story attacks one at a time


class Refused(Exception):
    """A request that is answered at once with this status and message."""

    def __init__(self, status: int, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.retry_after = status, message, retry_after

    def response(self) -> JSONResponse:
        """The answer to the client."""
        headers = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, round(self.retry_after)))
        return JSONResponse({"error": self.message}, self.status, headers)


class Rates:
    """Token buckets of clients, the least recently seen forgotten first."""

    def __init__(self, rate: float, burst: int) -> None:
        self._rate, self._burst = rate, burst
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # left, at a time

    def take(self, client: str, now: float) -> float:
        """Take one request; the seconds until there is one again, or 0 where it was taken."""
        if not self._rate:
            return 0.0
        left, then = self._buckets.pop(client, (float(self._burst), now))
        left = min(self._burst, left + (now - then) * self._rate)
        allowed = left >= 1
        self._buckets[client] = (left - allowed, now)
        if len(self._buckets) > _CLIENTS:
            self._buckets.popitem(last=False)
        return 0.0 if allowed else (1 - left) / self._rate


class Metrics:
    """Counters and times of the service, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ("route", "status")
        self.requests = Counter("robusthash_requests", "Requests", labels, registry=self.registry)
        self.seconds = Histogram(
            "robusthash_request_seconds", "Time to answer", ("route",), registry=self.registry
        )
        self.active = Gauge("robusthash_active_requests", "Requests in work", registry=self.registry)
        self.refused = Counter("robusthash_refused", "Refused requests", ("reason",), registry=self.registry)
        self.slowed = Counter("robusthash_slowed", "Answers slowed by detection", registry=self.registry)
        self.items = Gauge("robusthash_items", "Items in the index", registry=self.registry)


class Guard:
    """ASGI middleware: what must hold before a request meets a route.

    Where the hasher's batcher has no room, requests are refused by their head, and once more when their body
    is there: a client that sends its body slowly takes no room from others.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: ServiceSettings,
        tokens: Sequence[Token],
        metrics: Metrics,
        hasher: Callable[[], Batcher[Any, Any]],
    ) -> None:
        self._app, self._settings, self._tokens, self._metrics = app, settings, tokens, metrics
        self._hasher = hasher
        self._rates = Rates(settings.rate, settings.burst)
        self._held = 0  # bytes of bodies in memory

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id, started, route = secrets.token_hex(8), time.perf_counter(), _route(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        status, size = 500, 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = request_id
                headers["X-Content-Type-Options"] = "nosniff"
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        self._metrics.active.inc()
        try:
            self._admit(scope, Headers(scope=scope))
            body = await self._body(receive, Headers(scope=scope))
            size = len(body)
            try:
                self._check_room(scope)
                with self._hasher().admitted() if _encodes(scope) else nullcontext():
                    await self._app(scope, _replayed(body, receive), answer)
            finally:
                self._held -= size
        except Refused as refused:
            self._metrics.refused.labels(str(refused.status)).inc()
            await refused.response()(scope, receive, answer)
        except Exception:
            logger.exception(json.dumps({"request": request_id, "route": route}))
            if status == 500:
                await Refused(500, f"internal error; the log has request {request_id}").response()(
                    scope, receive, answer
                )
        finally:
            seconds = time.perf_counter() - started
            self._metrics.active.dec()
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.seconds.labels(route).observe(seconds)
            client = scope["state"].get("client", "")
            facts = {"request": request_id, "client": client, "method": scope["method"], "route": route}
            logger.info(json.dumps({**facts, "status": status, "bytes": size, "ms": round(seconds * 1e3, 1)}))

    def _admit(self, scope: Scope, headers: Headers) -> None:
        """The token with its scope, the rate, and where there are no tokens the host."""
        client = scope["state"]["client"] = (scope.get("client") or ("",))[0]
        if not self._tokens:
            self._same_machine(headers)
        elif scope["path"].startswith("/v1/") or scope["path"] == "/metrics":
            token = self._token(scope, headers)
            client, scope["state"]["audits"] = token.name, "audit" in token.scopes
        scope["state"]["client"] = client
        if scope["path"].startswith("/v1/") and (wait := self._rates.take(client, time.monotonic())):
            raise Refused(429, "too many requests", wait)
        self._check_room(scope)

    def _check_room(self, scope: Scope) -> None:
        if _encodes(scope):
            try:
                self._hasher().admit()
            except Overloaded as full:
                raise Refused(503, str(full), full.retry_after) from None

    def _token(self, scope: Scope, headers: Headers) -> Token:
        kind, _, text = headers.get("authorization", "").partition(" ")
        token = token_of(text.strip(), self._tokens) if kind.lower() == "bearer" else None
        if token is None and kind.lower() == "bearer" and text.strip():
            raise Refused(401, "unknown token; it may have been removed")
        if token is None:
            raise Refused(401, "a token is needed: Authorization: Bearer TOKEN")
        scope["state"]["client"] = token.name
        reading = scope["method"] in ("GET", "HEAD") or scope["path"] in ("/v1/search", "/v1/story")
        needed = "read" if reading else "write"
        if needed not in token.scopes:
            raise Refused(403, f"the token has no scope {needed!r}")
        return token

    def _same_machine(self, headers: Headers) -> None:
        """Refuse what a page of another site makes a browser send to this machine."""
        host, origin = headers.get("host", "").lower(), headers.get("origin", "").lower()
        match = _HOST.fullmatch(host)
        name = "" if match is None else match["six"] or match["name"] or ""
        if not (is_loopback(name) or name == "testserver") and self._settings.is_loopback:
            raise Refused(421, "this service answers under localhost alone")
        if origin and origin.partition("://")[2] != host:
            raise Refused(403, "requests from pages of other sites are refused")

    async def _body(self, receive: Receive, headers: Headers) -> bytes:
        """The whole body, within the limits of size, memory and time; its bytes count as held."""
        limit, declared = self._settings.max_bytes, headers.get("content-length", "0")
        if not declared.isdecimal() or int(declared) > limit:
            raise Refused(413, f"a request may have {limit} bytes")
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._settings.timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refused(400, "the client went away")
                    part = message.get("body", b"")
                    size += len(part)
                    self._held += len(part)
                    parts.append(part)
                    if size > limit:
                        raise Refused(413, f"a request may have {limit} bytes")
                    if self._held > self._settings.buffer:
                        raise Refused(503, "the service is at its limit", 1)
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            self._held -= size
            raise Refused(
                408, f"the request took longer than {self._settings.timeout:g} s to arrive"
            ) from None
        except BaseException:
            self._held -= size
            raise


def _encodes(scope: Scope) -> bool:
    return scope["method"] == "POST" and scope["path"] in _ENCODING


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A receive that gives the body once, then what the server has."""
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _route(scope: Scope) -> str:
    """The path with ids cut out, of known ones; metrics must not grow with what clients ask for."""
    parts = scope["path"].split("/")[1:]
    names = ["{id}" if part.isdecimal() else part for part in parts[:5]]
    return "/" + "/".join(names) if set(names) <= _KNOWN else "other"
