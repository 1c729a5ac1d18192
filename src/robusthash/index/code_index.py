"""The index of binary codes: SQLite holds the items, an engine in memory searches them."""

from __future__ import annotations

import os
import threading
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from robusthash.core.registry import nearest
from robusthash.core.types import Codes, CodesLike, Ranking, as_codes
from robusthash.index.checked_input import (
    Ids,
    id_array,
    key_texts,
    packed_rows,
    payload_texts,
    whole_number,
)
from robusthash.index.search_engines import ENGINES, Engine, Rows
from robusthash.index.sqlite_store import (
    FILE,
    NewItems,
    Store,
    Which,
    check_choice,
    check_origin,
    create_store,
)

_MOST_EMPTY = 10_000  # ranks of an answer that no item has
Where = Ids | Mapping[str, Any]
"""The items that a search may return: their ids, or the payload values they must have."""


@dataclass(frozen=True)
class Within:
    """All items within a radius of each of Q queries; their number differs from query to query."""

    ids: tuple[Tensor, ...]  # Q tensors (n,) int64, by (distance, id)
    distances: tuple[Tensor, ...]  # Q tensors (n,) int32, ascending

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Added:
    """The outcome of adding N items."""

    ids: Tensor  # (N,) int64
    held: Tensor  # (N,) bool: were held before; replaced under "update", left as they were under "skip"

    def __len__(self) -> int:
        return len(self.ids)


