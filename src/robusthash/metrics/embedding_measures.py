"""Ranking measures of float vectors: an exact sort of every query's distances, in bounded blocks.

The measures are those of codes: a block of sorted distances becomes a ``Profile``, so that ties count in
expectation here as there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from robusthash.core.embeddings import Embeddings, ordered
from robusthash.core.labels import overlap
from robusthash.core.types import Profile
from robusthash.metrics import ranking_measures as measures
from robusthash.metrics.average_precision import average_precision
from robusthash.metrics.protocol import CURVES, Measured, Protocol, measure_profile


def embedding_profiles(
    query: Embeddings, query_labels: Tensor, database: Embeddings, labels: Tensor
) -> Iterator[tuple[Profile, Tensor]]:
    """Profiles of float vectors by blocks of queries; empty groups fill up.

    A group is one distance. Neighbours whose items all share the same number of labels are one group, since
    their order decides nothing: fewer groups, and the same value of every measure by rank.

    Args:
        query_labels, labels: (Q, C) and (N, C) multi-hot.

    Yields:
        The profile of a block, and (b, N) bool: relevant by (distance, row).
    """
    for shared, group in _shared_in_order(query, query_labels, database, labels):
        run = _runs(shared, group)
        empty = torch.zeros(len(run), int(run.max()) + 1, dtype=torch.int64)
        items, hits, gain = (
            empty.scatter_add(1, run, part) for part in (torch.ones_like(run), (shared > 0).long(), shared)
        )
        exponential = empty.double().scatter_add(1, run, 2.0 ** shared.double() - 1)
        levels = torch.zeros(len(run), int(shared.max()) + 1, dtype=torch.int64)
        ideal = levels.scatter_add(1, shared, torch.ones_like(shared))
        yield Profile(items, hits, gain, exponential, ideal), shared > 0


def embedding_ap(query: Embeddings, query_labels: Tensor, database: Embeddings, labels: Tensor) -> Tensor:
    """(Q,) exact expected AP over the whole database."""
    values = []
    for shared, group in _shared_in_order(query, query_labels, database, labels):
        hit = shared > 0
        value = measures.ap_in_order(hit, None, "hits")
        # only where items of one distance differ in relevance does their order count
        mixed = ((group.diff(dim=1) == 0) & (hit[:, 1:] != hit[:, :-1])).any(1)
        if mixed.any():
            tied, among = hit[mixed], group[mixed]
            empty = torch.zeros(len(tied), int(among.max()) + 1, dtype=torch.int64)
            items = empty.scatter_add(1, among, torch.ones_like(among))
            value[mixed] = average_precision(items, empty.scatter_add(1, among, tied.long()))
        values.append(value)
    return torch.cat(values)


def _shared_in_order(
    query: Embeddings, query_labels: Tensor, database: Embeddings, labels: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """(b, N) labels that each item shares, by (distance, row), and its group of equal distance."""
    if len(query_labels) != len(query) or len(labels) != len(database):
        counts = f"{len(query)} queries and {len(database)} items"
        raise ValueError(f"{len(query_labels)} and {len(labels)} label rows for {counts}")
    if len(database) == 0:
        raise ValueError("there are no vectors to search: the split is empty")
    labels = labels.cpu()
    for rows, order, _, group in ordered(query, database):
        yield overlap(query_labels[rows].cpu(), labels).round().long().gather(1, order), group


def _runs(shared: Tensor, group: Tensor) -> Tensor:
    """(b, N) number of the run of each item: a group, or neighbouring groups of one number of labels."""
    step, differ = group.diff(dim=1) > 0, shared.diff(dim=1) != 0
    if (differ & ~step).any():  # a group of several numbers stands alone
        several = torch.zeros_like(group).scatter_add(1, group[:, 1:], (differ & ~step).long()) > 0
        inside = several.gather(1, group)
        differ = differ | inside[:, 1:] | inside[:, :-1]
    return torch.nn.functional.pad((step & differ).cumsum(1), (1, 0))


def measure_embeddings(
    protocol: Protocol, query: Embeddings, query_labels: Tensor, database: Embeddings, labels: Tensor
) -> Measured:
    """Score float vectors under a protocol; measures within a radius of bits are left out and named."""
    by_radius = [n for n in protocol.measures if n == "PR/radius" or protocol.parse(n).radius is not None]
    protocol = replace(protocol, measures=tuple(n for n in protocol.measures if n not in by_radius))
    parsed = {name: protocol.parse(name) for name in protocol.measures}
    legacy = {name: one for name, one in parsed.items() if one.base == "MAP" and one.ties == "legacy"}
    blocks: list[tuple[Measured, int]] = []
    collapsed, orders = list[Profile](), {name: list[Tensor]() for name in legacy}
    lenient = replace(protocol, empty="zero" if protocol.empty == "error" else protocol.empty)
    for profile, hit in embedding_profiles(query, query_labels, database, labels):
        own = {n: measures.ap_in_order(hit, one.k, one.denominator) for n, one in legacy.items()}
        for name, values in own.items():
            orders[name].append(values)
        some = int((profile.relevant.sum(1) > 0).sum())
        blocks.append((measure_profile(lenient, profile, own), some))
        collapsed.append(measures.collapsed(profile))
    joined = {name: torch.cat(values) for name, values in orders.items()}
    # chance, the empty policy and the notes are functions of how many items are relevant, not of their order
    whole = measure_profile(protocol, _joined(collapsed), joined)
    per_query = {
        name: torch.cat([block.per_query[name] for block, _ in blocks]) for name in blocks[0][0].per_query
    }
    note = f"{', '.join(by_radius)}: a radius in bits means nothing to the {query.metric} distance"
    return replace(
        whole,
        values={name: float(per_query[name].nanmean()) for name in whole.values},
        per_query=per_query,
        curves={name: _mean_curve(protocol, name, blocks) for name in whole.curves},
        notes=(*whole.notes, *((note,) if by_radius else ())),
    )


def _joined(profiles: list[Profile]) -> Profile:
    """Profiles of one group each, query after query."""
    width = max(profile.ideal.shape[1] for profile in profiles)
    ideal = [torch.nn.functional.pad(p.ideal, (0, width - p.ideal.shape[1])) for p in profiles]
    counts = {
        n: torch.cat([getattr(p, n) for p in profiles]) for n in ("items", "relevant", "gain", "gain_exp")
    }
    return Profile(**counts, ideal=torch.cat(ideal))


def _mean_curve(protocol: Protocol, name: str, blocks: list[tuple[Measured, int]]) -> dict[str, Tensor]:
    """The mean over all queries from the means of the blocks, by the queries that each is of."""
    assert name in CURVES
    of_all = name == "P@N" and protocol.empty != "skip"
    weights, parts = [], []
    for block, some in blocks:
        if name in block.curves:
            weights.append(len(next(iter(block.per_query.values()))) if of_all else some)
            parts.append(block.curves[name])
    share = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    axis = "n" if name == "P@N" else "recall"
    mean = (torch.stack([part["precision"] for part in parts]) * share[:, None]).sum(0)
    return {axis: parts[0][axis], "precision": mean}
