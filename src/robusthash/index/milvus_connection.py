"""A connection to Milvus whose errors are one line with a remedy."""

from __future__ import annotations

import logging
import os
import re
import time
from typing import Any

from robusthash.index.index_address import ServerAddress, ServerRefused

try:
    import grpc
    from pymilvus import MilvusClient
    from pymilvus.exceptions import MilvusException
except ImportError as error:
    raise ImportError(
        f"an index in Milvus needs its client ({error}): pip install 'robusthash[milvus]'"
    ) from error

_CONNECT, _ANSWER = 10.0, 30.0  # seconds, at most; ``timeout`` in the address is instead of the second
_REFUSED = (
    "auth check failure",
    "missing authorization",
    "unauthenticated",
    "permission deny",
    "incorrect password",
)
_STARTING = ("not loaded", "not fully loaded", "no available", "recovering", "not ready")  # after a restart
_OTHER = (
    "schema",
    "field",
    "dimension",
    "duplicate collection",
    "collection not found",
    "can't find collection",
)
# it logs each error with a traceback and the arguments; they are raised as well
logging.getLogger("pymilvus").setLevel(logging.CRITICAL)


class MilvusConnection:
    """Calls of a ``MilvusClient``, which is made by the first call, and again in the child of a fork."""

    def __init__(self, address: ServerAddress) -> None:
        self.address = address
        self._timeout = float(address.options.get("timeout", _ANSWER))
        self._client: MilvusClient | None = None
        self._process = os.getpid()

    def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """The answer of a method of the client.

        Raises:
            ConnectionError: no answer within the timeout of the address, or of ``options``.
            PermissionError: the server refuses the user.
            ServerRefused: the server refuses what it was given.
        """
        options = {"timeout": self._timeout, **options}
        end = time.monotonic() + options["timeout"]
        while True:
            try:
                return getattr(self._connected(), method)(*arguments, **options)
            except (MilvusException, grpc.RpcError, grpc.FutureTimeoutError) as error:
                if not any(words in str(error) for words in _STARTING) or time.monotonic() > end:
                    raise self._error(error) from None
            time.sleep(0.2)

    def version(self) -> tuple[int, ...]:
        """The numbers of the server's version: (2, 3, 5) of "v2.3.5-lite"."""
        numbers = re.match(r"v?(\d+)\.(\d+)\.(\d+)", str(self.call("get_server_version")))
        return tuple(map(int, numbers.groups())) if numbers else ()

    def close(self) -> None:
        """Close the connection; the parent's is left alone."""
        if self._client is not None and self._process == os.getpid():
            self._client.close()
        self._client = None

    def _connected(self) -> MilvusClient:
        if self._client is None or self._process != os.getpid():
            at = self.address
            scheme = "https" if at.options.get("tls") in ("true", "1") else "http"
            login = {"user": at.user, "password": at.password}
            named = {
                "db_name": at.options.get("db", ""),
                "timeout": min(_CONNECT, self._timeout),
                "dedicated": True,
            }
            self._process = os.getpid()
            self._client = MilvusClient(f"{scheme}://{at.hosts}", **login, **named)
        return self._client

    def _error(self, error: Exception) -> Exception:
        cause = error.__cause__  # which the client leaves out of what it says of a failed connection
        details = cause.details() if isinstance(cause, grpc.Call) else ""
        text = self.address.without_secrets(details or getattr(error, "message", "") or error)
        low = text.lower()
        if any(words in low for words in _REFUSED):
            return PermissionError(f"{self.address} refuses the user ({text:.200}); check name and password")
        code = getattr(error, "code", None)
        if code == 65535 or any(words in low for words in _OTHER):
            return ServerRefused(f"{self.address} refuses it: {text:.300}")
        self.close()  # the next call makes another connection
        return ConnectionError(
            f"{self.address} does not answer ({text:.200}); start the server or check the address. "
            "A write under way may be there or not: repeat it by key"
        )
