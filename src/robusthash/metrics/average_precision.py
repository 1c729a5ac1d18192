"""The exact tie-averaged average precision of a distance profile.

Items at equal distance come in any order with equal chance; the expectation over these orders is a closed
form of the counts (McSherry and Najork, "Computing information retrieval performance measures efficiently in
the presence of tied scores", ECIR 2008). Where the cut k splits a group and the denominator is the number of
hits, which is then random, the expectation conditions on that number (hypergeometric).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Denominator = Literal["hits", "mink", "rel"]
Ties = Literal["expected", "optimistic", "pessimistic"]

_WINDOW = 1 << 16  # terms of the hypergeometric sum held at a time


def harmonic(before: Tensor, count: Tensor) -> Tensor:
    """sum_{j=1..count} 1 / (before + j) in float64, to full relative precision.

    From a table up to 32; beyond it the difference of two digamma expansions, written with log1p so that it
    does not cancel.
    """
    table = torch.nn.functional.pad(1.0 / torch.arange(1, 33, dtype=torch.float64), (1, 0)).cumsum(0)
    last = before + count
    near = table[last.clamp(max=32)] - table[before.clamp(max=32)]
    start = before.clamp(min=32).to(torch.float64) + 0.5
    end = last.clamp(min=32).to(torch.float64) + 0.5
    return near + torch.log1p((end - start) / start) + _tail(end) - _tail(start)


def _tail(x: Tensor) -> Tensor:
    """digamma(x + 1/2) - log(x) for x > 32."""
    square = 1.0 / (x * x)
    return square * (1 / 24 - square * (7 / 960 - square * (31 / 8064 - square * 127 / 30720)))


@dataclass(frozen=True)
class Groups:
    """Counts and harmonic sums of each group of equal distance, all (Q, groups)."""

    items: Tensor  # n, int64
    relevant: Tensor  # r, int64
    before: Tensor  # items strictly before the group
    relevant_before: Tensor
    above_cut: Tensor  # m: the part of the group above the cut
    ones: Tensor  # A = sum_{j=1..m} 1 / (before + j), float64
    steps: Tensor  # B = sum_{j=1..m} (j - 1) / (before + j), float64

    @classmethod
    def cut(cls, items: Tensor, relevant: Tensor, k: int | None) -> Groups:
        """Groups of a ranking that is cut after ``k`` items; None cuts nothing, and k below 1 is refused."""
        if k is not None and k < 1:
            raise ValueError(f"k must be at least 1, got {k}; the whole database is k=None")
        before = items.cumsum(1) - items
        above_cut = items if k is None else torch.minimum((k - before).clamp(min=0), items)
        ones = harmonic(before, above_cut)
        steps = above_cut - (before + 1) * ones
        return cls(items, relevant, before, relevant.cumsum(1) - relevant, above_cut, ones, steps)

    def hits(self) -> Tensor:
        """(Q,) relevant items above the cut, whole groups only."""
        return torch.where(self.above_cut == self.items, self.relevant, 0).sum(1)


def share(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole in float64, 0 where ``whole`` is not positive."""
    return torch.where(whole > 0, part / whole.clamp(min=1).to(torch.float64), 0.0)


def average_precision(
    items: Tensor,
    relevant: Tensor,
    k: int | None = None,
    denominator: Denominator = "hits",
    ties: Ties = "expected",
) -> Tensor:
    """Average precision of each query from its counts by distance.

    With n items and r relevant ones in a group, nb and rb before it and m of it above the cut, the group adds
    (r/n) * [(rb+1) A + (r-1)/(n-1) B] precisions in expectation, A and B as in ``Groups``.

    Args:
        items, relevant: (Q, groups) int64 items of each group, nearest first, and relevant ones among them.
        k: ranks that count; None for all, and more than there are counts as all.
        denominator: ``hits`` = relevant items in the top k (random where the cut splits a group, and averaged
            exactly), ``mink`` = min(R, k), ``rel`` = R, all relevant items.
        ties: ``expected`` over all orders within groups; ``optimistic`` relevant first; ``pessimistic``
            relevant last. The latter two are extremes for ``mink`` and ``rel``, and under ``hits`` merely two
            orders.

    Returns:
        (Q,) float64 in [0, 1]; 0 where nothing relevant is in the top k.

    Example:
        >>> import torch
        >>> one_group = torch.tensor([[4]]), torch.tensor([[2]])
        >>> round(average_precision(*one_group, k=2).item(), 6)
        0.666667
    """
    if denominator not in ("hits", "mink", "rel"):
        raise ValueError(f"denominator must be 'hits', 'mink' or 'rel', got {denominator!r}")
    if ties not in ("expected", "optimistic", "pessimistic"):
        raise ValueError(f"ties must be 'expected', 'optimistic' or 'pessimistic', got {ties!r}")
    groups = Groups.cut(items, relevant, k)
    total = relevant.sum(1)
    if denominator == "rel":
        divisor = total
    else:
        divisor = total if k is None else torch.minimum(total, torch.minimum(items.sum(1), torch.tensor(k)))
    if ties != "expected":
        hits, ordered = _ordered_sums(groups, ties)
        return share(ordered, hits if denominator == "hits" else divisor)
    sums = _expected_sums(groups)
    if denominator != "hits":
        return share(sums.sum(1), divisor)
    split = (groups.above_cut > 0) & (groups.above_cut < groups.items)
    sums_before = torch.where(split, 0.0, sums).sum(1)
    whole = share(sums_before, groups.hits())
    queries, columns = torch.nonzero(split, as_tuple=True)  # at most one group of a query is split
    if len(queries):
        whole[queries] = _over_random_hits(groups, queries, columns, sums_before[queries])
    return whole


