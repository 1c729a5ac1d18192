"""Float vectors that are searched by cosine or Euclidean distance, next to binary codes.

Distances are computed in float64. Two of one query that differ by no more than rounding are a tie: the order
of a float search among them is as much luck as that of codes at equal Hamming distance.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from robusthash.core.hamming import distance, topk
from robusthash.core.types import Codes

Metric = Literal["cosine", "euclidean"]
Distance = Literal["hamming", "cosine", "euclidean"]

METRICS: tuple[Metric, ...] = ("cosine", "euclidean")
_CELLS = 1 << 20  # (query, item) pairs at a time: 8 MiB for each array of a block
_ROUNDING = 1e-12  # of the largest closeness there can be; float64 rounding of wide vectors stays below


@dataclass(frozen=True)
class Embeddings:
    """Float vectors of a split, and the distance by which they are searched."""

    vectors: Tensor  # (N, D) float, as the model answered them
    metric: Metric
    ids: Tensor  # (N,) int64
    origin: str = ""  # digest of the model that made them; "" where it is unknown

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def bits(self) -> int:
        """D, the width of the vectors: what results call the length of a code."""
        return self.vectors.shape[1]

    @cached_property
    def points(self) -> Tensor:
        """(N, D) float64: unit vectors, or vectors about their ``centre``, which keeps rounding small."""
        vectors = self.vectors.double()
        return _unit(vectors) if self.metric == "cosine" else vectors - self.centre

    @cached_property
    def centre(self) -> Tensor:
        """(D,) float64 mean of the vectors."""
        return self.vectors.double().mean(0)

    def rows(self) -> Tensor:
        """(N, D) what the search compares."""
        return self.vectors

    def take(self, positions: Tensor) -> Embeddings:
        """These items, numbered again."""
        return self.of(self.vectors[positions])

    def of(self, rows: Tensor) -> Embeddings:
        """Other vectors of the same space, numbered from 0."""
        return replace(self, vectors=rows.detach().cpu(), ids=torch.arange(len(rows)))


Searched = Codes | Embeddings
"""What a search compares: packed codes by Hamming distance, or float vectors by their own."""


def distances(query: Searched, database: Searched) -> Tensor:
    """(Q, N) distances of every query to every item: int32 bits, or float64.

    Cosine is 1 - cos, in [0, 2]; a vector of zeros has the cosine 0 with all.

    Raises:
        ValueError: codes against vectors, another metric or another width.
    """
    if isinstance(query, Codes) and isinstance(database, Codes):
        return distance(query.packed, database.packed)
    left, right = _same_space(query, database)
    return torch.cat([_as_distance(values, left.metric) for _, values, _ in _blocks(left, right)])


def paired_distances(left: Searched, right: Searched) -> Tensor:
    """(N,) distances between the items of equal position: int64 bits, or float64."""
    if isinstance(left, Codes) and isinstance(right, Codes):
        return (left.signs() != right.signs()).sum(1)
    one, two = _same_space(left, right)
    if one.metric == "cosine":
        return (1 - (one.points * two.points).sum(1)).clamp_min(0)
    return (one.vectors.double() - two.vectors.double()).norm(dim=1)


def nearest(query: Searched, database: Searched, k: int) -> tuple[Tensor, Tensor]:
    """(Q, k) positions and distances of the k nearest items (clipped to N), by (distance, position)."""
    k = min(k, len(database))
    if isinstance(query, Codes) and isinstance(database, Codes):
        return topk(query.packed, database.packed, k)
    positions, neighbours = [], []
    for _, order, values, _ in ordered(query, database):
        positions.append(order[:, :k])
        neighbours.append(values[:, :k])
    return torch.cat(positions), torch.cat(neighbours)


def ordered(query: Searched, database: Searched) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Rank the items of each query exactly, in blocks of queries.

    Yields:
        The rows of the block; (b, N) positions of the items by (distance, position); their distances; and
        (b, N) the number of the group of equal distance that each is in, from 0.
    """
    left, right = _same_space(query, database)
    for rows, values, rounding in _blocks(left, right):
        values, order = values.sort(dim=1, stable=True)
        group = torch.zeros_like(order)
        group[:, 1:] = (values.diff(dim=1) > rounding).cumsum(1)
        if len(right) > 1 and bool((group.diff(dim=1) == 0).any()):  # rounding may have shuffled a tie
            by_position = (group * len(right) + order).argsort(dim=1)
            order, values = order.gather(1, by_position), values.gather(1, by_position)
        yield rows, order, _as_distance(values, left.metric), group


def _as_distance(closeness: Tensor, metric: Metric) -> Tensor:
    return closeness if metric == "cosine" else closeness.sqrt()


def _same_space(query: Searched, database: Searched) -> tuple[Embeddings, Embeddings]:
    if isinstance(query, Codes) or isinstance(database, Codes):
        raise ValueError("codes and float vectors cannot be compared; encode both sides by the same model")
    if query.metric != database.metric or query.bits != database.bits:
        raise ValueError(
            f"queries of {query.bits} numbers by {query.metric} distance cannot be compared with items of "
            f"{database.bits} numbers by {database.metric} distance"
        )
    return query, database


def _blocks(query: Embeddings, database: Embeddings) -> Iterator[tuple[slice, Tensor, Tensor | float]]:
    """Rows of a block of queries, (b, N) float64 closeness to rank by, and the rounding of it.

    Closeness is 1 - cos, or the squared Euclidean distance.
    """
    items, centre = database.points, database.centre
    squares = items.square().sum(1)
    longest = squares.max().sqrt()
    step = max(1, _CELLS // max(1, len(items)))
    for start in range(0, len(query), step):
        rows = slice(start, start + step)
        if query.metric == "cosine":
            yield rows, (1 - _unit(query.vectors[rows].double()) @ items.T).clamp_min(0), _ROUNDING
        else:
            queries = query.vectors[rows].double() - centre
            own = queries.square().sum(1, keepdim=True)
            yield (
                rows,
                (own + squares - 2 * queries @ items.T).clamp_min(0),
                _ROUNDING * (own.sqrt() + longest) ** 2,
            )


def _unit(vectors: Tensor) -> Tensor:
    """Rows at length 1; a row of zeros stays one."""
    length = vectors.norm(dim=1, keepdim=True)
    return vectors / torch.where(length > 0, length, 1.0)
