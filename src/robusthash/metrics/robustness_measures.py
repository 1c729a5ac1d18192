"""Measures of attacks and robust models: success, worst case per query, searched floor, summary scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from robusthash.core.embeddings import Searched, paired_distances
from robusthash.core.hamming import distance, pack, unpack
from robusthash.core.runtime import Draws, digest
from robusthash.core.types import Codes
from robusthash.metrics.average_precision import Denominator, Groups, average_precision, share
from robusthash.metrics.distance_histogram import Prepared, prepare, prepared_counts


@dataclass(frozen=True)
class WorstCase:
    """The lowest AP of each query over a suite and the clean input (targeted: the highest t-AP)."""

    values: Tensor  # (Q,) float64
    winner: tuple[str, ...]  # (Q,) the attack that reached it; "clean" where none did better
    unique_wins: dict[str, int]  # queries on which this attack alone reaches the worst value

    @property
    def mean(self) -> float:
        """wMAP: the mean over queries of the worst value, not the worst of the attacks' means."""
        return float(self.values.mean())


def worst_case(
    clean: Tensor,
    attacks: Mapping[str, Tensor],
    targeted: bool = False,
    by: Mapping[str, Tensor] | None = None,
) -> WorstCase:
    """The worst case of each query over the clean input and every attack and restart.

    Args:
        clean: (Q,) AP of the clean queries (targeted: t-AP).
        attacks: (Q,) AP under each attack and restart, by name. Of equal ones the first named wins.
        targeted: the worst is then the highest value.
        by: (Q,) values by the same names, "clean" among them, that choose the winner, whose AP counts. A
            randomised model is chosen on some draws of its noise and scored on others: the lowest of noisy
            samples would drive any of them to 0.

    Raises:
        ValueError: a length that differs from ``clean``, NaN, or an attack called "clean".
    """
    if "clean" in attacks:
        raise ValueError("an attack cannot be called 'clean': that name stands for the clean input")
    names = ("clean", *attacks)
    stacked = [values.to(torch.float64) for values in (clean, *attacks.values())]
    for name, values in zip(names, stacked, strict=True):
        if values.shape != clean.shape:
            raise ValueError(f"{name} has {tuple(values.shape)} values for {len(clean)} queries")
        if values.isnan().any():
            query = int(torch.nonzero(values.isnan())[0])
            raise ValueError(
                f"{name} holds NaN for query {query}, and a worst case needs a value of each; "
                "under empty='skip' leave out the queries that have no relevant item"
            )
    values = torch.stack(stacked)  # (1 + attacks, Q)
    table = (values if by is None else torch.stack([by[name] for name in names])) * (-1 if targeted else 1)
    worst, first = table.min(0).values, table.argmin(0)
    alone = (table == worst).sum(0) == 1
    wins = {name: int((alone & (first == row)).sum()) for row, name in enumerate(names) if row}
    return WorstCase(values.gather(0, first[None])[0], tuple(names[row] for row in first.tolist()), wins)


def flips(clean: Codes, attacked: Codes) -> Tensor:
    """(Q,) int64 bits that differ between the clean and the attacked code of each query."""
    _same_queries(clean, attacked)
    return (clean.signs() != attacked.signs()).sum(1)


def moved(clean: Searched, attacked: Searched) -> tuple[str, Tensor]:
    """The name of the measure by which queries moved, and its (Q,) float64 values.

    ``flips`` counts bits of codes; float vectors have the ``distance`` between before and after.
    """
    if isinstance(clean, Codes) and isinstance(attacked, Codes):
        return "flips", flips(clean, attacked).double()
    return "distance", paired_distances(clean, attacked)


def _same_queries(clean: Codes, attacked: Codes) -> None:
    if len(clean) != len(attacked) or clean.bits != attacked.bits:
        raise ValueError(
            f"{len(attacked)} attacked codes of {attacked.bits} bits for {len(clean)} clean ones of "
            f"{clean.bits} bits"
        )


def topk_disruption(clean: Codes, attacked: Codes, database: Codes, k: int, block: int = 8) -> Tensor:
    """(Q,) share of the clean top k (clipped to N) that the attack replaced; 0 for an unchanged code.

    Tie-aware: an item of a group split by the cut belongs to the top k with the probability m/n; the overlap
    is the shared mass sum_i min(p_i, p'_i) / k.
    """
    _same_queries(clean, attacked)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    cut = min(k, len(database))
    replaced = []
    for start in range(0, len(clean), block):
        rows = slice(start, start + block)
        members = [_membership(codes.packed[rows], database, cut) for codes in (clean, attacked)]
        replaced.append(1 - torch.minimum(*members).sum(1) / cut)
    return torch.cat(replaced).clamp(0, 1)


