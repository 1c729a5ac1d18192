"""Distance profiles counted as machine code by numba (extra ``fast``): the same integers, sooner.

The compiled code is cached on disk next to this file, or in ``NUMBA_CACHE_DIR``.
"""

# mypy reads numba's decorators, but not the language inside of them
# mypy: disable-error-code="call-arg, var-annotated"
from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from numba.core import types
from numba.extending import intrinsic


def count(
    codes: np.ndarray,
    labels: np.ndarray,
    other_codes: np.ndarray,
    other_labels: np.ndarray,
    weights: np.ndarray,
    table: np.ndarray,
) -> None:
    """Add to ``table[q, g, d]`` the weight of every item that shares g labels with row q at distance d.

    Runs on the threads of torch; sums of integers, so neither threads nor blocks change a bit.

    Args:
        codes, labels: (Q, words) uint64 of the queries.
        other_codes, other_labels: (M, words) uint64 of the items.
        weights: (M,) int64 items that each row stands for; (0,): one each.
        table: (Q, overlaps, distances) int64, wide enough for every pair.
    """
    threads = torch.get_num_threads()
    before = numba.get_num_threads()
    numba.set_num_threads(max(1, min(threads, before)))
    try:
        _count(codes, labels, other_codes, other_labels, weights, table)
    finally:
        numba.set_num_threads(before)
        torch.set_num_threads(threads)  # numba's first call changes the threads of OpenMP, which are torch's


@intrinsic
def _popcount(typing: Any, word: Any) -> Any:
    """The processor's own count of set bits."""

    def make(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), make


@numba.njit(nogil=True, cache=True)
def _differing(left: Any, right: Any) -> Any:
    total = numba.uint64(0)
    for word in range(left.shape[0]):
        total += _popcount(left[word] ^ right[word])
    return total


@numba.njit(nogil=True, cache=True)
def _common(left: Any, right: Any) -> Any:
    total = numba.uint64(0)
    for word in range(left.shape[0]):
        total += _popcount(left[word] & right[word])
    return total


@numba.njit(parallel=True, nogil=True, cache=True)
def _count(codes: Any, labels: Any, other_codes: Any, other_labels: Any, weights: Any, table: Any) -> None:
    distances, cells = numba.uint64(table.shape[2]), table.shape[1] * table.shape[2]
    items, weighted = other_codes.shape[0], weights.shape[0] > 0
    one_word = codes.shape[1] == 1 and labels.shape[1] == 1
    for row in numba.prange(codes.shape[0]):
        # four counters in turn: a count that waits for the last write to its own cell takes longer
        counts = np.zeros((4, cells), np.int64)
        if one_word and not weighted:
            code, label = codes[row, 0], labels[row, 0]
            for item in range(items):
                shared = _popcount(label & other_labels[item, 0])
                counts[item & 3, shared * distances + _popcount(code ^ other_codes[item, 0])] += 1
        else:
            for item in range(items):
                shared = _common(labels[row], other_labels[item])
                weight = weights[item] if weighted else 1
                counts[item & 3, shared * distances + _differing(codes[row], other_codes[item])] += weight
        for overlap in range(table.shape[1]):
            for far in range(table.shape[2]):
                for counter in range(4):
                    table[row, overlap, far] += counts[counter, overlap * table.shape[2] + far]
