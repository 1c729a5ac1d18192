"""The least AP of a query with free bits, against the minimum over all its codes."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from robusthash.core.hamming import pack
from robusthash.core.types import Codes
from robusthash.metrics.protocol import Protocol, load_protocol, measure
from robusthash.robustness.certificates.certified_map import least_ap

BITS, ITEMS = 12, 40
PROTOCOLS = [
    Protocol("whole", ("MAP",)),
    *(Protocol(f"cut by {ap}", ("MAP@10",), ap=ap, k=10) for ap in ("hits", "mink", "rel")),
]


def codes_of(signs: Tensor) -> Codes:
    return Codes(pack(signs), signs.shape[1], torch.arange(len(signs)))


def ap_of(signs: Tensor, database: Tensor, relevant: Tensor, protocol: Protocol) -> Tensor:
    """(B,) AP of codes of one query, by the measures of the package."""
    labels = torch.stack([relevant, ~relevant], 1).float()
    own = torch.tensor([[1.0, 0.0]]).repeat(len(signs), 1)
    measured = measure(protocol, codes_of(signs), own, codes_of(database), labels)
    return measured.per_query[protocol.headline]


def case(seed: int, free: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A code, its free bits, a database, and its relevant items, which lie near the code more often."""
    draw = torch.Generator().manual_seed(seed)
    sign = torch.randint(2, (BITS,), generator=draw) * 2 - 1
    relevant = torch.rand(ITEMS, generator=draw) < 0.3
    flips = torch.rand(ITEMS, BITS, generator=draw) < torch.where(relevant, 0.25, 0.5)[:, None]
    places = torch.randperm(BITS, generator=draw)[:free]
    mask = torch.zeros(BITS, dtype=torch.bool)
    mask[places] = True
    return sign, mask, torch.where(flips, -sign, sign), relevant


def every_code(sign: Tensor, free: Tensor) -> Tensor:
    """(2^m, K) all codes that agree with ``sign`` on the other bits."""
    codes = sign.repeat(2 ** int(free.sum()), 1)
    codes[:, free] = torch.tensor(list(product((-1, 1), repeat=int(free.sum()))), dtype=codes.dtype)
    return codes


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda p: p.name)
@pytest.mark.parametrize("free", [0, 1, 4, 8])
def test_enumeration_gives_the_least_of_all_codes(protocol: Protocol, free: int) -> None:
    for seed in range(5):
        sign, mask, database, relevant = case(seed, free)
        least = ap_of(every_code(sign, mask), database, relevant, protocol).min()
        assert least_ap(sign, mask, database, relevant, protocol) == pytest.approx(float(least), abs=1e-12)


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda p: p.name)
def test_the_bound_lies_below_every_code_and_tightens_with_what_is_enumerated(protocol: Protocol) -> None:
    tighter = 0
    for seed in range(20):
        sign, mask, database, relevant = case(seed, 6)
        least = float(ap_of(every_code(sign, mask), database, relevant, protocol).min())
        bounds = [
            round(least_ap(sign, mask, database, relevant, protocol, most), 12) for most in (0, 2, 4, 6)
        ]
        assert bounds == sorted(bounds)
        assert bounds[0] <= least + 1e-12
        assert bounds[-1] == pytest.approx(least, abs=1e-12)
        tighter += bounds[0] < bounds[-1] - 1e-6
    assert tighter > 10


def test_ties_in_legacy_order_count_against_the_query() -> None:
    legacy = replace(PROTOCOLS[0], ties="legacy")
    for seed in range(5):
        sign, mask, database, relevant = case(seed, 4)
        least = ap_of(every_code(sign, mask), database, relevant, legacy).min()
        assert least_ap(sign, mask, database, relevant, legacy) <= float(least) + 1e-12


def test_a_query_without_relevant_items_and_a_denominator_without_a_bound() -> None:
    sign, mask, database, _ = case(0, 2)
    assert least_ap(sign, mask, database, torch.zeros(ITEMS, dtype=torch.bool), PROTOCOLS[0]) == 0.0
    strange = Protocol("first", ("MAP@10",), ap="first-k-relevant", k=10, ties="legacy")
    with pytest.raises(ValueError, match="first-k-relevant"):
        least_ap(sign, mask, database, database[:, 0] > 0, strange)


def test_the_house_protocol_has_one() -> None:
    sign, mask, database, relevant = case(3, 3)
    assert 0 < least_ap(sign, mask, database, relevant, load_protocol("house")) < 1
