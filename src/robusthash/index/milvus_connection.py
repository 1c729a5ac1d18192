"""A connection to Milvus whose errors are one line with a remedy, and one writer at a time."""

from __future__ import annotations

import logging
import os
import random
import re
import secrets
import time
from typing import Any, Self

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


_WAIT = 60.0  # seconds that a writer waits for another
_DEAD = 15.0  # seconds after which a writer that shows no life counts as killed
_PAUSE = 0.05


class WriterLock:
    """A lock that outlives no killed writer: an empty collection ``NAME__writer_N``, made by its holder.

    Making a collection of a given name succeeds for one client alone. A holder shows life by taking the
    number N + 1 and giving up N; a writer that has seen the same lock for 15 seconds takes N + 1 itself, and
    the old holder, were it alive, would fail to renew before it writes again. No clocks are compared.
    """

    def __init__(self, connection: MilvusConnection, collection: str, address: str) -> None:
        self._connection, self._address = connection, address
        self._prefix = f"{collection}__writer_"
        self._number, self._taken_at = 0, 0.0

    def __enter__(self) -> Self:
        end, last_holder, since = time.monotonic() + _WAIT, ("", 0), 0.0
        while True:
            before = self._numbers()
            top = max(before, default=0)
            holder = (self._holder(top), top)
            if holder != last_holder:
                last_holder, since = holder, time.monotonic()
            dead = time.monotonic() - since > _DEAD
            if (top == 0 or dead) and self._take(top + 1):
                if set(self._numbers()) <= {*before, top + 1}:
                    for number in before:
                        self._drop(number)
                    return self
                self._drop(top + 1)  # somebody else took another number at the same moment
                time.sleep(random.uniform(0, 10 * _PAUSE))
            if time.monotonic() > end:
                text = f"another process has been writing to {self._address} for {_WAIT:g} s; try again later"
                raise TimeoutError(text)
            time.sleep(random.uniform(_PAUSE / 2, _PAUSE))

    def __exit__(self, *error: object) -> None:
        self._drop(self._number)

    def renew(self) -> None:
        """Show life, before each request that writes.

        Raises:
            TimeoutError: another writer took over, because this one was silent for 15 seconds.
        """
        if time.monotonic() - self._taken_at < _DEAD / 3:
            return
        old = self._number
        if not self._take(old + 1):
            raise TimeoutError(f"writing to {self._address} took too long, and another has begun; repeat it")
        self._drop(old)

    def _numbers(self) -> list[int]:
        names = self._connection.call("list_collections")
        mine = [name.removeprefix(self._prefix) for name in names if name.startswith(self._prefix)]
        return [int(number) for number in mine if number.isdigit()]

    def _holder(self, number: int) -> str:
        try:
            name = f"{self._prefix}{number}"
            return str(self._connection.call("describe_collection", name)["description"]) if number else ""
        except ValueError:  # given up meanwhile
            return ""

    def _take(self, number: int) -> bool:
        from pymilvus import DataType, MilvusClient

        schema = MilvusClient.create_schema(auto_id=False, description=secrets.token_hex(8))
        schema.add_field("id", DataType.INT64, is_primary=True)
        schema.add_field("nothing", DataType.BINARY_VECTOR, dim=8)
        try:
            self._connection.call("create_collection", f"{self._prefix}{number}", schema=schema)
        except ValueError:  # it exists, with the token of another
            return False
        self._number, self._taken_at = number, time.monotonic()
        return True

    def _drop(self, number: int) -> None:
        self._connection.call("drop_collection", f"{self._prefix}{number}")
