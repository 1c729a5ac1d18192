"""Ranking measures: vectorised functions of a distance profile, in float64, exact under ties.

One value per query; NaN means "undefined for this query": it is left out of the mean and counted. Symbols: n,
r, g are the items, relevant items and shared labels of a group of equal distance; nb, rb, gb the same
strictly before it; m the part of it above the cut; A, B the sums of ``average_precision.Groups``. A cut k
above N counts as N.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from robusthash.core.hamming import distance
from robusthash.core.labels import relevant as share_label
from robusthash.core.types import Codes, Profile
from robusthash.metrics import average_precision as ap
from robusthash.metrics.average_precision import Denominator, Groups, Ties, share

Empty = Literal["zero", "skip", "error"]
Gain = Literal["exp", "lin"]
LegacyDenominator = Literal["hits", "mink", "rel", "first-k-relevant"]


def total_relevant(profile: Profile) -> Tensor:
    """(Q,) int64: R, the relevant items of the whole database."""
    return profile.relevant.sum(1)


def database_size(profile: Profile) -> int:
    """N, the same for every query; no queries or an empty database are refused."""
    if len(profile) == 0:
        raise ValueError("there are no queries (Q = 0), so there is nothing to average")
    size = int(profile.items[0].sum())
    if size == 0:
        raise ValueError("the database is empty")
    return size


def clip_rank(profile: Profile, k: int | None) -> int:
    """``k`` clipped to the N items of the database; None is N, and k below 1 is refused."""
    size = database_size(profile)
    if k is not None and k < 1:
        raise ValueError(f"k must be at least 1, got {k}; the whole database is k=None")
    return size if k is None else min(k, size)


def mean_over_queries(values: Tensor, empty: Tensor, policy: Empty = "zero") -> tuple[float | None, Tensor]:
    """The mean over queries under a policy for empty ones.

    Args:
        values: (Q,) per-query values, NaN where undefined.
        empty: (Q,) bool, queries with nothing relevant in the database.
        policy: ``zero`` counts 0 for them in every measure, recall included, as published codes do of AP;
            ``skip`` leaves them out; ``error`` refuses.

    Returns:
        The mean, None where no query is left, and the (Q,) values with NaN for every query left out.
    """
    if len(values) == 0:
        raise ValueError("there are no queries (Q = 0), so there is no mean")
    if policy not in ("zero", "skip", "error"):
        raise ValueError(f"empty must be 'zero', 'skip' or 'error', got {policy!r}")
    if policy == "error" and empty.any():
        first = int(torch.nonzero(empty)[0])
        raise ValueError(
            f"{int(empty.sum())} of {len(empty)} queries have no relevant item in the database (first: "
            f"query {first}); remove them, or choose empty='zero' or 'skip'"
        )
    values = torch.where(empty, 0.0 if policy == "zero" else torch.nan, values)
    defined = values[~values.isnan()]
    return (float(defined.mean()) if len(defined) else None), values


def average_precision(
    profile: Profile, k: int | None = None, denominator: Denominator = "hits", ties: Ties = "expected"
) -> Tensor:
    """(Q,) AP@k; denominators and tie rules as in ``metrics.average_precision``."""
    clip_rank(profile, k)
    return ap.average_precision(profile.items, profile.relevant, k, denominator, ties)


def tie_gap(profile: Profile, k: int | None = None, denominator: Denominator = "hits") -> Tensor:
    """(Q,) optimistic minus pessimistic AP: the luck of the order within ties."""
    best = average_precision(profile, k, denominator, "optimistic")
    return best - average_precision(profile, k, denominator, "pessimistic")


def collapsed(profile: Profile) -> Profile:
    """The profile of the same database when every item has the same code: one group of equal distance."""
    counts = {name: getattr(profile, name) for name in ("items", "relevant", "gain", "gain_exp")}
    return replace(profile, **{name: count.sum(1, keepdim=True) for name, count in counts.items()})


def chance(profile: Profile, k: int | None = None, denominator: Denominator = "hits") -> Tensor:
    """(Q,) expected AP@k of a random order, which is that of a fully collapsed code.

    For the whole database [H_N (1 - s) + N s] / N with s = (R - 1) / (N - 1).
    """
    return average_precision(collapsed(profile), k, denominator)


def least_ap(profile: Profile) -> Tensor:
    """(Q,) least AP over the whole database that any order can have: all relevant items last."""
    return average_precision(collapsed(profile), None, "rel", "pessimistic")


def legacy_average_precision(
    query: Codes,
    query_labels: Tensor,
    database: Codes,
    labels: Tensor,
    k: int | None = None,
    denominator: LegacyDenominator = "hits",
    block: int = 16,
) -> Tensor:
    """(Q,) AP@k in the order of a stable sort by (distance, row), to compare with published tables.

    Args:
        query_labels, labels: (Q, C) and (N, C) multi-hot.
        denominator: as in ``average_precision``, or ``first-k-relevant``: the mean of i / rank_i over the
            first min(k, R) relevant items of the *whole* ranking, which some cross-modal attack codes print
            as MAP@k.
        block: queries sorted at a time.
    """
    if denominator not in (known := get_args(LegacyDenominator)):
        raise ValueError(f"denominator must be one of {', '.join(known)}, got {denominator!r}")
    if k is not None and k < 1:
        raise ValueError(f"k must be at least 1, got {k}; the whole database is k=None")
    if len(query) == 0 or len(database) == 0:
        raise ValueError(f"there are {len(query)} queries and {len(database)} database items")
    values = []
    for start in range(0, len(query), block):
        rows = slice(start, start + block)
        order = torch.argsort(distance(query.packed[rows], database.packed), dim=1, stable=True)
        hit = share_label(query_labels[rows].cpu(), labels.cpu()).gather(1, order)
        values.append(ap_in_order(hit, k, denominator))
    return torch.cat(values)


def ap_in_order(hit: Tensor, k: int | None, denominator: LegacyDenominator) -> Tensor:
    """(Q,) AP@k of rankings without ties, from (Q, N) bool: the item at each rank is relevant."""
    size = hit.shape[1]
    cut = size if k is None else min(k, size)
    ranks = torch.arange(1, size + 1, dtype=torch.float64)
    hits_so_far = hit.cumsum(1)
    total = hits_so_far[:, -1]
    if denominator == "first-k-relevant":
        counted, divisor = hit & (hits_so_far <= cut), total.clamp(max=cut)
    else:
        counted = hit & (ranks <= cut)
        divisor = {"hits": counted.sum(1), "mink": total.clamp(max=cut), "rel": total}[denominator]
    return share(torch.where(counted, hits_so_far / ranks, 0.0).sum(1), divisor)


def precision_at(profile: Profile, k: int) -> Tensor:
    """(Q,) expected P@k."""
    cut = clip_rank(profile, k)
    return _hits(profile, cut) / cut


def recall_at(profile: Profile, k: int) -> Tensor:
    """(Q,) expected R@k; NaN for a query with nothing relevant."""
    total = total_relevant(profile)
    return torch.where(total > 0, share(_hits(profile, clip_rank(profile, k)), total), torch.nan)


def _hits(profile: Profile, k: int) -> Tensor:
    """(Q,) expected relevant items in the top k."""
    groups = Groups.cut(profile.items, profile.relevant, k)
    return (share(profile.relevant, profile.items) * groups.above_cut).sum(1)


def precision_curve(profile: Profile, ranks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """P@N over a grid, by default 100, 200, ... 1000 up to N: (G,) ranks and (Q, G) precisions."""
    ranks = torch.arange(100, 1001, 100) if ranks is None else ranks
    ranks = ranks[ranks <= database_size(profile)]
    columns = [precision_at(profile, int(rank)) for rank in ranks]
    return ranks, torch.stack(columns, 1) if columns else torch.zeros(len(profile), 0, dtype=torch.float64)


def radius_curve(profile: Profile, empty: Literal["zero", "undefined"] = "zero") -> tuple[Tensor, Tensor]:
    """(Q, K + 1) precision and recall of the Hamming ball of each radius; no ties to resolve.

    Args:
        empty: precision of a ball without items: 0, as hash-lookup tables count it, or NaN, for averaged
            curves. Recall is NaN for a query with nothing relevant.
    """
    if empty not in ("zero", "undefined"):
        raise ValueError(f"empty must be 'zero' or 'undefined', got {empty!r}")
    inside, hits = profile.items.cumsum(1), profile.relevant.cumsum(1)
    precision = share(hits, inside)
    if empty == "undefined":
        precision = torch.where(inside > 0, precision, torch.nan)
    total = total_relevant(profile)[:, None]
    return precision, torch.where(total > 0, share(hits, total), torch.nan)


def precision_within(profile: Profile, radius: int) -> Tensor:
    """(Q,) precision of the ball of ``radius``, 0 for an empty ball: P@r<=2 is the usual lookup number."""
    if not 0 <= radius <= profile.bits:
        raise ValueError(f"a radius lies in 0..{profile.bits}, got {radius}")
    return radius_curve(profile)[0][:, radius]


def rank_curve(profile: Profile) -> tuple[Tensor, Tensor]:
    """(100,) recall 0.01, ... 1 and (Q, 100) expected precision at it, NaN with nothing relevant.

    Precision is taken at the smallest real-valued position where expected recall reaches the level, linear
    inside a group: that also works with fewer relevant items than levels and with a hit at rank 1.
    """
    levels = 100
    steps = torch.arange(1, levels + 1)
    total = total_relevant(profile)[:, None]
    hits = profile.relevant.cumsum(1)
    # the first group whose hits reach steps / levels * R, decided in integers
    group = torch.searchsorted(levels * hits, steps * total).clamp(max=hits.shape[1] - 1)
    level_hits = steps.to(torch.float64) * total / levels
    items, relevant = profile.items.gather(1, group), profile.relevant.gather(1, group)
    items_before = profile.items.cumsum(1).gather(1, group) - items
    relevant_before = hits.gather(1, group) - relevant
    position = items_before + (level_hits - relevant_before) * share(items, relevant)
    precision = torch.where(total > 0, level_hits / position, torch.nan)
    return steps.to(torch.float64) / levels, precision


def pr_area(profile: Profile) -> Tensor:
    """(Q,) area under the precision-recall curve by rank, by trapezoid from recall 0 on. It is not AP."""
    recall, precision = rank_curve(profile)
    recall = torch.cat([torch.zeros(1, dtype=torch.float64), recall])
    return torch.trapezoid(torch.cat([precision[:, :1], precision], 1), recall, dim=1)


def ndcg(profile: Profile, k: int | None = None, gain: Gain = "exp") -> Tensor:
    """(Q,) expected nDCG@k; 0 for a query that shares no label with any item.

    DCG@k = sum_d (g/n) (D[nb + m] - D[nb]), D[p] = sum_{t<=p} 1 / log2(t + 1), gain 2^shared - 1 (``exp``) or
    shared (``lin``); the ideal order sorts the whole database by gain.
    """
    if gain not in ("exp", "lin"):
        raise ValueError(f"gain must be 'exp' or 'lin', got {gain!r}")
    cut = clip_rank(profile, k)
    discount = torch.zeros(cut + 1, dtype=torch.float64)
    discount[1:] = (1 / torch.log2(torch.arange(2, cut + 2, dtype=torch.float64))).cumsum(0)
    groups = Groups.cut(profile.items, profile.relevant, cut)
    sums = profile.gain_exp if gain == "exp" else profile.gain.to(torch.float64)
    start = groups.before.clamp(max=cut)
    dcg = (share(sums, profile.items) * (discount[start + groups.above_cut] - discount[start])).sum(1)
    shared = torch.arange(profile.ideal.shape[1], dtype=torch.float64)
    values = (2**shared - 1 if gain == "exp" else shared).flip(0)
    ends = profile.ideal.flip(1).cumsum(1).clamp(max=cut)
    bounds = torch.nn.functional.pad(discount[ends], (1, 0))
    best = (values * bounds.diff(dim=1)).sum(1)
    return torch.where(best > 0, dcg / torch.where(best > 0, best, 1.0), 0.0)


def acg(profile: Profile, k: int | None = None) -> Tensor:
    """(Q,) expected ACG@k: shared labels per item of the top k."""
    cut = clip_rank(profile, k)
    groups = Groups.cut(profile.items, profile.relevant, cut)
    return (share(profile.gain, profile.items) * groups.above_cut).sum(1) / cut


def wap(profile: Profile) -> Tensor:
    """(Q,) expected weighted AP: the mean, over relevant positions, of ACG at that position.

    A group adds (r/n) [(gb + g/r) A + (g - g/r)/(n - 1) B]; g/r is the mean gain of a relevant item.
    """
    groups = Groups.cut(profile.items, profile.relevant, None)
    gain = profile.gain.to(torch.float64)
    before = profile.gain.cumsum(1) - profile.gain
    each = share(gain, profile.relevant)
    inner = (before + each) * groups.ones + share(gain - each, profile.items - 1) * groups.steps
    sums = (share(profile.relevant, profile.items) * inner).sum(1)
    return share(sums, total_relevant(profile))
