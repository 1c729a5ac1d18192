"""Distance profiles: for each query the items, relevant items and shared labels at each Hamming distance.

Counted in blocks over both sides from byte planes (XOR, AND, popcount), which numpy runs on many bytes at
once. A pair becomes one small integer, distance + (K + 1) * overlap, and the histogram of these integers is
the profile. Nothing is sorted per query, no (Q, N) array is held, and equal (code, label set) rows are
counted once, so collapsed codes cost less. Counts are integers: the profiles of shards add up to that of the
whole, bit for bit. With numba (extra ``fast``) large counts run as machine code and give the same integers.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from robusthash.core.hamming import as_words
from robusthash.core.types import Codes, Profile

_PART = 1 << 18  # database items prepared at a time: bounds the memory of sorting and of label packing
_COLUMNS = 1 << 17  # items per counting block
_CELLS = 1 << 19  # (query, item) pairs per counting block: few enough for the cache, enough to hide the calls
_NARROW = 1 << 14  # below this many items a histogram call per query would cost more than its counting
_TABLE = 1 << 20  # histogram cells (8 bytes each) at a time: bounds the memory for long codes and many labels
_COMPILED = 1 << 22  # pairs from which machine code is used: below, compiling it costs more
_FIELDS = ("items", "relevant", "gain", "gain_exp", "ideal")


def code_profile(
    query: Codes, query_labels: Tensor, database: Codes, labels: Tensor, *, block: int = _PART
) -> Profile:
    """The distance profile of every query; relevant is who shares a label, the gain is the number shared.

    Args:
        query, query_labels: Q codes and (Q, C) multi-hot labels.
        database, labels: N codes of the same length and (N, C) multi-hot labels.
        block: database items prepared at a time; bounds the memory beyond the arguments and the profile.

    Example:
        >>> import torch
        >>> from robusthash.core.hamming import pack
        >>> code = lambda rows: Codes(pack(torch.tensor(rows)), 3, torch.arange(len(rows)))
        >>> query, database = code([[-1, -1, -1]]), code([[-1, -1, 1], [1, 1, 1]])
        >>> profile = code_profile(query, torch.eye(2)[:1], database, torch.eye(2))
        >>> profile.items.tolist(), profile.relevant.tolist()
        ([[0, 1, 0, 1]], [[0, 1, 0, 0]])
    """
    return streamed_profile(query, query_labels, [(database, labels)], block=block)


def streamed_profile(
    query: Codes, query_labels: Tensor, shards: Iterable[tuple[Codes, Tensor]], *, block: int = _PART
) -> Profile:
    """``code_profile`` of a database that comes in shards, bit for bit, each let go once it is counted.

    Args:
        shards: codes and labels (N_i, C) of each; empty ones are passed over.
    """
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    queries = prepare(query, query_labels, merge_above=1.0)
    whole: Profile | None = None
    for codes, labels in shards:
        if len(codes) != len(labels):
            raise ValueError(f"{len(labels)} label rows for {len(codes)} database codes")
        for start in range(0, len(codes), block):
            rows = slice(start, start + block)
            part = Codes(codes.packed[rows], codes.bits, codes.ids[rows], codes.origin)
            profile = _profile(queries, prepare(part, labels[rows]))
            whole = profile if whole is None else merge([whole, profile])
    if whole is None:
        raise ValueError("the database is empty")
    return _for_each_query(whole, queries)


def prepared_profile(query: Codes, query_labels: Tensor, database: Prepared) -> Profile:
    """``code_profile`` against a database prepared before, for loops that score candidate codes."""
    queries = prepare(query, query_labels, merge_above=1.0)
    return _for_each_query(_profile(queries, database), queries)


def prepared_counts(query: Codes, query_labels: Tensor, database: Prepared) -> tuple[Tensor, Tensor]:
    """(Q, K + 1) int64 ``items`` and ``relevant`` of ``prepared_profile`` alone: all that an AP needs."""
    queries = prepare(query, query_labels, merge_above=1.0)
    tables, places = _tables(queries, database)
    parts = [_items_and_relevant(table) for table in tables]
    items, relevant = (torch.cat(columns)[places] for columns in zip(*parts, strict=True))
    rows = slice(None) if queries.rows is None else torch.from_numpy(queries.rows)
    return items[rows], relevant[rows]


def merge(profiles: Sequence[Profile]) -> Profile:
    """The profile of a database from the profiles of its shards, for the same queries.

    Exactly that of one pass: all counts are integers, and so is ``gain_exp`` while it stays below 2^53 (36
    shared labels with 100,000 items).
    """
    if not profiles:
        raise ValueError("there are no profiles to merge")
    shapes = {tuple(profile.items.shape) for profile in profiles}
    if len(shapes) > 1:
        raise ValueError(f"profiles of different queries or code lengths do not add: {sorted(shapes)}")
    counts = {name: [getattr(profile, name) for profile in profiles] for name in _FIELDS}
    width = max(ideal.shape[1] for ideal in counts["ideal"])
    counts["ideal"] = [pad(ideal, (0, width - ideal.shape[1])) for ideal in counts["ideal"]]
    return Profile(**{name: torch.stack(parts).sum(0) for name, parts in counts.items()})


def _for_each_query(profile: Profile, queries: Prepared) -> Profile:
    """From distinct query rows back to queries."""
    if queries.rows is None:
        return profile
    rows = torch.from_numpy(queries.rows)
    return Profile(*(getattr(profile, name)[rows] for name in _FIELDS))


def _profile(queries: Prepared, database: Prepared) -> Profile:
    """The profile of each row of ``queries``."""
    tables, places = _tables(queries, database)
    parts = []
    for table in tables:
        shared = torch.arange(table.shape[1])
        items, relevant = _items_and_relevant(table)
        gain = (table * shared[:, None]).sum(1)
        exponential = 2.0 ** shared.to(torch.float64) - 1
        gain_exp = torch.einsum("qgd,g->qd", table.to(torch.float64), exponential)
        parts.append(Profile(items, relevant, gain, gain_exp, ideal=table.sum(2)))
    return Profile(*(torch.cat([getattr(part, name) for part in parts])[places] for name in _FIELDS))


def _items_and_relevant(table: Tensor) -> tuple[Tensor, Tensor]:
    """(Q, K + 1) each, of (Q, overlaps, K + 1); ``sum(1)`` over few slices would be twenty times slower."""
    none, *some = table.unbind(1)
    relevant = functools.reduce(torch.add, some, torch.zeros_like(none))
    return none + relevant, relevant


@dataclass(frozen=True)
class Prepared:
    """Codes and labels as byte planes, equal rows merged: made once for a database with many queries."""

    bits: int
    classes: int
    size: int  # items before equal rows were merged
    codes: np.ndarray  # (bytes, U) uint8
    labels: np.ndarray  # (bytes, U) uint8
    single: np.ndarray | None  # (U,) int32, the label where no item has two; -1 where it has none
    numbers: np.ndarray  # (U,) labels of each row
    counts: np.ndarray | None  # (U,) float64, items per row; None: one each
    rows: np.ndarray | None  # (size,) row of each item; None: in order


def prepare(codes: Codes, labels: Tensor, *, merge_above: float = 2.0) -> Prepared:
    """Pack ``codes`` and (N, C) multi-hot ``labels`` of any dtype for counting.

    Args:
        merge_above: equal rows are merged where a row stands for at least this many items on average; a
            weighted histogram is about twice as slow as a plain one.

    Raises:
        ValueError: no items, label rows that do not match, labels other than 0 and 1, bits set beyond the
            code.
    """
    size = len(codes)
    if size == 0:
        raise ValueError("there are no codes to count: the split is empty")
    if labels.ndim != 2 or labels.shape[1] == 0:
        raise ValueError(f"labels must be (N, C) multi-hot with C > 0, got shape {tuple(labels.shape)}")
    if len(labels) != size:
        raise ValueError(f"{len(labels)} label rows for {size} codes")
    packed = _checked_bytes(codes)
    packed_labels, single, numbers = _pack_labels(labels)
    order, starts = _runs(np.concatenate([as_words(packed), as_words(packed_labels)], axis=1).T)
    code_planes, label_planes = np.ascontiguousarray(packed.T), np.ascontiguousarray(packed_labels.T)
    head = (codes.bits, labels.shape[1], size)
    if len(starts) * merge_above > size:
        return Prepared(*head, code_planes, label_planes, single, numbers, None, None)
    first = order[starts]
    counts = np.diff(np.append(starts, size))
    rows = np.empty(size, dtype=np.int64)
    rows[order] = np.repeat(np.arange(len(starts)), counts)
    code_planes, label_planes = (np.ascontiguousarray(p[:, first]) for p in (code_planes, label_planes))
    single, numbers = None if single is None else single[first], numbers[first]
    return Prepared(*head, code_planes, label_planes, single, numbers, counts.astype(np.float64), rows)


def _checked_bytes(codes: Codes) -> np.ndarray:
    packed, width = codes.packed.cpu().numpy(), (codes.bits + 7) // 8
    if packed.dtype != np.uint8 or packed.ndim != 2 or packed.shape[1] != width:
        raise ValueError(
            f"packed codes of {codes.bits} bits are (N, {width}) uint8, "
            f"got {packed.dtype} of shape {packed.shape}"
        )
    beyond = 8 * width - codes.bits
    if beyond and (packed[:, -1] & ((1 << beyond) - 1)).any():
        raise ValueError(f"a code of {codes.bits} bits has bits set in its padding; pad with zeros")
    return packed


def _pack_labels(labels: Tensor) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Labels as (N, bytes) bits, the single label of each item (or None), and the number of labels."""
    count, classes = labels.shape
    packed = np.empty((count, (classes + 7) // 8), dtype=np.uint8)
    single = np.empty(count, dtype=np.int32)
    numbers = np.empty(count, dtype=np.int64)
    step = max(1, (1 << 22) // classes)
    for start in range(0, count, step):
        rows = slice(start, start + step)
        part = labels[rows].detach().cpu().numpy()
        on = part == 1
        valid = (on | (part == 0)).all(axis=1)
        if not valid.all():
            row = start + int(np.flatnonzero(~valid)[0])
            raise ValueError(f"labels must be 0 or 1 (multi-hot), row {row} has another value")
        numbers[rows] = on.sum(axis=1)
        packed[rows] = np.packbits(on, axis=1)
        single[rows] = np.where(on.any(axis=1), on.argmax(axis=1), -1)
    return packed, single if numbers.max() <= 1 else None, numbers


def _runs(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An order in which equal columns of (words, N) are neighbours, and the start of each run of equal ones.

    Sorted by a 64-bit hash, several times faster than by rows. Neighbours are compared word by word, so a
    collision can only split a run, never join two: counts stay exact.
    """
    order = np.argsort(_mix(words))
    changed = np.zeros(words.shape[1], dtype=bool)
    changed[0] = True
    for word in words:
        ordered = word[order]
        changed[1:] |= ordered[1:] != ordered[:-1]
    return order, np.flatnonzero(changed)


def _mix(words: np.ndarray) -> np.ndarray:
    """(words, N) uint64 -> (N,) uint64 hash of each column."""
    mixed = np.zeros(words.shape[1], dtype=np.uint64)
    for word in words:
        mixed ^= word
        mixed *= np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
        mixed *= np.uint64(0xBF58476D1CE4E5B9)
        mixed ^= mixed >> np.uint64(32)
    return mixed


def _tables(queries: Prepared, database: Prepared) -> tuple[Iterator[Tensor], Tensor]:
    """(rows, overlaps, distances) counts of parts of ``queries``, and (Q,) the place of each row in them."""
    if queries.bits != database.bits:
        raise ValueError(f"queries have {queries.bits} bits and the database {database.bits}")
    if queries.classes != database.classes:
        raise ValueError(f"queries have {queries.classes} label columns and the database {database.classes}")
    overlaps = min(int(queries.numbers.max()), int(database.numbers.max())) + 1
    order = np.argsort(queries.numbers, kind="stable")  # few labels together: their keys fit in a byte
    step = max(1, _TABLE // ((queries.bits + 1) * overlaps))
    starts = range(0, len(order), step)
    tables = (_histogram(queries, order[start : start + step], database, overlaps) for start in starts)
    return tables, torch.from_numpy(np.argsort(order))


class _Scratch:
    """Buffers of one counting block, allocated once: fresh pages would cost more than the counting."""

    def __init__(self, cells: int, widest: int) -> None:
        self.pairs = np.empty(cells, np.uint8)
        self.once = np.empty(cells, np.uint8)
        self.total = np.empty(cells, np.uint8 if widest < 256 else np.uint16)
        self.keys = {dtype: np.empty(cells, dtype) for dtype in (np.uint8, np.int16, np.int32)}

    def popcounts(self, operation: np.ufunc, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """(bytes, b), (bytes, m) -> (b, m) bits set after ``operation``; valid until the next call."""
        shape = (left.shape[1], right.shape[1])
        used = shape[0] * shape[1]
        pairs, once, total = (buffer[:used].reshape(shape) for buffer in (self.pairs, self.once, self.total))
        for index in range(len(left)):
            operation(left[index, :, None], right[index], out=pairs)
            np.bitwise_count(pairs, out=once if index else total)
            if index:
                np.add(total, once, out=total)
        return total


def _histogram(queries: Prepared, rows: np.ndarray, database: Prepared, overlaps: int) -> Tensor:
    """(rows, overlaps, distances) int64 counts of items for ``rows`` of ``queries``, few labels first."""
    codes, labels, numbers = queries.codes[:, rows], queries.labels[:, rows], queries.numbers[rows]
    size, distances = database.codes.shape[1], queries.bits + 1
    if len(rows) * size >= _COMPILED and _numba_installed():
        return _compiled_histogram(codes, labels, database, overlaps, distances)
    own = None  # one label each: equality is cheaper than a popcount; no label is -2 here, -1 there
    if queries.single is not None and database.single is not None:
        own = queries.single[rows] - (numbers == 0)
    width = min(_COLUMNS, size)
    height = min(max(1, _CELLS // width), len(rows))
    narrow = width < _NARROW
    scratch = _Scratch(height * width, max(queries.bits, queries.classes))
    table = torch.zeros((len(rows), overlaps * distances), dtype=torch.int64)
    for left in range(0, size, width):
        columns = slice(left, min(left + width, size))
        weights = None
        if database.counts is not None:
            weights = torch.from_numpy(np.tile(database.counts[columns], height if narrow else 1))
        for top in range(0, len(rows), height):
            block = slice(top, min(top + height, len(rows)))
            shape = (block.stop - top, columns.stop - left)
            most = min(int(numbers[block.stop - 1]), overlaps - 1)  # rows are ordered by numbers
            cells = (most + 1) * distances
            wide = narrow or cells > 1 << 15
            key = scratch.keys[np.int32 if wide else np.uint8 if cells <= 1 << 8 else np.int16]
            pairs = key[: shape[0] * shape[1]].reshape(shape)
            if own is not None and database.single is not None:
                overlap = own[block, None] == database.single[columns]
            else:
                overlap = scratch.popcounts(np.bitwise_and, labels[:, block], database.labels[:, columns])
            np.multiply(overlap, distances, out=pairs, dtype=key.dtype)
            distance = scratch.popcounts(np.bitwise_xor, codes[:, block], database.codes[:, columns])
            np.add(pairs, distance, out=pairs)
            if narrow:  # all queries of the block in one histogram call, each with cells of its own
                np.add(pairs, np.arange(shape[0], dtype=np.int32)[:, None] * cells, out=pairs)
                pairs = pairs.reshape(1, -1)
            each = shape[0] // len(pairs)
            for row, line in enumerate(torch.from_numpy(pairs)):
                weight = None if weights is None else weights[: len(line)]
                counts = torch.bincount(line, weight, minlength=each * cells).view(each, cells)
                table[top + row * each : top + (row + 1) * each, :cells] += counts.to(torch.int64)
    return table.view(len(rows), overlaps, distances)


@functools.cache
def _numba_installed() -> bool:
    return importlib.util.find_spec("numba") is not None


def _compiled_histogram(
    codes: np.ndarray, labels: np.ndarray, database: Prepared, overlaps: int, distances: int
) -> Tensor:
    """``_histogram`` by machine code; blocks of items become words as they are needed."""
    from robusthash.metrics import distance_histogram_numba as compiled  # loading numba takes a second

    table = np.zeros((codes.shape[1], overlaps, distances), dtype=np.int64)
    own = as_words(codes.T), as_words(labels.T)
    for left in range(0, database.codes.shape[1], _COLUMNS):
        columns = slice(left, left + _COLUMNS)
        items = as_words(database.codes[:, columns].T), as_words(database.labels[:, columns].T)
        counts = np.empty(0) if database.counts is None else database.counts[columns]
        compiled.count(*own, *items, counts.astype(np.int64), table)
    return torch.from_numpy(table)
