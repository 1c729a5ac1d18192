"""What every index of binary codes promises, whatever engine or server answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from torch import Tensor

from robusthash.core.types import Codes, Ranking

Ids = Tensor | np.ndarray | Iterable[int]
"""Item ids: whole numbers, 0 or greater, in one dimension."""

Where = Ids | Mapping[str, Any]
"""Which items may be found: their ids, or the payload values they must have."""


@dataclass(frozen=True)
class Within:
    """All items within a radius of each query; the number found differs from query to query."""

    ids: tuple[Tensor, ...]  # Q tensors (found,) int64, by (distance, id)
    distances: tuple[Tensor, ...]  # Q tensors (found,) int32, ascending

    def __len__(self) -> int:
        return len(self.ids)


class CodeIndex(ABC):
    """A set of (id, code, payload) that is searched by Hamming distance.

    The contract, the same for every exact adapter:

    * ``search`` returns exactly what ``core.hamming.topk`` returns on the items held, ordered by (distance,
      id), with ties at rank k resolved by the same rule; -1 fills the ranks that no item has; ``Ranking.cut``
      is False.
    * An adapter that cannot keep the rule, or is approximate by its nature, says so in ``Ranking.cut``.
    * A write is acknowledged (the call returns) only when it survives a kill, and happens whole or not at
      all.
    * Codes of another origin than those held are refused by ``add``, ``search`` and ``range`` alike; codes
      without an origin, and an index whose codes came without one, are accepted. An emptied index takes any
      origin.
    * ``where`` narrows the items before they are ranked. It is either a collection of allowed ids, where
      unknown ones are ignored, or a mapping of payload values: ``{"label": "cat", "year": [2024, 2025]}``
      keeps the items whose label is cat and whose year is either. A payload value that is itself a list
      matches by any of its members. Filtered queries are answered by an exact scan of the allowed items.

    Wrong input raises ``ValueError`` and changes nothing.
    """

    @property
    @abstractmethod
    def bits(self) -> int:
        """Length of the codes."""

    @property
    @abstractmethod
    def origin(self) -> str:
        """Digest of the model that made the codes held; "" where none was given, or where no item is held."""

    @abstractmethod
    def add(self, codes: Codes, payload: Sequence[Mapping[str, Any]] | None = None) -> None:
        """Add items; all of them or, on error, none.

        Args:
            codes: N codes of the index's length with N new ids, each 0 or greater.
            payload: N JSON objects, returned by ``payload`` and matched by ``where``; none by default.

        Raises:
            ValueError: for codes of another length or another origin, an id given twice or held already, or a
                payload that JSON cannot write.
            OSError: when the disk is full; the index is unchanged and usable.
        """

    def search(self, codes: Codes, k: int, where: Where | None = None) -> Ranking:
        """The ``k`` nearest items of each of Q query codes, at least 1: (Q, k), -1 where there are fewer."""
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        return self._search(self._queries(codes), k, where)

    def range(self, codes: Codes, radius: int, where: Where | None = None) -> Within:
        """All items at most ``radius`` bits, 0 or more, from each query code. Exact in every engine."""
        if radius < 0:
            raise ValueError(f"radius must be 0 or greater, got {radius}")
        return self._range(self._queries(codes), min(radius, self.bits), where)

    @abstractmethod
    def _search(self, queries: np.ndarray, k: int, where: Where | None) -> Ranking:
        """Answer ``search`` for checked (Q, ceil(K / 8)) rows."""

    @abstractmethod
    def _range(self, queries: np.ndarray, radius: int, where: Where | None) -> Within:
        """Answer ``range`` for checked (Q, ceil(K / 8)) rows; the radius is at most the number of bits."""

    def _queries(self, codes: Codes) -> np.ndarray:
        """Packed rows of query codes that fit the codes held in length and origin."""
        rows = as_rows(codes, self.bits)
        check_origin(codes.origin, self.origin)
        return rows

    @abstractmethod
    def remove(self, ids: Ids) -> int:
        """Remove items and say how many there were; ids that are not held are ignored."""

    @abstractmethod
    def count(self) -> int:
        """Number of items held."""

    @abstractmethod
    def next_id(self) -> int:
        """One more than the highest id held, 0 for an empty index."""

    @abstractmethod
    def payload(self, ids: Ids) -> list[dict[str, Any]]:
        """The payload of each id, in their order; ``{}`` for an item added without one.

        Raises:
            KeyError: for an id that is not held.
        """

    @abstractmethod
    def snapshot(self, directory: str) -> None:
        """Write a consistent copy to a new directory, from which an index opens.

        The copy appears under its name only when it is complete and on disk.

        Raises:
            FileExistsError: where the directory exists already.
        """

    @abstractmethod
    def info(self) -> dict[str, Any]:
        """What the index is: ``url, engine, exact, bits, count, origin, format`` and what an engine adds."""

    @abstractmethod
    def close(self) -> None:
        """Let go of files and connections. A closed index answers nothing; closing twice does no harm."""

    def __enter__(self) -> CodeIndex:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()


def as_ids(ids: Ids) -> np.ndarray:
    """Any collection of ids as (N,) int64, in its order.

    Raises:
        ValueError: where the values are not whole numbers in one dimension.
    """
    values = ids.cpu().numpy() if isinstance(ids, Tensor) else ids
    array = values if isinstance(values, np.ndarray) else np.array(list(values))
    if array.ndim != 1:
        raise ValueError(f"ids must have one dimension, got shape {array.shape}")
    if len(array) == 0:
        return np.zeros(0, dtype=np.int64)
    if array.dtype.kind not in "iu":
        raise ValueError(f"ids must be whole numbers, got {array.dtype}: {array[0]!r}")
    return array.astype(np.int64)


def check_origin(given: str, held: str) -> None:
    """Refuse codes of origin ``given`` next to codes of origin ``held``; "" is unknown and fits any.

    Raises:
        ValueError: where the two differ.
    """
    if given and held and given != held:
        raise ValueError(
            f"codes of origin {given!r} do not belong to an index of origin {held!r}: distances between the codes of "
            f"two models mean nothing; encode with the model of origin {held!r} (--run on the command line), or build "
            "a new index"
        )


def as_rows(codes: Codes, bits: int) -> np.ndarray:
    """The packed rows of ``codes`` as a contiguous (N, ceil(K / 8)) uint8 array, checked against ``bits``.

    Raises:
        ValueError: for codes of another length, rows of another width or type, another number of ids, or
            padding that is not zero, which would count as distance.
    """
    if codes.bits != bits:
        raise ValueError(
            f"codes of {codes.bits} bits do not fit an index of {bits} bits; encode with the same model"
        )
    width = (bits + 7) // 8
    if str(codes.packed.dtype) != "torch.uint8" or codes.packed.ndim != 2 or codes.packed.shape[1] != width:
        found = f"{tuple(codes.packed.shape)} {codes.packed.dtype}"
        raise ValueError(
            f"codes of {bits} bits are (N, {width}) torch.uint8 rows, got {found}; use hamming.pack"
        )
    if len(codes.ids) != len(codes.packed):
        raise ValueError(f"{len(codes.packed)} codes with {len(codes.ids)} ids")
    rows = np.ascontiguousarray(codes.packed.cpu().numpy())
    padding = width * 8 - bits
    if padding and (rows[:, -1] & ((1 << padding) - 1)).any():
        raise ValueError(f"codes have ones after bit {bits}; the padding must be zero, use hamming.pack")
    return rows
