"""Items that are about to be written, and which of them are: one rule for every store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_DUPLICATES = ("error", "skip", "update")
_MOST = 2**63  # ids are smaller

Which = np.ndarray | Mapping[str, Any] | Sequence[str]
"""Items: (N,) ids, the payload values that they have, or their keys."""


@dataclass(frozen=True)
class NewItems:
    """N items to be written, with ids or with keys."""

    codes: np.ndarray  # (N, bytes) uint8
    ids: np.ndarray | None  # (N,) int64; None takes new ones, for new keys where there are keys
    keys: Sequence[str] | None
    stamps: Sequence[str] | None  # which state of the keyed things the codes are of
    payload: Sequence[str] | None  # JSON texts
    origin: str


@dataclass(frozen=True)
class WritePlan:
    """The outcome of a write of N items, before it is done."""

    ids: np.ndarray  # (N,) int64
    held: np.ndarray  # (N,) bool: held before
    rows: np.ndarray  # those of the N that are written, by ascending id
    following: int  # the id that the next new item gets


def planned(
    new: NewItems, on_duplicate: str, known: Mapping[str, int] | np.ndarray, following: int
) -> WritePlan:
    """The ids of new items, and which are written.

    Args:
        on_duplicate: what becomes of an id or a key that is held: ``error`` refuses all, ``skip`` keeps the
            item, ``update`` replaces it under its id.
        known: the ids held of those given or, of items without ids, the id of each key that is held.
        following: the id that the next new item gets.

    Raises:
        ValueError: an item is held and ``on_duplicate`` is ``error``, or no id is left.
    """
    if isinstance(known, np.ndarray):
        ids = new.ids if new.ids is not None else np.zeros(0, dtype=np.int64)
        held = np.isin(ids, known)
    else:
        keys = new.keys if new.keys is not None else [""] * len(new.codes)
        ids = np.array([known.get(key, -1) for key in keys], dtype=np.int64)
        held = ids >= 0
        fresh = int((~held).sum())
        if following + fresh > _MOST:
            raise ValueError("the ids below 2**63 are used up: build a new index, with smaller ids")
        ids[~held] = following + np.arange(fresh)
    if on_duplicate == "error" and held.any():
        raise ValueError(_duplicate(new, ids, int(np.flatnonzero(held)[0])))
    rows = np.flatnonzero(~held) if on_duplicate == "skip" else np.arange(len(ids))
    return WritePlan(ids, held, rows[np.argsort(ids[rows])], max(following, int(ids.max()) + 1))


def _duplicate(new: NewItems, ids: np.ndarray, at: int) -> str:
    """The message for an item that is held already."""
    what = f"id {ids[at]}" if new.keys is None else f"{new.keys[at]!r} (id {ids[at]})"
    choices = "'update' replaces it, 'skip' keeps it"
    return f"{what} is already in the index; on_duplicate (--on-duplicate): {choices}"


def check_choice(on_duplicate: str) -> None:
    """Refuse what is no way to treat an item that is held."""
    if on_duplicate not in _DUPLICATES:
        got = f"got {on_duplicate!r}"
        raise ValueError(f"on_duplicate (--on-duplicate) is one of {', '.join(_DUPLICATES)}, {got}")


def check_origin(added: str, held: str) -> None:
    """Refuse codes of origin ``added`` next to codes of origin ``held``; "" is unknown and fits any."""
    if added and held and added != held:
        raise ValueError(
            f"codes of origin {added!r} do not fit an index of origin {held!r}: distances mean nothing; "
            f"encode with the model of origin {held!r} (--run on the command line), or build a new index"
        )