def _membership(packed: Tensor, database: Codes, k: int) -> Tensor:
    """(b, N) probability that each item is among the k nearest."""
    distances = distance(packed, database.packed).to(torch.int64)
    items = torch.zeros(len(packed), database.bits + 1, dtype=torch.int64)
    items.scatter_add_(1, distances, torch.ones_like(distances))
    return share(Groups.cut(items, items, k).above_cut, items).gather(1, distances)


@dataclass(frozen=True)
class Success:
    """A rate over the queries it is defined for."""

    rate: float | None  # None where no query is left
    left_out: int


def ap_drop(clean: Tensor, attacked: Tensor) -> tuple[Tensor, Tensor]:
    """(Q,) AP lost, and (Q,) its share of the clean AP, NaN where that is 0."""
    lost = clean - attacked
    return lost, torch.where(clean > 0, lost / torch.where(clean > 0, clean, 1.0), torch.nan)


def success_rate(clean: Tensor, attacked: Tensor, tau: float = 0.5, failed: float = 0.05) -> Success:
    """Untargeted success: the share of queries with AP_attacked <= tau * AP_clean.

    Queries with a clean AP below ``failed`` fail without an attack: they are left out and counted.
    """
    rows = clean >= failed
    count = int(rows.sum())
    rate = float((attacked[rows] <= tau * clean[rows]).to(torch.float64).mean()) if count else None
    return Success(rate, len(clean) - count)


def targeted_success_rate(clean: Tensor, attacked: Tensor, least: float = 0.5) -> float:
    """Targeted success: the share of queries with a t-AP of at least ``least``, above the clean one."""
    if len(clean) == 0:
        raise ValueError("there are no queries (Q = 0)")
    return float(((attacked >= least) & (attacked > clean)).to(torch.float64).mean())


def hubness(codes: Codes | Tensor) -> float:
    """Share of the codes that equal the most frequent one; 1 where all queries fall on one code.

    Args:
        codes: packed, or (Q, K) signs or vectors.
    """
    if len(codes) == 0:
        raise ValueError("there are no codes")
    rows = codes.packed if isinstance(codes, Codes) else codes
    counts = torch.unique(rows.cpu(), dim=0, return_counts=True)[1]
    return int(counts.max()) / len(codes)


def completeness(clean: Tensor, attacked: Tensor, floor: Tensor) -> Tensor:
    """(Q,) (clean - attacked) / (clean - floor); NaN where clean is at the searched floor already.

    Above 1 where the attack beats the search, which is no bound.
    """
    room = clean - floor
    return torch.where(room > 0, (clean - attacked) / torch.where(room > 0, room, 1.0), torch.nan)


def floor_starts(
    own: Tensor, representative: Tensor | None, labels: Tensor, draws: Draws, random: int = 8
) -> Tensor:
    """(Q, S, K) int8 start codes of the floor search: own complement, representative, random codes.

    Args:
        own, representative: (Q, K) signs of the clean queries and of the codes that the attack steers to.
        labels: (Q, C) multi-hot, the key of the random codes: the search knows a query by its labels alone,
            so those of one label set share them, and they are searched from once.
    """
    bits = own.shape[1]
    label_sets, member = torch.unique(labels.cpu().to(torch.uint8), dim=0, return_inverse=True)
    keys = torch.tensor([int(digest(each.tolist()), 16) for each in label_sets])[member]
    codes = torch.where(draws.within("floor").uniform(keys, (random, bits)) < 0.5, -1, 1).to(torch.int8)
    parts = [-own.cpu()[:, None].to(torch.int8), codes]
    if representative is not None:
        parts.insert(1, representative.cpu()[:, None].to(torch.int8))
    return torch.cat(parts, 1)


