"""The parts that indexes on servers share: settings, filters by term, values, recall."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import UnsupportedOperation
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from robusthash.core.registry import nearest
from robusthash.core.runtime import Draws
from robusthash.index.code_index import CodeIndex, Neighbours, View
from robusthash.index.index_address import ServerAddress
from robusthash.index.payload_filter import UnknownKey, check_key, has_term, scalars, term_groups
from robusthash.index.search_engines import measured_recall

FORMAT = 1


@dataclass(frozen=True)
class Allowed:
    """The items that a filter allows: all, some by id, or those with one term of each group."""

    ids: np.ndarray | None = None
    groups: tuple[list[str], ...] = ()

    @property
    def is_none(self) -> bool:
        """True if it can allow nothing, whatever is held."""
        return (self.ids is not None and not len(self.ids)) or any(not group for group in self.groups)

    @classmethod
    def of(cls, where: np.ndarray | Mapping[str, Any] | None) -> Allowed:
        """From what ``search`` takes."""
        if isinstance(where, Mapping):
            return cls(groups=tuple(term_groups(where)))
        return cls(where if where is None else np.unique(where[where >= 0]))


class ServerIndex(CodeIndex):
    """An index whose items are on a server, and are searched there.

    Args:
        address: of the server and the collection.
        bits, create: as in ``open_index``.
        engine: one of ``ENGINES``, whose first is the exact one; None takes the one that is there.
    """

    ENGINES: tuple[str, str]

    def __init__(self, address: ServerAddress, bits: int | None, engine: str | None, create: bool) -> None:
        super().__init__()
        self._server, self._closed = address, False
        if engine is not None and engine not in self.ENGINES:
            raise ValueError(
                f"no engine of {address.scheme} is called {engine!r}{nearest(engine, self.ENGINES)}; "
                f"it has {' and '.join(self.ENGINES)}"
            )
        if bits is not None and bits < 1:
            raise ValueError(f"bits must be positive, got {bits}")
        try:
            self._engine_name = self._open(bits, engine, create)
            settings = self._settings()
            self._bits = settings["bits"]
            if bits not in (None, self._bits):
                raise ValueError(f"{self.address} holds codes of {self._bits} bits, asked for {bits}")
        except BaseException:
            self.close()
            raise

    @property
    def address(self) -> str:
        return str(self._server)

    @property
    def exact(self) -> bool:
        """True if ``search`` without a filter is exact."""
        return self._engine_name == self.ENGINES[0]

    def next_id(self) -> int:
        with self._lock:
            return int(self._settings()["next_id"])

    def build_source(self) -> Any:
        with self._lock:
            return self._settings().get("made_of")

    def set_build_source(self, source: Mapping[str, Any]) -> None:
        with self._lock:
            self._set({"made_of": source})

    def values(self, key: str, most: int = 10) -> list[Any]:
        check_key(key)
        values: dict[str, Any] = {}
        with self._lock:
            for payload in self._payload_texts(Allowed(groups=([has_term(key)],))):
                values |= scalars(payload, key)
                if len(values) >= most:
                    break
        return list(values.values())[:most]

    def info(self) -> dict[str, Any]:
        with self._lock:
            settings, count = self._settings(), self.count()
            names = {"url": self.address, "engine": self._engine_name, "created_with": settings["engine"]}
            sizes = {"exact": self.exact, "bits": self._bits, "count": count, "origin": settings["origin"]}
            info = {**names, **sizes, "format": settings["format"]}
            if self.exact:
                return info
            sample, recall = self._some_codes(100), 1.0
            if len(sample):
                draws = Draws(0).within("index-recall").generator()
                recall = measured_recall(self._view(None), self._exact_view(), sample, draws)
            return {**info, "approximation": {**self._parameters(), "recall@10": recall}}

    def _stored_origin(self) -> str:
        return str(self._settings()["origin"])

    def _check_known(self, where: Mapping[str, Any]) -> None:
        """Refuse a filter that allows nothing because no item has one of its keys."""
        if not self._any_items():
            return
        for key in where:
            if next(self._payload_texts(Allowed(groups=([has_term(key)],))), None) is None:
                texts = self._payload_texts(Allowed())
                raise UnknownKey(key, sorted({name for text in texts for name in json.loads(text)}))

    def _no_snapshot(self, remedy: str) -> NoReturn:
        raise UnsupportedOperation(f"{self.address} is on a server, whose own backup is meant: {remedy}")

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError(f"the index {self.address} is closed; open it again")

    def _refuse_missing(self, bits: int | None, create: bool) -> int:
        """The bits of an index that is to be made."""
        if not create:
            raise FileNotFoundError(f"there is no index at {self.address}; build one or check the address")
        if bits is None:
            raise ValueError(f"there is no index at {self.address}; a new one needs the number of bits")
        return bits

    @abstractmethod
    def snapshot(self, directory: str | Path) -> NoReturn: ...

    @abstractmethod
    def _open(self, bits: int | None, engine: str | None, create: bool) -> str:
        """Connect, make the collection where it is missing, and return the name of the engine."""

    @abstractmethod
    def _settings(self) -> dict[str, Any]:
        """``bits, format, origin, next_id, engine`` and ``made_of``, the source, as they are now."""

    @abstractmethod
    def _set(self, settings: Mapping[str, Any]) -> None:
        """Write some settings."""

    @abstractmethod
    def _payload_texts(self, selection: Allowed) -> Iterator[str]:
        """The payload of some items as JSON, streamed."""

    @abstractmethod
    def _some_codes(self, count: int) -> np.ndarray:
        """(up to count, bytes) codes that are held."""

    @abstractmethod
    def _exact_view(self) -> View:
        """All items, scanned exactly."""

    @abstractmethod
    def _parameters(self) -> dict[str, Any]:
        """The settings of the approximate engine."""


def padded(answers: list[Neighbours], k: int) -> Neighbours:
    """Answers of different lengths as (Q, k) arrays, filled up with -1."""
    ids = np.full((len(answers), k), -1, dtype=np.int64)
    distances = np.full((len(answers), k), -1, dtype=np.int32)
    for row, (near, far) in enumerate(answers):
        ids[row, : len(near)], distances[row, : len(near)] = near[:k], far[:k]
    return ids, distances