def _expected_sums(groups: Groups) -> Tensor:
    """(Q, groups) expected sum of the precisions at the relevant positions of each group."""
    pairs = share(groups.relevant - 1, groups.items - 1)
    inner = (groups.relevant_before + 1) * groups.ones + pairs * groups.steps
    return share(groups.relevant, groups.items) * inner  # r = 0 gives 0, n = 1 has no pairs


def _ordered_sums(groups: Groups, ties: Ties) -> tuple[Tensor, Tensor]:
    """(Q,) hits and (Q,) sum of precisions with the relevant items first or last within each group."""
    irrelevant = groups.items - groups.relevant
    if ties == "optimistic":
        hits, start = torch.minimum(groups.relevant, groups.above_cut), groups.before
    else:
        hits, start = (groups.above_cut - irrelevant).clamp(min=0), groups.before + irrelevant
    # sum_{j=1..hits} (rb + j) / (start + j)
    sums = hits + (groups.relevant_before - start) * harmonic(start, hits)
    return hits.sum(1), sums.sum(1)


def _over_random_hits(groups: Groups, queries: Tensor, columns: Tensor, sums_before: Tensor) -> Tensor:
    """Expected AP under ``hits`` for queries whose cut splits a group.

    The number x of relevant items in the cut part is hypergeometric; given x the average precision is (sums
    before + x/m [(rb+1) A + (x-1)/(m-1) B]) / (rb + x). Terms further from the mean than 5 sqrt(s), s the
    smallest of m, n-m, r, n-r, hold less than 4e-22 of the probability (Hoeffding) and are left out.
    """
    n, r, m, rb = (
        getattr(groups, name)[queries, columns][:, None]
        for name in ("items", "relevant", "above_cut", "relevant_before")
    )
    ones, steps = groups.ones[queries, columns][:, None], groups.steps[queries, columns][:, None]
    mean = m.to(torch.float64) * r / n
    reach = 5 * torch.minimum(torch.minimum(m, n - m), torch.minimum(r, n - r)).to(torch.float64).sqrt() + 1
    low = torch.maximum((m - (n - r)).clamp(min=0), (mean - reach).floor().to(torch.int64))
    high = torch.minimum(torch.minimum(r, m), (mean + reach).ceil().to(torch.int64))
    width = int((high - low).max()) + 1
    expected = torch.empty(len(queries), dtype=torch.float64)
    step = max(1, _WINDOW // width)
    for start in range(0, len(queries), step):
        rows = slice(start, start + step)
        x = low[rows] + torch.arange(width)
        inside = x <= high[rows]
        grows = (r[rows] - x).to(torch.float64) * (m[rows] - x)  # P(x + 1) / P(x), numerator and denominator
        shrinks = (x + 1).to(torch.float64) * (n[rows] - r[rows] - m[rows] + x + 1)
        ratio = torch.where(x < high[rows], grows / shrinks, 1.0)
        log_weight = torch.nn.functional.pad(ratio.log().cumsum(1)[:, :-1], (1, 0))
        weight = torch.softmax(torch.where(inside, log_weight, -torch.inf), dim=1)
        inner = (rb[rows] + 1) * ones[rows] + share(x - 1, m[rows] - 1) * steps[rows]
        precision = share(sums_before[rows, None] + share(x, m[rows]) * inner, rb[rows] + x)
        expected[rows] = (weight * precision).sum(1)
    return expected