def floor_ap(
    starts: Tensor,
    query_labels: Tensor,
    database: Codes,
    labels: Tensor,
    k: int | None = None,
    denominator: Denominator = "hits",
) -> tuple[Tensor, Tensor]:
    """The lowest exact AP that a coordinate descent over the bits of the query code finds.

    Each turn flips the bit that lowers the expected AP most; a start ends where no flip lowers it. An
    attacker with full control of the code reaches this, up to local optima: a search result, no bound.
    Queries with equal label sets are searched together, against distinct (code, relevance) rows, and equal
    starts once.

    Args:
        starts: (Q, S, K) signs in {-1, +1}, as of ``floor_starts``.
        query_labels, labels: (Q, C) and (N, C) multi-hot.
        k, denominator: of the AP that is lowered.

    Returns:
        (Q,) float64 floor AP and (Q, K) int8 the code that has it.
    """
    if starts.ndim != 3 or starts.shape[2] != database.bits or starts.shape[1] == 0:
        raise ValueError(f"starts must be (Q, S, {database.bits}) with S > 0, got {tuple(starts.shape)}")
    if len(starts) != len(query_labels):
        raise ValueError(f"{len(query_labels)} label rows for the starts of {len(starts)} queries")
    label_sets, member = torch.unique(query_labels.cpu().to(torch.uint8), dim=0, return_inverse=True)
    floor = torch.empty(len(starts), dtype=torch.float64)
    codes = torch.empty(len(starts), database.bits, dtype=torch.int8)
    item_labels = labels.cpu().float()
    for index, label_set in enumerate(label_sets):
        queries = torch.nonzero(member == index).flatten()
        relevant = (item_labels @ label_set.float())[:, None] > 0
        packed, origin = torch.unique(pack(starts[queries].flatten(0, 1)), dim=0, return_inverse=True)
        values, ends = _descend(packed, prepare(database, relevant), k, denominator)
        origin = origin.view(len(queries), -1)
        best = origin.gather(1, values[origin].argmin(1, keepdim=True))[:, 0]
        floor[queries] = values[best]
        codes[queries] = unpack(ends[best], database.bits)
    return floor, codes


def _descend(
    packed: Tensor, database: Prepared, k: int | None, denominator: Denominator
) -> tuple[Tensor, Tensor]:
    """Descend from each packed start: (S,) AP reached and (S, bytes) codes."""

    def score(codes: Tensor) -> Tensor:
        query = Codes(codes, database.bits, torch.arange(len(codes)))
        return average_precision(*prepared_counts(query, torch.ones(len(codes), 1), database), k, denominator)

    flips = pack(2 * torch.eye(database.bits) - 1)  # (K, bytes), one bit set in each
    packed, values = packed.clone(), score(packed)
    active = torch.arange(len(packed))
    while len(active):  # every turn lowers the AP of the active codes, so it ends
        neighbours = packed[active, None] ^ flips
        lowest, bit = score(neighbours.flatten(0, 1)).view(len(active), -1).min(1)
        better = lowest < values[active]
        active, bit = active[better], bit[better]
        packed[active] ^= flips[bit]
        values[active] = lowest[better]
    return values, packed


def hrs(clean: Tensor, worst: Tensor, chance: Tensor) -> Tensor:
    """Harmonic robustness score in [0, 1]: the harmonic mean of clean and worst-case MAP, both above chance.

    C' = clip((C - c) / (1 - c), 0, 1), W' likewise; 2 C' W' / (C' + W'), 0 where both are 0. A collapsed
    model and a model without robustness both get about 0.

    Args:
        clean, worst, chance: MAP of the clean queries, wMAP, and the mean chance level, tensors of one shape.
    """
    room = torch.where(chance < 1, 1 - chance, 1.0)  # chance 1: everything is relevant, nothing to score
    above = [torch.where(chance < 1, ((value - chance) / room).clamp(0, 1), 0.0) for value in (clean, worst)]
    total = above[0] + above[1]
    return torch.where(total > 0, 2 * above[0] * above[1] / torch.where(total > 0, total, 1.0), 0.0)


def curve_score(eps: Sequence[float], worst: Sequence[float]) -> float:
    """Area under wMAP(eps) by trapezoid, divided by the largest eps. ``eps`` starts at 0 and rises."""
    if len(eps) != len(worst) or len(eps) < 2:
        raise ValueError(f"a curve needs as many eps as values, at least 2; got {len(eps)} and {len(worst)}")
    if eps[0] != 0 or any(right <= left for left, right in pairwise(eps)):
        raise ValueError(f"eps must start at 0 and rise, got {list(eps)}")
    x, y = torch.tensor(eps, dtype=torch.float64), torch.tensor(worst, dtype=torch.float64)
    return float(torch.trapezoid(y, x) / x[-1])


def targeted_resistance(worst: float, clean: float) -> float:
    """1 - (t-MAP_worst - t-MAP_clean) / (1 - t-MAP_clean): 1 where targeting gains nothing, 0 if all."""
    if clean >= 1:
        raise ValueError(f"a clean t-MAP of {clean} leaves nothing to gain: the targets cover everything")
    return 1 - (worst - clean) / (1 - clean)
