"""The SQLite file of an index: ids, codes, payload and settings, from which engines are built."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, final

import numpy as np

from robusthash.core.atomic_files import flush

FORMAT = 1
FILE = "index.sqlite"
_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE items (id INTEGER PRIMARY KEY, code BLOB NOT NULL);
CREATE TABLE payloads (id INTEGER PRIMARY KEY, value TEXT NOT NULL);
"""
_RESTORE = "restore it from a snapshot or build the index again"
_UNUSABLE = (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM)
_PAGE = 4096  # bytes; the file is a whole number of pages
_CHUNK = 65536  # rows that go into SQLite in one statement
_KEY = re.compile(r'[^"\\\x00-\x1f]+')
_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
_IN_LIST = "IN (SELECT value FROM json_each(?))"


@final
class Store:
    """One connection to the file, for one thread at a time: the index holds a lock around it.

    Write-ahead log with ``synchronous=FULL``: a commit is on disk when it returns, and readers in other
    processes go on meanwhile. A second writer waits ``wait`` seconds for the first.
    """

    def __init__(self, directory: Path, wait: float) -> None:
        self.path = directory / FILE
        self._errors = partial(_sqlite_errors, self.path, wait)
        _refuse_part_page(self.path)
        with self._errors():
            address = f"{self.path.resolve().as_uri()}?mode=rw"
            self._connection = sqlite3.connect(
                address, timeout=wait, isolation_level=None, check_same_thread=False, uri=True
            )
            try:
                self._prepare()
            except BaseException:
                self._connection.close()
                raise

    def _prepare(self) -> None:
        tables = self._all("SELECT name FROM sqlite_master WHERE name IN ('meta', 'items', 'payloads')")
        if len(tables) != 3:
            raise ValueError(f"{self.path} is damaged or no index; restore it from a snapshot or remove it")
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = FULL")
        stored = self.meta().get("format")
        if stored != FORMAT:
            raise ValueError(f"{self.path} has format {stored}, this version reads {FORMAT}; build it again")

    def close(self) -> None:
        """Close the connection; the last one to do so folds the log into the file."""
        self._connection.close()

    def version(self) -> int:
        """A number that changes when another connection has written."""
        return int(self._all("PRAGMA data_version")[0][0])

    def meta(self) -> dict[str, Any]:
        """``bits, format, origin`` and the ``engine`` that the index was created with."""
        return {key: json.loads(value) for key, value in self._all("SELECT key, value FROM meta")}

    def load(self, width: int) -> tuple[np.ndarray, np.ndarray]:
        """All (N,) ids ascending and their (N, width) codes."""
        parts, codes = [np.zeros(0, dtype=np.int64)], bytearray()
        with self._errors():
            cursor = self._connection.execute("SELECT id, code FROM items ORDER BY id")
            while chunk := cursor.fetchmany(
                1000
            ):  # few tuples at once: more would wake the garbage collector
                parts.append(np.fromiter((item for item, _ in chunk), dtype=np.int64, count=len(chunk)))
                codes += b"".join([code for _, code in chunk])
        ids = np.concatenate(parts)
        if len(codes) != len(ids) * width:
            raise ValueError(f"{self.path} is damaged: codes are not {width} bytes each; restore a snapshot")
        return ids, np.frombuffer(codes, dtype=np.uint8).reshape(len(ids), width)

    def add(self, ids: np.ndarray, codes: np.ndarray, payload: Sequence[str] | None, origin: str) -> str:
        """Insert rows in one transaction, checked against those held; returns the origin held now."""
        order = np.argsort(ids)  # in id order the tree grows at its end, which is many times faster
        ascending, width = ids[order], codes.shape[1]
        with self._transaction():
            highest = self._all("SELECT max(id) FROM items")[0][0]
            held = ""  # of an emptied store, whatever its codes were of
            if highest is not None:
                known = json.dumps(ids[ids <= highest].tolist())
                if taken := self._all(f"SELECT id FROM items WHERE id {_IN_LIST} LIMIT 1", known):
                    raise ValueError(f"id {taken[0][0]} is already in the index; remove it or give a new id")
                held = str(self.meta()["origin"])
                check_origin(origin, held)
            held = origin or held
            self._connection.execute("INSERT OR REPLACE INTO meta VALUES ('origin', ?)", (json.dumps(held),))
            for start in range(0, len(ids), _CHUNK):
                part = slice(start, start + _CHUNK)
                self._connection.execute(  # unpacked by SQLite: four times faster than a call for each row
                    "INSERT INTO items SELECT value, substr(?2, 1 + key * ?3, ?3) FROM json_each(?1)",
                    (json.dumps(ascending[part].tolist()), codes[order[part]].tobytes(), width),
                )
            if payload is not None:
                rows = zip(ascending.tolist(), (payload[at] for at in order.tolist()), strict=True)
                self._connection.executemany("INSERT INTO payloads VALUES (?, ?)", rows)
        return held

    def remove(self, ids: np.ndarray) -> int:
        """Delete rows in one transaction and count them."""
        values = (json.dumps(ids.tolist()),)
        with self._transaction():
            self._connection.execute(f"DELETE FROM payloads WHERE id {_IN_LIST}", values)
            return self._connection.execute(f"DELETE FROM items WHERE id {_IN_LIST}", values).rowcount

    def payload(self, ids: np.ndarray) -> dict[int, dict[str, Any]]:
        """By id, the payload of those that are held."""
        joined = "items LEFT JOIN payloads USING (id)"
        query = f"SELECT id, coalesce(value, '{{}}') FROM {joined} WHERE id {_IN_LIST}"
        return {item: json.loads(text) for item, text in self._all(query, json.dumps(ids.tolist()))}

    def matching(self, where: Mapping[str, Any]) -> np.ndarray:
        """Ids of the rows whose payload has these values; a list means any of them."""
        clauses, values = [], []
        for key, value in where.items():
            check_key(key)
            options = list(value) if isinstance(value, (list, tuple, set, frozenset)) else [value]
            for option in options:
                if not isinstance(option, (str, int, float)):
                    raise ValueError(
                        f"where: {key!r} can equal text, a number or a truth value, not {option!r}"
                    )
            clauses.append(
                f"CASE json_type(payloads.value, ?) WHEN 'array' "
                f"THEN EXISTS (SELECT 1 FROM json_each(payloads.value, ?) AS one WHERE one.value {_IN_LIST}) "
                f"ELSE json_extract(payloads.value, ?) {_IN_LIST} END"
            )
            path, text = f'$."{key}"', to_json(options, f"where: {key!r}")
            values += [path, path, text, path, text]
        which = f"payloads WHERE {' AND '.join(clauses)}" if clauses else "items"
        return np.array(self._all(f"SELECT id FROM {which}", *values), dtype=np.int64).reshape(-1)

    def copy_to(self, directory: Path) -> None:
        """Copy consistently to a new directory: written under another name, flushed, then renamed."""
        draft = directory.parent / f".{directory.name}.{secrets.token_hex(4)}"
        draft.mkdir(parents=True)
        try:
            with (
                self._errors(),
                contextlib.closing(sqlite3.connect(draft / FILE)) as copy,
            ):
                self._connection.backup(copy)
            flush(draft / FILE)
            flush(draft)
            os.rename(draft, directory)
        except BaseException:
            shutil.rmtree(draft)
            raise
        flush(directory.parent)

    def _all(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._errors():
            return self._connection.execute(query, values).fetchall()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """One transaction, whole or not at all, on disk when the block ends."""
        with self._errors():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # SQLite itself rolls back after some errors
                    self._connection.execute("ROLLBACK")
                raise


def create_store(directory: Path, bits: int, engine: str) -> None:
    """Make an empty store, which appears only when complete; of two that are made at once the first stays."""
    directory.mkdir(parents=True, exist_ok=True)
    path, draft = directory / FILE, directory / f".{FILE}.{secrets.token_hex(4)}"
    log = path.with_name(f"{FILE}-wal")
    if log.exists():
        raise ValueError(f"{log} is the log of a store that is gone; put {FILE} back or remove the log")
    meta = {"format": FORMAT, "bits": bits, "engine": engine, "origin": ""}
    rows = [(key, json.dumps(value)) for key, value in meta.items()]
    try:
        with _sqlite_errors(path, 0), contextlib.closing(sqlite3.connect(draft)) as connection:
            connection.execute(f"PRAGMA page_size = {_PAGE}")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.executescript(_SCHEMA)
            with connection:
                connection.executemany("INSERT INTO meta VALUES (?, ?)", rows)
        flush(draft)
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        for file in directory.glob(f"{draft.name}*"):  # the draft, and its log where SQLite could not finish
            file.unlink()
    flush(directory)


def check_key(key: Any) -> None:
    """Refuse payload keys that a JSON path, which knows no escapes inside a quoted key, could not find."""
    if not (isinstance(key, str) and _KEY.fullmatch(key)):
        raise ValueError(f"payload keys are text without quotes, backslashes and control marks, got {key!r}")


def check_origin(given: str, held: str) -> None:
    """Refuse codes of origin ``given`` next to codes of origin ``held``; "" is unknown and fits any."""
    if given and held and given != held:
        raise ValueError(
            f"codes of origin {given!r} do not fit an index of origin {held!r}: distances mean nothing; "
            f"encode with the model of origin {held!r} (--run on the command line), or build a new index"
        )


def to_json(value: Any, what: str) -> str:
    """JSON text of ``value``; keys stay as written, so that a JSON path finds them."""
    try:
        text = _JSON.encode(value)
        text.encode()  # half a surrogate pair is text to Python and to nobody else
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} cannot be written as JSON: {error}") from None
    return text


