"""Search time of the local index against faiss called directly: one million 64-bit codes, 100 queries.

Both scan the same codes in the same process and thread count, in pairs that alternate in order; the ratio is
the median over the pairs, so that a burst of other work on the machine touches both sides. Exactness is
checked first: a fast wrong answer is no result.
"""

from __future__ import annotations

import json
import tempfile
import time
from typing import Any

import faiss
import numpy as np
import torch
from _timing import in_turn, seconds

from robusthash.core import hamming
from robusthash.core.types import Codes
from robusthash.index import CodeIndex, open_index

BITS = 64
TARGET = 1.10


def random_codes(count: int, draws: np.random.Generator) -> np.ndarray:
    """(count, 8) uint8, every bit a fair coin."""
    return draws.integers(0, 256, (count, BITS // 8), dtype=np.uint8)


def clustered_codes(
    count: int, draws: np.random.Generator, centres: np.ndarray, flips: float = 0.02
) -> np.ndarray:
    """(count, 8) uint8 as training makes them: a few centres, each bit flipped with a small chance; ties
    abound."""
    noise = np.packbits(draws.random((count, BITS), dtype=np.float32) < flips, axis=1)
    return centres[draws.integers(0, len(centres), count)] ^ noise


def compare(
    index: CodeIndex, direct: Any, queries: Codes, k: int, pairs: int
) -> tuple[float, dict[str, float]]:
    """Median ratio of ours to faiss over alternating pairs, and the median times in milliseconds."""
    rows = queries.packed.numpy()
    compared = in_turn(lambda: index.search(queries, k), lambda: direct.search(rows, k), pairs)
    return compared.wall_ratio, {"ours_ms": 1e3 * compared.ours_wall, "faiss_ms": 1e3 * compared.theirs_wall}


def check(index: CodeIndex, queries: Codes, held: Codes, k: int) -> None:
    """Ten queries against the oracle.

    Raises:
        AssertionError: where an id or a distance differs.
    """
    few = Codes(queries.packed[:10], BITS, queries.ids[:10])
    ids, distances = hamming.topk(few.packed, held.packed, k, held.ids, block=2)
    found = index.search(few, k)
    if not (torch.equal(found.ids, ids) and torch.equal(found.distances, distances)):
        raise AssertionError(f"the index and the oracle differ at k={k}")


def run(count: int = 1_000_000, queries: int = 100, pairs: int = 25, seed: int = 0) -> list[dict[str, Any]]:
    """One row for each distribution of codes and each k: ``benchmark, ratio, target, better, detail``."""
    draws = np.random.default_rng(seed)
    centres = random_codes(100, draws)
    data = {
        "random": (random_codes(count, draws), random_codes(queries, draws)),
        "clustered": (clustered_codes(count, draws, centres), clustered_codes(queries, draws, centres)),
    }
    size, rows = f"{count // 1_000_000}M" if count >= 1_000_000 else str(count), []
    for name, (database, asked) in data.items():
        held = Codes(torch.from_numpy(database), BITS, torch.arange(count))
        query = Codes(torch.from_numpy(asked), BITS, torch.arange(queries))
        direct = faiss.IndexBinaryFlat(BITS)
        direct.add(database)
        with tempfile.TemporaryDirectory() as home:
            with open_index(f"file:{home}", BITS) as index:
                store = {"add_s": seconds(lambda index=index, held=held: index.add(held))[0]}
            start = time.perf_counter()
            with open_index(f"file:{home}") as index:
                store["open_s"] = time.perf_counter() - start
                for k in (10, 100):
                    check(index, query, held, k)
                    ratio, times = compare(index, direct, query, k, pairs)
                    detail = {"distribution": name, "n": count, "queries": queries, "k": k, "bits": BITS}
                    detail |= {
                        "pairs": pairs,
                        "threads": faiss.omp_get_max_threads(),
                        "faiss": faiss.__version__,
                    }
                    benchmark = f"search-vs-faiss-{size}-{BITS}bit-k{k}-{name}"
                    measured = {key: round(value, 3) for key, value in (times | store).items()}
                    rows.append(
                        {"bench": benchmark, "ratio": round(ratio, 4), "target": TARGET, "better": "lower"}
                    )
                    rows[-1]["detail"] = detail | measured
    return rows


if __name__ == "__main__":
    for row in run():
        print(json.dumps(row))
