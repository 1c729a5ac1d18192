"""Distance profiles: the counts under every ranking measure.

A query's profile says how many database items, relevant items and shared labels lie at each Hamming distance.
It is counted in blocks over both sides from byte planes (XOR, AND, popcount): numpy runs these on many bytes
at once, but a popcount of wider words on one at a time. A pair becomes one small integer, distance + (K + 1)
* overlap, and the histogram of those integers is the profile. Nothing is sorted per query, no (Q, N) array is
kept, and equal (code, label set) rows are counted once, so collapsed codes cost less. Counts are integers, so
the profiles of shards add up to the profile of the whole, bit for bit. Where numba is installed (extra
``fast``) large counts run as machine code (``metrics.distance_histogram_numba``), which gives the same integers.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from robusthash.core.hamming import as_words
from robusthash.core.types import Codes, Profile

_PART = 1 << 18  # database items prepared at a time: bounds the memory of sorting and of label packing
_COLUMNS = 1 << 17  # items per counting block
_CELLS = 1 << 19  # (query, item) pairs per counting block: few enough for the cache, enough to hide the calls
_NARROW = 1 << 14  # below so many items a histogram call for each query would cost more than its counting
_TABLE = (
    1 << 20
)  # histogram cells (8 bytes each) held at a time: bounds the memory for long codes and many labels
_COMPILED = 1 << 22  # pairs from which machine code is used where it can be: below, compiling it costs more
_FIELDS = ("items", "relevant", "gain", "gain_exp", "ideal")


# ---------------------------------------------------------------------------------------------- counting


@dataclass(frozen=True)
class Prepared:
    """Codes and labels as byte planes, equal rows merged: make it once for a database that is asked often."""

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
    """Pack ``codes`` and ``labels`` for counting.

    Args:
        codes: N codes.
        labels: (N, C) multi-hot, every value 0 or 1, any dtype.
        merge_above: equal rows are merged when a row stands for at least this many items on average; a
            weighted histogram is about twice as slow as a plain one, so fewer do not pay.

    Raises:
        ValueError: no items, label rows that do not match, labels other than 0 and 1, bits set beyond the
            code.
    """
    if len(codes) == 0:
        raise ValueError("there are no codes to count: the split is empty")
    if labels.ndim != 2 or labels.shape[1] == 0:
        raise ValueError(f"labels must be (N, C) multi-hot with C > 0, got shape {tuple(labels.shape)}")
    if len(labels) != len(codes):
        raise ValueError(f"{len(labels)} label rows for {len(codes)} codes")
    packed = _checked_bytes(codes)
    packed_labels, single, numbers = _pack_labels(labels)
    order, starts = _runs(np.concatenate([as_words(packed), as_words(packed_labels)], axis=1).T)
    code_planes, label_planes = np.ascontiguousarray(packed.T), np.ascontiguousarray(packed_labels.T)
    if len(starts) * merge_above > len(codes):
        return Prepared(
            codes.bits, labels.shape[1], len(codes), code_planes, label_planes, single, numbers, None, None
        )
    kept = order[starts]
    sizes = np.diff(np.append(starts, len(codes)))
    rows = np.empty(len(codes), dtype=np.int64)
    rows[order] = np.repeat(np.arange(len(starts)), sizes)
    return Prepared(
        codes.bits,
        labels.shape[1],
        len(codes),
        np.ascontiguousarray(code_planes[:, kept]),
        np.ascontiguousarray(label_planes[:, kept]),
        None if single is None else single[kept],
        numbers[kept],
        sizes.astype(np.float64),
        rows,
    )


def _checked_bytes(codes: Codes) -> np.ndarray:
    packed = codes.packed.cpu().numpy()
    if packed.dtype != np.uint8 or packed.ndim != 2 or packed.shape[1] != (codes.bits + 7) // 8:
        raise ValueError(
            f"packed codes of {codes.bits} bits are (N, {(codes.bits + 7) // 8}) uint8, "
            f"got {packed.dtype} of shape {packed.shape}"
        )
    beyond = 8 * packed.shape[1] - codes.bits
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
        part = labels[start : start + step].detach().cpu().numpy()
        on = part == 1
        if not (on | (part == 0)).all():
            row = start + int(np.flatnonzero(~(on | (part == 0)).all(axis=1))[0])
            raise ValueError(f"labels must be 0 or 1 (multi-hot), row {row} has another value")
        numbers[start : start + step] = on.sum(axis=1)
        packed[start : start + step] = np.packbits(on, axis=1)
        single[start : start + step] = np.where(on.any(axis=1), on.argmax(axis=1), -1)
    return packed, single if numbers.max() <= 1 else None, numbers


def _runs(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An order in which equal columns of (words, N) are neighbours, and where each run of equal ones starts.

    Sorted by a 64-bit hash, which is several times faster than by rows. Neighbours are compared word by word,
    so that a hash collision can only split a run, never join two: counts stay exact.
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


def code_profile(
    query: Codes, query_labels: Tensor, database: Codes, labels: Tensor, *, block: int = _PART
) -> Profile:
    """The distance profile of every query.

    Relevance is a shared label; the gain is the number of shared labels. Memory beyond the arguments is
    bounded by ``block``, not by Q or N, apart from the profile itself.

    Args:
        query: Q codes.
        query_labels: (Q, C) multi-hot.
        database: N codes of the same length.
        labels: (N, C) multi-hot.
        block: database items prepared at a time.

    Raises:
        ValueError: code lengths or label widths that differ, an empty side, labels other than 0 and 1.

    Example:
        >>> import torch
        >>> from robusthash.core.hamming import pack
        >>> code = lambda rows: Codes(pack(torch.tensor(rows)), 3, torch.arange(len(rows)))
        >>> made = code_profile(code([[-1, -1, -1]]), torch.eye(2)[:1], code([[-1, -1, 1], [1, 1, 1]]), torch.eye(2))
        >>> made.items.tolist(), made.relevant.tolist()
        ([[0, 1, 0, 1]], [[0, 1, 0, 0]])
    """
    if len(database) == 0:
        raise ValueError("the database is empty")
    return streamed_profile(query, query_labels, [(database, labels)], block=block)


def streamed_profile(
    query: Codes, query_labels: Tensor, shards: Iterable[tuple[Codes, Tensor]], *, block: int = _PART
) -> Profile:
    """``code_profile`` of a database that comes in shards, each let go once it is counted.

    Memory is one shard, one block and the profile, so a database may be larger than what fits. The result is
    that of one pass, bit for bit (see ``merge``).

    Args:
        shards: codes and labels (N_i, C) of each; empty ones are passed over.

    Raises:
        ValueError: as ``code_profile``; no item in any shard.
    """
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    asked = prepare(query, query_labels, merge_above=1.0)
    whole: Profile | None = None
    for codes, labels in shards:
        if len(codes) != len(labels):
            raise ValueError(f"{len(labels)} label rows for {len(codes)} database codes")
        for start in range(0, len(codes), block):
            rows = slice(start, start + block)
            part = Codes(codes.packed[rows], codes.bits, codes.ids[rows], codes.origin)
            found = _profile(asked, prepare(part, labels[rows]))
            whole = found if whole is None else merge([whole, found])
    if whole is None:
        raise ValueError("the database is empty")
    return _spread(whole, asked)


def prepared_profile(query: Codes, query_labels: Tensor, database: Prepared) -> Profile:
    """``code_profile`` against a database prepared before: what a loop that scores candidate codes calls."""
    asked = prepare(query, query_labels, merge_above=1.0)
    return _spread(_profile(asked, database), asked)


def prepared_counts(query: Codes, query_labels: Tensor, database: Prepared) -> tuple[Tensor, Tensor]:
    """(Q, K + 1) int64 ``items`` and ``relevant`` of ``prepared_profile`` alone: all that an AP needs, and
    sooner."""
    asked = prepare(query, query_labels, merge_above=1.0)
    tables, back = _tables(asked, database)
    parts = [_items_and_relevant(table) for table in tables]
    items, relevant = (torch.cat(columns)[back] for columns in zip(*parts, strict=True))
    rows = slice(None) if asked.rows is None else torch.from_numpy(asked.rows)
    return items[rows], relevant[rows]


def _spread(profile: Profile, asked: Prepared) -> Profile:
    """From distinct query rows back to queries."""
    if asked.rows is None:
        return profile
    rows = torch.from_numpy(asked.rows)
    return Profile(*(getattr(profile, name)[rows] for name in _FIELDS))


def _profile(asked: Prepared, database: Prepared) -> Profile:
    """The profile of each row of ``asked``."""
    tables, back = _tables(asked, database)
    parts = []
    for table in tables:
        shared = torch.arange(table.shape[1])
        exponential = 2.0 ** shared.to(torch.float64) - 1
        items, relevant = _items_and_relevant(table)
        parts.append(
            Profile(
                items=items,
                relevant=relevant,
                gain=(table * shared[:, None]).sum(1),
                gain_exp=torch.einsum("qgd,g->qd", table.to(torch.float64), exponential),
                ideal=table.sum(2),
            )
        )
    return Profile(*(torch.cat([getattr(part, name) for part in parts])[back] for name in _FIELDS))


def _items_and_relevant(table: Tensor) -> tuple[Tensor, Tensor]:
    """(Q, K + 1) each, of (Q, overlaps, K + 1). Slice by slice: ``sum(1)`` over so few is twenty times
    slower."""
    none, *some = table.unbind(1)
    relevant = functools.reduce(torch.add, some, torch.zeros_like(none))
    return none + relevant, relevant


def _tables(asked: Prepared, database: Prepared) -> tuple[Iterator[Tensor], Tensor]:
    """(rows, overlaps, distances) counts of parts of ``asked``, and (Q,) the place of each of its rows among
    them."""
    if asked.bits != database.bits:
        raise ValueError(f"queries have {asked.bits} bits and the database {database.bits}")
    if asked.classes != database.classes:
        raise ValueError(f"queries have {asked.classes} label columns and the database {database.classes}")
    distances, overlaps = asked.bits + 1, min(int(asked.numbers.max()), int(database.numbers.max())) + 1
    order = np.argsort(
        asked.numbers, kind="stable"
    )  # queries of few labels together: their keys fit in a byte
    step = max(1, _TABLE // (distances * overlaps))
    starts = range(0, len(order), step)
    tables = (_histogram(asked, order[start : start + step], database, overlaps) for start in starts)
    return tables, torch.from_numpy(np.argsort(order))


class _Scratch:
    """Buffers of one counting block, allocated once: fresh pages would cost more than the counting."""

    def __init__(self, cells: int, widest: int) -> None:
        self.pairs = np.empty(cells, np.uint8)
        self.once = np.empty(cells, np.uint8)
        self.total = np.empty(cells, np.uint8 if widest < 256 else np.uint16)

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


def _histogram(asked: Prepared, rows: np.ndarray, database: Prepared, overlaps: int) -> Tensor:
    """(rows, overlaps, distances) int64 counts of database items, for rows of ``asked`` in the order of
    ``numbers``."""
    codes, labels, numbers = asked.codes[:, rows], asked.labels[:, rows], asked.numbers[rows]
    size, distances = database.codes.shape[1], asked.bits + 1
    if len(rows) * size >= _COMPILED and _numba_installed():
        return _compiled_histogram(codes, labels, database, overlaps, distances)
    # one label each: equality is cheaper than a popcount; -2 and -1 stand for no label and never meet
    own = (
        None
        if asked.single is None or database.single is None
        else asked.single[rows] - (asked.numbers[rows] == 0)
    )
    width = min(_COLUMNS, size)
    height = min(max(1, _CELLS // width), len(rows))
    narrow = width < _NARROW
    scratch = _Scratch(height * width, max(asked.bits, asked.classes))
    keys = {dtype: np.empty(height * width, dtype) for dtype in (np.uint8, np.int16, np.int32)}
    table = torch.zeros((len(rows), overlaps * distances), dtype=torch.int64)
    for left in range(0, size, width):
        columns = slice(left, min(left + width, size))
        weights = None
        if database.counts is not None:
            weights = torch.from_numpy(np.tile(database.counts[columns], height if narrow else 1))
        for top in range(0, len(rows), height):
            lines = slice(top, min(top + height, len(rows)))
            cells = (
                min(int(numbers[lines.stop - 1]), overlaps - 1) + 1
            ) * distances  # rows are ordered by numbers
            wide = narrow or cells > 1 << 15
            key = keys[np.int32 if wide else np.uint8 if cells <= 1 << 8 else np.int16]
            shape = (lines.stop - top, columns.stop - left)
            pairs = key[: shape[0] * shape[1]].reshape(shape)
            if own is not None and database.single is not None:
                overlap = own[lines, None] == database.single[columns]
            else:
                overlap = scratch.popcounts(np.bitwise_and, labels[:, lines], database.labels[:, columns])
            np.multiply(overlap, distances, out=pairs, dtype=key.dtype)
            np.add(
                pairs,
                scratch.popcounts(np.bitwise_xor, codes[:, lines], database.codes[:, columns]),
                out=pairs,
            )
            if (
                narrow
            ):  # all queries of the block in one histogram, each with cells of its own: a call costs more
                np.add(pairs, np.arange(shape[0], dtype=np.int32)[:, None] * cells, out=pairs)
                pairs = pairs.reshape(1, -1)
            each = shape[0] // len(pairs)
            for row, line in enumerate(torch.from_numpy(pairs)):
                found = torch.bincount(
                    line, None if weights is None else weights[: len(line)], minlength=each * cells
                )
                table[top + row * each : top + (row + 1) * each, :cells] += found.view(each, cells).to(
                    torch.int64
                )
    return table.view(len(rows), overlaps, distances)


@functools.cache
def _numba_installed() -> bool:
    return importlib.util.find_spec("numba") is not None


def _compiled_histogram(
    codes: np.ndarray, labels: np.ndarray, database: Prepared, overlaps: int, distances: int
) -> Tensor:
    """``_histogram`` by machine code; blocks of items become words as they are needed."""
    from robusthash.metrics import (
        distance_histogram_numba as compiled,  # loading numba takes a second, and only large counts need it
    )

    table = np.zeros((codes.shape[1], overlaps, distances), dtype=np.int64)
    own = as_words(codes.T), as_words(labels.T)
    for left in range(0, database.codes.shape[1], _COLUMNS):
        columns = slice(left, left + _COLUMNS)
        weights = (
            np.empty(0, np.int64) if database.counts is None else database.counts[columns].astype(np.int64)
        )
        items = as_words(database.codes[:, columns].T), as_words(database.labels[:, columns].T)
        compiled.count(*own, *items, weights, table)
    return torch.from_numpy(table)


def merge(profiles: Sequence[Profile]) -> Profile:
    """The profile of a database from the profiles of its shards, for the same queries.

    Exactly that of one pass: all counts are integers, and so is ``gain_exp`` while it stays below 2^53 (36
    shared labels with 100,000 items).

    Raises:
        ValueError: no profile, or profiles of other sizes.
    """
    if not profiles:
        raise ValueError("there are no profiles to merge")
    shapes = {tuple(profile.items.shape) for profile in profiles}
    if len(shapes) > 1:
        raise ValueError(f"profiles of different queries or code lengths do not add: {sorted(shapes)}")
    width = max(profile.ideal.shape[1] for profile in profiles)
    ideals = [
        torch.nn.functional.pad(profile.ideal, (0, width - profile.ideal.shape[1])) for profile in profiles
    ]

    def total(name: str) -> Tensor:
        return torch.stack([getattr(profile, name) for profile in profiles]).sum(0)

    return Profile(
        total("items"), total("relevant"), total("gain"), total("gain_exp"), torch.stack(ideals).sum(0)
    )


# ---------------------------------------------------------------------------------------------- average
# precision
