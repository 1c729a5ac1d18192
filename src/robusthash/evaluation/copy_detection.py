"""Relevance without labels: a search is right where it finds the copy of the very photograph."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from robusthash.core.embeddings import Searched, distances, ordered, paired_distances
from robusthash.core.types import Codes
from robusthash.data.base import ArraySource, RetrievalData
from robusthash.data.splits import Indices, assemble, hash_pixels
from robusthash.evaluation.context import EvaluationContext
from robusthash.evaluation.evaluate import measure_codes
from robusthash.metrics import average_precision as ap
from robusthash.metrics.distance_histogram import prepare, prepared_counts
from robusthash.metrics.protocol import copies

COPIES = copies()
"""One relevant item and one target a query."""


def copies_data(photographs: Tensor, stored: Tensor, note: str) -> RetrievalData:
    """Photographs as queries, and the stored copies that are searched.

    Each photograph is a class of its own, whose only database item is its stored copy; the other stored items
    have no class. The training split is the database: nothing is trained.

    Args:
        photographs: (Q, 3, H, W) uint8, of which photograph i has the stored copy i.
        stored: (M, 3, H, W) uint8, M at least Q.

    Raises:
        ValueError: a stored copy with the very pixels of a photograph.
    """
    queries, stored_items = len(photographs), len(stored)
    pixels = torch.cat([photographs, stored])
    labels = torch.cat([torch.eye(queries), torch.eye(stored_items, queries)])
    database = torch.arange(queries, queries + stored_items)
    hashes = hash_pixels(pixels)
    if same := int(np.isin(hashes[:queries], hashes[queries:]).sum()):
        raise ValueError(f"{same} photographs have the very pixels of a stored copy; leave them out")
    splits = Indices(database, torch.arange(queries), database)
    return assemble("photographs", ArraySource({"image": pixels}), labels, hashes, splits, (), note)


@dataclass(frozen=True, eq=False)
class CategoryScores:
    """AP of finding the other photographs of the same category; NaN for a photograph that has none."""

    ap: Tensor  # (Q,) float64
    chance: Tensor  # (Q,) float64 the AP of a random order

    @staticmethod
    def counted(items: Tensor, relevant: Tensor, cut: int | None = None) -> CategoryScores:
        """From (Q, groups) int64 counts of all photographs and of those of the category, nearest group first.

        Args:
            cut: ranks that count; where more photographs are of the category, these are all that can be
                found.
        """
        some = relevant.sum(1) > 0
        precision = ap.average_precision(items, relevant, cut, "mink")
        chance = ap.average_precision(items.sum(1, keepdim=True), relevant.sum(1, keepdim=True), cut, "mink")
        return CategoryScores(torch.where(some, precision, torch.nan), torch.where(some, chance, torch.nan))


@dataclass(frozen=True, eq=False)
class CopyScores:
    """Answers of a search, photograph by photograph."""

    ap: Tensor  # (Q,) float64 1 / rank of the copy, in expectation over ties
    first: Tensor  # (Q,) float64 chance that the copy comes first
    bits: Tensor  # (Q,) distance to the copy: int64 bits, or float64 of vectors
    rows: Tensor  # (Q, K) the signs, or vectors, of the queries
    kind: CategoryScores | None = None  # where the kinds are known

    def within(self, radius: float) -> Tensor:
        """(Q,) float64: 1 where the copy is at most ``radius`` apart."""
        return (self.bits <= radius).to(torch.float64)


def copy_scores(
    context: EvaluationContext, signs: Tensor, labels: Tensor, kinds: Tensor | None = None
) -> CopyScores:
    """Search with codes, or vectors, for the copies that ``labels`` name: their own, or those of targets.

    Args:
        signs: (Q, K) in {-1, +1}, or float vectors, of the first Q queries of the context.
        labels: (Q, C) one-hot.
        kinds: (M, G) one-hot category of each stored copy, zeros where it has none.
    """
    query = context.query.of(signs)
    measured = measure_codes(context, query, labels).per_query
    bits = paired_distances(query, context.database.take(labels.argmax(1)))
    kind = None if kinds is None else _same_kind(context, query, kinds)
    return CopyScores(measured["MAP"], measured["P@1"], bits, query.rows(), kind)


def _same_kind(context: EvaluationContext, query: Searched, kinds: Tensor) -> CategoryScores:
    """The stored copies of the same category; a photograph's own copy is left out of the ranking."""
    query_kinds, database = kinds[: len(query)], context.database
    if isinstance(query, Codes):
        items, relevant = prepared_counts(query, query_kinds, prepare(context.codes, kinds))
        own = distances(query, database)[:, : len(query)].diagonal().long()[:, None]
        return CategoryScores.counted(*_without_own(items, relevant, own, query_kinds))
    parts = []
    for rows, order, _, group in ordered(query, database):
        own = group[order == torch.arange(rows.start, rows.start + len(order))[:, None]][:, None]
        same = (query_kinds[rows] @ kinds.T).long().gather(1, order)
        empty = torch.zeros(len(order), int(group.max()) + 1, dtype=torch.int64)
        items, relevant = (empty.scatter_add(1, group, part) for part in (torch.ones_like(order), same))
        parts.append(CategoryScores.counted(*_without_own(items, relevant, own, query_kinds[rows])))
    return CategoryScores(*(torch.cat([getattr(p, name) for p in parts]) for name in ("ap", "chance")))


def _without_own(items: Tensor, relevant: Tensor, own: Tensor, query_kinds: Tensor) -> tuple[Tensor, Tensor]:
    """Counts without one item of each query, which is of its category, in the group ``own``, (Q, 1)."""
    one = torch.ones_like(own)
    with_category = query_kinds.sum(1, keepdim=True).long()
    return items.scatter_add(1, own, -one), relevant.scatter_add(1, own, -one * with_category)


def calibrated_radius(context: EvaluationContext, copies: Tensor | None = None, share: float = 0.01) -> float:
    """The largest radius at which at most ``share`` of the pairs of different photographs match, or 0.

    A whole number of bits; of vectors the last number below the distance of the first pair too many.

    Args:
        copies: (Q, M) bool, photographs that are the same picture as another stored one; they do not count.
    """
    apart = _of_others(context, copies)
    if context.victim.distance == "hamming":
        counts = torch.bincount(apart, minlength=context.victim.bits + 1)
        return max(0, int((counts.cumsum(0) <= share * len(apart)).sum()) - 1)
    first_too_many = apart.sort().values[int(share * len(apart))]
    return float(torch.nextafter(first_too_many, torch.zeros_like(first_too_many)))


def false_matches(context: EvaluationContext, radius: float, copies: Tensor | None = None) -> float:
    """Share of the pairs of different photographs that are at most ``radius`` apart; ``copies`` as above."""
    return float((_of_others(context, copies) <= radius).double().mean())


def _of_others(context: EvaluationContext, copies: Tensor | None) -> Tensor:
    """(P,) distances from each query to every stored copy of another photograph: int64 bits, or float64."""
    apart = distances(context.query, context.database)
    apart = apart.long() if context.victim.distance == "hamming" else apart
    others = context.query_labels @ context.database_labels.T == 0
    different = others if copies is None else others & ~copies
    if not different.any():
        raise ValueError(
            f"the {len(context.query)} photographs that are looked up are all copies of one another; an "
            "audit needs different ones ('robusthash duplicates FOLDER' lists copies)"
        )
    return apart[different]
