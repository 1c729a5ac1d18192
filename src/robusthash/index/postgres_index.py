"""The index in PostgreSQL with pgvector: codes are ``bit(n)``, the distance is ``<~>``."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, final

import numpy as np

from robusthash.index.checked_input import NewItems, Which, check_origin, checked_keys, planned
from robusthash.index.code_index import Neighbours, by_distance
from robusthash.index.index_address import ServerAddress, ServerRefused
from robusthash.index.payload_filter import digest, terms
from robusthash.index.server_index import FORMAT, Allowed, ServerIndex, padded

try:
    import psycopg
    from psycopg import errors, sql
except ImportError as error:
    raise ImportError(
        f"an index in PostgreSQL needs its client ({error}): pip install 'robusthash[pgvector]'"
    ) from error

_WAIT = 60  # seconds that a writer waits for another
_CONNECT = 10  # seconds
_AT_ONCE = 10_000  # rows read or written together
_T = TypeVar("_T")
_TABLES = """
CREATE EXTENSION IF NOT EXISTS vector;
CREATE TABLE IF NOT EXISTS {meta} (key text PRIMARY KEY, value text NOT NULL);
CREATE TABLE IF NOT EXISTS {items} (
  id bigint PRIMARY KEY,
  code bit({bits}) NOT NULL,
  key text COLLATE "C",
  key_digest text UNIQUE,
  stamp text NOT NULL,
  payload text NOT NULL,
  terms text[] NOT NULL
);
CREATE INDEX IF NOT EXISTS {by_term} ON {items} USING gin (terms);
INSERT INTO {meta} VALUES {settings} ON CONFLICT DO NOTHING;
"""
_NEW = "(id bigint, code text, key text, key_digest text, stamp text, payload text, terms text[])"
_WRITE = """
INSERT INTO {items} (id, code, key, key_digest, stamp, payload, terms)
  SELECT id, code::bit({bits}), key, key_digest, stamp, payload, terms FROM new_items
  ON CONFLICT (id) DO UPDATE SET code = excluded.code, payload = excluded.payload, terms = excluded.terms,
    key = coalesce(excluded.key, {items}.key), key_digest = coalesce(excluded.key_digest, {items}.key_digest),
    stamp = CASE WHEN excluded.key IS NULL THEN {items}.stamp ELSE excluded.stamp END
