"""Speed and memory of the metric core against a per-query argsort, in the same run on the same threads.

The reference size of the evaluation protocol: 1,000 queries, 100,000 database items, 32 bits, 24 labels,
several to an item; MAP over the whole database and MAP@5000. The ratio is for random codes, the worst case
for merging equal rows; the detail adds collapsed codes, as trained models make them, longer codes and single
labels.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
import tracemalloc
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robusthash.core.hamming import pack
from robusthash.core.types import Codes, Profile
from robusthash.metrics.average_precision import average_precision
from robusthash.metrics.distance_histogram import code_profile, merge

QUERIES, ITEMS, BITS, LABELS, CUT = 1000, 100_000, 32, 24, 5000
ROUNDS = 5

Sides = tuple[Codes, Tensor, Codes, Tensor]


def make(bits: int = BITS, labels: int = LABELS, kind: str = "random") -> Sides:
    """Queries and a database.

    Args:
        kind: ``random`` codes and label sets of three labels on average; ``collapsed`` the same drawn from
            2,000 distinct (code, label set) rows; ``single`` random codes, one label each.
    """
    generator = torch.Generator().manual_seed(0)

    def side(count: int) -> tuple[Codes, Tensor]:
        distinct = min(count, 2000) if kind == "collapsed" else count
        signs = torch.randint(0, 2, (distinct, bits), generator=generator, dtype=torch.int8) * 2 - 1
        hot = (torch.rand(distinct, labels, generator=generator) < 3 / labels).float()
        if kind == "single":
            hot = torch.eye(labels)[torch.randint(labels, (distinct,), generator=generator)]
        rows = (
            torch.randint(distinct, (count,), generator=generator)
            if kind == "collapsed"
            else torch.arange(count)
        )
        return Codes(pack(signs[rows]), bits, torch.arange(count)), hot[rows].contiguous()

    query, query_labels = side(QUERIES)
    database, database_labels = side(ITEMS)
    return query, query_labels, database, database_labels


def ours(query: Codes, query_labels: Tensor, database: Codes, labels: Tensor) -> tuple[float, float]:
    """MAP over the whole database and MAP@5000, in expectation over ties."""
    profile = code_profile(query, query_labels, database, labels)
    whole = average_precision(profile.items, profile.relevant)
    return float(whole.mean()), float(average_precision(profile.items, profile.relevant, CUT).mean())


def argsort(query: Codes, query_labels: Tensor, database: Codes, labels: Tensor) -> tuple[float, float]:
    """The same two values as published code computes them: distances and relevance by matrix product, one
    sort a query.

    numpy's default sort, which is the faster of its two here. The codes are unpacked to float once and the
    two values share the sort, so this is a quick form of it.
    """
    items, wanted = database.signs().float().numpy(), labels.numpy()
    sums = np.zeros(2)
    ranks = np.arange(1, len(items) + 1)
    for code, label in zip(query.signs().float().numpy(), query_labels.numpy(), strict=True):
        relevant = wanted @ label > 0
        distance = 0.5 * (query.bits - items @ code)
        hit = relevant[np.argsort(distance)]
        for row, k in enumerate((len(items), CUT)):
            found = np.flatnonzero(hit[:k])
            if len(found):
                sums[row] += np.mean(np.arange(1, len(found) + 1) / ranks[found])
    return float(sums[0] / len(query)), float(sums[1] / len(query))


def race(data: Sides) -> dict[str, Any]:
    """Both in turns, so that whatever else the machine does falls on both: ours whole, the baseline a slice
    of queries.

    Returns:
        The ratio of processor seconds (time that other programs took does not count), processor and wall
        seconds of one whole run of each, the best wall seconds of ours, and the values of both.
    """
    query, query_labels, database, labels = data
    own, base, values = [], [], np.zeros(2)
    found = ours(*data)
    for rows in torch.arange(QUERIES).chunk(ROUNDS):
        clock = Clock()
        ours(*data)
        own.append(clock.read())
        part = Codes(query.packed[rows], query.bits, query.ids[rows])
        clock = Clock()
        values += np.array(argsort(part, query_labels[rows], database, labels)) * len(rows) / QUERIES
        base.append(clock.read())
    mine, theirs = np.mean(own, axis=0).tolist(), np.sum(base, axis=0).tolist()
    return {
        "ratio": round(theirs[0] / mine[0], 2),
        "ratio_wall": round(theirs[1] / mine[1], 2),
        "seconds": {"ours": round(mine[0], 3), "argsort": round(theirs[0], 3)},
        "seconds_wall": {
            "ours": round(mine[1], 3),
            "ours_best": round(float(np.min(own, axis=0)[1]), 3),
            "argsort": round(theirs[1], 3),
        },
        "MAP": {"ours": round(found[0], 6), "argsort": round(float(values[0]), 6)},
        "MAP@5000": {"ours": round(found[1], 6), "argsort": round(float(values[1]), 6)},
    }


class Clock:
    """Processor and wall seconds since it was made."""

    def __init__(self) -> None:
        self.started = time.process_time(), time.perf_counter()

    def read(self) -> tuple[float, float]:
        return time.process_time() - self.started[0], time.perf_counter() - self.started[1]


def _resident() -> int:
    """Resident bytes of this process now."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _memory_child(which: str, pipe: Any) -> None:
    """Peak extra memory of one implementation: resident set sampled every 2 ms, and allocations that numpy
    traces."""
    torch.set_num_threads(1)
    data = make()
    run = ours if which == "ours" else argsort
    run(*first(data, 4))  # libraries and tables are loaded before the baseline is taken
    before, peak, stop = _resident(), _resident(), threading.Event()

    def sample() -> None:
        nonlocal peak
        while not stop.is_set():
            peak = max(peak, _resident())
            time.sleep(0.002)

    watcher = threading.Thread(target=sample)
    watcher.start()
    run(*(data if which == "ours" else first(data, 40)))
    stop.set()
    watcher.join()
    tracemalloc.start()
    run(*(data if which == "ours" else first(data, 4)))
    traced = tracemalloc.get_traced_memory()[1]
    pipe.send({"resident_mb": (peak - before) / 2**20, "numpy_traced_mb": traced / 2**20})
    pipe.close()


