"""The index of binary codes: SQLite holds the items, an engine in memory searches them."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from robusthash.core.registry import nearest
from robusthash.core.types import Codes, CodesLike, Ranking, as_codes
from robusthash.index.search_engines import ENGINES, Engine, Rows
from robusthash.index.sqlite_store import FILE, FORMAT, Store, check_key, check_origin, create_store, to_json

Ids = Tensor | np.ndarray | Iterable[int]
"""Item ids: whole numbers, 0 or greater, in one dimension."""

Where = Ids | Mapping[str, Any]
"""The items that a search may return: their ids, or the payload values they must have."""


@dataclass(frozen=True)
class Within:
    """All items within a radius of each of Q queries; their number differs from query to query."""

    ids: tuple[Tensor, ...]  # Q tensors (n,) int64, by (distance, id)
    distances: tuple[Tensor, ...]  # Q tensors (n,) int32, ascending

    def __len__(self) -> int:
        return len(self.ids)


@final
class CodeIndex:
    """Items (id, code, payload) searched by Hamming distance; one writer at a time, any number of readers.

    * An exact engine returns what ``core.hamming.topk`` returns on the items held, by (distance, id), ties at
      rank k included; -1 fills the ranks that no item has. An approximate one sets ``Ranking.cut``.
    * A write is acknowledged (the call returns) when it survives a kill, and happens whole or not at all.
    * Codes of another origin than those held are refused by ``add``, ``search`` and ``range``. Codes without
      an origin, and an index whose codes came without one, are accepted. An emptied index takes any origin.
    * ``where`` narrows the items before they are ranked: a collection of allowed ids (unknown ones are
      ignored) or a mapping of payload values. ``{"label": "cat", "year": [2024, 2025]}`` keeps the items
      whose label is cat and whose year is either; a payload value that is a list matches by any of its
      members. The allowed items are scanned exactly.
    * Wrong input raises ValueError and changes nothing.

    The engine follows this object's writes, and is built again from the store when another process has
    written. Exact to about ten million codes at interactive speed.

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
        wait: float = 5.0,
    ) -> None:
        if engine not in ENGINES:
            raise ValueError(f"no index engine is called {engine!r}{nearest(engine, ENGINES)}")
        if bits is not None and bits < 1:
            raise ValueError(f"bits must be positive, got {bits}")
        self._directory, self._name = directory, engine
        self._lock = threading.RLock()
        self._store: Store | None = None
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
    def bits(self) -> int:
        """Length of the codes."""
        return self._bits

    @property
    def origin(self) -> str:
        """Digest of the model that made the codes held; "" where none was given or no item is held."""
        with self._lock:
            return self._origin if len(self._current().rows) else ""

    def add(self, codes: CodesLike, payload: Sequence[Mapping[str, Any]] | None = None) -> None:
        """Add items; all of them or, on error, none.

        Args:
            codes: N codes of the index's length with N new ids, each 0 or greater; the ids of an array or
                tensor go on from the highest that is held.
            payload: N JSON objects, returned by ``payload`` and matched by ``where``; none by default.

        Raises:
            ValueError: codes of another length or origin, an id given twice or held already, or a payload
                that JSON cannot write.
            OSError: the disk is full; the index is unchanged and usable.
        """
        codes = as_codes(codes, self._bits, self.next_id())
        rows, ids = _packed_rows(codes, self._bits), _id_array(codes.ids)
        texts = None if payload is None else _payload_texts(payload, ids)
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

    def search(self, codes: CodesLike, k: int, where: Where | None = None) -> Ranking:
        """The ``k`` nearest items of each of Q query codes, k >= 1: (Q, k), -1 where there are fewer."""
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        queries = self._query_rows(codes)
        engine = self._engine_for(where)
        count = min(k, len(engine.rows))
        ids = np.full((len(queries), k), -1, dtype=np.int64)
        distances = np.full((len(queries), k), -1, dtype=np.int32)
        if count:
            ids[:, :count], distances[:, :count] = engine.search(queries, count)
        cut = torch.full((len(queries),), not engine.exact)
        return Ranking(torch.from_numpy(ids), torch.from_numpy(distances), cut)

    def range(self, codes: CodesLike, radius: int, where: Where | None = None) -> Within:
        """All items at most ``radius`` bits, 0 or more, from each query code; exact in every engine."""
        if radius < 0:
            raise ValueError(f"radius must be 0 or greater, got {radius}")
        queries = self._query_rows(codes)
        neighbours = self._engine_for(where).range(queries, min(radius, self._bits))
        ids, distances = zip(*neighbours, strict=True) if neighbours else ((), ())
        return Within(tuple(map(torch.from_numpy, ids)), tuple(map(torch.from_numpy, distances)))

    def remove(self, ids: Ids) -> int:
        """Remove items and return how many there were; ids that are not held are ignored."""
        array = _id_array(ids)
        with self._lock:
            removed = self._opened().remove(array)
            if removed:
                self._engine = self._current().minus(array)
        return removed

    def count(self) -> int:
        """Number of items held."""
        return len(self._current().rows)

    def next_id(self) -> int:
        """One more than the highest id held, 0 for an empty index."""
        ids = self._current().rows.ids
        return int(ids[-1]) + 1 if len(ids) else 0

    def payload(self, ids: Ids) -> list[dict[str, Any]]:
        """The payload of each id, in order, ``{}`` where an item has none; KeyError for an id not held."""
        array = _id_array(ids)
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
        info = {**names, **sizes, "format": FORMAT}
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
                ids, rows = zip(*self._pending, strict=True)
                self._pending = []
                self._engine = self._engine.plus(np.concatenate(ids), np.concatenate(rows))
            return self._engine

    def _engine_for(self, where: Where | None) -> Engine:
        """The engine over the items that ``where`` allows."""
        with self._lock:
            engine = self._current()
            if where is None:
                return engine
            allowed = self._opened().matching(where) if isinstance(where, Mapping) else _id_array(where)
        return engine.only(allowed)

    def _query_rows(self, codes: CodesLike) -> np.ndarray:
        """Packed rows of query codes that fit the codes held in length and origin."""
        codes = as_codes(codes, self._bits)
        rows = _packed_rows(codes, self._bits)
        check_origin(codes.origin, self.origin)
        return rows


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


