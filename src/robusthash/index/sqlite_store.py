"""The SQLite file of an index: ids, codes, payload and settings, from which engines are built."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, final

import numpy as np

from robusthash.core.atomic_files import flush
from robusthash.index.checked_input import NewItems, Which, check_origin, planned
from robusthash.index.payload_filter import (
    IN_LIST,
    UnknownKey,
    condition,
    json_path,
    normal_form,
    values_query,
)
from robusthash.index.sqlite_file import (
    CHANGES,
    FILE,
    FORMAT,
    KEYS,
    READ,
    DamagedIndex,
    damaged,
    refuse_part_page,
    sqlite_errors,
    stored_ids,
    stored_json,
)

_SETTINGS = {"bits": int, "origin": str, "engine": str, "next_id": int}
_CHUNK = 65536  # rows that go into SQLite in one statement
_REMEMBERED = 100_000  # changed ids; to read more rows than that one by one takes as long as to read all


@final
class Store:
    """One connection to the file, for one thread at a time: the index holds a lock around it.

    Write-ahead log with ``synchronous=FULL``: a commit is on disk when it returns, and readers in other
    processes go on meanwhile. A second writer waits ``wait`` seconds for the first.
    """

    def __init__(self, directory: Path, wait: float) -> None:
        self.path = directory / FILE
        self._log = directory / f"{FILE}-wal"
        self._errors = partial(sqlite_errors, self.path, wait)
        self._wait, self._opened = wait, 0
        self.writable = os.access(self.path, os.W_OK) and os.access(directory, os.W_OK)
        self._connect()

    def _connect(self) -> None:
        refuse_part_page(self.path)
        self._state, self._opened = self._file_state(), self._opened + 1
        # a log next to a file that cannot be written is another's work in progress; without one, no lock is
        # needed, and none could be written
        mode = "mode=rw" if self.writable else "mode=ro" if self._state[2] else "mode=ro&immutable=1"
        with self._errors():
            address = f"{self.path.resolve().as_uri()}?{mode}"
            self._connection = sqlite3.connect(
                address, timeout=self._wait, isolation_level=None, check_same_thread=False, uri=True
            )
            try:
                self._prepare()
            except BaseException:
                self._connection.close()
                raise

    def _prepare(self) -> None:
        self._connection.create_function("normal_form", 1, normal_form, deterministic=True)
        tables = {name for (name,) in self._all("SELECT name FROM sqlite_master")}
        if not {"meta", "items", "payloads"} <= tables:
            raise DamagedIndex(f"{self.path} is damaged or no index; restore it from a snapshot or remove it")
        for table, formats in (("keys", (2, 3)), ("changes", (3,))):
            if table not in tables and self.format() in formats:
                raise damaged(self.path, f"its table {table} is gone")
        if self.writable:
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")
        if (stored := self.format()) not in READ:
            known = f"this version reads 1 to {FORMAT}"
            raise ValueError(f"{self.path} has format {stored}, {known}; build it again or update robusthash")

    def close(self) -> None:
        """Close the connection; the last one to do so folds the log into the file."""
        self._connection.close()

    def version(self) -> tuple[int, int]:
        """Numbers that change when another connection has written."""
        if not self.writable and self._file_state() != self._state:
            self._connection.close()
            self._connect()
        return self._opened, int(self._all("PRAGMA data_version")[0][0])

    def _file_state(self) -> tuple[int, int, bool]:
        state = self.path.stat()
        return state.st_mtime_ns, state.st_size, self._log.exists() and self._log.stat().st_size > 0

    def meta(self) -> dict[str, Any]:
        """``bits, format, origin, next_id`` and the ``engine`` that the index was created with."""
        rows = self._all("SELECT key, value FROM meta")
        meta: dict[str, Any] = {
            str(key): stored_json(self.path, value, f"its setting {key}") for key, value in rows
        }
        for name, kind in _SETTINGS.items() if meta.get("format") in READ else ():
            value: Any = meta.get(name, 0 if name == "next_id" else None)
            wrong = type(value) is not kind
            if wrong or (name == "bits" and value < 1):
                raise damaged(self.path, f"its setting {name} is {value!r:.40}")
        return meta

    def format(self) -> int | None:
        """Format of the file: an old one is read as it is, and brought to ``FORMAT`` by the first write."""
        return self.meta().get("format")

    def next_id(self) -> int:
        """The id that the next new key gets: one more than any id ever held."""
        meta = self.meta()
        if "next_id" in meta:
            return int(meta["next_id"])
        return int(self._all("SELECT coalesce(max(id) + 1, 0) FROM items")[0][0])

    def position(self) -> int | None:
        """Number of ids that all writes have changed so far; None where an older format does not count."""
        if self.format() != FORMAT:
            return None
        return int(self._all("SELECT coalesce(max(upto), 0) FROM changes")[0][0])

    def changed(self, since: int | None) -> tuple[np.ndarray, int] | None:
        """Ids that writes have changed since a position, and the position now; None where too many have."""
        if since is None or self.format() != FORMAT:
            return None
        changes = self._all("SELECT upto, ids FROM changes WHERE upto > ? ORDER BY upto", since)
        ids: list[int] = []
        for upto, text in changes:
            ids += [] if text is None else stored_ids(self.path, text, "its list of changes")
            if since + len(ids) != upto:  # forgotten in part
                return None
        return np.array(ids, dtype=np.int64), since + len(ids)

    def load(self, width: int, ids: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """All (N,) ids ascending and their (N, width) codes, or of some ids those that are held."""
        parts, codes = [np.zeros(0, dtype=np.int64)], bytearray()
        some, values = ("", ()) if ids is None else (f" WHERE id {IN_LIST}", (json.dumps(ids.tolist()),))
        with self._errors():
            cursor = self._connection.execute(f"SELECT id, code FROM items{some} ORDER BY id", values)
            while chunk := cursor.fetchmany(1000):  # more at once would wake the garbage collector
                parts.append(np.fromiter((item for item, _ in chunk), dtype=np.int64, count=len(chunk)))
                try:
                    codes += b"".join([code for _, code in chunk])
                except TypeError:
                    raise damaged(self.path, "a code of it is no blob") from None
        ids = np.concatenate(parts)
        if len(codes) != len(ids) * width:
            raise damaged(self.path, f"codes are not {width} bytes each")
        return ids, np.frombuffer(codes, dtype=np.uint8).reshape(len(ids), width)

    def add(self, new: NewItems, on_duplicate: str) -> tuple[np.ndarray, np.ndarray, str]:
        """Write rows in one transaction, checked against those held.

        Args:
            on_duplicate: what becomes of an id or a key that is held: ``error`` writes nothing at all,
                ``skip`` keeps the item, ``update`` replaces it under its id.

        Returns:
            (N,) ids of the items, (N,) bool: those that were held before, and the origin held now.
        """
        with self._transaction():
            self._upgrade()
            following = self.next_id()
            known = self._known(new, following)
            plan = planned(new, on_duplicate, known, following)
            origin = self._set_meta(new.origin, plan.following)
            self._write(new, plan.ids, plan.rows)
            self._remember(plan.ids[plan.rows])
        return plan.ids, plan.held, origin

    def _known(self, new: NewItems, following: int) -> dict[str, int] | np.ndarray:
        """The ids held among those of new items, or the id of each of their keys that is held."""
        if new.ids is None:
            return {key: item for key, item, _ in self._keyed(new.keys or ())}
        return self._held_ids(new.ids, following)

    def _held_ids(self, ids: np.ndarray, following: int) -> np.ndarray:
        """Those of ``ids`` that are held. None from ``following`` on was ever held."""
        low = ids[ids < following].tolist()
        known = self._all(f"SELECT id FROM items WHERE id {IN_LIST}", json.dumps(low))
        return np.array(known, dtype=np.int64).reshape(-1)

    def _set_meta(self, origin: str, following: int) -> str:
        """Check and keep the origin, and the counter of ids; returns the origin held now."""
        empty = not self._all("SELECT 1 FROM items LIMIT 1")
        held = "" if empty else str(self.meta()["origin"])  # an emptied store takes codes of any model
        check_origin(origin, held)
        meta = {"origin": origin or held, "next_id": following}
        rows = [(key, json.dumps(value)) for key, value in meta.items()]
        self._connection.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", rows)
        return origin or held

    def _write(self, new: NewItems, ids: np.ndarray, order: np.ndarray) -> None:
        """Insert or replace the rows ``order``, in id order: the tree grows at its end, many times faster."""
        width, run = new.codes.shape[1], self._connection.execute
        for start in range(0, len(order), _CHUNK):
            part = order[start : start + _CHUNK]
            run(  # unpacked by SQLite: four times faster than a call for each row
                "INSERT OR REPLACE INTO items SELECT value, substr(?2, 1 + key * ?3, ?3) FROM json_each(?1)",
                (json.dumps(ids[part].tolist()), new.codes[part].tobytes(), width),
            )
            run(f"DELETE FROM payloads WHERE id {IN_LIST}", (json.dumps(ids[part].tolist()),))
        of = list(zip(order.tolist(), ids[order].tolist(), strict=True))
        if new.payload is not None:
            rows = ((item, new.payload[at]) for at, item in of)
            self._connection.executemany("INSERT INTO payloads VALUES (?, ?)", rows)
        if new.keys is not None:
            stamps = new.stamps or [""] * len(new.keys)
            keyed = ((new.keys[at], item, stamps[at]) for at, item in of)
            self._connection.executemany("INSERT OR REPLACE INTO keys VALUES (?, ?, ?)", keyed)

    def _remember(self, ids: np.ndarray) -> None:
        """Note the ids that the transaction has changed, for readers that hold all other rows."""
        if not len(ids):
            return
        upto = (self.position() or 0) + len(ids)
        text = json.dumps(ids.tolist()) if len(ids) <= _REMEMBERED else None
        self._connection.execute("DELETE FROM changes WHERE upto <= ?", (upto - _REMEMBERED,))
        self._connection.execute("INSERT INTO changes VALUES (?, ?)", (upto, text))

    def _upgrade(self) -> None:
        """Bring a file of an older format to the present one, inside a transaction."""
        if (stored := self.format()) == FORMAT:
            return
        if stored == 1:
            self._add_keys()
        self._connection.execute(CHANGES)
        self._connection.execute("UPDATE meta SET value = ? WHERE key = 'format'", (json.dumps(FORMAT),))

    def _add_keys(self) -> None:
        """Bring a file of format 1 to format 2; the last item of a path is it."""
        following, keys = self.next_id(), {}
        for item, text in self._all("SELECT id, value FROM payloads ORDER BY id"):
            path = self._payload(text).get("path")
            if isinstance(path, str):
                keys[os.path.abspath(path) if os.path.lexists(path) else path] = item
        self._connection.execute(KEYS)
        rows = ((key, item, "") for key, item in keys.items())
        self._connection.executemany("INSERT INTO keys VALUES (?, ?, ?)", rows)
        row = ("next_id", json.dumps(following))
        self._connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", row)

    def held(self, keys: Sequence[str]) -> dict[str, tuple[int, str]]:
        """Id and stamp of each key that is held."""
        return {key: (item, stamp) for key, item, stamp in self._keyed(keys)}

    def keys_of(self, ids: Sequence[int]) -> dict[int, str]:
        """By id, the keys of items that are held and have one."""
        if self.format() == 1:
            return {}
        query = f"SELECT id, key FROM keys WHERE id {IN_LIST}"
        return {int(item): str(key) for item, key in self._all(query, json.dumps(list(ids)))}

    def keys(self, prefix: str) -> list[str]:
        """Keys that begin with ``prefix``, sorted."""
        if self.format() == 1:
            return []
        query = "SELECT key FROM keys WHERE substr(key, 1, length(?1)) = ?1 ORDER BY key"
        return [key for (key,) in self._all(query, prefix)]

    def _keyed(self, keys: Sequence[str]) -> list[tuple[Any, ...]]:
        """(key, id, stamp) of the keys that are held."""
        if self.format() == 1:
            return []
        query, rows = f"SELECT key, id, stamp FROM keys WHERE key {IN_LIST}", []
        for start in range(0, len(keys), _CHUNK):
            rows += self._all(query, json.dumps(list(keys[start : start + _CHUNK])))
        return rows

    def remove(self, which: Which) -> np.ndarray:
        """Delete items in one transaction; returns the ids of those that were held."""
        with self._transaction():
            self._upgrade()
            if isinstance(which, Mapping):
                ids = self.matching(which)
            elif isinstance(which, np.ndarray):
                ids = self._held_ids(which, self.next_id())
            else:
                ids = np.array([item for _, item, _ in self._keyed(which)], dtype=np.int64)
            values = (json.dumps(ids.tolist()),)
            for table in ("keys", "payloads", "items"):
                self._connection.execute(f"DELETE FROM {table} WHERE id {IN_LIST}", values)
            self._remember(ids := np.unique(ids))
        return ids

    def payload(self, ids: np.ndarray) -> dict[int, dict[str, Any]]:
        """By id, the payload of those that are held."""
        joined = "items LEFT JOIN payloads USING (id)"
        query = f"SELECT id, coalesce(value, '{{}}') FROM {joined} WHERE id {IN_LIST}"
        return {item: self._payload(text) for item, text in self._all(query, json.dumps(ids.tolist()))}

    def _payload(self, text: str) -> dict[str, Any]:
        value = stored_json(self.path, text, "a payload")
        if not isinstance(value, dict):
            raise damaged(self.path, f"a payload is {value!r:.40}")
        return value

    def matching(self, where: Mapping[str, Any]) -> np.ndarray:
        """Ids of the rows whose payload has these values; ValueError for a key that no row has."""
        clause, values = condition(where)
        which = f"payloads WHERE {clause}" if clause else "items"
        ids = np.array(self._all(f"SELECT id FROM {which}", *values), dtype=np.int64).reshape(-1)
        if len(ids) == 0 and self._all("SELECT 1 FROM items LIMIT 1"):
            for key in where:
                has = "SELECT 1 FROM payloads WHERE json_type(value, ?) IS NOT NULL LIMIT 1"
                if not self._all(has, json_path(key)):
                    query = "SELECT DISTINCT one.key FROM payloads, json_each(payloads.value) AS one"
                    raise UnknownKey(key, sorted(str(name) for (name,) in self._all(query)))
        return ids

    def values(self, key: str, most: int) -> list[Any]:
        """Up to ``most`` different values of a payload key."""
        rows = self._all(values_query(), json_path(key), most)
        return [stored_json(self.path, text, "a payload")[0] for (text,) in rows]

    def copy_to(self, directory: Path) -> None:
        """Copy consistently to a new directory: written under another name, flushed, then renamed."""
        draft = directory.parent / f".{directory.name}.{secrets.token_hex(4)}"
        draft.mkdir(parents=True)
        try:
            with self._errors(), contextlib.closing(sqlite3.connect(draft / FILE)) as copy:
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

    def reading(self) -> contextlib.AbstractContextManager[None]:
        """A block whose reads see one state of the file, whatever is written meanwhile."""
        return self._block("BEGIN")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """One transaction, whole or not at all, on disk when the block ends."""
        if not self.writable:
            text = "the index is read-only here, it can be searched but not changed; give write rights on it"
            raise PermissionError(errno.EACCES, text, str(self.path))
        with self._block("BEGIN IMMEDIATE"):
            yield

    @contextlib.contextmanager
    def _block(self, begin: str) -> Iterator[None]:
        with self._errors():
            self._connection.execute(begin)
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # SQLite itself rolls back after some errors
                    self._connection.execute("ROLLBACK")
                raise
