"""The engines that scan codes held in memory. All are values: a change of the rows gives a new engine."""

from __future__ import annotations

import itertools
import math
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, final

import numpy as np
import torch

from robusthash.core import hamming
from robusthash.core.runtime import Draws
from robusthash.index.code_index import Neighbours, View, by_distance


def _one_thread() -> None:
    """In the child of a fork the threads of OpenMP are gone, and whoever waits for them waits for ever."""
    torch.set_num_threads(1)
    if "faiss" in sys.modules:
        sys.modules["faiss"].omp_set_num_threads(1)


os.register_at_fork(after_in_child=_one_thread)


@final
@dataclass(frozen=True)
class Rows:
    """Items in ascending order of id. In that order "first row wins" is the (distance, id) rule."""

    ids: np.ndarray  # (N,) int64, ascending, unique
    codes: np.ndarray  # (N, bytes) uint8

    def __len__(self) -> int:
        return len(self.ids)

    def changed(self, gone: np.ndarray, ids: np.ndarray, codes: np.ndarray) -> Rows:
        """These rows without some ids, held or not, and with rows of others, in any order."""
        at = self._places(gone)
        ids = np.concatenate([np.delete(self.ids, at), ids])
        codes = np.concatenate([np.delete(self.codes, at, axis=0), codes])
        if (np.diff(ids) > 0).all():
            return Rows(ids, codes)
        order = np.argsort(ids, kind="stable")  # a merge of sorted runs: much faster than a sort
        return Rows(ids[order], codes[order])

    def only(self, ids: np.ndarray) -> Rows:
        """The rows of some ids; those not held are ignored."""
        at = self._places(ids)
        return Rows(self.ids[at], self.codes[at])

    def _places(self, ids: np.ndarray) -> np.ndarray:
        """Ascending places of those of some ids that are held."""
        if len(self) == 0:
            return np.zeros(0, dtype=np.int64)
        ids = np.unique(ids)
        at = np.searchsorted(self.ids, ids).clip(max=len(self) - 1)
        places: np.ndarray = at[self.ids[at] == ids]
        return places


class Engine(ABC):
    """A scan of rows. Safe to call from several threads at once, because nothing in it changes."""

    exact = True

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.report: dict[str, Any] = {}  # of an approximate engine: its recall, measured when it was built

    def __len__(self) -> int:
        return len(self.rows)

    def search(self, queries: np.ndarray, k: int) -> Neighbours:
        """(Q, bytes) uint8 -> (Q, min(k, N)) ids and distances by (distance, id); -1 where none was found."""
        k = min(k, len(self.rows))
        if k == 0:
            return np.zeros((len(queries), 0), np.int64), np.zeros((len(queries), 0), np.int32)
        return self._search(queries, k)

    @abstractmethod
    def _search(self, queries: np.ndarray, k: int) -> Neighbours:
        """``search`` for 1 <= k <= N."""

    @abstractmethod
    def range(self, queries: np.ndarray, radius: int) -> list[Neighbours]:
        """(Q, bytes) uint8 -> per query the ids and distances within ``radius``, by (distance, id). Exact."""

    def only(self, ids: np.ndarray) -> Engine:
        """An exact engine over some of the rows."""
        return type(self)(self.rows.only(ids))

    def changed(self, gone: np.ndarray, ids: np.ndarray, codes: np.ndarray) -> Engine:
        """The engine without some ids, held or not, and with rows of others, in any order."""
        return type(self)(self.rows.changed(gone, ids, codes))


