"""Signs, packing and distances of binary codes. The only place where a bit is decided or counted."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def sign(logits: Tensor) -> Tensor:
    """+1 where ``logits`` >= 0 and -1 elsewhere, in the dtype of ``logits``.

    Zero gives +1, never a third value: zeros would make half-integer distances.

    Raises:
        ValueError: where a value is NaN or infinite; such a number is an error, not a bit.
    """
    if not torch.isfinite(logits).all():
        bad = int((~torch.isfinite(logits)).sum())
        raise ValueError(
            f"{bad} of {logits.numel()} code values are NaN or infinite; the model or the attack diverged"
        )
    return torch.where(logits >= 0, 1.0, -1.0).to(logits.dtype)


def pack(signs: Tensor) -> Tensor:
    """(N, K) signs in {-1, +1} -> (N, ceil(K / 8)) uint8; bit 1 = +1, first bit highest, zeros pad the
    end."""
    bits = (signs > 0).to("cpu", torch.uint8).numpy()
    return torch.from_numpy(np.packbits(bits, axis=1))


def unpack(packed: Tensor, bits: int) -> Tensor:
    """(N, ceil(K / 8)) uint8 -> (N, K) int8 in {-1, +1}."""
    if bits < 1:
        raise ValueError(f"bits must be positive, got {bits}")
    if packed.shape[1] != (bits + 7) // 8:
        raise ValueError(f"{bits} bits need {(bits + 7) // 8} bytes a code, got {packed.shape[1]}")
    raw = np.unpackbits(packed.cpu().numpy(), axis=1, count=bits)
    return torch.from_numpy(raw.astype(np.int8) * 2 - 1)


def as_words(packed: np.ndarray) -> np.ndarray:
    """(N, bytes) uint8 -> (N, words) uint64, zero-padded, so that one popcount covers 64 bits."""
    rows, width = packed.shape
    words = (width + 7) // 8
    padded = np.zeros((rows, words * 8), dtype=np.uint8)
    padded[:, :width] = packed
    return padded.view(np.uint64)


def distance(queries: Tensor, database: Tensor) -> Tensor:
    """Hamming distances between two packed code matrices: (Q, bytes), (M, bytes) -> (Q, M) int32."""
    if queries.shape[1] != database.shape[1]:
        raise ValueError(f"codes of different length: {queries.shape[1]} and {database.shape[1]} bytes")
    left, right = as_words(queries.cpu().numpy()), as_words(database.cpu().numpy())
    out = np.zeros((len(left), len(right)), dtype=np.int32)
    for word in range(left.shape[1]):
        out += np.bitwise_count(left[:, word, None] ^ right[None, :, word])
    return torch.from_numpy(out)


def topk(
    queries: Tensor, database: Tensor, k: int, ids: Tensor | None = None, block: int = 64
) -> tuple[Tensor, Tensor]:
    """The k nearest items of each query, ordered by (distance, id), exactly. The oracle of every index.

    Args:
        queries: (Q, bytes) packed codes.
        database: (M, bytes) packed codes.
        k: ranks kept, at least 1; where k > M the rest is -1.
        ids: (M,) int64 unique item ids; positions by default.
        block: queries per block; memory is ``block * M`` distances.

    Returns:
        (Q, k) int64 ids and (Q, k) int32 distances, -1 where there is no k-th item.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    count = len(database)
    ids = torch.arange(count) if ids is None else ids.cpu()
    by_id = torch.argsort(
        ids
    )  # with rows in id order, a stable order by distance is the order by (distance, id)
    database, ids = database.cpu()[by_id], ids[by_id]
    kept = min(k, count)
    out_ids = torch.full((len(queries), k), -1, dtype=torch.int64)
    out_distances = torch.full((len(queries), k), -1, dtype=torch.int32)
    for start in range(0, len(queries), block):
        rows = slice(start, start + block)
        found = distance(queries[rows], database)
        key = found.to(torch.int64) * count + torch.arange(
            count
        )  # unique, so that no tie is left to the sort
        best = torch.topk(key, kept, dim=1, largest=False, sorted=True).values
        out_ids[rows, :kept] = ids[best % count]
        out_distances[rows, :kept] = (best // count).to(torch.int32)
    return out_ids, out_distances
