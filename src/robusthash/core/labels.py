"""Relevance by shared labels, and the drawing of target labels."""

from __future__ import annotations

import torch
from torch import Tensor

from robusthash.core.runtime import Draws


def overlap(left: Tensor, right: Tensor) -> Tensor:
    """(A, C), (B, C) multi-hot -> (A, B) number of shared labels, float."""
    return left.float() @ right.float().T


def relevant(left: Tensor, right: Tensor) -> Tensor:
    """(A, C), (B, C) multi-hot -> (A, B) bool: the two share a label."""
    return overlap(left, right) > 0


def has_relevant(queries: Tensor, database: Tensor) -> Tensor:
    """(Q, C), (N, C) multi-hot -> (Q,) bool: some item of the database shares a label with the query."""
    return ((queries > 0) & (database > 0).any(0)).any(1)


def cosine(left: Tensor, right: Tensor) -> Tensor:
    """(A, C), (B, C) multi-hot -> (A, B) cosine of the label vectors; 0 where one is empty."""
    norms = left.float().norm(dim=1)[:, None] * right.float().norm(dim=1)[None]
    return overlap(left, right) / norms.clamp_min(1e-8)


def draw_targets(
    query_labels: Tensor, ids: Tensor, database_labels: Tensor, count: int, draws: Draws
) -> Tensor:
    """Target label sets of targeted attacks, keyed by query id.

    Drawn uniformly and with replacement from the distinct non-zero label sets of the database that share no
    label with the query (the rule of SAAT's code, seeded).

    Args:
        query_labels, database_labels: (Q, C) and (M, C) multi-hot.
        ids: (Q,) query ids, the key of each draw.

    Returns:
        (Q, count, C) float; all zero for a query without a possible target, which is left out when scored.
    """
    sets = torch.unique(database_labels.cpu().to(torch.uint8), dim=0).float()
    sets = sets[sets.sum(1) > 0]
    allowed = ~relevant(query_labels.cpu(), sets)  # (Q, S)
    possible = allowed.sum(1)
    targets = torch.zeros(len(query_labels), count, query_labels.shape[1])
    numbers = draws.within("targets").uniform(ids.cpu(), (count,))
    for row in torch.nonzero(possible).flatten().tolist():
        candidates = torch.nonzero(allowed[row]).flatten()
        targets[row] = sets[candidates[(numbers[row] * len(candidates)).long()]]
    return targets
