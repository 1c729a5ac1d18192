"""The index in a directory: SQLite holds the items, an engine in memory searches them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np

from robusthash.core.atomic_files import json_text, write_aside
from robusthash.core.limited_files import read_json
from robusthash.core.registry import nearest
from robusthash.index.checked_input import NewItems, Which, checked_keys
from robusthash.index.code_index import CodeIndex
from robusthash.index.search_engines import ENGINES, Engine, Rows
from robusthash.index.sqlite_file import FILE, create_store
from robusthash.index.sqlite_store import Store

_MADE_OF = "run.json"  # in the directory: the run whose hasher made the codes, and of what


@final
class FileIndex(CodeIndex):
    """An index in a directory of this machine, exact to about ten million codes at interactive speed.

    The engine follows this object's writes; of those of other processes it reads the rows that have changed,
    and all rows where these are more than 100,000. Writers wait for each other. The child of a fork opens the
    store again. A store that cannot be written, on a read-only disk say, is searched all the same.

    Args:
        directory: of the store; it may hold other files as well.
        bits, engine, create: as in ``open_index``.
        wait: seconds to wait for another process that is writing.
    """

    def __init__(
        self,
        directory: Path,
        bits: int | None = None,
        engine: str = "faiss",
        create: bool = True,
        wait: float = 60.0,
    ) -> None:
        if engine not in ENGINES:
            raise ValueError(f"no index engine is called {engine!r}{nearest(engine, ENGINES)}")
        if bits is not None and bits < 1:
            raise ValueError(f"bits must be positive, got {bits}")
        self._directory, self._name, self._wait = directory, engine, wait
        super().__init__()
        self._store: Store | None = None
        self._process = os.getpid()
        self._pending: list[tuple[np.ndarray, np.ndarray]] = []  # own writes that the engine lacks yet
        try:
            self._store = _open_store(directory, bits, engine, create, wait)
            self._bits = int(self._store.meta()["bits"])
            if bits not in (None, self._bits):
                raise ValueError(f"{directory} holds codes of {self._bits} bits, asked for {bits}")
            self._load()
        except BaseException:
            self.close()
            raise

    @property
    def _width(self) -> int:
        """Bytes of a packed code."""
        return (self._bits + 7) // 8

    @property
    def address(self) -> str:
        return f"file:{self._directory}"

    def count(self) -> int:
        return len(self._current())

    def next_id(self) -> int:
        with self._lock:
            return self._opened().next_id()

    def held(self, keys: Sequence[str]) -> dict[str, tuple[int, str]]:
        with self._lock:
            return self._opened().held(checked_keys(keys))

    def keys_of(self, ids: Sequence[int]) -> dict[int, str]:
        with self._lock:
            return self._opened().keys_of(ids)

    def keys(self, prefix: str = "") -> list[str]:
        with self._lock:
            return self._opened().keys(prefix)

    def values(self, key: str, most: int = 10) -> list[Any]:
        with self._lock:
            return self._opened().values(key, most)

    def build_source(self) -> Any:
        return build_source_of(self._directory)

    def set_build_source(self, source: Mapping[str, Any]) -> None:
        _write_build_source(self._directory, source)

    def snapshot(self, directory: str | Path) -> None:
        target = Path(directory)
        if target.exists():
            raise FileExistsError(f"{target} exists already; give a snapshot a new directory")
        with self._lock:
            self._opened().copy_to(target)
            if (source := build_source_of(self._directory)) is not None:
                _write_build_source(target, source)

    def info(self) -> dict[str, Any]:
        with self._lock:
            engine, meta = self._current(), self._opened().meta()
        names = {"url": self.address, "engine": self._name, "created_with": meta["engine"]}
        sizes = {"exact": engine.exact, "bits": self._bits, "count": len(engine), "origin": meta["origin"]}
        info = {**names, **sizes, "format": meta["format"]}
        return info if engine.exact else {**info, "approximation": engine.report}

    def close(self) -> None:
        with self._lock:
            if self._store is not None:
                self._store.close()
                self._store = None

    def _write(self, new: NewItems, on_duplicate: str) -> tuple[np.ndarray, np.ndarray]:
        ids, held, self._origin = self._opened().add(new, on_duplicate)
        written = ~held if on_duplicate == "skip" else np.ones(len(ids), dtype=bool)
        self._pending.append((ids[written], new.codes[written]))  # copies: the caller may write into its own
        return ids, held

    def _delete(self, which: Which) -> int:
        engine = self._current()  # before: what others write after the removal must be read, not passed over
        removed = self._opened().remove(which)
        if len(removed):
            self._engine = engine.changed(removed, removed[:0], np.zeros((0, self._width), dtype=np.uint8))
        return len(removed)

    def _view(self, where: np.ndarray | Mapping[str, Any] | None) -> Engine:
        engine = self._current()
        if where is None:
            return engine
        return engine.only(self._opened().matching(where) if isinstance(where, Mapping) else where)

    def _payloads(self, ids: np.ndarray) -> dict[int, dict[str, Any]]:
        return self._opened().payload(ids)

    def _stored_origin(self) -> str:
        self._current()
        return self._origin

    def _any_items(self) -> bool:
        return len(self._current()) > 0

    def _opened(self) -> Store:
        if self._store is not None and self._process != os.getpid():  # SQLite: no connection crosses a fork
            _LEFT_BEHIND.append(self._store)  # nor may it be closed here, which would free the parent's locks
            self._store, self._process = Store(self._directory, self._wait), os.getpid()
            self._load()
        if self._store is None:
            raise ValueError(f"the index {self._directory} is closed; open it again")
        return self._store

    def _load(self) -> Engine:
        """Build the engine. The version is read first: a write in between is then read twice, not missed."""
        store = self._opened()
        self._version, self._pending = store.version(), []
        with store.reading():
            self._position, self._origin = store.position(), str(store.meta()["origin"])
            self._engine = ENGINES[self._name](Rows(*store.load(self._width)))
        return self._engine

    def _follow(self) -> Engine:
        """Take the rows that have changed in the store, this object's own among them."""
        store = self._opened()
        version = store.version()
        with store.reading():
            changed = store.changed(self._position)
            if changed is not None:
                ids, position = changed
                origin, rows = str(store.meta()["origin"]), store.load(self._width, ids)
        if changed is None:
            return self._load()
        self._engine, self._pending = self._engine.changed(ids, *rows), []
        self._version, self._position, self._origin = version, position, origin
        return self._engine

    def _current(self) -> Engine:
        """The engine over all rows committed by now, by anyone. It never changes, so search it unlocked."""
        with self._lock:
            if self._opened().version() != self._version:
                return self._follow()
            if self._pending:
                ids, rows = map(np.concatenate, zip(*self._pending, strict=True))
                self._pending = []
                last = len(ids) - 1 - np.unique(ids[::-1], return_index=True)[1]  # the last write of each id
                self._engine = self._engine.changed(ids, ids[last], rows[last])
            return self._engine


_LEFT_BEHIND: list[Store] = []  # connections of the parent, in the child of a fork


def _open_store(directory: Path, bits: int | None, engine: str, create: bool, wait: float) -> Store:
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file; an index lives in a directory")
    if not (directory / FILE).exists():
        if not create:
            raise FileNotFoundError(f"there is no index in {directory}; build one first or check the address")
        if bits is None:
            raise ValueError(f"there is no index in {directory}; a new one needs the number of bits")
        create_store(directory, bits, engine)
    return Store(directory, wait)


def _write_build_source(directory: Path, source: Mapping[str, Any]) -> None:
    with write_aside(directory / _MADE_OF) as aside:
        aside.write_text(json_text(source))


def build_source_of(directory: Path) -> Any:
    """``CodeIndex.build_source`` of the index in a directory, whose store is not opened."""
    file = directory / _MADE_OF
    return read_json(file) if file.is_file() else None
