"""Worst cases, success measures, the searched floor and the summary scores."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from robusthash.core.hamming import distance, pack
from robusthash.core.runtime import Draws
from robusthash.core.types import Codes
from robusthash.metrics import robustness_measures as robust
from robusthash.metrics.average_precision import average_precision
from robusthash.metrics.distance_histogram import code_profile


def hrs(*values: float) -> float:
    return float(robust.hrs(*(torch.tensor(value, dtype=torch.float64) for value in values)))


def codes(count: int, bits: int, seed: int) -> Codes:
    generator = torch.Generator().manual_seed(seed)
    return Codes(
        pack(torch.randint(0, 2, (count, bits), generator=generator) * 2 - 1), bits, torch.arange(count)
    )


def ap(signs: Tensor, query_labels: Tensor, database: Codes, labels: Tensor, k: int | None = None) -> Tensor:
    query = Codes(pack(signs), signs.shape[1], torch.arange(len(signs)))
    profile = code_profile(query, query_labels, database, labels)
    return average_precision(profile.items, profile.relevant, k)


def test_worst_case_ties_targets_and_errors() -> None:
    clean = torch.tensor([0.5, 0.5, 0.2])
    attacks = {"a": torch.tensor([0.5, 0.3, 0.2]), "b": torch.tensor([0.4, 0.3, 0.3])}
    worst = robust.worst_case(clean, attacks)
    assert worst.winner == ("b", "a", "clean")
    assert worst.unique_wins == {"a": 0, "b": 1}
    highest = robust.worst_case(clean, attacks, targeted=True)
    assert highest.values.tolist() == pytest.approx([0.5, 0.5, 0.3])
    assert highest.winner == ("clean", "clean", "b")
    assert highest.unique_wins == {"a": 0, "b": 1}
    assert robust.worst_case(clean, {}).winner == ("clean",) * 3
    with pytest.raises(ValueError, match=r"c has .* values for 3 queries"):
        robust.worst_case(clean, {"c": clean[:2]})
    with pytest.raises(ValueError, match="c holds NaN for query 1"):
        robust.worst_case(clean, {"c": torch.tensor([0.1, float("nan"), 0.1])})
    with pytest.raises(ValueError, match="cannot be called 'clean'"):
        robust.worst_case(clean, {"clean": clean})


def test_flips_count_bits() -> None:
    clean, attacked = codes(9, 13, 0), codes(9, 13, 1)
    assert torch.equal(robust.flips(clean, attacked), distance(clean.packed, attacked.packed).diag().long())
    with pytest.raises(ValueError, match="9 attacked codes of 13 bits for 8 clean"):
        robust.flips(Codes(clean.packed[:8], 13, clean.ids[:8]), attacked)


def test_topk_disruption_of_an_unchanged_a_moved_and_an_opposite_code() -> None:
    database, query = codes(200, 10, 2), codes(6, 10, 3)
    opposite = Codes(pack(-query.signs()), 10, query.ids)
    for k in (1, 10, 100):
        assert robust.topk_disruption(query, query, database, k).tolist() == [0] * 6
        assert (robust.topk_disruption(query, opposite, database, k) > 0.8).all() or k == 100
    assert robust.topk_disruption(query, opposite, database, 500).tolist() == [0] * 6  # all items are in both


def test_topk_disruption_shares_the_mass_of_split_groups() -> None:
    # clean: one item at 0, two at 1 (the cut at 2 takes half of each); attacked: the two at 0 or 2 ...
    database = Codes(pack(torch.tensor([[-1, -1], [1, -1], [-1, 1]])), 2, torch.arange(3))
    clean = Codes(pack(torch.tensor([[-1, -1]])), 2, torch.arange(1))
    attacked = Codes(pack(torch.tensor([[1, -1]])), 2, torch.arange(1))
    # clean membership 1, 1/2, 1/2; attacked: item 1 at 0, item 0 at 1, item 2 at 2: 1, 1, 0; shared 1 + 1/2
    # of 2
    assert float(robust.topk_disruption(clean, attacked, database, 2)) == pytest.approx(0.25)


def test_success_rates_leave_failed_queries_out() -> None:
    clean = torch.tensor([0.8, 0.6, 0.01, 0.5])
    attacked = torch.tensor([0.3, 0.5, 0.0, 0.25])
    assert robust.success_rate(clean, attacked) == robust.Success(pytest.approx(2 / 3), 1)
    assert robust.success_rate(clean, attacked, tau=0.1).rate == 0
    assert robust.success_rate(clean[2:3], attacked[2:3]) == robust.Success(None, 1)
    lost, relative = robust.ap_drop(clean, attacked)
    assert lost.tolist() == pytest.approx([0.5, 0.1, 0.01, 0.25])
    assert relative.tolist() == pytest.approx([0.625, 1 / 6, 1.0, 0.5])
    assert robust.ap_drop(torch.zeros(1), torch.zeros(1))[1].isnan().all()
    t_clean, t_attacked = torch.tensor([0.6, 0.1, 0.2]), torch.tensor([0.55, 0.7, 0.4])
    assert robust.targeted_success_rate(t_clean, t_attacked) == pytest.approx(1 / 3)


def test_hubness_is_the_share_of_the_most_frequent_code() -> None:
    packed = torch.tensor([[1, 2], [1, 2], [3, 4], [1, 2], [5, 6]], dtype=torch.uint8)
    assert robust.hubness(Codes(packed, 16, torch.arange(5))) == pytest.approx(0.6)


def test_summary_scores_at_their_ends() -> None:
    assert hrs(1, 1, 0.3) == pytest.approx(1)
    assert hrs(0.9, 0.05, 0.1) == 0
    assert hrs(1, 1, 1) == 0  # everything relevant: nothing to score
    assert robust.targeted_resistance(0.4, 0.4) == 1
    assert robust.targeted_resistance(1.0, 0.4) == pytest.approx(0)
    with pytest.raises(ValueError, match="nothing to gain"):
        robust.targeted_resistance(1.0, 1.0)
    for eps in ([1, 2], [0, 2, 2], [0]):
        with pytest.raises(ValueError, match=r"eps|curve"):
            robust.curve_score(eps, [0.5] * len(eps))


def test_completeness() -> None:
    found = robust.completeness(torch.tensor([0.8, 0.2]), torch.tensor([0.4, 0.2]), torch.tensor([0.3, 0.2]))
    assert float(found[0]) == pytest.approx(0.8)
    assert found.isnan().tolist() == [False, True]


@pytest.mark.parametrize("k", [None, 20])
def test_the_floor_search_never_ends_above_its_starts_and_is_a_local_minimum(k: int | None) -> None:
    generator = torch.Generator().manual_seed(5)
    centers = torch.randint(0, 2, (4, 8), generator=generator) * 2 - 1
    classes = torch.randint(4, (300,), generator=generator)
    noise = torch.where(torch.rand(300, 8, generator=generator) < 0.1, -1, 1)
    database = Codes(pack(centers[classes] * noise), 8, torch.arange(300))
    labels = torch.nn.functional.one_hot(classes, 4)
    query_labels, own = torch.eye(4)[[0, 1, 2, 3, 0]], centers[[0, 1, 2, 3, 0]]
    starts = robust.floor_starts(own, centers[[1, 2, 3, 0, 1]], query_labels, Draws(0))
    assert starts.shape == (5, 10, 8)
    assert torch.equal(starts[:, 0], -own.to(torch.int8))
    floor, found = robust.floor_ap(starts, query_labels, database, labels, k)
    assert torch.allclose(ap(found, query_labels, database, labels, k), floor, atol=1e-14)
    assert (floor < ap(own, query_labels, database, labels, k) - 0.2).all()
    for start in starts.unbind(1):
        assert (floor <= ap(start, query_labels, database, labels, k) + 1e-14).all()
    for bit in range(8):
        flipped = found.clone()
        flipped[:, bit] *= -1
        assert (ap(flipped, query_labels, database, labels, k) >= floor - 1e-14).all()
    every = torch.tensor(list(itertools.product([-1, 1], repeat=8)))
    for row in range(5):
        lowest = ap(every, query_labels[row].expand(256, 4), database, labels, k).min()
        assert float(floor[row]) == pytest.approx(float(lowest), abs=0.02)
    alone, _ = robust.floor_ap(starts[2:3], query_labels[2:3], database, labels, k)
    assert torch.equal(alone, floor[2:3])


def test_random_starts_of_the_floor_are_those_of_the_label_set() -> None:
    own, labels = torch.ones(6, 12, dtype=torch.int8), torch.eye(3)[[0, 1, 2, 2, 1, 0]]
    together = robust.floor_starts(own, None, labels, Draws(1))
    alone = robust.floor_starts(own[4:5], None, labels[4:5], Draws(1))
    assert torch.equal(together[4:5], alone)
    assert torch.equal(together[:3], together[[5, 4, 3]])
    assert not torch.equal(together[0], together[1])
    assert together.shape == (6, 9, 12)
    with pytest.raises(ValueError, match="starts must be"):
        robust.floor_ap(together[0], torch.eye(6), codes(5, 12, 0), torch.eye(6)[:5])
