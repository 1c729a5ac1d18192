"""The least average precision of a query some of whose bits may take either value.

With m free bits the distance of an item lies in [d, d + m], d that of the fixed bits. The ranking in which
every relevant item is as far and every other one as near as it can be, with ties against the query, has
before each relevant item all that could come before it, so its AP is at most that of any of the 2^m codes.
Some of the free bits are enumerated (a branch for each of their values) and only the rest is bounded so;
where all are enumerated the minimum is exact. The bound is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robusthash.metrics.average_precision import Denominator, average_precision
from robusthash.metrics.protocol import Protocol

ENUMERATED = 10
"""Free bits that are enumerated at most: up to so many, the minimum is exact."""

_CELLS = 1 << 25  # pairs of a branch and an item that are looked at for one query


def least_ap(
    sign: Tensor, free: Tensor, database: Tensor, relevant: Tensor, protocol: Protocol, most: int = ENUMERATED
) -> float:
    """A lower bound of the AP of every code that agrees with ``sign`` on the bits that are not free.

    Args:
        sign: (K,) in {-1, +1}.
        free: (K,) bool.
        database: (N, K) signs of the items.
        relevant: (N,) bool.
        protocol: its cut, denominator and order of ties.
        most: free bits that are enumerated; fewer in a large database. As many as are free: exact, but for
            ties of a protocol in legacy order, which count against the query.

    Raises:
        ValueError: the denominator ``first-k-relevant``.
    """
    if protocol.ap == "first-k-relevant":
        raise ValueError("no least AP is known for the denominator 'first-k-relevant'; use another protocol")
    if not bool(relevant.any()):
        return 0.0
    ones = (database > 0).to(torch.float32)
    apart = ones != (sign > 0)
    split = _branched(ones, free, relevant, min(most, (_CELLS // len(database)).bit_length() - 1))
    rest = int(free.sum()) - len(split)
    fixed = apart[:, ~free].sum(1)
    values = torch.arange(1 << len(split))[:, None] >> torch.arange(len(split)) & 1
    lowest, step = 1.0, max(1, (1 << 22) // len(database))
    for part in values.to(torch.float32).split(step):
        of = ones[:, split]
        near = fixed + (of.sum(1) + part.sum(1, keepdim=True) - 2 * part @ of.T).long()  # (branches, N)
        lowest = min(lowest, _lowest(near, rest, relevant, len(sign), protocol))
    return lowest


def _branched(ones: Tensor, free: Tensor, relevant: Tensor, most: int) -> Tensor:
    """Positions of the free bits to enumerate: those that tell relevant items best from the others."""
    places = torch.nonzero(free).flatten()
    others = ones[~relevant].mean(0) if not bool(relevant.all()) else ones.mean(0)
    order = (ones[relevant].mean(0) - others).abs()[places].argsort(descending=True, stable=True)
    return places[order[: max(0, most)]]


def _lowest(near: Tensor, rest: int, relevant: Tensor, bits: int, protocol: Protocol) -> float:
    """The least AP over branches, of (branches, N) smallest distances and ``rest`` bits that stay free."""
    far = torch.where(relevant, near + rest, near)
    places = far + (bits + 1) * torch.arange(len(near))[:, None]
    size = len(near) * (bits + 1)
    items = torch.bincount(places.flatten(), minlength=size).view(len(near), bits + 1)
    relevant_counts = torch.bincount(places[:, relevant].flatten(), minlength=size).view(len(near), bits + 1)
    if rest == 0 and protocol.ties == "expected":
        exact: Denominator = protocol.ap  # type: ignore[assignment]
        return float(average_precision(items, relevant_counts, protocol.k, exact).min())
    # fewer hits may raise the mean over them; that over min(R, k) is never larger, and falls with every item
    divisor: Denominator = "rel" if protocol.ap == "rel" else "mink"
    return float(average_precision(items, relevant_counts, protocol.k, divisor, "pessimistic").min())
