"""The SQLite file that holds the truth of a local index: ids, codes, payload and what they are."""

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
from pathlib import Path
from typing import Any, final

import numpy as np

from robusthash.core.atomic_files import flush
from robusthash.index.base import check_origin

FORMAT = 1
FILE = "index.sqlite"
_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE items (id INTEGER PRIMARY KEY, code BLOB NOT NULL);
CREATE TABLE payloads (id INTEGER PRIMARY KEY, value TEXT NOT NULL);
"""
_PAGE = 4096  # bytes; the file is a whole number of pages
_CHUNK = 65536  # rows that go into SQLite in one statement
_KEY = re.compile(r'[^"\\\x00-\x1f]+')
_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
_ASKED = "IN (SELECT value FROM json_each(?))"


@final
class Store:
    """One connection to the file. Not safe for several threads at once: the index holds a lock around it.

    Write-ahead log with ``synchronous=FULL``: a commit is on disk when it returns, and readers in other
    processes go on meanwhile. A second writer waits ``wait`` seconds for the first.
    """

    def __init__(self, directory: Path, wait: float) -> None:
        self.path = directory / FILE
        self._wait = wait
        _refuse_part_page(self.path)
        with _told(self.path, wait):
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
            raise ValueError(
                f"{self.path} is damaged or not an index; restore it from a snapshot or remove it"
            )
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = FULL")
        found = self.meta().get("format")
        if found != FORMAT:
            raise ValueError(
                f"{self.path} has format {found}, this version reads {FORMAT}; build the index again"
            )

    def close(self) -> None:
        """Let go of the file; the last one to do so folds the log into it."""
        self._connection.close()

    def version(self) -> int:
        """A number that changes when another connection has written."""
        with _told(self.path, self._wait):
            return int(self._all("PRAGMA data_version")[0][0])

    def meta(self) -> dict[str, Any]:
        """``bits, format, origin, engine`` and what else was kept with ``set_meta``."""
        with _told(self.path, self._wait):
            return {key: json.loads(value) for key, value in self._all("SELECT key, value FROM meta")}

    def set_meta(self, key: str, value: Any) -> None:
        """Keep one JSON value."""
        with self._writing():
            self._connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(value)))

    def load(self, width: int) -> tuple[np.ndarray, np.ndarray]:
        """All (N,) ids ascending and their (N, width) codes."""
        ids, codes = [np.zeros(0, dtype=np.int64)], bytearray()
        with _told(self.path, self._wait):
            cursor = self._connection.execute("SELECT id, code FROM items ORDER BY id")
            while chunk := cursor.fetchmany(
                1000
            ):  # few tuples at once: more would wake the garbage collector
                ids.append(np.fromiter((at for at, _ in chunk), dtype=np.int64, count=len(chunk)))
                codes += b"".join([code for _, code in chunk])
        every = np.concatenate(ids)
        if len(codes) != len(every) * width:
            raise ValueError(
                f"{self.path} is damaged: codes are not {width} bytes each; restore it from a snapshot"
            )
        return every, np.frombuffer(codes, dtype=np.uint8).reshape(len(every), width)

    def add(self, ids: np.ndarray, codes: np.ndarray, payload: Sequence[str] | None, origin: str) -> str:
        """Insert rows in one transaction, after checking ids and origin against what is held by then.

        Returns:
            The origin of all that is held now.
        """
        order = np.argsort(ids)  # in id order the tree grows at its end, which is many times faster
        ascending, width = ids[order], codes.shape[1]
        with self._writing():
            highest = self._all("SELECT max(id) FROM items")[0][0]
            held = ""  # of an emptied store, whatever its codes were of
            if highest is not None:
                self._refuse_taken(ids, highest)
                held = str(self.meta()["origin"])
                check_origin(origin, held)
            held = origin or held
            self._connection.execute("INSERT OR REPLACE INTO meta VALUES ('origin', ?)", (json.dumps(held),))
            for start in range(
                0, len(ids), _CHUNK
            ):  # unpacked by SQLite: four times faster than a call for each row
                part = slice(start, start + _CHUNK)
                self._connection.execute(
                    "INSERT INTO items SELECT value, substr(?2, 1 + key * ?3, ?3) FROM json_each(?1)",
                    (json.dumps(ascending[part].tolist()), codes[order[part]].tobytes(), width),
                )
            if payload is not None:
                texts = (payload[at] for at in order.tolist())
                self._connection.executemany(
                    "INSERT INTO payloads VALUES (?, ?)", zip(ascending.tolist(), texts, strict=True)
                )
        return held

    def _refuse_taken(self, ids: np.ndarray, highest: int) -> None:
        asked = json.dumps(ids[ids <= highest].tolist())
        taken = self._all(f"SELECT id FROM items WHERE id {_ASKED} LIMIT 1", asked)
        if taken:
            raise ValueError(f"id {taken[0][0]} is already in the index; remove it first or give a new id")

    def remove(self, ids: np.ndarray) -> int:
        """Delete rows in one transaction and count them."""
        asked = (json.dumps(ids.tolist()),)
        with self._writing():
            self._connection.execute(f"DELETE FROM payloads WHERE id {_ASKED}", asked)
            return self._connection.execute(f"DELETE FROM items WHERE id {_ASKED}", asked).rowcount

    def payload(self, ids: np.ndarray) -> dict[int, dict[str, Any]]:
        """By id, the payload of those that are held."""
        query = (
            f"SELECT id, coalesce(value, '{{}}') FROM items LEFT JOIN payloads USING (id) WHERE id {_ASKED}"
        )
        with _told(self.path, self._wait):
            return {at: json.loads(text) for at, text in self._all(query, json.dumps(ids.tolist()))}

    def matching(self, where: Mapping[str, Any]) -> np.ndarray:
        """Ids of the rows whose payload has these values; a list means any of them."""
        if not where:
            with _told(self.path, self._wait):
                return np.array(self._all("SELECT id FROM items"), dtype=np.int64).reshape(-1)
        clauses, values = [], []
        for key, wanted in where.items():
            check_key(key)
            options = list(wanted) if isinstance(wanted, (list, tuple, set, frozenset)) else [wanted]
            for option in options:
                if not isinstance(option, (str, int, float)):
                    raise ValueError(
                        f"where: {key!r} can equal text, a number or a truth value, not {option!r}"
                    )
            clauses.append(
                f"CASE json_type(payloads.value, ?) WHEN 'array' "
                f"THEN EXISTS (SELECT 1 FROM json_each(payloads.value, ?) AS one WHERE one.value {_ASKED}) "
                f"ELSE json_extract(payloads.value, ?) {_ASKED} END"
            )
            path, text = f'$."{key}"', to_json(options, f"where: {key!r}")
            values += [path, path, text, path, text]
        with _told(self.path, self._wait):
            found = self._all(f"SELECT id FROM payloads WHERE {' AND '.join(clauses)}", *values)
        return np.array(found, dtype=np.int64).reshape(-1)

    def copy_to(self, directory: Path) -> None:
        """A consistent copy in a new directory: written aside, put on disk, then renamed."""
        aside = directory.parent / f".{directory.name}.{secrets.token_hex(4)}"
        aside.mkdir(parents=True)
        try:
            with _told(aside / FILE, self._wait), contextlib.closing(sqlite3.connect(aside / FILE)) as copy:
                self._connection.backup(copy)
            flush(aside / FILE)
            flush(aside)
            os.rename(aside, directory)
        except BaseException:
            shutil.rmtree(aside)
            raise
        flush(directory.parent)

    def _all(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        return self._connection.execute(query, values).fetchall()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """One transaction, whole or not at all, on disk when the block ends."""
        with _told(self.path, self._wait):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # SQLite itself rolls back after some errors
                    self._connection.execute("ROLLBACK")
                raise


def create(directory: Path, bits: int, engine: str) -> None:
    """Make an empty store. It appears under its name only when complete, so a half-made one is never opened.

    Where another process makes the same store meanwhile, the first one stands.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path, aside = directory / FILE, directory / f".{FILE}.{secrets.token_hex(4)}"
    log = path.with_name(f"{FILE}-wal")
    if log.exists():
        raise ValueError(f"{log} is the log of a store that is gone; put {FILE} back or remove the log")
    meta = {"format": FORMAT, "bits": bits, "engine": engine, "origin": ""}
    try:
        with _told(path, 0), contextlib.closing(sqlite3.connect(aside)) as connection:
            connection.execute(f"PRAGMA page_size = {_PAGE}")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.executescript(_SCHEMA)
            with connection:
                connection.executemany(
                    "INSERT INTO meta VALUES (?, ?)", [(k, json.dumps(v)) for k, v in meta.items()]
                )
        flush(aside)
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
    finally:
        for draft in directory.glob(f"{aside.name}*"):  # the file, and its log where SQLite could not finish
            draft.unlink()
    flush(directory)