@final
class NumpyEngine(Engine):
    """The oracle itself: ``core.hamming.topk``. Needs no faiss, and is several times slower."""

    def _search(self, queries: np.ndarray, k: int) -> Neighbours:
        block = max(1, 4_000_000 // max(1, len(self.rows)))  # the oracle holds block * N distances as int64
        codes, ids = torch.from_numpy(self.rows.codes), torch.from_numpy(self.rows.ids)
        nearest, distances = hamming.topk(torch.from_numpy(queries), codes, k, ids, block)
        return nearest.numpy(), distances.numpy()

    def range(self, queries: np.ndarray, radius: int) -> list[Neighbours]:
        codes = torch.from_numpy(self.rows.codes)
        neighbours = []
        for query in queries:
            distances = hamming.distance(torch.from_numpy(query[None]), codes)[0].numpy()
            near = np.flatnonzero(distances <= radius)
            neighbours.append(by_distance(self.rows.ids[near], distances[near]))
        return neighbours


@final
class FlatEngine(Engine):
    """faiss ``IndexBinaryFlat``: the answers of the oracle, about seven times faster at a million codes.

    faiss keeps, of equal distances, those of the smallest row and lists them in row order: its heap compares
    (distance, row), and a later row replaces an earlier one only when it is strictly nearer. Rows are in id
    order, so its order is the (distance, id) rule and ties at rank k need no second search. faiss does not
    promise this, so ``check_tie_order`` tests the installed build once for each code width.
    """

    def __init__(self, rows: Rows) -> None:
        super().__init__(rows)
        check_tie_order(rows.codes.shape[1])
        self._index = flat_index(rows.codes)

    def _search(self, queries: np.ndarray, k: int) -> Neighbours:
        distances, at = self._index.search(queries, k)
        return self.rows.ids[at], distances  # k <= N, so that no slot is -1

    def range(self, queries: np.ndarray, radius: int) -> list[Neighbours]:
        limits, distances, at = self._index.range_search(queries, radius + 1)  # faiss: strictly nearer than
        distances = distances.astype(np.int32)
        parts = [slice(*pair) for pair in itertools.pairwise(limits.tolist())]
        return [by_distance(self.rows.ids[at[part]], distances[part]) for part in parts]


@final
class IvfEngine(Engine):
    """faiss ``IndexBinaryIVF``: searches some of its lists only, so it is faster and misses items.

    ``report`` holds the recall against the exact answer, measured when the lists were trained. They are
    trained again when the rows have doubled, and when the engine is built from the store.
    """

    exact = False

    def __init__(self, rows: Rows, index: Any, report: dict[str, Any]) -> None:
        super().__init__(rows)
        self.report = report
        self._index = index

    @classmethod
    def trained(cls, rows: Rows) -> IvfEngine:
        """The engine with lists made for these rows."""
        index = _trained_ivf(rows.codes)
        index.add_with_ids(rows.codes, rows.ids)
        engine = cls(rows, index, {"trained_on": len(rows), "lists": index.nlist, "probes": index.nprobe})
        engine.report["recall@10"] = _recall(engine, 10)
        return engine

    def _search(self, queries: np.ndarray, k: int) -> Neighbours:
        distances, ids = self._index.search(queries, k)
        distances[ids < 0] = -1
        order = np.lexsort((ids, np.where(ids < 0, np.iinfo(np.int32).max, distances)), axis=1)
        return np.take_along_axis(ids, order, 1), np.take_along_axis(distances, order, 1)

    def range(self, queries: np.ndarray, radius: int) -> list[Neighbours]:
        return FlatEngine(self.rows).range(queries, radius)

    def only(self, ids: np.ndarray) -> FlatEngine:
        return FlatEngine(self.rows.only(ids))

    def changed(self, gone: np.ndarray, ids: np.ndarray, codes: np.ndarray) -> IvfEngine:
        import faiss

        rows = self.rows.changed(gone, ids, codes)
        if len(rows) > 2 * self.report["trained_on"]:
            return IvfEngine.trained(rows)
        index = faiss.clone_binary_index(self._index)  # type: ignore[attr-defined]
        if len(gone):
            index.remove_ids(gone)
        index.add_with_ids(codes, ids)
        return IvfEngine(rows, index, self.report)


ENGINES: dict[str, Callable[[Rows], Engine]] = {
    "faiss": FlatEngine,
    "numpy": NumpyEngine,
    "faiss-ivf": IvfEngine.trained,
}
"""Engines by name, each made of all rows."""


def flat_index(codes: np.ndarray) -> Any:
    """A faiss exact index of (N, bytes) packed codes; faiss counts whole bytes, and the padding is zero."""
    import faiss

    index = faiss.IndexBinaryFlat(codes.shape[1] * 8)
    index.add(codes)
    return index


def _trained_ivf(codes: np.ndarray) -> Any:
    """A trained, empty faiss inverted-file index: about sqrt(N) lists, an eighth of which are searched."""
    import faiss

    bits, lists = codes.shape[1] * 8, max(1, math.isqrt(len(codes)))
    sample = codes if len(codes) else np.zeros((1, bits // 8), np.uint8)
    sample = sample[:: max(1, len(codes) // (64 * lists))]
    sample = np.unique(sample, axis=0)  # trained codes collapse to few values: no list for each copy of one
    lists = max(1, min(lists, len(sample) // 40))
    index = faiss.IndexBinaryIVF(faiss.IndexBinaryFlat(bits), bits, lists)
    index.cp.min_points_per_centroid = 1
    index.train(sample)
    index.nprobe = math.ceil(lists / 8)
    return index


def _recall(engine: Engine, k: int) -> float:
    """``measured_recall`` on 100 stored codes."""
    count = len(engine)
    if count == 0:
        return 1.0
    generator = Draws(0).within("index-recall").generator()
    at = torch.randint(count, (100,), generator=generator).numpy()
    return measured_recall(engine, FlatEngine(engine.rows), engine.rows.codes[at], generator, min(k, count))


def measured_recall(
    engine: View, exact: View, codes: np.ndarray, generator: torch.Generator, k: int = 10
) -> float:
    """Share of ``k`` ranks whose distance is the exact one, of (Q, bytes) codes with 5% of bits flipped."""
    flips = torch.rand(len(codes), codes.shape[1] * 8, generator=generator).numpy() < 0.05
    queries = codes ^ np.packbits(flips, axis=1)
    return float((engine.search(queries, k)[1] == exact.search(queries, k)[1]).mean())


@cache
def check_tie_order(width: int) -> None:
    """RuntimeError unless the installed faiss lets the first row win, on codes that are nearly all tied."""
    import faiss

    generator = Draws(0).within("tie-order", width).generator()
    codes = torch.randint(2, (400, width), generator=generator, dtype=torch.uint8)
    queries, database = codes[:40], codes[40:]
    for k in (1, 7, 100, 360):
        distances, at = flat_index(database.numpy()).search(queries.numpy(), k)
        ids, expected = hamming.topk(queries, database, k)
        if not (np.array_equal(at, ids.numpy()) and np.array_equal(distances, expected.numpy())):
            raise RuntimeError(
                f"faiss {faiss.__version__} does not order equal distances by row here, so its answers would "
                "differ from the rule; install another faiss-cpu or open the index with engine='numpy'"
            )
