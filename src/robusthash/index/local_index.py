"""An index in a directory of this machine: SQLite holds the truth, an engine in memory answers."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import torch

from robusthash.core.registry import nearest
from robusthash.core.types import Codes, Ranking
from robusthash.index.base import CodeIndex, Ids, Where, Within, as_ids, as_rows
from robusthash.index.search_engines import ENGINES, Engine, Rows
from robusthash.index.sqlite_store import FILE, FORMAT, Store, check_key, create, to_json


@final
class LocalIndex(CodeIndex):
    """Codes in ``directory``, for one writer at a time and any number of readers, in threads and processes.

    The engine is built from the store when the index opens, follows this index's own writes, and is built
    again when another process has written. Exact to about ten million codes at interactive speed.

    Args:
        directory: where the store lives; it may hold other files as well.
        bits: code length; needed for a new index, checked against an old one.
        engine: ``faiss`` (exact, default), ``numpy`` (exact, the oracle) or ``faiss-ivf`` (approximate; its
            measured recall is in ``info()["approximation"]``). The store is the same for all three.
        create: make the index where there is none.
        wait: seconds to wait for another process that is writing.

    Raises:
        FileNotFoundError: where there is no index and ``create`` is False.
        ValueError: for wrong arguments, and for a store that is damaged or of another format.
    """

    def __init__(
        self,
        directory: Path,
        bits: int | None = None,
        engine: str = "faiss",
        create: bool = True,
        wait: float = 5.0,
    ) -> None:
        if engine not in ENGINES:
            raise ValueError(f"no index engine is called {engine!r}{nearest(engine, ENGINES)}")
        if bits is not None and bits < 1:
            raise ValueError(f"bits must be positive, got {bits}")
        self._directory, self._name = directory, engine
        self._lock = threading.RLock()
        self._store: Store | None = _open(directory, bits, engine, create, wait)
        try:
            self._bits = int(self._store.meta()["bits"])
            if bits not in (None, self._bits):
                raise ValueError(
                    f"the index in {directory} holds codes of {self._bits} bits, asked for {bits}"
                )
            self._pending: list[tuple[np.ndarray, np.ndarray]] = []
            self._version = -1
            self._load()
        except BaseException:
            self.close()
            raise

    @property
    def bits(self) -> int:
        return self._bits

    @property
    def origin(self) -> str:
        with self._lock:
            return self._origin if len(self._current().rows) else ""

    def add(self, codes: Codes, payload: Sequence[Mapping[str, Any]] | None = None) -> None:
        rows, ids = as_rows(codes, self._bits), as_ids(codes.ids)
        texts = _texts(payload, ids)
        if len(ids) and ids.min() < 0:
            raise ValueError(f"ids must be 0 or greater, got {ids.min()}")
        values, counts = np.unique(ids, return_counts=True)
        if (counts > 1).any():
            raise ValueError(f"id {values[counts > 1][0]} is given more than once")
        with self._lock:
            store = self._opened()
            if len(ids):
                self._origin = store.add(ids, rows, texts, codes.origin)
                self._pending.append((ids, rows.copy()))  # the caller may write into its tensor later

    def _search(self, queries: np.ndarray, k: int, where: Where | None) -> Ranking:
        engine = self._narrowed(where)
        kept = min(k, len(engine.rows))
        found, distances = _empty(len(queries), 0) if kept == 0 else engine.search(queries, kept)
        if kept < k:
            padding = _empty(len(queries), k - kept)
            found, distances = np.hstack([found, padding[0]]), np.hstack([distances, padding[1]])
        cut = torch.full((len(queries),), not engine.exact)
        return Ranking(torch.from_numpy(found), torch.from_numpy(distances), cut)

    def _range(self, queries: np.ndarray, radius: int, where: Where | None) -> Within:
        answers = self._narrowed(where).range(queries, radius)
        ids, distances = zip(*answers, strict=True) if answers else ((), ())
        return Within(tuple(map(torch.from_numpy, ids)), tuple(map(torch.from_numpy, distances)))

    def remove(self, ids: Ids) -> int:
        wanted = as_ids(ids)
        with self._lock:
            removed = self._opened().remove(wanted)
            if removed:
                self._engine = self._current().minus(wanted)
        return removed

    def count(self) -> int:
        return len(self._current().rows)

    def next_id(self) -> int:
        held = self._current().rows.ids
        return int(held[-1]) + 1 if len(held) else 0

    def payload(self, ids: Ids) -> list[dict[str, Any]]:
        wanted = as_ids(ids)
        with self._lock:
            held = self._opened().payload(wanted)
        for one in wanted.tolist():
            if one not in held:
                raise KeyError(f"id {one} is not in the index {self._directory}")
        return [held[one] for one in wanted.tolist()]

    def snapshot(self, directory: str | Path) -> None:
        target = Path(directory)
        if target.exists():
            raise FileExistsError(f"{target} exists already; give a snapshot a new directory")
        with self._lock:
            self._opened().copy_to(target)

    def info(self) -> dict[str, Any]:
        with self._lock:
            engine, meta = self._current(), self._opened().meta()
        about = {
            "url": f"file:{self._directory}",
            "engine": self._name,
            "created_with": meta["engine"],
            "exact": engine.exact,
            "bits": self._bits,
            "count": len(engine.rows),
            "origin": meta["origin"],
            "format": FORMAT,
        }
        return about if engine.exact else {**about, "approximation": engine.report}

    def close(self) -> None:
        with self._lock:
            if self._store is not None:
                self._store.close()
                self._store = None

    def _opened(self) -> Store:
        if self._store is None:
            raise ValueError(f"the index {self._directory} is closed; open it again")
        return self._store

    def _load(self) -> Engine:
        """Build the engine from the store. The version is read first: what is written meanwhile is read
        twice."""
        store = self._opened()
        self._version = store.version()
        self._pending = []
        self._origin = str(store.meta()["origin"])
        return self._adopt(ENGINES[self._name](Rows(*store.load((self._bits + 7) // 8))))

    def _current(self) -> Engine:
        """The engine over all rows that are committed by now, own and others'. It never changes: search
        unlocked."""
        with self._lock:
            if self._opened().version() != self._version:
                return self._load()
            if self._pending:
                ids, rows = zip(*self._pending, strict=True)
                self._pending = []
                self._adopt(self._engine.plus(np.concatenate(ids), np.concatenate(rows)))
            return self._engine

    def _adopt(self, engine: Engine) -> Engine:
        """Take an engine into use; the store keeps what an approximate one measured of itself."""
        self._engine = engine
        if engine.report and self._opened().meta().get("approximation") != engine.report:
            self._opened().set_meta("approximation", engine.report)
        return engine

    def _narrowed(self, where: Where | None) -> Engine:
        with self._lock:
            engine = self._current()
            if where is None:
                return engine
            allowed = self._opened().matching(where) if isinstance(where, Mapping) else as_ids(where)
        return engine.only(allowed)


def _open(directory: Path, bits: int | None, engine: str, make: bool, wait: float) -> Store:
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file; an index lives in a directory")
    if not (directory / FILE).exists():
        if not make:
            raise FileNotFoundError(f"there is no index in {directory}; build one first or check the address")
        if bits is None:
            raise ValueError(f"there is no index in {directory}; a new one needs the number of bits")
        create(directory, bits, engine)
    return Store(directory, wait)


def _texts(payload: Sequence[Mapping[str, Any]] | None, ids: np.ndarray) -> list[str] | None:
    """The payload as JSON texts, checked."""
    if payload is None:
        return None
    if len(payload) != len(ids):
        raise ValueError(f"{len(ids)} codes with {len(payload)} payloads; give one each, or none at all")
    texts = []
    for one, value in zip(ids.tolist(), payload, strict=True):
        if not isinstance(value, Mapping):
            raise ValueError(f"the payload of id {one} must be a mapping, got {type(value).__name__}")
        for key in value:
            check_key(key)
        texts.append(to_json(dict(value), f"the payload of id {one}"))
    return texts


def _empty(queries: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full((queries, k), -1, dtype=np.int64), np.full((queries, k), -1, dtype=np.int32)