def _id_array(ids: Ids) -> np.ndarray:
    """Any collection of ids as (N,) int64, in its order."""
    values = ids.cpu().numpy() if isinstance(ids, Tensor) else ids
    array = values if isinstance(values, np.ndarray) else np.array(list(values))
    if array.ndim != 1:
        raise ValueError(f"ids must have one dimension, got shape {array.shape}")
    if len(array) == 0:
        return np.zeros(0, dtype=np.int64)
    if array.dtype.kind not in "iu":
        raise ValueError(f"ids must be whole numbers, got {array.dtype}: {array[0]!r}")
    return array.astype(np.int64)


def _packed_rows(codes: Codes, bits: int) -> np.ndarray:
    """The rows of ``codes`` as a contiguous (N, ceil(K / 8)) uint8 array, checked against ``bits``."""
    if codes.bits != bits:
        raise ValueError(f"codes of {codes.bits} bits do not fit an index of {bits} bits; use the same model")
    width, packed = (bits + 7) // 8, codes.packed
    if packed.dtype != torch.uint8 or packed.ndim != 2 or packed.shape[1] != width:
        got = f"got {tuple(packed.shape)} {packed.dtype}; use hamming.pack"
        raise ValueError(f"codes of {bits} bits are (N, {width}) torch.uint8 rows, {got}")
    if len(codes.ids) != len(packed):
        raise ValueError(f"{len(packed)} codes with {len(codes.ids)} ids")
    rows = np.ascontiguousarray(packed.cpu().numpy())
    padding = width * 8 - bits
    if padding and (rows[:, -1] & ((1 << padding) - 1)).any():  # it would count as distance
        raise ValueError(f"codes have ones after bit {bits}; the padding must be zero, use hamming.pack")
    return rows


def _payload_texts(payload: Sequence[Mapping[str, Any]], ids: np.ndarray) -> list[str]:
    """The payload as JSON texts, checked."""
    if len(payload) != len(ids):
        raise ValueError(f"{len(ids)} codes with {len(payload)} payloads; give one each, or none at all")
    texts = []
    for item, value in zip(ids.tolist(), payload, strict=True):
        if not isinstance(value, Mapping):
            raise ValueError(f"the payload of id {item} must be a mapping, got {type(value).__name__}")
        for key in value:
            check_key(key)
        texts.append(to_json(dict(value), f"the payload of id {item}"))
    return texts