def check_key(key: Any) -> None:
    """Payload keys are found by JSON path, which knows no escapes inside a quoted key."""
    if not (isinstance(key, str) and _KEY.fullmatch(key)):
        raise ValueError(f"payload keys are text without quotes, backslashes and control marks, got {key!r}")


def to_json(value: Any, what: str) -> str:
    """JSON text of ``value``; keys stay as written, so that a JSON path finds them."""
    try:
        text = _JSON.encode(value)
        text.encode()  # half a surrogate pair is text to Python and to nobody else
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} cannot be written as JSON: {error}") from None
    return text


def _refuse_part_page(path: Path) -> None:
    """SQLite reads a file that ends within a page as if zeros followed. Its log, where there is one, holds
    the rest."""
    log = path.with_name(f"{path.name}-wal")
    if path.stat().st_size % _PAGE and not (log.exists() and log.stat().st_size):
        raise ValueError(
            f"{path} is damaged (it ends within a page); restore it from a snapshot or build it again"
        )


@contextlib.contextmanager
def _told(path: Path, wait: float) -> Iterator[None]:
    """SQLite's errors in the words of who has to act on them; an error of ours or a bug passes as it is."""
    try:
        yield
    except sqlite3.Error as error:
        primary = getattr(error, "sqlite_errorcode", 0) & 0xFF
        short = getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_IOERR_SHORT_READ
        if short or primary in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            text = f"{path} is damaged ({error}); restore it from a snapshot or build the index again"
            raise ValueError(text) from None
        if primary == sqlite3.SQLITE_FULL:
            raise OSError(
                errno.ENOSPC, "the disk is full, nothing was written; make room", str(path)
            ) from None
        if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise TimeoutError(
                f"another process has been writing to {path} for {wait:g} s; try again later"
            ) from None
        if primary in (
            sqlite3.SQLITE_IOERR,
            sqlite3.SQLITE_CANTOPEN,
            sqlite3.SQLITE_READONLY,
            sqlite3.SQLITE_PERM,
        ):
            text = f"the file cannot be read and written ({error}); check its rights, the disk and the room on it"
            raise OSError(errno.EIO, text, str(path)) from None
        raise
