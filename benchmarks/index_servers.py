"""Search in a file, in PostgreSQL and in Milvus against FAISS alone: the same answers, and the time of each.

One million 64-bit codes from 1,000 centres, and from 10 (collapsed: each distance ties 100,000 items). The
servers are real, of the extra ``dev-index``, and run on this machine with the client. Every exact engine must
give the same ids and distances, bit for bit, before any time counts. ``--count``, ``--engines`` and
``--centres`` make it smaller.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from _timing import seconds
from search import BITS, clustered_codes, random_codes

from robusthash.core.types import Codes
from robusthash.index import CodeIndex, open_index

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from index_servers import running

_CENTRES = {"1000": (1000, 0.02), "10": (10, 0.0)}
_ENGINES = ("faiss", "numpy", "postgresql", "milvus")
_K = (10, 100)


def index_of(engine: str, stack: ExitStack) -> CodeIndex:
    """An empty index of an exact engine."""
    if engine in ("faiss", "numpy"):
        home = stack.enter_context(tempfile.TemporaryDirectory())
        return stack.enter_context(open_index(f"file:{home}", BITS, engine))
    server = stack.enter_context(running(engine))
    return stack.enter_context(open_index(server.url(), BITS))


def measured(index: CodeIndex, queries: Codes, k: int, repeats: int) -> tuple[float, tuple[Any, Any]]:
    """Median seconds of one query, and the answers."""
    ones = [Codes(queries.packed[at : at + 1], BITS, queries.ids[at : at + 1]) for at in range(len(queries))]
    found = [index.search(one, k) for one in ones]
    times = [seconds(lambda one=one: index.search(one, k))[0] for _ in range(repeats) for one in ones]
    answers = torch.cat([one.ids for one in found]), torch.cat([one.distances for one in found])
    return statistics.median(times), answers


def compare(
    engines: Sequence[str], name: str, count: int, asked: int, repeats: int
) -> Iterator[dict[str, Any]]:
    """A row for each k and engine.

    Raises:
        AssertionError: two engines differ.
    """
    centres, flips = _CENTRES[name]
    draws = np.random.default_rng(0)
    middles = random_codes(centres, draws)
    rows = clustered_codes(count, draws, middles, flips)
    held = Codes(torch.from_numpy(rows), BITS, torch.arange(count))
    near = torch.from_numpy(clustered_codes(asked, draws, middles, 0.02))
    queries = Codes(near, BITS, torch.arange(asked))
    alone, first = faiss.IndexBinaryFlat(BITS), dict[int, Any]()
    alone.add(rows)
    with ExitStack() as stack:
        for engine in engines:
            index = index_of(engine, stack)
            add = seconds(lambda index=index: index.add(held))[0]
            for k in _K:
                one, answers = measured(index, queries, k, repeats)
                expected = first.setdefault(k, answers)
                if not all(map(torch.equal, answers, expected)):
                    raise AssertionError(f"{engine} differs from faiss at k={k} on {name}")
                direct = [
                    seconds(lambda row=row, k=k: alone.search(row[None], k))[0]
                    for _ in range(repeats)
                    for row in near.numpy()
                ]
                yield {
                    "centres": name,
                    "count": count,
                    "k": k,
                    "engine": engine,
                    "query_ms": round(1e3 * one, 2),
                    "faiss_alone_ms": round(1e3 * statistics.median(direct), 2),
                    "add_s": round(add, 1),
                    "equal": True,
                }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--engines", nargs="+", choices=_ENGINES, default=_ENGINES)
    parser.add_argument("--centres", nargs="+", choices=_CENTRES, default=list(_CENTRES))
    parser.add_argument("--queries", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    for codes in given.centres:
        for row in compare(given.engines, codes, given.count, given.queries, given.repeats):
            print(json.dumps(row), flush=True)