@final
class CodeIndex:
    """Items (id, code, payload) searched by Hamming distance; any number of readers and writers at once.

    * An exact engine returns what ``core.hamming.topk`` returns on the items held, by (distance, id), ties at
      rank k included; -1 fills the ranks that no item has. An approximate one sets ``Ranking.cut``.
    * A write is acknowledged (the call returns) when it survives a kill, and happens whole or not at all.
    * Codes of another origin than those held are refused by ``add``, ``search`` and ``range``. Codes without
      an origin, and an index whose codes came without one, are accepted. An emptied index takes any origin.
    * ``where`` narrows the items before they are ranked: a collection of allowed ids (unknown ones are
      ignored) or a mapping of payload values. ``{"label": "cat", "year": [2024, 2025]}`` keeps the items
      whose label is cat and whose year is either; a payload value that is a list matches by any of its
      members. 2, "2" and "2.0" are the same value, "007" is not 7, None is null; a key that no item has is
      refused. The allowed items are scanned exactly.
    * A store that cannot be written, on a read-only disk say, is searched all the same.
    * Wrong input raises ValueError and changes nothing.

    The engine follows this object's writes, and is built again from the store when another process has
    written. Writers wait for each other. The child of a fork opens the store anew. Exact to about ten million
    codes at interactive speed.

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
        self._lock = threading.RLock()
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
        _OPEN.add(self)

    @property
    def bits(self) -> int:
        """Length of the codes."""
        return self._bits

    @property
    def origin(self) -> str:
        """Digest of the model that made the codes held; "" where none was given or no item is held."""
        with self._lock:
            return self._origin if len(self._current().rows) else ""

    def add(
        self,
        codes: CodesLike,
        payload: Sequence[Mapping[str, Any]] | None = None,
        *,
        keys: Sequence[str] | None = None,
        on_duplicate: str | None = None,
        stamps: Sequence[str] | None = None,
    ) -> Added:
        """Add items; all of them or, on error, none.

        Args:
            codes: N codes of the index's length, with N ids, each 0 or greater, that ``keys`` make needless.
                An array or tensor gets ids that were never given before.
            payload: N JSON objects, returned by ``payload`` and matched by ``where``; none by default.
            keys: N texts that name the items, such as paths. A new key gets an id that was never given
                before, and keeps it as long as it is held.
            on_duplicate: what becomes of a key (without keys: an id) that is held: ``update`` replaces the
                item, ``skip`` keeps it, ``error`` refuses all N. None is ``update`` by key, ``error`` by id.
            stamps: N texts, with keys: which state of the item was encoded, see ``held``.

        Raises:
            ValueError: codes of another length or origin, an id or key given twice or, under ``error``, held
                already, or a payload that JSON cannot write.
            OSError: the disk is full or cannot be written; the index is unchanged and usable.
            TimeoutError: another process has been writing for ``wait`` seconds.
        """
        counted = keys is not None or not isinstance(codes, Codes)  # ids from the counter, inside the write
        codes = as_codes(codes, self._bits)
        rows, ids = packed_rows(codes, self._bits), id_array(codes.ids)
        names = list(map(str, ids.tolist())) if keys is None else key_texts(keys, len(rows))
        texts = None if payload is None else payload_texts(payload, ids.tolist() if keys is None else names)
        if stamps is not None and (keys is None or len(stamps) != len(rows)):
            raise ValueError(f"{len(rows)} codes with {len(stamps)} stamps; give one each, next to keys")
        if keys is None and len(ids) and ids.min() < 0:
            raise ValueError(f"ids must be 0 or greater, got {ids.min()}")
        if len(set(names)) < len(names):
            twice = next(name for name, count in Counter(names).items() if count > 1)
            raise ValueError(f"{f'id {twice}' if keys is None else f'key {twice!r}'} is given more than once")
        new = NewItems(rows, None if counted else ids, keys, stamps, texts, codes.origin)
        choice = ("error" if keys is None else "update") if on_duplicate is None else on_duplicate
        check_choice(choice)
        with self._lock:
            store = self._opened()
            if not len(rows):
                check_origin(codes.origin, self.origin)
                return Added(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool))
            given, held, self._origin = store.add(new, choice)
            written = ~held if choice == "skip" else np.ones(len(rows), dtype=bool)
            self._pending.append((given[written], rows[written]))  # copies: the caller may write into its own
        return Added(torch.from_numpy(given), torch.from_numpy(held))

    def held(self, keys: Sequence[str]) -> dict[str, tuple[int, str]]:
        """By key, those of ``keys`` that are held: the id, and the stamp it was added with ("" for none)."""
        with self._lock:
            return self._opened().held(list(keys))

    def keys(self, prefix: str = "") -> list[str]:
        """The keys that begin with ``prefix``, sorted."""
        with self._lock:
            return self._opened().keys(prefix)

    def search(self, codes: CodesLike, k: int, where: Where | None = None) -> Ranking:
        """The ``k`` nearest items of each of Q query codes, k >= 1: (Q, k), -1 where there are fewer.

        A k above 10,000 is cut at the number of items, or at 10,000 where there are fewer.
        """
        k = whole_number(k, "k", 1)
        queries = self._query_rows(codes)
        engine = self._engine_for(where)
        k = min(k, max(len(engine.rows), _MOST_EMPTY))
        count = min(k, len(engine.rows))
        ids = np.full((len(queries), k), -1, dtype=np.int64)
        distances = np.full((len(queries), k), -1, dtype=np.int32)
        if count:
            ids[:, :count], distances[:, :count] = engine.search(queries, count)
        cut = torch.full((len(queries),), not engine.exact)
        return Ranking(torch.from_numpy(ids), torch.from_numpy(distances), cut)

    def range(self, codes: CodesLike, radius: int, where: Where | None = None) -> Within:
        """All items at most ``radius`` bits, 0 or more, from each query code; exact in every engine."""
        radius = whole_number(radius, "radius", 0)
        queries = self._query_rows(codes)
        neighbours = self._engine_for(where).range(queries, min(radius, self._bits))
        ids, distances = zip(*neighbours, strict=True) if neighbours else ((), ())
        return Within(tuple(map(torch.from_numpy, ids)), tuple(map(torch.from_numpy, distances)))

    def remove(self, ids: Where | None = None, *, keys: Sequence[str] | None = None) -> int:
        """Remove items and return how many there were; ids and keys that are not held are ignored.

        Args:
            ids: ids, or as in ``search`` the payload values of the items; {} would mean all and is refused.
            keys: instead of ids, the keys of items.
        """
        if (ids is None) == (keys is None) or (isinstance(ids, Mapping) and not ids):
            raise ValueError("remove takes ids, payload values or keys: one of them")
        which: Which = list(keys or ())
        if ids is not None:
            which = ids if isinstance(ids, Mapping) else id_array(ids)
        with self._lock:
            removed = self._opened().remove(which)
            if len(removed):
                self._engine = self._current().minus(removed)
        return len(removed)

    def count(self) -> int:
        """Number of items held."""
        return len(self._current().rows)

    def next_id(self) -> int:
        """The id that the next new key gets: one more than the highest ever held, 0 at first."""
        with self._lock:
            return self._opened().next_id()

    def values(self, key: str, most: int = 10) -> list[Any]:
        """Up to ``most`` different values of a payload key; none where no item has it."""
        with self._lock:
            return self._opened().values(key, most)

    def payload(self, ids: Ids) -> list[dict[str, Any]]:
        """The payload of each id, in order, ``{}`` where an item has none; KeyError for an id not held."""
        array = id_array(ids)
        with self._lock:
            by_id = self._opened().payload(array)
        missing = [item for item in array.tolist() if item not in by_id]
        if missing:
            raise KeyError(f"id {missing[0]} is not in the index {self._directory}")
        return [by_id[item] for item in array.tolist()]

    def snapshot(self, directory: str | Path) -> None:
        """Write a consistent copy to a new directory, which appears only when complete and on disk."""
        target = Path(directory)
        if target.exists():
            raise FileExistsError(f"{target} exists already; give a snapshot a new directory")
        with self._lock:
            self._opened().copy_to(target)

    def info(self) -> dict[str, Any]:
        """Address, engine, size, origin and format; of an approximate engine its measured recall too."""
        with self._lock:
            engine, meta = self._current(), self._opened().meta()
        names = {"url": f"file:{self._directory}", "engine": self._name, "created_with": meta["engine"]}
        sizes = {
            "exact": engine.exact,
            "bits": self._bits,
            "count": len(engine.rows),
            "origin": meta["origin"],
        }
        info = {**names, **sizes, "format": meta["format"]}
        return info if engine.exact else {**info, "approximation": engine.report}

    def close(self) -> None:
        """Release the store. A closed index raises ValueError; closing twice does no harm."""
        with self._lock:
            if self._store is not None:
                self._store.close()
                self._store = None

    def __enter__(self) -> CodeIndex:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

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
        self._version = store.version()
        self._pending = []
        self._origin = str(store.meta()["origin"])
        self._engine = ENGINES[self._name](Rows(*store.load((self._bits + 7) // 8)))
        return self._engine

    def _current(self) -> Engine:
        """The engine over all rows committed by now, by anyone. It never changes, so search it unlocked."""
        with self._lock:
            if self._opened().version() != self._version:
                return self._load()
            if self._pending:
                ids, rows = map(np.concatenate, zip(*self._pending, strict=True))
                self._pending = []
                last = len(ids) - 1 - np.unique(ids[::-1], return_index=True)[1]  # the last write of each id
                replaced = np.intersect1d(ids, self._engine.rows.ids)
                engine = self._engine.minus(replaced) if len(replaced) else self._engine
                self._engine = engine.plus(ids[last], rows[last])
            return self._engine

    def _engine_for(self, where: Where | None) -> Engine:
        """The engine over the items that ``where`` allows."""
        with self._lock:
            engine = self._current()
            if where is None:
                return engine
            allowed = self._opened().matching(where) if isinstance(where, Mapping) else id_array(where)
        return engine.only(allowed)

    def _query_rows(self, codes: CodesLike) -> np.ndarray:
        """Packed rows of query codes that fit the codes held in length and origin."""
        codes = as_codes(codes, self._bits)
        rows = packed_rows(codes, self._bits)
        check_origin(codes.origin, self.origin)
        return rows


_OPEN: weakref.WeakSet[CodeIndex] = weakref.WeakSet()
_LEFT_BEHIND: list[Store] = []  # connections of the parent, in the child of a fork


def _after_fork() -> None:
    """In the child no other thread lives that could give a lock back."""
    for index in _OPEN:
        index._lock = threading.RLock()


os.register_at_fork(after_in_child=_after_fork)


def open_index(url: str, bits: int | None = None, engine: str = "faiss", create: bool = True) -> CodeIndex:
    """Open the index at an address, or make it.

    Args:
        url: ``file:DIR``, a directory of this machine.
        bits: code length; needed for a new index, checked against an old one.
        engine: ``faiss`` (exact), ``numpy`` (exact, the oracle) or ``faiss-ivf`` (approximate; its measured
            recall is in ``info()["approximation"]``). The store is the same for all three.
        create: make the index where there is none.

    Raises:
        FileNotFoundError: there is no index and ``create`` is False.
        ValueError: an unknown scheme or engine, codes of another length, or a store that is damaged or of
            another format.
    """
    scheme, _, rest = url.partition(":")
    if scheme != "file" or not rest:
        raise ValueError(f"an index address is file:DIR, got {url!r}; supported schemes: file")
    if rest.startswith("//"):
        if not rest.startswith("///"):
            raise ValueError(f"{url!r} names a host; write file:DIR or file:///DIR, on this machine")
        rest = rest[2:]
    return CodeIndex(Path(rest).expanduser(), bits, engine, create)


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
