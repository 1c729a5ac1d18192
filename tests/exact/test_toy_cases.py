"""The worked examples of the evaluation protocol, T1 to T18, with values computed by hand, and brute
force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from robusthash.analysis.band_attribution import shapley
from robusthash.core.hamming import pack
from robusthash.core.types import Codes, Profile
from robusthash.metrics import distortion as perceptibility
from robusthash.metrics import ranking_measures as measures
from robusthash.metrics import robustness_measures as robust
from robusthash.metrics.average_precision import average_precision as core_ap
from robusthash.metrics.distance_histogram import code_profile, merge
from robusthash.metrics.statistics import sign_flip_tests


def codes(rows: list[str] | Tensor) -> Codes:
    bits = torch.tensor([[int(bit) for bit in row] for row in rows]) if isinstance(rows, list) else rows
    return Codes(pack(bits * 2 - 1), bits.shape[1], torch.arange(len(bits)))


def from_counts(items: list[int], relevant: list[int]) -> Profile:
    n, r = torch.tensor([items]), torch.tensor([relevant])
    ideal = torch.stack([n.sum(1) - r.sum(1), r.sum(1)], 1)
    return Profile(n, r, r, r.double(), ideal)


def untied(relevance: list[int], more: int = 0) -> Profile:
    """A ranking without ties, and ``more`` relevant items far behind it."""
    return from_counts([1] * len(relevance) + [1] * more, relevance + [1] * more)


LABELS = {"A": [1, 0, 0], "B": [0, 1, 0], "C": [0, 0, 1], "AB": [1, 1, 0]}
DATABASE = ["000", "001", "010", "011", "101", "111"]
DATABASE_LABELS = torch.tensor([LABELS[name] for name in ("A", "AB", "C", "B", "A", "C")])


def t1(code: str = "000", labels: str = "AB") -> Profile:
    return code_profile(codes([code]), torch.tensor([LABELS[labels]]), codes(DATABASE), DATABASE_LABELS)


def value(tensor: Tensor) -> float:
    assert tensor.shape == (1,)
    return float(tensor)


def near(expected: float, tolerance: float = 6e-7) -> object:
    return pytest.approx(expected, abs=tolerance)


def test_t01_profile() -> None:
    profile = t1()
    assert profile.items.tolist() == [[1, 2, 2, 1]]
    assert profile.relevant.tolist() == [[1, 1, 2, 0]]
    assert profile.gain.tolist() == [[1, 2, 2, 0]]
    assert profile.gain_exp.tolist() == [[1, 3, 2, 0]]
    assert profile.ideal.tolist() == [[2, 3, 1]]


@pytest.mark.parametrize(
    ("k", "hits", "mink", "rel", "precision"),
    [
        (1, 1, 1, 0.25, 1),
        (2, 1, 0.75, 0.375, 0.75),
        (3, 0.916667, 0.611111, 0.458333, 0.666667),
        (4, 0.861111, 0.645833, 0.645833, 0.75),
        (5, 0.845833, 0.845833, 0.845833, 0.8),
        (6, 0.845833, 0.845833, 0.845833, 0.666667),
        (9, 0.845833, 0.845833, 0.845833, 0.666667),
        (None, 0.845833, 0.845833, 0.845833, 0.666667),
    ],
)
def test_t01_average_precision(k: int | None, hits: float, mink: float, rel: float, precision: float) -> None:
    profile = t1()
    for denominator, expected in (("hits", hits), ("mink", mink), ("rel", rel)):
        assert value(measures.average_precision(profile, k, denominator)) == near(expected)
    assert value(measures.precision_at(profile, k or 6)) == near(precision)


def test_t01_companions_and_graded_measures() -> None:
    profile = t1()
    assert value(measures.average_precision(profile, ties="optimistic")) == near(0.8875)
    assert value(measures.average_precision(profile, ties="pessimistic")) == near(0.804167)
    assert value(measures.tie_gap(profile)) == near(0.8875 - 0.8041666667)
    assert value(measures.average_precision(profile, 2, "mink", "optimistic")) == near(1)
    assert value(measures.average_precision(profile, 2, "mink", "pessimistic")) == near(0.5)
    for k, expected in ((1, 0.333333), (2, 0.536060), (3, 0.652733), (6, 0.770326)):
        assert value(measures.ndcg(profile, k, "exp")) == near(expected)
    for k, expected in ((1, 0.5), (3, 0.680606), (6, 0.827845)):
        assert value(measures.ndcg(profile, k, "lin")) == near(expected)
    for k in range(1, 6):
        assert value(measures.acg(profile, k)) == near(1)
    assert value(measures.acg(profile, 6)) == near(5 / 6)
    assert value(measures.wap(profile)) == near(1.0625)


def test_t01_radius_curve() -> None:
    precision, recall = measures.radius_curve(t1())
    assert precision[0].tolist() == pytest.approx([1, 2 / 3, 0.8, 2 / 3])
    assert recall[0].tolist() == pytest.approx([0.25, 0.5, 1, 1])


def test_t02_cut_group_with_random_denominator() -> None:
    two, one = from_counts([4], [2]), from_counts([4], [1])
    assert value(measures.average_precision(two)) == near(0.680556)
    assert value(measures.average_precision(two, 2, "hits")) == near(0.666667)  # not 0.833333
    assert value(measures.average_precision(two, 2, "mink")) == near(0.416667)
    assert value(measures.average_precision(one)) == near(0.520833)
    assert value(measures.average_precision(one, 2, "hits")) == near(0.375)
    assert value(measures.average_precision(one, 2, "rel")) == near(0.375)
    assert value(measures.average_precision(one, ties="optimistic")) == near(1)
    assert value(measures.average_precision(one, ties="pessimistic")) == near(0.25)


def test_t03_degenerate() -> None:
    for denominator, ties, k in itertools.product(
        ("hits", "mink", "rel"), ("expected", "optimistic", "pessimistic"), (1, 2, None)
    ):
        assert value(measures.average_precision(from_counts([2, 3], [0, 0]), k, denominator, ties)) == 0
        all_relevant = value(measures.average_precision(from_counts([2, 3], [2, 3]), k, denominator, ties))
        assert all_relevant == near(1 if denominator != "rel" or k is None else k / 5)
        for relevant in (0, 1):
            assert (
                value(measures.average_precision(from_counts([1], [relevant]), k, denominator, ties))
                == relevant
            )
    nothing = from_counts([2, 3], [0, 0])
    assert value(measures.ndcg(nothing)) == 0
    assert value(measures.wap(nothing)) == 0
    assert measures.recall_at(nothing, 2).isnan().all()
    collapsed = from_counts([32], [16])
    assert value(measures.average_precision(collapsed)) == near(0.549331)
    assert value(measures.average_precision(collapsed, ties="optimistic")) == near(1)
    assert value(measures.average_precision(collapsed, ties="pessimistic")) == near(0.322234)


@pytest.mark.parametrize(
    ("size", "relevant", "expected"),
    [(4, 1, 0.520833), (4, 2, 0.680556), (6, 4, 0.763333), (1000, 100, 0.105843)],
)
def test_t04_chance(size: int, relevant: int, expected: float) -> None:
    spread = from_counts(
        [1] * size, [1] * relevant + [0] * (size - relevant)
    )  # chance ignores where items lie
    assert value(measures.chance(spread)) == near(expected)
    harmonic = sum(1 / t for t in range(1, size + 1))
    s = (relevant - 1) / (size - 1)
    assert value(measures.chance(spread)) == pytest.approx((harmonic * (1 - s) + size * s) / size, abs=1e-13)


def test_t05_denominators() -> None:
    for found, expected in (([1, 0, 1], (0.833333, 0.555556, 0.333333)), ([1, 0, 0], (1, 1 / 3, 0.2))):
        profile = untied(found, more=5 - sum(found))
        for denominator, wanted in zip(("hits", "mink", "rel"), expected, strict=True):
            assert value(measures.average_precision(profile, 3, denominator)) == near(wanted)


def test_t06_targeted() -> None:
    clean = value(measures.average_precision(t1("000", "C")))
    attacked = value(measures.average_precision(t1("111", "C")))
    assert (clean, attacked) == (near(0.375), near(0.725))
    assert attacked - clean == near(0.35)
    original = t1("111", "AB")
    assert original.relevant.tolist() == [[0, 2, 1, 1]]
    assert value(measures.average_precision(original)) == near(0.627083)


def test_t07_worst_case() -> None:
    clean = torch.tensor([0.8, 0.6, 0.9], dtype=torch.float64)
    attacks = {"a": torch.tensor([0.2, 0.5, 0.9]).double(), "b": torch.tensor([0.4, 0.1, 0.7]).double()}
    assert [float(values.mean()) for values in attacks.values()] == pytest.approx([0.533333, 0.4], abs=1e-6)
    worst = robust.worst_case(clean, attacks)
    assert worst.mean == near(1 / 3)
    assert worst.winner == ("a", "b", "b")
    assert worst.unique_wins == {"a": 1, "b": 2}


def hrs(*values: float) -> float:
    return float(robust.hrs(*(torch.tensor(value, dtype=torch.float64) for value in values)))


def test_t08_summary_scores() -> None:
    assert hrs(0.7, 0.4, 0.1) == near(0.444444)
    assert hrs(0.1, 0.1, 0.1) == 0
    assert robust.curve_score([0, 2 / 255, 4 / 255, 8 / 255], [0.8, 0.6, 0.4, 0.2]) == near(0.45)


def test_t09_perceptibility() -> None:
    clean = torch.full((1, 3, 224, 224), 0.5, dtype=torch.float64)
    attacked = clean + 8 / 255
    found = perceptibility.image_measures(clean, attacked)
    expected = {
        "linf": 0.0313725,
        "l2": 12.171902,
        "mse": 9.842368e-4,
        "psnr": 30.0690,
        "ssim": 0.998152,
        "l0": 1,
    }
    tolerance = {"linf": 5e-8, "l2": 5e-7, "mse": 5e-11, "psnr": 5e-5, "ssim": 5e-7, "l0": 0}
    for name, wanted in expected.items():
        assert value(found[name]) == pytest.approx(wanted, abs=tolerance[name]), name
    for norm in perceptibility.legacy_matrix_norms(clean, attacked).values():
        assert value(norm) == pytest.approx(7.02745, abs=5e-6)


def test_t12_sign_flip() -> None:
    assert sign_flip_tests({"AP": torch.tensor([0.1, 0.2, 0.3])}) == {"AP": 0.25}


def test_t13_shapley() -> None:
    worth = {(): 0.0, (0,): 1.0, (1,): 0.0, (0, 1): 3.0}
    values, errors = shapley(lambda mask: worth[tuple(mask.nonzero().flatten().tolist())], players=2)
    assert values.tolist() == [2, 1]
    assert float(values.sum()) == 3
    assert errors.tolist() == [0, 0]


def test_t16_order_of_the_database_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(4)
    classes = torch.arange(10).repeat_interleave(100)
    labels = torch.nn.functional.one_hot(classes, 10)
    database = codes(
        torch.tensor([[0] * 8, [1] + [0] * 7])[(torch.rand(1000, generator=generator) < 0.05).long()]
    )
    query, query_labels = codes(torch.zeros(10, 8, dtype=torch.int64)), torch.eye(10)
    orders = {
        "sorted": torch.arange(1000),
        "reversed": torch.arange(1000).flip(0),
        "shuffled": torch.randperm(1000, generator=generator),
    }
    headline, legacy = {}, {}
    for name, order in orders.items():
        ordered = Codes(database.packed[order], 8, torch.arange(1000))
        profile = code_profile(query, query_labels, ordered, labels[order])
        headline[name] = {
            "AP": measures.average_precision(profile),
            "AP@50": measures.average_precision(profile, 50),
            "nDCG": measures.ndcg(profile, 100),
            "WAP": measures.wap(profile),
        }
        legacy[name] = float(
            measures.legacy_average_precision(query, query_labels, ordered, labels[order]).mean()
        )
    for name in ("reversed", "shuffled"):
        for measure, values in headline["sorted"].items():
            assert torch.equal(values, headline[name][measure]), measure
    assert float(headline["sorted"]["AP"].mean()) == pytest.approx(0.104, abs=0.003)
    assert legacy["shuffled"] == pytest.approx(0.104, abs=0.02)
    assert legacy["sorted"] > 0.17


def test_t17_shards_add_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(17)
    query, database = (codes(torch.randint(0, 2, (n, 20), generator=generator)) for n in (30, 1003))
    query_labels, labels = ((torch.rand(n, 9, generator=generator) < 0.2).float() for n in (30, 1003))
    whole = code_profile(query, query_labels, database, labels)
    for shards in (1, 7):
        parts = [
            code_profile(
                query, query_labels, Codes(database.packed[rows], 20, database.ids[rows]), labels[rows]
            )
            for rows in torch.arange(1003).chunk(shards)
        ]
        merged = merge(parts)
        for name in ("items", "relevant", "gain", "gain_exp", "ideal"):
            assert torch.equal(getattr(merged, name), getattr(whole, name)), name
            assert getattr(merged, name).dtype == getattr(whole, name).dtype
    streamed = code_profile(query, query_labels, database, labels, block=97)
    assert all(
        torch.equal(getattr(streamed, name), getattr(whole, name)) for name in ("items", "gain_exp", "ideal")
    )


def orders_of(groups: list[list[int]]) -> np.ndarray:
    """(P, N) gains along every ranking that respects the groups."""
    per_group = [np.array(list(itertools.permutations(group))) for group in groups]
    made = per_group[0]
    for following in per_group[1:]:
        made = np.concatenate(
            [np.repeat(made, len(following), 0), np.tile(following, (len(made), 1))], axis=1
        )
    return made


def random_groups(seed: int) -> list[list[int]]:
    """At most 9 items in groups with at most 5,000 orders, gains 0 to 3."""
    random = np.random.default_rng(seed)
    while True:
        sizes = random.multinomial(random.integers(1, 10), random.dirichlet([0.7] * 5))
        sizes = [int(size) for size in sizes if size]
        if math.prod(math.factorial(size) for size in sizes) <= 5000:
            break
    density = random.uniform(0.1, 0.9)
    return [[int(g) for g in random.integers(1, 4, size) * (random.random(size) < density)] for size in sizes]


def profile_of(groups: list[list[int]]) -> Profile:
    columns = [
        [len(group), sum(g > 0 for g in group), sum(group), sum(2**g - 1 for g in group)] for group in groups
    ]
    items, relevant, gain, gain_exp = torch.tensor(columns).T[:, None]
    ideal = torch.tensor([[sum(group.count(g) for group in groups) for g in range(4)]])
    return Profile(items, relevant, gain, gain_exp.double(), ideal)


def check_against_brute_force(groups: list[list[int]]) -> None:
    profile, rankings = profile_of(groups), orders_of(groups)
    size = rankings.shape[1]
    ranks = np.arange(1, size + 1)
    hit = rankings > 0
    seen = hit.cumsum(1)
    precisions = (hit * seen / ranks).cumsum(1)
    total = int(seen[0, -1])
    for k in range(1, size + 1):
        divisors = {
            "hits": seen[:, k - 1],
            "mink": np.full(len(hit), min(total, k)),
            "rel": np.full(len(hit), total),
        }
        for denominator, divisor in divisors.items():
            every = precisions[:, k - 1] / np.maximum(divisor, 1)
            assert value(measures.average_precision(profile, k, denominator)) == pytest.approx(
                every.mean(), abs=1e-12
            )
            if denominator != "hits" or k == size:
                best = value(measures.average_precision(profile, k, denominator, "optimistic"))
                worst = value(measures.average_precision(profile, k, denominator, "pessimistic"))
                assert (best, worst) == pytest.approx((every.max(), every.min()), abs=1e-12)
        assert value(measures.precision_at(profile, k)) == pytest.approx(
            (seen[:, k - 1] / k).mean(), abs=1e-12
        )
        assert value(measures.acg(profile, k)) == pytest.approx(
            (rankings[:, :k].sum(1) / k).mean(), abs=1e-12
        )
        for gain, gains in (("exp", 2.0**rankings - 1), ("lin", rankings)):
            discounted = gains / np.log2(ranks + 1)
            ideal = (np.sort(gains[0])[::-1] / np.log2(ranks + 1))[:k].sum()
            expected = discounted[:, :k].sum(1).mean() / ideal if ideal else 0
            assert value(measures.ndcg(profile, k, gain)) == pytest.approx(expected, abs=1e-12)
    weighted = (hit * rankings.cumsum(1) / ranks).sum(1) / max(total, 1)
    assert value(measures.wap(profile)) == pytest.approx(weighted.mean(), abs=1e-12)


@pytest.mark.parametrize("seed", range(60))
def test_t18_closed_forms_equal_the_average_over_all_orders(seed: int) -> None:
    check_against_brute_force(random_groups(seed))


def test_t18_one_group_of_eight() -> None:
    check_against_brute_force([[0, 1, 0, 2, 0, 3, 0, 1]])


def test_golden_values_of_average_precision() -> None:
    profile = from_counts([0, 3, 2, 1], [0, 2, 1, 1])
    assert value(measures.average_precision(profile)) == near(0.738194)
    assert value(measures.average_precision(profile, ties="optimistic")) == near(0.854167)
    assert value(measures.average_precision(profile, ties="pessimistic")) == near(0.608333)
    assert value(measures.average_precision(profile, 4, "hits")) == near(0.796296)
    assert value(measures.average_precision(profile, 4, "mink")) == near(0.496528)
    query, labels = codes(["000"]), torch.tensor([[1, 0], [0, 1], [1, 0], [0, 1], [1, 0], [1, 0]])
    database = codes(["001", "010", "100", "011", "101", "111"])
    legacy = measures.legacy_average_precision(query, torch.tensor([[1, 0]]), database, labels)
    assert value(legacy) == near(0.733333)


def test_least_ap_is_that_of_a_reversed_perfect_ranking() -> None:
    size, relevant = 300, 90
    reversed_ranking = from_counts([1] * size, [0] * (size - relevant) + [1] * relevant)
    expected = sum(i / (size - relevant + i) for i in range(1, relevant + 1)) / relevant
    assert value(measures.average_precision(reversed_ranking)) == pytest.approx(expected, abs=1e-13)
    assert value(measures.least_ap(reversed_ranking)) == pytest.approx(expected, abs=1e-13)
    p = relevant / size
    assert expected == pytest.approx(1 - (1 - p) / p * math.log(1 / (1 - p)), abs=2e-3)


def test_split_group_agrees_with_a_rational_sum_at_database_size() -> None:
    """The windowed hypergeometric sum against all its terms, in big integers, for a group cut at rank
    2,000."""
    items, relevant, k = torch.tensor([[40, 3000, 500]]), torch.tensor([[10, 700, 70]]), 2000
    n, r, m, nb, rb = 3000, 700, 1960, 40, 10
    whole = math.comb(n, m)
    first = float(core_ap(items[:, :1], relevant[:, :1], None, "rel")) * 10
    ones = math.fsum(1 / (nb + j) for j in range(1, m + 1))
    steps = math.fsum((j - 1) / (nb + j) for j in range(1, m + 1))
    expected = math.fsum(
        (math.comb(r, x) * math.comb(n - r, m - x) * 10**30 // whole) / 1e30
        * (first + x / m * ((rb + 1) * ones + (x - 1) / (m - 1) * steps)) / (rb + x)
        for x in range(max(0, m - (n - r)), min(r, m) + 1)
    )  # fmt: skip
    assert value(core_ap(items, relevant, k, "hits")) == pytest.approx(expected, abs=1e-12)
