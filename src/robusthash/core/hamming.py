"""Signs, packing and distances of binary codes: the only place where a bit is decided or counted."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def sign(logits: Tensor) -> Tensor:
    """+1 where ``logits`` >= 0 (zero too, or distances were half-integers) and -1 elsewhere, in their dtype.

    Raises:
        ValueError: where a value is NaN or infinite; such a number is an error, not a bit.
    """
    return torch.where(finite(logits) >= 0, 1.0, -1.0).to(logits.dtype)


def finite(values: Tensor) -> Tensor:
    """The values themselves; a ``ValueError`` where one is NaN or infinite."""
    good = torch.isfinite(values)
    if not good.all():
        raise ValueError(
            f"{int((~good).sum())} of {values.numel()} code values are NaN or infinite; "
            "the model or the attack diverged"
        )
    return values


def pack(signs: Tensor) -> Tensor:
    """(N, K) signs in {-1, +1} -> (N, ceil(K / 8)) uint8; bit 1 = +1, first bit highest, zeros at the end."""
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
    """The k nearest items of each query by (distance, id), exactly: the ground truth of every index.

    Args:
        queries, database: (Q, bytes) and (M, bytes) packed codes.
        ids: (M,) int64 unique item ids; positions by default.
        block: queries at a time; memory is ``block * M`` distances.

    Returns:
        (Q, k) int64 ids and (Q, k) int32 distances, -1 where there is no k-th item.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    count = len(database)
    ids = torch.arange(count) if ids is None else ids.cpu()
    by_id = torch.argsort(ids)  # rows in id order: equal distances are then in order of id
    database, ids = database.cpu()[by_id], ids[by_id]
    ranks = min(k, count)
    out_ids = torch.full((len(queries), k), -1, dtype=torch.int64)
    out_distances = torch.full((len(queries), k), -1, dtype=torch.int32)
    for start in range(0, len(queries), block):
        rows = slice(start, start + block)
        distances = distance(queries[rows], database).to(torch.int64)
        key = distances * count + torch.arange(count)  # unique, so that no tie is left to the sort
        nearest = torch.topk(key, ranks, dim=1, largest=False, sorted=True).values
        out_ids[rows, :ranks] = ids[nearest % count]
        out_distances[rows, :ranks] = (nearest // count).to(torch.int32)
    return out_ids, out_distances
