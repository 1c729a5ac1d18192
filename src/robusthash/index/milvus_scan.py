"""Searches in a Milvus collection that hold the rule of ties: by (distance, id)."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from robusthash.index.code_index import Neighbours, by_distance
from robusthash.index.milvus_connection import MilvusConnection
from robusthash.index.server_index import Allowed, padded

_LIMIT = 16_384  # results of a query that Milvus gives at most
_TOGETHER = 200_000  # results of one request
_IN_LIST = 10_000  # members of a list in a filter
_LAST = 2**63 - 1


class Scan:
    """The items that a filter allows, scanned by the server.

    Args:
        probes: lists that an approximate engine looks into; None for an exact engine.
        nothing: called where no item passes the filter.
    """

    def __init__(
        self,
        connection: MilvusConnection,
        collection: str,
        selection: Allowed,
        exact: bool,
        probes: int | None,
        lock: threading.RLock,
        nothing: Callable[[], None] | None,
    ) -> None:
        self.exact = exact
        self._connection, self._collection, self._lock = connection, collection, lock
        self._selection, self._filter = selection, condition(selection)
        self._params = {} if probes is None else {"nprobe": probes}
        self._nothing = nothing

    def __len__(self) -> int:
        if self._selection.is_none:
            return 0
        options = {"filter": self._filter, "output_fields": ["count(*)"], "consistency_level": "Strong"}
        with self._lock:
            return int(self._connection.call("query", self._collection, **options)[0]["count(*)"])

    def search(self, queries: np.ndarray, k: int) -> Neighbours:
        if self.exact and 2 * k > _LIMIT:
            return padded(self.range(queries, queries.shape[1] * 8), k)
        limit = min(_LIMIT, max(2 * k, 64) if self.exact else k)
        answers = []
        for start in range(0, len(queries), max(1, _TOGETHER // limit)):
            part = queries[start : start + max(1, _TOGETHER // limit)]
            for query, (ids, distances) in zip(part, self._request(part, limit), strict=True):
                full = len(ids) == limit
                if self.exact and full and distances[k - 1] == distances[-1]:
                    ids, distances = self._with_ties(query, ids, distances, k)
                answers.append(by_distance(ids, distances))
        self._check_known(answers)
        return padded(answers, k)

    def range(self, queries: np.ndarray, radius: int) -> list[Neighbours]:
        answers = [by_distance(*self._within(query, radius, 0, _LAST)) for query in queries]
        self._check_known(answers)
        return answers

    def _with_ties(self, query: np.ndarray, ids: np.ndarray, distances: np.ndarray, k: int) -> Neighbours:
        """The k nearest where Milvus cut among equals: the nearer ones, and of the tied the smallest ids.

        Milvus chooses freely among equals. All at the tied distance are asked for up to some id; where they
        are more than it gives, at least as many as are missing lie at or below the id of that rank among
        those it gave, which bounds the next request.
        """
        tied = distances[k - 1]
        nearer = distances < tied
        missing, last = k - int(nearer.sum()), _LAST
        while True:
            equal, _ = self._request(query[None], _LIMIT, (int(tied), int(tied)), (0, last))[0]
            if len(equal) < _LIMIT:
                break
            last = int(np.partition(equal, missing - 1)[missing - 1])
        equal = np.sort(equal)[:missing]
        same = np.full(len(equal), tied, dtype=np.int32)
        return np.concatenate([ids[nearer], equal]), np.concatenate([distances[nearer], same])

    def _within(self, query: np.ndarray, radius: int, first: int, last: int) -> Neighbours:
        """All within the radius with ids from ``first`` to ``last``; halved where Milvus would cut."""
        ids, distances = self._request(query[None], _LIMIT, (0, radius), (first, last))[0]
        if len(ids) < _LIMIT:
            return ids, distances
        middle = int(np.partition(ids, len(ids) // 2 - 1)[len(ids) // 2 - 1])
        low, high = self._within(query, radius, first, middle), self._within(query, radius, middle + 1, last)
        return np.concatenate([low[0], high[0]]), np.concatenate([low[1], high[1]])

    def _request(
        self,
        queries: np.ndarray,
        limit: int,
        distances: tuple[int, int] | None = None,
        ids: tuple[int, int] = (0, _LAST),
    ) -> list[Neighbours]:
        """One request: up to ``limit`` items a query, of distances and ids from .. to .."""
        if self._selection.is_none or not len(queries):
            return [(np.zeros(0, np.int64), np.zeros(0, np.int32)) for _ in queries]
        clauses = [f"({self._filter})"] if self._filter else []
        clauses += [f"id >= {ids[0]}"] if ids[0] > 0 else []
        clauses += [f"id <= {ids[1]}"] if ids[1] < _LAST else []
        params: dict[str, Any] = dict(self._params)
        if distances is not None:
            params |= {
                "radius": distances[1] + 1,
                "range_filter": distances[0],
            }  # below the one, from the other
        options = {"filter": " and ".join(clauses), "limit": limit, "anns_field": "code"}
        options |= {"search_params": {"metric_type": "HAMMING", "params": params}}
        with self._lock:
            answers = self._connection.call(
                "search",
                self._collection,
                data=[query.tobytes() for query in queries],
                consistency_level="Strong",
                **options,
            )
        return [(_int64(answer.ids), np.array(answer.distances, dtype=np.int32)) for answer in answers]

    def _check_known(self, answers: Sequence[Neighbours]) -> None:
        if self._nothing is not None and not any(len(ids) for ids, _ in answers) and not len(self):
            with self._lock:
                self._nothing()


def condition(selection: Allowed) -> str:
    """A filter in Milvus's language; "" allows all."""
    if selection.is_none:  # Milvus refuses an empty list
        return "id < 0"
    if selection.ids is not None:
        return f"id in {selection.ids.tolist()}"
    return " and ".join(f"array_contains_any(terms, {json.dumps(group)})" for group in selection.groups)


def in_list(field: str, values: Sequence[Any], most: int = _IN_LIST) -> Iterator[str]:
    """Filters that allow the rows whose field is one of the values, up to ``most`` of them each."""
    for start in range(0, len(values), most):
        yield f"{field} in {json.dumps(list(values[start : start + most]))}"


def _int64(values: Any) -> np.ndarray:
    return np.array(list(values), dtype=np.int64)
