"""One exchange with an HTTP server that may be slow, broken or hostile: limits on time, bytes and redirects.

The time is that of the whole exchange, since a server that sends a byte now and then, or intermediate answers
(103) without end, never lets a single read time out. Bytes are counted after decompression. No redirect is
followed.
"""

from __future__ import annotations

import queue
import threading
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from robusthash.models.external.wrapper import Broken

_ENCODINGS = ("", "identity", "gzip", "deflate")
_HEADERS = 1 << 16  # bytes of the headers of an answer; httpx itself reads 100 KiB of them at most
_GZIP_OR_ZLIB = 47  # wbits of zlib: either, by the header


class Unanswered(Exception):
    """No whole answer came, by something that may pass: a timeout, a dropped connection, half a body.

    ``connected`` is false where not even a connection was made.
    """

    def __init__(self, reason: str, connected: bool = True) -> None:
        super().__init__(reason)
        self.connected = connected


@dataclass(frozen=True)
class Reply:
    """A status, its headers (names in lower case), and a body of bounded length."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Exchanger:
    """Posts to one address.

    Args:
        headers: sent with each request.
        seconds: that an exchange may take from its first to its last byte.
        largest: bytes of a body, decompressed.
    """

    def __init__(self, url: str, headers: Mapping[str, str], seconds: float, largest: int) -> None:
        self.url, self.headers, self.seconds, self.largest = url, dict(headers), seconds, largest
        self._client = self._new_client()

    def _new_client(self) -> Any:
        import httpx

        headers = {"accept-encoding": "gzip", **self.headers}
        return httpx.Client(timeout=self.seconds, headers=headers, follow_redirects=False)

    def post(self, content: bytes, kind: str, seconds: float | None = None) -> Reply:
        """Post ``content`` of the media type ``kind``, within ``seconds`` where that is less than usual.

        Raises:
            Unanswered: see there.
            Broken: the address is none, or headers or body are too long, or in an encoding that was not
                asked for.
        """
        seconds = self.seconds if seconds is None else min(seconds, self.seconds)
        outcomes: queue.SimpleQueue[Reply | Exception] = queue.SimpleQueue()
        client = self._client

        def work() -> None:
            try:
                outcomes.put(self._exchange(client, content, kind))
            except Exception as error:  # handed over to the caller's thread, which raises it
                outcomes.put(error)

        threading.Thread(target=work, daemon=True).start()
        try:
            outcome = outcomes.get(timeout=seconds)
        except queue.Empty:
            client.close()  # the next read of the thread fails, which ends it
            self._client = self._new_client()
            raise Unanswered(f"did not answer within {seconds:.3g} s") from None
        if isinstance(outcome, Exception):
            raise self._classified(outcome) from outcome
        return outcome

    def _exchange(self, client: Any, content: bytes, kind: str) -> Reply:
        with client.stream("POST", self.url, content=content, headers={"content-type": kind}) as reply:
            if sum(len(name) + len(value) for name, value in reply.headers.raw) > _HEADERS:
                raise self._too_long()
            encoding = reply.headers.get("content-encoding", "").strip().lower()
            if encoding not in _ENCODINGS:
                raise Broken(
                    f"{self.url} answered in the encoding {encoding[:40]!r}, which was not asked for; "
                    "let it answer plain JSON, or gzip"
                )
            body, whole = _bounded(reply.iter_raw(), encoding, self.largest)
            if not whole and reply.status_code == 200:
                remedy = "return the nearest few ids only"
                raise Broken(f"{self.url} answered more than {self.largest} bytes; {remedy}")
            return Reply(reply.status_code, reply.headers, body)

    def _too_long(self) -> Broken:
        return Broken(f"{self.url} answered headers of more than {_HEADERS} bytes; send fewer")

    def _classified(self, error: Exception) -> Exception:
        import httpx

        reason = str(error) or type(error).__name__
        if isinstance(error, httpx.TimeoutException):
            return Unanswered(f"did not answer within {self.seconds:g} s")
        if isinstance(error, httpx.ConnectError | httpx.ProxyError):
            return Unanswered(f"cannot be asked: {reason}", connected=False)
        if isinstance(error, httpx.RemoteProtocolError) and "buffer too long" in reason:  # h11's own limit
            return self._too_long()
        if isinstance(error, httpx.NetworkError | httpx.RemoteProtocolError):
            return Unanswered(f"broke off its answer ({reason})")
        if isinstance(error, zlib.error):
            return Broken(f"{self.url} answered a body that is not the gzip it says to be ({reason})")
        if isinstance(error, httpx.HTTPError | httpx.InvalidURL):
            return Broken(f"{self.url} cannot be asked: {reason}")
        return error


def _bounded(chunks: Iterable[bytes], encoding: str, largest: int) -> tuple[bytes, bool]:
    """The body, decompressed, and whether it ended within ``largest`` bytes.

    Raises:
        Unanswered: a compressed body that breaks off.
    """
    inflate = zlib.decompressobj(_GZIP_OR_ZLIB) if encoding in ("gzip", "deflate") else None
    body = bytearray()
    for chunk in chunks:
        left = largest + 1 - len(body)
        body += chunk[:left] if inflate is None else inflate.decompress(chunk, left)
        if len(body) > largest:
            return bytes(body[:largest]), False
    if inflate is not None and not inflate.eof:
        raise Unanswered("broke off its answer (half a compressed body)")
    return bytes(body), True
