"""A connection to Milvus: errors of one line with a remedy, one writer at a time, ties by (distance, id)."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import numpy as np

from robusthash.index.code_index import Neighbours, by_distance
from robusthash.index.index_address import ServerAddress, ServerRefused
from robusthash.index.server_index import Allowed, padded

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


_LIMIT = 16_384  # results of a query that Milvus gives at most
_TOGETHER = 200_000  # results of one request
_IN_LIST = 10_000  # members of a list in a filter
_LAST = 2**63 - 1


class Scan:
    """The items that a filter allows, scanned by the server.

    Args:
        probes: lists that an approximate engine looks into; None for an exact engine.
        nothing: called where no item passes the filter.
    """

    def __init__(
        self,
        connection: MilvusConnection,
        collection: str,
        selection: Allowed,
        exact: bool,
        probes: int | None,
        lock: threading.RLock,
        nothing: Callable[[], None] | None,
    ) -> None:
        self.exact = exact
        self._connection, self._collection, self._lock = connection, collection, lock
        self._selection, self._filter = selection, condition(selection)
        self._params = {} if probes is None else {"nprobe": probes}
        self._nothing = nothing

    def __len__(self) -> int:
        if self._selection.is_none:
            return 0
        options = {"filter": self._filter, "output_fields": ["count(*)"], "consistency_level": "Strong"}
        with self._lock:
            return int(self._connection.call("query", self._collection, **options)[0]["count(*)"])

    def search(self, queries: np.ndarray, k: int) -> Neighbours:
        if self.exact and 2 * k > _LIMIT:
            return padded(self.range(queries, queries.shape[1] * 8), k)
        limit = min(_LIMIT, max(2 * k, 64) if self.exact else k)
        answers = []
        for start in range(0, len(queries), max(1, _TOGETHER // limit)):
            part = queries[start : start + max(1, _TOGETHER // limit)]
            for query, (ids, distances) in zip(part, self._request(part, limit), strict=True):
                full = len(ids) == limit
                if self.exact and full and distances[k - 1] == distances[-1]:
                    ids, distances = self._with_ties(query, ids, distances, k)
                answers.append(by_distance(ids, distances))
        self._check_known(answers)
        return padded(answers, k)

    def range(self, queries: np.ndarray, radius: int) -> list[Neighbours]:
        answers = [by_distance(*self._within(query, radius, 0, _LAST)) for query in queries]
        self._check_known(answers)
        return answers

    def _with_ties(self, query: np.ndarray, ids: np.ndarray, distances: np.ndarray, k: int) -> Neighbours:
        """The k nearest where Milvus cut among equals: the nearer ones, and of the tied the smallest ids.

        Milvus chooses freely among equals. All at the tied distance are asked for up to some id; where they
        are more than it gives, at least as many as are missing lie at or below the id of that rank among
        those it gave, which bounds the next request.
        """
        tied = distances[k - 1]
        nearer = distances < tied
        missing, last = k - int(nearer.sum()), _LAST
        while True:
            equal, _ = self._request(query[None], _LIMIT, (int(tied), int(tied)), (0, last))[0]
            if len(equal) < _LIMIT:
                break
            last = int(np.partition(equal, missing - 1)[missing - 1])
        equal = np.sort(equal)[:missing]
        same = np.full(len(equal), tied, dtype=np.int32)
        return np.concatenate([ids[nearer], equal]), np.concatenate([distances[nearer], same])

    def _within(self, query: np.ndarray, radius: int, first: int, last: int) -> Neighbours:
        """All within the radius with ids from ``first`` to ``last``; halved where Milvus would cut."""
        ids, distances = self._request(query[None], _LIMIT, (0, radius), (first, last))[0]
        if len(ids) < _LIMIT:
            return ids, distances
        middle = int(np.partition(ids, len(ids) // 2 - 1)[len(ids) // 2 - 1])
        low, high = self._within(query, radius, first, middle), self._within(query, radius, middle + 1, last)
        return np.concatenate([low[0], high[0]]), np.concatenate([low[1], high[1]])

    def _request(
        self,
        queries: np.ndarray,
        limit: int,
        distances: tuple[int, int] | None = None,
        ids: tuple[int, int] = (0, _LAST),
    ) -> list[Neighbours]:
        """One request: up to ``limit`` items a query, of distances and ids from .. to .."""
        if self._selection.is_none or not len(queries):
            return [(np.zeros(0, np.int64), np.zeros(0, np.int32)) for _ in queries]
        clauses = [f"({self._filter})"] if self._filter else []
        clauses += [f"id >= {ids[0]}"] if ids[0] > 0 else []
        clauses += [f"id <= {ids[1]}"] if ids[1] < _LAST else []
        params: dict[str, Any] = dict(self._params)
        if distances is not None:
            params |= {
                "radius": distances[1] + 1,
                "range_filter": distances[0],
            }  # below the one, from the other
        options = {"filter": " and ".join(clauses), "limit": limit, "anns_field": "code"}
        options |= {"search_params": {"metric_type": "HAMMING", "params": params}}
        with self._lock:
            answers = self._connection.call(
                "search",
                self._collection,
                data=[query.tobytes() for query in queries],
                consistency_level="Strong",
                **options,
            )
        return [(_int64(answer.ids), np.array(answer.distances, dtype=np.int32)) for answer in answers]

    def _check_known(self, answers: Sequence[Neighbours]) -> None:
        if self._nothing is not None and not any(len(ids) for ids, _ in answers) and not len(self):
            with self._lock:
                self._nothing()


def condition(selection: Allowed) -> str:
    """A filter in Milvus's language; "" allows all."""
    if selection.is_none:  # Milvus refuses an empty list
        return "id < 0"
    if selection.ids is not None:
        return f"id in {selection.ids.tolist()}"
    return " and ".join(f"array_contains_any(terms, {json.dumps(group)})" for group in selection.groups)


def in_list(field: str, values: Sequence[Any], most: int = _IN_LIST) -> Iterator[str]:
    """Filters that allow the rows whose field is one of the values, up to ``most`` of them each."""
    for start in range(0, len(values), most):
        yield f"{field} in {json.dumps(list(values[start : start + most]))}"


def _int64(values: Any) -> np.ndarray:
    return np.array(list(values), dtype=np.int64)