def _refuse_part_page(path: Path) -> None:
    """SQLite would read zeros after a file that ends within a page, unless a log holds the rest."""
    log = path.with_name(f"{path.name}-wal")
    if path.stat().st_size % _PAGE and not (log.exists() and log.stat().st_size):
        raise ValueError(f"{path} is damaged (it ends within a page); {_RESTORE}")


@contextlib.contextmanager
def _sqlite_errors(path: Path, wait: float) -> Iterator[None]:
    """Turn SQLite's errors into errors with a remedy; an error of ours or a bug passes as it is."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0)
        primary = code & 0xFF
        if code == sqlite3.SQLITE_IOERR_SHORT_READ or primary in (
            sqlite3.SQLITE_CORRUPT,
            sqlite3.SQLITE_NOTADB,
        ):
            raise ValueError(f"{path} is damaged ({error}); {_RESTORE}") from None
        if primary == sqlite3.SQLITE_FULL:
            raise OSError(errno.ENOSPC, "the disk is full, nothing was written", str(path)) from None
        if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            text = f"another process has been writing to {path} for {wait:g} s; try again later"
            raise TimeoutError(text) from None
        if primary in _UNUSABLE:
            text = f"the file cannot be read and written ({error}); check its rights and the room on the disk"
            raise OSError(errno.EIO, text, str(path)) from None
        raise