def first(data: Sides, count: int) -> Sides:
    """The same with the first queries only."""
    query, query_labels, database, labels = data
    return Codes(query.packed[:count], query.bits, query.ids[:count]), query_labels[:count], database, labels


def memory(which: str) -> dict[str, float]:
    """Peak extra memory beyond packed codes and labels, in a fresh process."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_memory_child, args=(which, sender))
    child.start()
    measured = receiver.recv()
    child.join()
    return {name: round(value, 2) for name, value in measured.items()}


def kernels(bits: int = 64, labels: int = 38) -> dict[str, Any]:
    """Seconds of profiles and both MAPs at the protocol's reference size, by machine code and by numpy, in
    turn."""
    from robusthash.metrics import distance_histogram as core

    data, installed = make(bits, labels), core._numba_installed
    if not installed():
        raise ImportError("this row compares with numba: pip install robusthash[fast]")
    times: dict[str, list[tuple[float, float]]] = {"compiled": [], "numpy": []}
    values: dict[str, tuple[float, float]] = {}
    for turn in range(ROUNDS + 1):
        for name in times:
            core._numba_installed = (lambda: True) if name == "compiled" else (lambda: False)
            clock = Clock()
            values[name] = ours(*data)
            if turn:  # the first compiles, or reads what was compiled
                times[name].append(clock.read())
    core._numba_installed = installed
    medians = {name: np.median(found, axis=0).round(3).tolist() for name, found in times.items()}
    return {
        "seconds": medians,
        "best_wall": {n: round(min(f)[1], 3) for n, f in times.items()},
        "equal": values["compiled"] == values["numpy"],
    }


def _same(left: Profile, right: Profile) -> bool:
    names = ("items", "relevant", "gain", "gain_exp", "ideal")
    return all(torch.equal(getattr(left, name), getattr(right, name)) for name in names)


def compiled_rows() -> list[dict[str, Any]]:
    """Machine code over numpy: a ratio, since both run in turn; seconds stand in the detail as (processor,
    wall)."""
    rows = []
    for bits, labels in ((64, 24), (64, 38)):
        found = kernels(bits, labels)
        ratio = found["seconds"]["numpy"][0] / found["seconds"]["compiled"][0]
        size = {
            "queries": QUERIES,
            "items": ITEMS,
            "bits": bits,
            "labels": labels,
            "threads": torch.get_num_threads(),
        }
        rows.append(
            {
                "bench": f"metric-core-numpy-over-compiled-{bits}-bits-{labels}-labels",
                "ratio": round(ratio, 2),
                "target": 4,
                "better": "higher",
                "detail": {**size, **found},
            }
        )
    return rows


def run() -> list[dict[str, Any]]:
    """One row for speed, one for memory, one for shards."""
    data = make()
    raced = race(data)
    extra = {name: memory(name) for name in ("ours", "argsort")}
    other = {
        name: race(made)
        for name, made in (
            ("collapsed to 2,000 distinct rows", make(kind="collapsed")),
            ("one label each", make(kind="single")),
            ("128 bits, 80 labels", make(128, 80)),
        )
    }
    query, query_labels, database, labels = data
    whole = code_profile(*data)
    started = time.perf_counter()
    parts = [
        code_profile(
            query, query_labels, Codes(database.packed[rows], BITS, database.ids[rows]), labels[rows]
        )
        for rows in torch.arange(ITEMS).chunk(7)
    ]
    merged = merge(parts)
    sharded = time.perf_counter() - started
    size = {"queries": QUERIES, "items": ITEMS, "bits": BITS, "labels": LABELS, "cut": CUT}
    return [
        {
            "bench": "metric-core-vs-argsort",
            "ratio": raced["ratio"],
            "target": 8,
            "better": "higher",
            "detail": {
                **size,
                "codes": "random (worst case for merging equal rows)",
                "threads": torch.get_num_threads(),
                **{name: value for name, value in raced.items() if name != "ratio"},
                "memory_mb": extra,
                "other_sizes": other,
            },
        },
        {
            "bench": "metric-core-memory-mb",
            "ratio": round(extra["ours"]["resident_mb"] / 64, 3),
            "target": 1.0,
            "better": "lower",
            "detail": {**size, "ours": extra["ours"], "argsort": extra["argsort"]},
        },
        *compiled_rows(),
        {
            "bench": "metric-core-shards-bit-equal",
            "ratio": 1.0 if _same(whole, merged) else 0.0,
            "target": 1.0,
            "better": "higher",
            "detail": {**size, "shards": 7, "bit_equal": _same(whole, merged), "seconds": round(sharded, 3)},
        },
    ]


if __name__ == "__main__":
    for line in run():
        print(json.dumps(line))
