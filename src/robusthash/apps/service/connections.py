"""Connections of the service: bounded in number, and in the time that each may take to ask."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

_FULL = b'{"error": "too many connections"}'
_ANSWER = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
    b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(_FULL), _FULL)
)
_LATE = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class BoundedProtocol(H11Protocol):
    """A connection of a server that has at most ``most`` of them.

    It waits while it has no request under way: at its start, between requests, and while it sends the head
    of one. One that waits longer than ``timeout`` seconds is ended, however it drips its bytes, and so is one
    that does not take its answer for that long. Where there is one connection too many, the one that waits
    longest is ended in favour of the new one; where none waits, the new one is answered 503.
    """

    most: int
    timeout: float
    waiting: dict[H11Protocol, asyncio.TimerHandle]  # of all connections of the server, oldest first
    unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._follow()
        if len(self.connections) <= self.most:
            return
        oldest: Any = next(iter(self.waiting))
        if oldest is self:
            transport.write(_ANSWER)
            transport.close()
        else:
            oldest.end()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        self._follow()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._follow()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        self.resume_writing()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.unread = self.unread or self.loop.call_later(self.timeout, self.end)

    def resume_writing(self) -> None:
        if self.unread is not None:
            self.unread.cancel()
            self.unread = None
        super().resume_writing()

    def end(self) -> None:
        """End the connection at once."""
        self._forget()
        self.connections.discard(self)
        self.transport.abort()

    def _follow(self) -> None:
        """Start the time to wait, or end it where a request is under way; more bytes do not renew it."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._forget()
        elif self not in self.waiting and not self.transport.is_closing():
            self.waiting[self] = self.loop.call_later(self.timeout, self._late)

    def _forget(self) -> None:
        if (timer := self.waiting.pop(self, None)) is not None:
            timer.cancel()

    def _late(self) -> None:
        """Answer 408 where nothing was answered yet, and end the connection."""
        self._forget()
        if self.conn.our_state is h11.IDLE and self.cycle is None and not self.transport.is_closing():
            self.transport.write(_LATE)
            self.transport.close()
        else:
            self.end()


def bounded_protocol(most: int, timeout: float) -> type[H11Protocol]:
    """The ``BoundedProtocol`` of one server."""
    return type("ServerProtocol", (BoundedProtocol,), {"most": most, "timeout": timeout, "waiting": {}})
