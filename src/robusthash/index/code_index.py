"""``CodeIndex``, the contract of every index of binary codes, wherever its items are."""

from __future__ import annotations

import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from robusthash.core.types import Codes, CodesLike, Ranking, as_codes
from robusthash.index.checked_input import (
    Ids,
    NewItems,
    Which,
    check_choice,
    check_origin,
    checked_keys,
    id_array,
    key_texts,
    packed_rows,
    payload_texts,
    whole_number,
)
from robusthash.index.payload_filter import check_filter, to_json

Neighbours = tuple[np.ndarray, np.ndarray]  # ids (int64) and distances (int32)
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


class View(Protocol):
    """The items that a search may return, as its engine sees them."""

    exact: bool  # whether ``search`` is

    def __len__(self) -> int:
        """Number of items."""

    def search(self, queries: np.ndarray, k: int) -> Neighbours:
        """(Q, bytes) uint8 -> (Q, up to k) ids and distances by (distance, id); -1 where none was found."""

    def range(self, queries: np.ndarray, radius: int) -> list[Neighbours]:
        """(Q, bytes) uint8 -> per query the ids and distances within ``radius``, by (distance, id). Exact."""


class CodeIndex(ABC):
    """Items (id, code, payload) searched by Hamming distance; any number of readers and writers at once.

    * An exact engine returns what ``core.hamming.topk`` returns on the items held, by (distance, id), ties at
      rank k included; -1 fills the ranks that no item has. An approximate one sets ``Ranking.cut``.
    * A write is acknowledged (the call returns) when it survives a kill, and happens whole or not at all
      (Milvus promises less: see ``MilvusIndex``).
    * Codes of another origin than those held are refused by ``add``, ``search`` and ``range``. Codes without
      an origin, and an index whose codes came without one, are accepted. An emptied index takes any origin.
    * ``where`` narrows the items before they are ranked: a collection of allowed ids (unknown ones are
      ignored) or a mapping of payload values. ``{"label": "cat", "year": [2024, 2025]}`` keeps the items
      whose label is cat and whose year is either; a payload value that is a list matches by any of its
      members. 2, "2" and "2.0" are the same value, "007" is not 7, None is null; a key that no item has is
      refused, and so is a filter of more than 32 keys or 1,000 values. The allowed items are scanned exactly.
    * Wrong input raises ValueError and changes nothing. A server that is gone raises ConnectionError.
    * The child of a fork opens its own connection.

    This class checks what goes in and arranges what comes out; its subclasses hold the items and scan them.
    """

    _bits: int

    def __init__(self) -> None:
        self._lock = threading.RLock()
        _OPEN.add(self)

    @property
    def bits(self) -> int:
        """Length of the codes."""
        return self._bits

    @property
    def origin(self) -> str:
        """Digest of the model that made the codes held; "" where none was given or no item is held."""
        with self._lock:
            origin = self._stored_origin()
            return origin if origin and self._any_items() else ""

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
        if stamps is not None:
            to_json(list(stamps), "a stamp")
        new = NewItems(rows, None if counted else ids, keys, stamps, texts, codes.origin)
        choice = ("error" if keys is None else "update") if on_duplicate is None else on_duplicate
        check_choice(choice)
        if not len(rows):
            self._check_origin(codes.origin)
            return Added(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool))
        with self._lock:
            stored_ids, held = self._write(new, choice)
        return Added(torch.from_numpy(stored_ids), torch.from_numpy(held))

    def search(self, codes: CodesLike, k: int, where: Where | None = None) -> Ranking:
        """The ``k`` nearest items of each of Q query codes, k >= 1: (Q, k), -1 where there are fewer.

        A k above 10,000 is cut at the number of items, or at 10,000 where there are fewer.
        """
        k = whole_number(k, "k", 1)
        queries = self._query_rows(codes)
        view = self._view_of(where)
        if k > _MOST_EMPTY:
            k = min(k, max(len(view), _MOST_EMPTY))
        ids = np.full((len(queries), k), -1, dtype=np.int64)
        distances = np.full((len(queries), k), -1, dtype=np.int32)
        nearest_ids, near = view.search(queries, k)
        ids[:, : nearest_ids.shape[1]], distances[:, : nearest_ids.shape[1]] = nearest_ids, near
        cut = torch.full((len(queries),), not view.exact)
        return Ranking(torch.from_numpy(ids), torch.from_numpy(distances), cut)

    def range(self, codes: CodesLike, radius: int, where: Where | None = None) -> Within:
        """All items at most ``radius`` bits, 0 or more, from each query code; exact in every engine."""
        radius = whole_number(radius, "radius", 0)
        queries = self._query_rows(codes)
        neighbours = self._view_of(where).range(queries, min(radius, self._bits))
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
        which: Which = checked_keys(() if keys is None else keys)
        if ids is not None:
            which = _checked(ids)
        with self._lock:
            return self._delete(which)

    def payload(self, ids: Ids) -> list[dict[str, Any]]:
        """The payload of each id, in order, ``{}`` where an item has none; KeyError for an id not held."""
        array = id_array(ids)
        with self._lock:
            by_id = self._payloads(array)
        missing = [item for item in array.tolist() if item not in by_id]
        if missing:
            raise KeyError(f"id {missing[0]} is not in the index {self.address}")
        return [by_id[item] for item in array.tolist()]

    @property
    @abstractmethod
    def address(self) -> str:
        """The place of the items, without a password."""

    @abstractmethod
    def count(self) -> int:
        """Number of items held."""

    @abstractmethod
    def next_id(self) -> int:
        """The id that the next new key gets: one more than any id ever held."""

    @abstractmethod
    def held(self, keys: Sequence[str]) -> dict[str, tuple[int, str]]:
        """By key, those of ``keys`` that are held: the id, and the stamp it was added with ("" for none)."""

    @abstractmethod
    def keys_of(self, ids: Sequence[int]) -> dict[int, str]:
        """By id, the keys of those of ``ids`` that are held and have one."""

    @abstractmethod
    def keys(self, prefix: str = "") -> list[str]:
        """The keys that begin with ``prefix``, sorted."""

    @abstractmethod
    def values(self, key: str, most: int = 10) -> list[Any]:
        """Up to ``most`` different values of a payload key; none where no item has it."""

    @abstractmethod
    def build_source(self) -> Any:
        """The note that ``set_build_source`` wrote last; None where there is none."""

    @abstractmethod
    def set_build_source(self, source: Mapping[str, Any]) -> None:
        """Note as JSON what the index is made of: the run that encodes for it, say."""

    @abstractmethod
    def snapshot(self, directory: str | Path) -> None:
        """Write a consistent copy to a new directory, which appears only when complete and on disk.

        Raises:
            io.UnsupportedOperation: (a ValueError) the items are on a server, which has a backup of its own.
        """

    @abstractmethod
    def info(self) -> dict[str, Any]:
        """Address, engine, size, origin and format; of an approximate engine its measured recall too."""

    @abstractmethod
    def close(self) -> None:
        """Release the store. A closed index raises ValueError; closing twice does no harm."""

    @abstractmethod
    def _write(self, new: NewItems, on_duplicate: str) -> tuple[np.ndarray, np.ndarray]:
        """Write checked items, one or more: (N,) ids, and (N,) bool, those that were held before."""

    @abstractmethod
    def _delete(self, which: Which) -> int:
        """Delete items and return their number."""

    @abstractmethod
    def _view(self, where: np.ndarray | Mapping[str, Any] | None) -> View:
        """The items that ``where`` allows."""

    @abstractmethod
    def _payloads(self, ids: np.ndarray) -> dict[int, dict[str, Any]]:
        """By id, the payload of those that are held."""

    @abstractmethod
    def _stored_origin(self) -> str:
        """The origin last given, also where all items are gone since."""

    @abstractmethod
    def _any_items(self) -> bool:
        """True if any item is held."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _view_of(self, where: Where | None) -> View:
        allowed = None if where is None else _checked(where)
        with self._lock:
            return self._view(allowed)

    def _check_origin(self, origin: str) -> None:
        """Refuse codes of another origin; whether an item is held is looked up only where it matters."""
        with self._lock:
            if origin != self._stored_origin():
                check_origin(origin, self.origin)

    def _query_rows(self, codes: CodesLike) -> np.ndarray:
        """Packed rows of query codes that fit the codes held in length and origin."""
        codes = as_codes(codes, self._bits)
        rows = packed_rows(codes, self._bits)
        self._check_origin(codes.origin)
        return rows


_OPEN: weakref.WeakSet[CodeIndex] = weakref.WeakSet()


def _checked(where: Where) -> np.ndarray | Mapping[str, Any]:
    """Ids as an array, or a filter that is not too large."""
    if not isinstance(where, Mapping):
        return id_array(where)
    check_filter(where)
    return where


def by_distance(ids: np.ndarray, distances: np.ndarray) -> Neighbours:
    """The items of one query in the order of (distance, id)."""
    order = np.lexsort((ids, distances))
    return ids[order], distances[order]


def _after_fork() -> None:
    """In the child no other thread lives that could give a lock back."""
    for index in _OPEN:
        index._lock = threading.RLock()


os.register_at_fork(after_in_child=_after_fork)
