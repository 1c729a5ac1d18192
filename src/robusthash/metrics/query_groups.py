"""Scores of groups of queries, such as the copies that one kind of change made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from robusthash.metrics.statistics import intervals


@dataclass(frozen=True)
class GroupScores:
    """The means over some of the queries; a query that a measure leaves out is left out here too."""

    queries: int
    values: dict[str, float]  # by measure
    interval: dict[str, tuple[float, float]] = field(default_factory=dict)


def group_scores(per_query: Mapping[str, Tensor], groups: Mapping[str, Tensor]) -> dict[str, GroupScores]:
    """Scores of each group that has a query.

    Args:
        per_query: by measure, (Q,) with NaN for a query that it leaves out.
        groups: by name, (Q,) bool.
    """
    scores = {}
    for name, members in groups.items():
        own = {measure: values[members] for measure, values in per_query.items()}
        own = {measure: values for measure, values in own.items() if not values.isnan().all()}
        if members.any():
            means = {measure: float(values.nanmean()) for measure, values in own.items()}
            scores[name] = GroupScores(int(members.sum()), means, intervals(own))
    return scores
