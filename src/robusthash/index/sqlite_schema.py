"""The tables of an index in SQLite, by format, and a file that has them."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sqlite3
from pathlib import Path

from robusthash.core.atomic_files import flush
from robusthash.index.sqlite_errors import PAGE, sqlite_errors

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
