"""Split -> batches, in order or shuffled by a keyed generator, decoded one batch ahead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from robusthash.core.runtime import Draws
from robusthash.core.types import Batch
from robusthash.data.base import Split


def batches(
    split: Split,
    batch_size: int,
    shuffle: Draws | None = None,
    positions: torch.Tensor | None = None,
    modalities: Sequence[str] | None = None,
) -> Iterator[Batch]:
    """Batches of ``split``; the last may be smaller.

    Args:
        batch_size: items per batch, at least 1.
        shuffle: the order is drawn from this scope; None keeps the split's order.
        positions: only these positions of the split (a pool); None for all.
        modalities: only these, where the split has them; None for all.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    order = torch.arange(len(split)) if positions is None else positions
    if shuffle is not None:
        order = order[torch.randperm(len(order), generator=shuffle.generator())]
    chunks = order.split(batch_size)

    def read(chunk: torch.Tensor) -> Batch:
        whole = split.batch(chunk)
        return whole if modalities is None else whole.only(modalities)

    # one thread reads ahead, so that decoding the next batch overlaps computing on this one
    with ThreadPoolExecutor(max_workers=1) as reader:
        ahead = reader.submit(read, chunks[0])
        for following in chunks[1:]:
            current, ahead = ahead, reader.submit(read, following)
            yield current.result()
        yield ahead.result()
