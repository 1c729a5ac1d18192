"""Checks of what a caller gives to an index: ids, keys, packed rows, payload, and items to be written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robusthash.core.types import Codes
from robusthash.index.payload_filter import check_key, to_json

Ids = Tensor | np.ndarray | Iterable[int]
"""Item ids: whole numbers, 0 or greater, in one dimension."""


def id_array(ids: Ids) -> np.ndarray:
    """Any collection of ids as (N,) int64, in its order."""
    values = ids.cpu().numpy() if isinstance(ids, Tensor) else ids
    array = values if isinstance(values, np.ndarray) else np.array(list(values))
    if array.ndim != 1:
        raise ValueError(f"ids must have one dimension, got shape {array.shape}")
    if len(array) == 0:
        return np.zeros(0, dtype=np.int64)
    if array.dtype.kind not in "iu":
        raise ValueError(f"ids must be whole numbers, got {array.dtype}: {array[0]!r}")
    if array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"ids must be below 2**63, got {array.max()}")
    return array.astype(np.int64)


def whole_number(value: Any, what: str, least: int) -> int:
    """A whole number of Python's or numpy's, checked."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ValueError(f"{what} must be a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{what} must be {f'at least {least}' if least else '0 or greater'}, got {value}")
    return int(value)


def key_texts(keys: Sequence[str], count: int) -> list[str]:
    """Keys, checked."""
    if isinstance(keys, str) or len(keys) != count:
        raise ValueError(f"{count} codes with the keys {keys!r:.80}; give a list of one each")
    return checked_keys(keys)


def checked_keys(keys: Sequence[str]) -> list[str]:
    """Keys that items may have; others name none."""
    if isinstance(keys, str):
        raise ValueError(f"keys are a list of texts, got the text {keys!r:.80}")
    texts = list(keys)
    for key in texts:
        if not isinstance(key, str):
            raise ValueError(f"keys are text, got {key!r}")
    try:
        to_json(texts, "a key")  # all at once: many times faster
    except ValueError:
        for key in texts:
            to_json(key, f"the key {key!r:.80}")
    return texts


def packed_rows(codes: Codes, bits: int) -> np.ndarray:
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


def payload_texts(payload: Sequence[Mapping[str, Any]], names: Sequence[object]) -> list[str]:
    """The payload as JSON texts, checked; ``names`` are ids or keys."""
    if len(payload) != len(names):
        raise ValueError(f"{len(names)} codes with {len(payload)} payloads; give one each, or none at all")
    texts = []
    for item, value in zip(names, payload, strict=True):
        what = f"the payload of {f'id {item}' if not isinstance(item, str) else repr(item)}"
        if not isinstance(value, Mapping):
            raise ValueError(f"{what} must be a mapping, got {type(value).__name__}")
        for key in value:
            check_key(key)
        texts.append(to_json(dict(value), what))
    return texts


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
