"""The SQLite file of an index: its tables by format, and errors that name the file and a remedy."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from robusthash.core.atomic_files import flush

PAGE = 4096  # bytes; the file is a whole number of pages
_RESTORE = "restore it from a snapshot or build the index again"
_CORRUPT = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_UNUSABLE = (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM)
_UNREADABLE = ("malformed JSON", "Could not decode to UTF-8")  # of values, for which there is no code


class DamagedIndex(ValueError):
    """A file that holds what no index writes."""


def damaged(path: Path, reason: str) -> DamagedIndex:
    """The error of such a file."""
    return DamagedIndex(f"{path} is damaged: {reason}; {_RESTORE}")


def stored_json(path: Path, text: Any, what: str) -> Any:
    """The value of a JSON text of the file."""
    try:
        return json.loads(text)
    except (ValueError, TypeError, RecursionError):
        raise damaged(path, f"{what} is no JSON") from None


def stored_ids(path: Path, text: Any, what: str) -> list[int]:
    """The ids in a JSON list of the file."""
    ids = stored_json(path, text, what)
    if not isinstance(ids, list) or any(type(one) is not int or not 0 <= one < 1 << 63 for one in ids):
        raise damaged(path, f"{what} is {ids!r:.40}")
    return ids


def refuse_part_page(path: Path) -> None:
    """SQLite would read zeros after a file that ends within a page, unless a log holds the rest."""
    log = path.with_name(f"{path.name}-wal")
    if path.stat().st_size % PAGE and not (log.exists() and log.stat().st_size):
        raise damaged(path, "it ends within a page")


@contextlib.contextmanager
def sqlite_errors(path: Path, wait: float) -> Iterator[None]:
    """Turn SQLite's errors into errors with a remedy; an error of ours or a bug passes as it is."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0)
        primary = code & 0xFF
        broken = code == sqlite3.SQLITE_IOERR_SHORT_READ or primary in _CORRUPT
        if broken or any(text in str(error) for text in _UNREADABLE):
            raise damaged(path, str(error)) from None
        if primary == sqlite3.SQLITE_FULL:
            raise OSError(errno.ENOSPC, "the disk is full, nothing was written", str(path)) from None
        if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            text = f"another process has been writing to {path} for {wait:g} s; try again later"
            raise TimeoutError(text) from None
        if primary in _UNUSABLE and not os.access(path, os.W_OK):
            text = (
                f"it cannot be read ({error}): its log holds another's writes; open it once with write rights"
            )
            raise OSError(errno.EACCES, text, str(path)) from None
        if primary in _UNUSABLE:
            text = f"the file cannot be read and written ({error}); check its rights and the room on the disk"
            raise OSError(errno.EIO, text, str(path)) from None
        raise


FORMAT = 3
FILE = "index.sqlite"
SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE items (id INTEGER PRIMARY KEY, code BLOB NOT NULL);
CREATE TABLE payloads (id INTEGER PRIMARY KEY, value TEXT NOT NULL);
"""
KEYS = """
CREATE TABLE keys (key TEXT PRIMARY KEY, id INTEGER NOT NULL UNIQUE, stamp TEXT NOT NULL) WITHOUT ROWID
"""  # new in format 2, with the counter ``next_id`` in meta
# new in format 3: the ids that a write added, replaced or removed; upto counts those of all writes
CHANGES = "CREATE TABLE changes (upto INTEGER PRIMARY KEY, ids TEXT)"
READ = (1, 2, FORMAT)  # formats that are read as they are


def create_store(directory: Path, bits: int, engine: str) -> None:
    """Make an empty store, which appears only when complete; of two that are made at once the first stays."""
    directory.mkdir(parents=True, exist_ok=True)
    path, draft = directory / FILE, directory / f".{FILE}.{secrets.token_hex(4)}"
    log = path.with_name(f"{FILE}-wal")
    if log.exists() and not path.exists():  # made meanwhile by another, it is no leftover
        raise ValueError(f"{log} is the log of a store that is gone; put {FILE} back or remove the log")
    meta = {"format": FORMAT, "bits": bits, "engine": engine, "origin": "", "next_id": 0}
    rows = [(key, json.dumps(value)) for key, value in meta.items()]
    try:
        with sqlite_errors(path, 0), contextlib.closing(sqlite3.connect(draft)) as connection:
            connection.execute(f"PRAGMA page_size = {PAGE}")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.executescript(f"{SCHEMA}{KEYS};{CHANGES}")
            with connection:
                connection.executemany("INSERT INTO meta VALUES (?, ?)", rows)
        flush(draft)
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        for file in directory.glob(f"{draft.name}*"):  # the draft, and its log where SQLite could not finish
            file.unlink()
    flush(directory)
