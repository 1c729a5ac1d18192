"""Many models in one table: Holm over the whole table, what is bold, and what may be called a method."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from robusthash.metrics import EvalResult
from robusthash.metrics.comparison import claim_of, compare_all
from robusthash.metrics.results import Setting, compare
from robusthash.metrics.statistics import (
    hierarchical_difference,
    hierarchical_interval,
    holm,
    sign_flip_tests,
)

SETTING = Setting(
    "m", "photos", "photos", {"k": None, "ties": "expected"}, "I2I", 32, "img-linf-8", ("hag",), "b", (0,)
)
BASE = torch.rand(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.5 + 0.2


def result(values: Tensor, **changes: object) -> EvalResult:
    setting = replace(SETTING, **changes)  # type: ignore[arg-type]
    return EvalResult(setting, {"wMAP": float(values.nanmean())}, {"wMAP": values})


def noise(seed: int, size: float) -> Tensor:
    return size * torch.randn(200, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_bold_is_not_significantly_different_from_the_best():
    models = {"a": [result(BASE)], "b": [result(BASE - 0.0005 + noise(1, 0.05))], "c": [result(BASE - 0.1)]}
    found = compare_all({"wMAP": models})["wMAP"]
    assert found["a"].best
    assert [found[name].bold for name in "abc"] == [True, True, False]
    assert found["c"].difference == pytest.approx(-0.1)
    assert found["c"].interval[0] <= -0.1 <= found["c"].interval[1]
    assert {aggregate.claim for aggregate in found.values()} == {"checkpoint"}


def test_the_correction_is_over_the_whole_table():
    models = {name: [result(BASE + noise(seed, 0.05) - shift)] for name, seed, shift in
              (("a", 1, 0.0), ("b", 2, 0.004), ("c", 3, 0.008), ("d", 4, 0.012))}  # fmt: skip
    one = compare_all({"wMAP": models})["wMAP"]
    others = {name: one[name].p for name in "abcd" if not one[name].best}
    best = next(name for name in "abcd" if one[name].best)
    for name, p in others.items():
        difference = models[name][0].per_query["wMAP"] - models[best][0].per_query["wMAP"]
        plain = sign_flip_tests({"wMAP": difference})["wMAP"]
        assert p == pytest.approx(plain, abs=0.01)
    assert {name: one[name].p_holm for name in others} == pytest.approx(holm(others))
    wider = compare_all({"wMAP": models, "again": {n: [renamed(r[0])] for n, r in models.items()}})["wMAP"]
    assert all(wider[name].p_holm >= one[name].p_holm for name in "abcd")
    assert any(wider[name].p_holm > one[name].p_holm for name in others)


def renamed(given: EvalResult) -> EvalResult:
    return replace(given, per_query={"again": given.per_query["wMAP"]})


def test_a_method_needs_three_seeds():
    assert [claim_of(seeds) for seeds in (1, 2, 3, 5)] == ["checkpoint", "checkpoint", "method", "method"]
    three = [result(BASE + noise(seed, 0.01)) for seed in (1, 2, 3)]
    lower = [result(BASE - 0.1 + noise(seed, 0.01)) for seed in (4, 5, 6)]
    found = compare_all({"wMAP": {"a": three, "b": lower, "c": lower[:2]}})["wMAP"]
    assert found["b"].claim == "method"
    assert found["c"].claim == "checkpoint"
    assert not found["b"].bold


def test_seeds_that_disagree_make_no_method_better_than_another():
    """Queries agree perfectly that a is better; two of three seeds do not."""
    a = [result(BASE + shift) for shift in (0.0, 0.0, 0.12)]
    b = [result(BASE + shift) for shift in (0.0, 0.01, 0.02)]
    assert compare_all({"wMAP": {"a": a, "b": b}})["wMAP"]["b"].bold
    means = {"a": [result(torch.stack([r.per_query["wMAP"] for r in a]).mean(0))],
             "b": [result(torch.stack([r.per_query["wMAP"] for r in b]).mean(0))]}  # fmt: skip
    assert not compare_all({"wMAP": means})["wMAP"]["b"].bold


def test_unlike_settings_are_refused_and_the_field_named():
    with pytest.raises(ValueError, match="a and b cannot stand in one table: they differ in budget"):
        compare_all({"wMAP": {"a": [result(BASE)], "b": [result(BASE, budget="more")]}})
    with pytest.raises(ValueError, match="threat"):
        compare(result(BASE), result(BASE, threat="img-linf-4"))
    with pytest.raises(ValueError, match=r"digests\.queries"):
        compare(result(BASE), result(BASE, digests={"queries": "x"}))
    assert compare_all({"wMAP": {"a": [result(BASE)], "b": [result(BASE, bits=64, defense="gate")]}})


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="the column wMAP needs at least one result"):
        compare_all({"wMAP": {"a": []}})
    with pytest.raises(ValueError, match="a has no per-query values of MAP"):
        compare_all({"MAP": {"a": [result(BASE)]}})
    with pytest.raises(ValueError, match="no query has a value"):
        compare_all({"wMAP": {"a": [result(torch.full((3,), torch.nan))]}})


def test_queries_that_one_model_lacks_are_left_out_of_all():
    holed = BASE.clone()
    holed[:50] = torch.nan
    found = compare_all({"wMAP": {"a": [result(BASE)], "b": [result(holed - 0.1)]}})["wMAP"]
    assert found["a"].mean == pytest.approx(float(BASE[50:].mean()))


def test_hierarchical_difference_shares_the_queries():
    seeds = torch.stack([BASE + noise(seed, 0.0001) for seed in (1, 2, 3)])
    low, high, p = hierarchical_difference(seeds + 0.01, seeds, resamples=2000)
    assert 0.0095 < low <= high < 0.0105  # spread over queries is shared and cancels
    assert p == pytest.approx(2 / 2001)
    assert hierarchical_difference(seeds, seeds, resamples=2000)[2] == 1.0
    with pytest.raises(ValueError, match="one seed supports"):
        hierarchical_difference(seeds, BASE[None])
    with pytest.raises(ValueError, match=r"\[200, 100\] queries"):
        hierarchical_difference(seeds, seeds[:, :100])


def test_a_statistic_of_several_means_has_a_hierarchical_interval():
    seeds = torch.stack([BASE + shift for shift in (0.0, 0.1, 0.2)])
    pairs = torch.stack([seeds, 2 * seeds], 2)
    assert hierarchical_interval(pairs, resamples=500, statistic=lambda means: means[:, 1] / means[:, 0]) == (
        2.0,
        2.0,
    )
    plain = hierarchical_interval(seeds, resamples=500)
    assert hierarchical_interval(pairs, resamples=500, statistic=lambda means: means[:, 0]) == pytest.approx(
        plain
    )
