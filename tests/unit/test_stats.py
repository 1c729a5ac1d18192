"""Intervals, permutation tests, corrections and Shapley values."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch

from robusthash.analysis.band_attribution import shapley
from robusthash.core.runtime import Draws
from robusthash.metrics import statistics as stats
from robusthash.metrics.robustness_measures import hrs


def sample(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_bootstrap_agrees_with_scipy_and_the_normal_interval() -> None:
    values = sample(200)
    low, high = stats.bootstrap_interval(values)
    library = scipy.stats.bootstrap(
        (values.numpy(),), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert (low, high) == pytest.approx((library.low, library.high), abs=2e-3)
    half = 1.96 * float(values.std()) / math.sqrt(200)
    assert high - low == pytest.approx(2 * half, rel=0.03)


def test_intervals_are_reproducible_and_do_not_depend_on_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    values = sample(50)
    once = stats.bootstrap_interval(values, resamples=500)
    assert stats.bootstrap_interval(values, resamples=500) == once
    assert stats.bootstrap_interval(values, resamples=500, draws=Draws(1)) != once
    monkeypatch.setattr(stats, "_BLOCK", 50 * 100)
    assert stats.bootstrap_interval(values, resamples=500) == pytest.approx(once, abs=1e-14)


def test_a_function_of_several_means_has_an_interval_too() -> None:
    clean = sample(300) * 0.3 + 0.6
    worst, chance = clean - 0.3, torch.full((300,), 0.1).double()
    low, high = stats.bootstrap_interval(
        torch.stack([clean, worst, chance], 1), lambda means: hrs(means[:, 0], means[:, 1], means[:, 2])
    )
    point = float(hrs(clean.mean(), worst.mean(), chance.mean()))
    assert low < point < high
    assert high - low < 0.05


def test_undefined_queries_are_left_out_of_their_column_only() -> None:
    values = sample(40)
    holed = values.clone()
    holed[::4] = torch.nan
    made = stats.intervals(
        {"all": values, "some": holed, "none": torch.full((40,), torch.nan)}, resamples=2000
    )
    assert set(made) == {"all", "some"}
    assert made["all"] == pytest.approx(stats.bootstrap_interval(values, resamples=2000), abs=1e-14)
    assert made["some"][0] < float(holed.nanmean()) < made["some"][1]
    assert made["some"][1] - made["some"][0] > made["all"][1] - made["all"][0]


def test_coverage_of_the_interval() -> None:
    covered = 0
    for seed in range(200):
        low, high = stats.bootstrap_interval(sample(60, seed), resamples=400, draws=Draws(seed))
        covered += low <= 0.5 <= high
    assert 0.88 <= covered / 200 <= 0.99


def sign_flip_test(values: torch.Tensor, **options: int) -> float:
    return stats.sign_flip_tests({"": values}, **options)[""]


@pytest.mark.parametrize("count", [1, 2, 5, 12])
def test_exact_sign_flips_equal_the_enumeration(count: int) -> None:
    values = (sample(count, count) - 0.3).numpy()
    patterns = np.array(list(itertools.product([-1, 1], repeat=count)))
    expected = (abs((patterns * values).mean(1)) >= abs(values.mean()) - 1e-12).mean()
    assert sign_flip_test(torch.from_numpy(values)) == pytest.approx(expected)


def test_zero_differences_have_no_sign() -> None:
    assert sign_flip_test(torch.zeros(30)) == 1
    padded = torch.cat([torch.tensor([0.1, 0.2, 0.3]), torch.zeros(100)])
    assert sign_flip_test(padded) == 0.25
    undefined = torch.tensor([float("nan"), 0.1, 0.2, 0.3])  # a query without a value is left out
    assert sign_flip_test(undefined) == 0.25


def test_random_sign_flips_agree_with_the_exact_test_and_are_never_zero() -> None:
    values = sample(18, 3) - 0.4
    exact = sign_flip_test(values)
    doubled = torch.cat(
        [values, torch.full((5,), 1e-15).double()]
    )  # 23 values: drawn, and the same distribution
    assert sign_flip_test(doubled, flips=40_000) == pytest.approx(exact, abs=0.01)
    assert sign_flip_test(sample(100) + 1, flips=1000) == 1 / 1000


def test_holm_against_a_worked_example() -> None:
    adjusted = stats.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert adjusted == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert stats.holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}
    with pytest.raises(ValueError, match="p-value of a"):
        stats.holm({"a": 1.2})


def test_seeds_widen_the_interval() -> None:
    queries = sample(200)
    same = queries.expand(4, 200)
    apart = same + torch.tensor([-0.1, 0.0, 0.05, 0.1]).double()[:, None]
    low, high = stats.hierarchical_interval(same, resamples=4000)
    plain = stats.bootstrap_interval(queries, resamples=4000)
    assert high - low == pytest.approx(
        plain[1] - plain[0], rel=0.05
    )  # shared queries are not counted four times
    wide = stats.hierarchical_interval(apart, resamples=4000)
    assert wide[1] - wide[0] > 1.5 * (high - low)
    with pytest.raises(ValueError, match="at least two training seeds"):
        stats.hierarchical_interval(queries[None])


def test_shapley_values_telescope_ignore_the_invisible_and_carry_errors() -> None:
    weights = torch.tensor([3.0, 0.0, 1.0, 2.0, 0.5]).double()

    def worth(mask: torch.Tensor) -> torch.Tensor:
        total = (weights * mask).sum()
        return torch.stack([total, total.square(), torch.sin(total)])  # three images

    values, errors = shapley(worth, players=5, permutations=32)
    everyone, none = worth(torch.ones(5)), worth(torch.zeros(5))
    assert values.shape == errors.shape == (5, 3)
    assert torch.allclose(values.sum(0), everyone - none, atol=1e-9, rtol=0)
    assert values[1].tolist() == [0, 0, 0]
    assert torch.allclose(values[:, 0], weights)  # additive: exact, and without error
    assert float(errors[:, 0].max()) < 1e-12
    assert torch.allclose(
        values[:, 1], weights * weights.sum()
    )  # pairwise interactions cancel in antithetic pairs
    exact = torch.zeros(5, dtype=torch.float64)
    for order in itertools.permutations(range(5)):
        mask = torch.zeros(5)
        for player in order:
            before = worth(mask)[2]
            mask[player] = 1
            exact[player] += (worth(mask)[2] - before) / 120
    assert ((values[:, 2] - exact).abs() <= 4 * errors[:, 2] + 1e-12).all()
    assert torch.equal(shapley(worth, players=5, permutations=32)[0], values)


def test_shapley_arguments() -> None:
    for wrong in (0, 2, 5):
        with pytest.raises(ValueError, match="even and at least 4"):
            shapley(lambda mask: float(mask.sum()), players=3, permutations=wrong)
    with pytest.raises(ValueError, match="not finite"):
        shapley(lambda mask: float("nan"), players=3)
    values, _ = shapley(lambda mask: float(mask.sum()), players=1, permutations=4)
    assert values.tolist() == [1]