"""


@final
class PostgresIndex(ServerIndex):
    """An index in two tables of a PostgreSQL database, ``NAME_meta`` and ``NAME_items``.

    ``scan`` orders all items by (distance, id) in the server: exact, ties included. ``hnsw`` uses pgvector's
    graph with iterative scan, which may find fewer than k above ``hnsw.max_scan_tuples`` (20,000); filters
    and ``range`` scan exactly.
    A write is one transaction, flushed before it is acknowledged; writers wait for each other at the row of
    the id counter. One connection an object: threads that share it take turns. A connection that broke is
    opened again by the next call.
    """

    ENGINES = ("scan", "hnsw")

    def __init__(self, address: ServerAddress, bits: int | None, engine: str | None, create: bool) -> None:
        self._connection: psycopg.Connection[Any] | None = None
        self._process = os.getpid()
        self._names: dict[str, sql.Composable] = {
            "meta": sql.Identifier(f"{address.collection}_meta"),
            "items": sql.Identifier(f"{address.collection}_items"),
            "by_term": sql.Identifier(f"{address.collection}_items_terms"),
            "by_code": sql.Identifier(f"{address.collection}_items_hnsw"),
        }
        super().__init__(address, bits, engine, create)

    def _open(self, bits: int | None, engine: str | None, create: bool) -> str:
        name = engine or self.ENGINES[0]
        with self._lock:
            table = f'"{self._server.collection}_meta"'
            if self._all("SELECT to_regclass(%s)", table) == [(None,)]:
                self._make(self._refuse_missing(bits, create), name)
            bits = int(self._settings()["bits"])
            self._names["bits"] = sql.Literal(bits)
            if name == "hnsw":
                self._make_graph()
        return name

    def _make(self, bits: int, engine: str) -> None:
        meta = {"format": FORMAT, "bits": bits, "engine": engine, "origin": "", "next_id": 0}
        rows = [sql.SQL("({}, {})").format(key, json.dumps(value)) for key, value in meta.items()]
        names = {**self._names, "bits": sql.Literal(bits), "settings": sql.SQL(", ").join(rows)}

        def make(run: psycopg.Cursor[Any]) -> None:
            run.execute("SELECT pg_advisory_xact_lock(hashtext('robusthash'))")
            run.execute(sql.SQL(_TABLES).format(**names))

        self._transaction(make)

    def _make_graph(self) -> None:
        if self._all("SELECT to_regclass(%s)", f'"{self._server.collection}_items_hnsw"') == [(None,)]:
            make = "CREATE INDEX IF NOT EXISTS {by_code} ON {items} USING hnsw (code bit_hamming_ops)"
            self._transaction(lambda run: run.execute(self._sql(make)))

    def count(self) -> int:
        with self._lock:
            return int(self._all("SELECT count(*) FROM {items}")[0][0])

    def held(self, keys: Sequence[str]) -> dict[str, tuple[int, str]]:
        with self._lock:
            return {key: (item, stamp) for key, item, stamp in self._keyed(checked_keys(keys))}

    def keys_of(self, ids: Sequence[int]) -> dict[int, str]:
        query = "SELECT id, key FROM {items} WHERE id = ANY(%s) AND key IS NOT NULL"
        return {int(item): str(key) for item, key in self._all(query, list(ids))}

    def keys(self, prefix: str = "") -> list[str]:
        if "\0" in prefix:
            return []
        query = "SELECT key FROM {items} WHERE starts_with(key, %s) ORDER BY key"
        with self._lock:
            return [key for (key,) in self._all(query, prefix)]

    def snapshot(self, directory: str | Path) -> NoReturn:
        tables = " ".join(f"--table '\"{self._server.collection}_{part}\"'" for part in ("meta", "items"))
        self._no_snapshot(f"pg_dump {tables} and pg_restore, while it serves")

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._connection is not None and self._process == os.getpid():
                self._connection.close()
            self._connection = None

    def _settings(self) -> dict[str, Any]:
        rows = dict(self._all("SELECT key, value FROM {meta}"))
        try:
            settings = {key: json.loads(value) for key, value in rows.items()}
            if settings["format"] != FORMAT:
                raise ValueError(f"{self.address} has format {settings['format']}; update robusthash")
            return {**settings, "bits": int(settings["bits"]), "next_id": int(settings["next_id"])}
        except (KeyError, TypeError, json.JSONDecodeError):
            raise ValueError(
                f"the tables at {self.address} are not those of an index; name another collection"
            ) from None

    def _set(self, settings: Mapping[str, Any]) -> None:
        self._transaction(lambda run: self._set_in(run, settings))

    def _set_in(self, run: psycopg.Cursor[Any], settings: Mapping[str, Any]) -> None:
        query = "INSERT INTO {meta} VALUES (%s, %s) ON CONFLICT (key) DO UPDATE SET value = excluded.value"
        run.executemany(self._sql(query), [(key, json.dumps(value)) for key, value in settings.items()])

    def _any_items(self) -> bool:
        return bool(self._all("SELECT 1 FROM {items} LIMIT 1"))

    def _keyed(self, keys: Sequence[str]) -> list[tuple[Any, ...]]:
        """(key, id, stamp) of the keys that are held."""
        query = "SELECT key, id, stamp FROM {items} WHERE key_digest = ANY(%s)"
        return self._all(query, [digest(key) for key in keys])

    def _write(self, new: NewItems, on_duplicate: str) -> tuple[np.ndarray, np.ndarray]:
        def write(run: psycopg.Cursor[Any]) -> tuple[np.ndarray, np.ndarray]:
            self._wait_for_writers(run)
            settings = self._settings()
            if new.ids is None:
                known: Any = {key: item for key, item, _ in self._keyed(new.keys or ())}
            else:
                known = self._ids("SELECT id FROM {items} WHERE id = ANY(%s)", new.ids.tolist())
            plan = planned(new, on_duplicate, known, settings["next_id"])
            origin = settings["origin"] if self._any_items() else ""
            check_origin(new.origin, origin)
            self._set_in(run, {"origin": new.origin or origin, "next_id": plan.following})
            run.execute(f"CREATE TEMP TABLE new_items {_NEW} ON COMMIT DROP")
            with run.copy("COPY new_items FROM STDIN") as copy:
                for row in _rows(new, plan.ids, plan.rows, self._bits):
                    copy.write_row(row)
            run.execute(self._sql(_WRITE))
            return plan.ids, plan.held

        return self._transaction(write)

    def _delete(self, which: Which) -> int:
        def delete(run: psycopg.Cursor[Any]) -> int:
            self._wait_for_writers(run)
            if isinstance(which, (Mapping, np.ndarray)):
                clause, values = _condition(Allowed.of(which))
            else:
                clause, values = "key_digest = ANY(%s)", [[digest(key) for key in which]]
            run.execute(self._sql(f"DELETE FROM {{items}} WHERE {clause}"), values)
            removed = run.rowcount
            if not removed and isinstance(which, Mapping):
                self._check_known(which)
            return removed

        return self._transaction(delete)

    def _wait_for_writers(self, run: psycopg.Cursor[Any]) -> None:
        run.execute("SET LOCAL synchronous_commit = on")
        run.execute(f"SET LOCAL lock_timeout = '{_WAIT}s'")
        run.execute(self._sql("SELECT 1 FROM {meta} WHERE key = 'next_id' FOR UPDATE"))

    def _view(self, where: np.ndarray | Mapping[str, Any] | None) -> _Scan:
        return _Scan(self, where, exact=self.exact or where is not None)

    def _exact_view(self) -> _Scan:
        return _Scan(self, None, exact=True)

    def _parameters(self) -> dict[str, Any]:
        return {"ef_search": int(self._all("SELECT current_setting('hnsw.ef_search', true)")[0][0] or 40)}

    def _payloads(self, ids: np.ndarray) -> dict[int, dict[str, Any]]:
        query = "SELECT id, payload FROM {items} WHERE id = ANY(%s)"
        return {item: json.loads(text) for item, text in self._all(query, ids.tolist())}

    def _payload_texts(self, selection: Allowed) -> Iterator[str]:
        clause, values = _condition(selection)
        query = f"SELECT id, payload FROM {{items}} WHERE id > %s AND {clause} ORDER BY id LIMIT {_AT_ONCE}"
        last = -1
        while rows := self._all(query, last, *values):
            yield from (text for _, text in rows)
            last = rows[-1][0]

    def _some_codes(self, count: int) -> np.ndarray:
        rows = self._all("SELECT code::text FROM {items} ORDER BY md5(id::text) LIMIT %s", count)
        bits = np.array([[int(one) for one in text] for (text,) in rows], dtype=np.uint8)
        return np.packbits(bits.reshape(-1, self._bits), axis=1)

    def _ids(self, query: str, *values: Any) -> np.ndarray:
        return np.array(self._all(query, *values), dtype=np.int64).reshape(-1)

    # The connection

    def _sql(self, query: str) -> sql.Composed:
        return sql.SQL(query).format(**self._names)

    def _all(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """The rows of a query, inside the transaction under way or alone."""
        with self._lock:
            return self._transaction(lambda run: run.execute(self._sql(query), values).fetchall())

    def _transaction(self, work: Callable[[psycopg.Cursor[Any]], _T]) -> _T:
        """Do ``work`` whole or not at all; where the connection broke before it ended, once more."""
        with self._lock, self._errors():
            self._check_open()
            if self._connection is not None and self._process == os.getpid() and self._is_inside():
                return work(self._connection.cursor())
            for last in (False, True):
                connection, ending = self._connected(), False
                try:
                    with connection.transaction(), connection.cursor() as run:
                        outcome = work(run)
                        ending = True
                    return outcome
                except psycopg.OperationalError:
                    if last or not connection.closed or ending:  # while it ended, it may have been written
                        raise
        raise AssertionError("one of the two tries returns or raises")

    def _is_inside(self) -> bool:
        assert self._connection is not None
        status = psycopg.pq.TransactionStatus
        return self._connection.info.transaction_status in (status.INTRANS, status.ACTIVE)

    def _connected(self) -> psycopg.Connection[Any]:
        """The connection, opened again where it broke or belongs to the parent of a fork."""
        if self._connection is None or self._connection.closed or self._process != os.getpid():
            self._process, self._connection = os.getpid(), None
            self._connection = psycopg.connect(
                self._server.libpq(), autocommit=True, connect_timeout=_CONNECT, application_name="robusthash"
            )
        return self._connection

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn errors of PostgreSQL into one line with a remedy and without the password."""
        try:
            yield
        except errors.LockNotAvailable:
            raise TimeoutError(
                f"another process has been writing to {self.address} for {_WAIT} s; try again later"
            ) from None
        except (errors.UndefinedTable, errors.UndefinedColumn, errors.DatatypeMismatch) as error:
            message = self._server.without_secrets(error.diag.message_primary)
            raise ServerRefused(
                f"the tables at {self.address} are not those of an index ({message}); name another collection"
            ) from None
        except (errors.InsufficientPrivilege, errors.InvalidPassword) as error:
            message = self._server.without_secrets(error.diag.message_primary or error)
            raise PermissionError(f"{self.address} refuses it: {message}") from None
        except psycopg.Error as error:
            raise self._failure(self._server.without_secrets(error)) from None

    def _failure(self, message: str) -> Exception:
        if "password" in message or "role " in message or "pg_hba" in message:
            return PermissionError(f"{self.address} refuses the user ({message}); check name and password")
        if message.endswith("does not exist") and "database" in message:
            return ValueError(f"{self.address}: {message}; make the database, or check the address")
        if 'extension "vector"' in message:
            return ValueError(f"the server of {self.address} lacks pgvector ({message}); install it there")
        return ConnectionError(
            f"{self.address} does not answer ({message}); start the server or check the address. "
            "A write under way may be there or not: repeat it by key"
        )


