"""Relevance without labels: a search is right where it finds the copy of the very photograph."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from robusthash.core.hamming import distance, pack, unpack
from robusthash.core.types import Codes
from robusthash.data.base import ArraySource, RetrievalData
from robusthash.data.splits import Indices, assemble, hash_pixels
from robusthash.evaluation.context import EvaluationContext
from robusthash.metrics import average_precision as ap
from robusthash.metrics.distance_histogram import prepare, prepared_counts, prepared_profile
from robusthash.metrics.protocol import copies
from robusthash.metrics.ranking_measures import average_precision, precision_at

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
    asked, held = len(photographs), len(stored)
    pixels = torch.cat([photographs, stored])
    labels = torch.cat([torch.eye(asked), torch.eye(held, asked)])
    database = torch.arange(asked, asked + held)
    hashes = hash_pixels(pixels)
    if same := int(np.isin(hashes[:asked], hashes[asked:]).sum()):
        raise ValueError(f"{same} photographs have the very pixels of a stored copy; leave them out")
    splits = Indices(database, torch.arange(asked), database)
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
        found = ap.average_precision(items, relevant, cut, "mink")
        chance = ap.average_precision(items.sum(1, keepdim=True), relevant.sum(1, keepdim=True), cut, "mink")
        return CategoryScores(torch.where(some, found, torch.nan), torch.where(some, chance, torch.nan))


@dataclass(frozen=True, eq=False)
class CopyScores:
    """Answers of a search, photograph by photograph."""

    ap: Tensor  # (Q,) float64 1 / rank of the copy, in expectation over ties
    first: Tensor  # (Q,) float64 chance that the copy comes first
    bits: Tensor  # (Q,) int64 Hamming distance to the copy
    packed: Tensor  # (Q, bytes) the codes that asked
    kind: CategoryScores | None = None  # where the kinds are known

    def within(self, radius: int) -> Tensor:
        """(Q,) float64: 1 where the copy differs in at most ``radius`` bits."""
        return (self.bits <= radius).to(torch.float64)


def copy_scores(
    context: EvaluationContext, signs: Tensor, labels: Tensor, kinds: Tensor | None = None
) -> CopyScores:
    """Search with codes for the copies that ``labels`` name: their own, or those of targets.

    Args:
        signs: (Q, K) in {-1, +1}, of the first Q queries of the context.
        labels: (Q, C) one-hot.
        kinds: (M, G) one-hot category of each stored copy, zeros where it has none.
    """
    packed = pack(signs)
    query = Codes(packed, context.victim.bits, torch.arange(len(packed)))
    profile = prepared_profile(query, labels, context.prepared)
    wanted = context.database.packed[labels.argmax(1)]
    bits = (unpack(packed, context.victim.bits) != unpack(wanted, context.victim.bits)).sum(1)
    kind = None if kinds is None else _kind_found(context, packed, kinds)
    return CopyScores(average_precision(profile), precision_at(profile, 1), bits, packed, kind)


def _kind_found(context: EvaluationContext, packed: Tensor, kinds: Tensor) -> CategoryScores:
    """The stored copies of the same category; a photograph's own copy is left out of the ranking."""
    asked = kinds[: len(packed)]
    query = Codes(packed, context.victim.bits, torch.arange(len(packed)))
    items, relevant = prepared_counts(query, asked, prepare(context.database, kinds))
    own = distance(packed, context.database.packed[: len(packed)]).diagonal().long()[:, None]
    one = torch.ones_like(own)
    items = items.scatter_add(1, own, -one)
    relevant = relevant.scatter_add(1, own, -one * asked.sum(1, keepdim=True).long())
    return CategoryScores.counted(items, relevant)


def calibrated_radius(context: EvaluationContext, share: float = 0.01) -> int:
    """The largest radius at which at most ``share`` of the pairs of different photographs match, or 0."""
    distances = _of_others(context)
    counts = torch.bincount(distances, minlength=context.victim.bits + 1)
    return max(0, int((counts.cumsum(0) <= share * len(distances)).sum()) - 1)


def false_matches(context: EvaluationContext, radius: int) -> float:
    """Share of the pairs of different photographs that differ in at most ``radius`` bits."""
    return float((_of_others(context) <= radius).double().mean())


def _of_others(context: EvaluationContext) -> Tensor:
    """(P,) int64 Hamming distances from each query to every stored copy but its own."""
    distances = distance(context.query.packed, context.database.packed).long()
    return distances[context.query_labels @ context.database_labels.T == 0]
