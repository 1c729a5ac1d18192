"""Errors of SQLite and of stored values, each turned into one that names the file and a remedy."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