class _Scan:
    """The items that a filter allows, scanned by the server."""

    def __init__(
        self, index: PostgresIndex, where: np.ndarray | Mapping[str, Any] | None, exact: bool
    ) -> None:
        self.exact = exact
        self._index, self._where = index, where
        self._clause, self._values = _condition(Allowed.of(where))

    def __len__(self) -> int:
        rows = self._index._all(f"SELECT count(*) FROM {{items}} WHERE {self._clause}", *self._values)
        return int(rows[0][0])

    def search(self, queries: np.ndarray, k: int) -> Neighbours:
        return padded(self._each(queries, "true", (), f"LIMIT {k}", self.exact), k)

    def range(self, queries: np.ndarray, radius: int) -> list[Neighbours]:
        return self._each(queries, "code <~> {query} <= %s", (radius,), "", True)

    def _each(
        self, queries: np.ndarray, within: str, values: tuple[Any, ...], limit: str, exact: bool
    ) -> list[Neighbours]:
        """The neighbours of each query, by (distance, id)."""
        distance = "code <~> {query}"
        order = f"{distance}, id" if exact else distance
        base = (
            f"SELECT id, {distance} FROM {{items}} WHERE {self._clause} AND {within} ORDER BY {order} {limit}"
        )
        index = self._index

        def search(run: psycopg.Cursor[Any]) -> list[Neighbours]:
            run.execute(f"SET LOCAL enable_indexscan = {'off' if exact else 'on'}")
            if not exact:
                run.execute("SET LOCAL enable_seqscan = off; SET LOCAL hnsw.iterative_scan = strict_order")
            answers = []
            for query in queries:
                text = "".join(map(str, np.unpackbits(query)[: index.bits]))
                literal = sql.SQL("{}::bit({})").format(text, index.bits)
                names = {**index._names, "query": literal}
                run.execute(sql.SQL(base).format(**names), (*self._values, *values))
                rows = np.array(run.fetchall(), dtype=np.int64).reshape(-1, 2)
                answers.append(by_distance(rows[:, 0], rows[:, 1].astype(np.int32)))
            return answers

        neighbours = index._transaction(search)
        if isinstance(self._where, Mapping) and not any(len(ids) for ids, _ in neighbours) and not len(self):
            index._check_known(self._where)
        return neighbours


def _condition(selection: Allowed) -> tuple[str, list[Any]]:
    """A filter in SQL, and its values."""
    if selection.ids is not None:
        return "id = ANY(%s)", [selection.ids.tolist()]
    return " AND ".join(["true", *["terms && %s::text[]"] * len(selection.groups)]), list(selection.groups)


def _rows(new: NewItems, ids: np.ndarray, rows: np.ndarray, bits: int) -> Iterator[tuple[Any, ...]]:
    """The rows to be written, as ``COPY`` takes them."""
    for start in range(0, len(rows), _AT_ONCE):
        part = rows[start : start + _AT_ONCE]
        signs = np.unpackbits(new.codes[part], axis=1)[:, :bits] + ord("0")
        texts = signs.astype(np.uint8).view(f"S{bits}").ravel().tolist() if len(part) else []
        for at, code in zip(part.tolist(), texts, strict=True):
            key = new.keys[at] if new.keys is not None else None
            payload = new.payload[at] if new.payload is not None else "{}"
            stamp = new.stamps[at] if new.stamps is not None else ""
            named = (key, None if key is None else digest(key), stamp)
            yield (int(ids[at]), code.decode(), *named, payload, terms(payload))
