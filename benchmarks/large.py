"""Memory of distance profiles for databases that come in shards: 1, 3 and 10 million items, none of them
kept.

Each size runs in a fresh process. Its codes and labels are drawn shard by shard (250,000 items) and let go;
what counts is the peak of the resident set over that before the first shard. The ratio is the peak at 10
million items over that at 1 million: flat memory is 1.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from robusthash.core.types import Codes
from robusthash.metrics.distance_histogram import streamed_profile

SIZES = (1_000_000, 3_000_000, 10_000_000)
QUERIES, BITS, LABELS, SHARD = 100, 64, 24, 250_000


def drawn(count: int, seed: int) -> tuple[Codes, Tensor]:
    """Random codes, and label sets of three labels on average."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (count, BITS // 8), generator=generator, dtype=torch.uint8)
    labels = (torch.rand(count, LABELS, generator=generator) < 3 / LABELS).to(torch.uint8)
    return Codes(packed, BITS, torch.arange(count)), labels


def shards(items: int) -> Iterator[tuple[Codes, Tensor]]:
    """One after another; nothing holds on to them."""
    for number in range(items // SHARD):
        yield drawn(SHARD, 1 + number)


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _child(items: int, pipe: Any) -> None:
    torch.set_num_threads(1)
    query, query_labels = drawn(QUERIES, 0)
    streamed_profile(query, query_labels, [drawn(SHARD, 1)])  # one shard's work is in what is compared with
    before, started = _peak(), time.process_time()
    profile = streamed_profile(query, query_labels, shards(items))
    whole = bool((profile.items.sum(1) == items).all())
    pipe.send(
        {
            "peak_mb": _peak(),
            "grown_mb": _peak() - before,
            "seconds": time.process_time() - started,
            "all": whole,
        }
    )
    pipe.close()


def measure(items: int) -> dict[str, float]:
    """Peak resident MB of a fresh process, what the stream added to one shard's peak, and processor
    seconds."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(items, sender))
    child.start()
    measured = receiver.recv()
    child.join()
    return {name: round(value, 2) for name, value in measured.items()}


def run() -> list[dict[str, Any]]:
    """One row."""
    found = {str(items): measure(items) for items in SIZES}
    least, most = (found[str(SIZES[end])]["peak_mb"] for end in (0, -1))
    size = {"queries": QUERIES, "bits": BITS, "labels": LABELS, "shard": SHARD}
    detail = {**size, "by_items": found}
    return [
        {
            "bench": "profile-memory-10M-over-1M",
            "ratio": round(most / least, 3),
            "target": 1.05,
            "better": "lower",
        }
        | {"detail": detail}
    ]


if __name__ == "__main__":
    for line in run():
        print(json.dumps(line))
