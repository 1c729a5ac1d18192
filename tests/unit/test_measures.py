"""Measures against libraries and naive loops; policies; protocols."""

from __future__ import annotations

import dataclasses
import math

import ir_measures
import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.functional.retrieval import retrieval_average_precision

from robusthash.apps.experiment.config import ConfigError, make_config
from robusthash.core.hamming import pack
from robusthash.core.registry import build, catalogue
from robusthash.core.types import Codes, Profile
from robusthash.metrics import ranking_measures as measures
from robusthash.metrics.distance_histogram import code_profile
from robusthash.metrics.protocol import Protocol, TargetRule, load_protocol, measure, measure_profile

BITS = 40


def untied(seed: int) -> tuple[Codes, Tensor, Codes, Tensor, Tensor]:
    """Two queries of one code, a database with one item at each distance, and the (2, N) shared labels by
    rank."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(BITS + 1, generator=generator)
    database = -torch.ones(BITS + 1, BITS, dtype=torch.int64)
    for row, distance in enumerate(order.tolist()):
        database[row, torch.randperm(BITS, generator=generator)[:distance]] = 1
    labels = (torch.rand(BITS + 1, 6, generator=generator) < 0.2).float()
    query_labels = torch.tensor([[1.0, 1, 0, 0, 1, 0], [0, 0, 1, 0, 0, 0]])
    query = Codes(pack(-torch.ones(2, BITS)), BITS, torch.arange(2))
    shared = (query_labels @ labels.T)[:, torch.argsort(order)]
    return query, query_labels, Codes(pack(database), BITS, torch.arange(BITS + 1)), labels, shared


def random_set(count: int, bits: int, classes: int, seed: int) -> tuple[Codes, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (count, bits), generator=generator) * 2 - 1
    labels = (torch.rand(count, classes, generator=generator) < 0.2).float()
    labels[torch.arange(count), torch.randint(classes, (count,), generator=generator)] = (
        1  # no item without a label
    )
    return Codes(pack(signs), bits, torch.arange(count)), labels


def profile_of(items: list[int], relevant: list[int]) -> Profile:
    n, r = torch.tensor([items]), torch.tensor([relevant])
    return Profile(n, r, r, r.double(), torch.stack([(n - r).sum(1), r.sum(1)], 1))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("k", [1, 5, 20, 41])
def test_untied_lists_agree_with_ir_measures(seed: int, k: int) -> None:
    query, query_labels, database, labels, shared = untied(seed)
    profile = code_profile(query, query_labels, database, labels)
    for row in range(2):
        gains = shared[row].long().tolist()
        if not any(gains):
            continue
        truth = [ir_measures.Qrel("q", f"d{rank}", 2**gain - 1) for rank, gain in enumerate(gains)]
        ranking = [ir_measures.ScoredDoc("q", f"d{rank}", float(-rank)) for rank in range(len(gains))]
        wanted = [ir_measures.AP @ k, ir_measures.P @ k, ir_measures.nDCG @ k, ir_measures.R @ k]
        found = ir_measures.calc_aggregate(wanted, truth, ranking)
        ours = (
            measures.average_precision(profile, k, "rel"),
            measures.precision_at(profile, k),
            measures.ndcg(profile, k, "exp"),
            measures.recall_at(profile, k),
        )
        for name, values in zip(wanted, ours, strict=True):
            assert float(values[row]) == pytest.approx(found[name], abs=1e-6), name


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("k", [1, 5, 20, 41])
def test_untied_lists_agree_with_torchmetrics(seed: int, k: int) -> None:
    query, query_labels, database, labels, shared = untied(seed)
    profile = code_profile(query, query_labels, database, labels)
    found = measures.average_precision(profile, k, "hits")
    legacy = measures.legacy_average_precision(query, query_labels, database, labels, k, "hits")
    scores = torch.arange(BITS + 1, 0, -1).float()  # positive: the library drops items whose score is not
    for row in range(2):
        expected = float(retrieval_average_precision(scores, shared[row] > 0, top_k=k))
        assert float(found[row]) == pytest.approx(expected, abs=1e-6)
        assert float(legacy[row]) == pytest.approx(expected, abs=1e-6)


def test_without_ties_every_order_gives_the_same() -> None:
    query, query_labels, database, labels, _ = untied(11)
    profile = code_profile(query, query_labels, database, labels)
    for k in (1, 7, None):
        for denominator in ("hits", "mink", "rel"):
            expected = measures.average_precision(profile, k, denominator)
            for ties in ("optimistic", "pessimistic"):
                found = measures.average_precision(profile, k, denominator, ties)
                assert torch.allclose(found, expected, atol=1e-14)
            legacy = measures.legacy_average_precision(query, query_labels, database, labels, k, denominator)
            assert torch.allclose(legacy, expected, atol=1e-14)


def test_expected_is_the_mean_of_legacy_over_shuffled_databases() -> None:
    query, query_labels = random_set(5, 4, 5, 1)
    database, labels = random_set(60, 4, 5, 2)
    expected = measures.average_precision(code_profile(query, query_labels, database, labels), 20, "hits")
    generator = torch.Generator().manual_seed(3)
    values = []
    for _ in range(400):
        order = torch.randperm(60, generator=generator)
        shuffled = Codes(database.packed[order], 4, database.ids)
        values.append(
            measures.legacy_average_precision(query, query_labels, shuffled, labels[order], 20, "hits")
        )
    stacked = torch.stack(values)
    error = stacked.std(0) / math.sqrt(len(values))
    assert ((stacked.mean(0) - expected).abs() < 4 * error + 1e-12).all()


def test_first_k_relevant_looks_past_rank_k() -> None:
    query, query_labels, database, labels, shared = untied(5)
    found = measures.legacy_average_precision(query, query_labels, database, labels, 3, "first-k-relevant")
    for row in range(2):
        ranks = (torch.nonzero(shared[row] > 0).flatten() + 1).tolist()[:3]
        assert float(found[row]) == pytest.approx(
            sum((i + 1) / rank for i, rank in enumerate(ranks)) / len(ranks)
        )
    everything = measures.legacy_average_precision(
        query, query_labels, database, labels, None, "first-k-relevant"
    )
    assert torch.allclose(
        everything, measures.average_precision(code_profile(query, query_labels, database, labels))
    )


def test_rank_curve_with_few_relevant_items_and_a_hit_at_rank_one() -> None:
    recall, precision = measures.rank_curve(profile_of([1, 0, 4], [1, 0, 2]))
    assert recall[[0, 49, 99]].tolist() == pytest.approx([0.01, 0.5, 1.0])
    assert precision[0, :33].tolist() == pytest.approx([1.0] * 33)  # one of three relevant items, at rank 1
    # level 0.5 is 1.5 relevant items: half of one beyond the first, a quarter into the last group
    assert float(precision[0, 49]) == pytest.approx(1.5 / (1 + 0.25 * 4))
    assert float(precision[0, 99]) == pytest.approx(3 / 5)
    assert float(measures.pr_area(profile_of([3], [3]))) == pytest.approx(1.0)
    assert measures.rank_curve(profile_of([3], [0]))[1].isnan().all()


def test_radius_curve_of_empty_balls() -> None:
    profile = profile_of([0, 2], [0, 1])
    assert measures.radius_curve(profile)[0].tolist() == [[0, 0.5]]
    assert measures.radius_curve(profile, "undefined")[0][0].isnan().tolist() == [True, False]
    assert measures.precision_within(profile, 0).tolist() == [0]
    with pytest.raises(ValueError, match=r"0\.\.1, got 2"):
        measures.precision_within(profile, 2)


def test_precision_curve_drops_points_beyond_the_database() -> None:
    ranks, precision = measures.precision_curve(profile_of([120, 130], [60, 0]))
    assert ranks.tolist() == [100, 200]
    assert precision[0].tolist() == pytest.approx([0.5, 0.3])


def test_policies_for_empty_queries() -> None:
    values, empty = torch.tensor([0.8, 0.0, 0.4]).double(), torch.tensor([False, True, False])
    assert measures.mean_over_queries(values, empty, "zero")[0] == pytest.approx(0.4)
    mean, kept = measures.mean_over_queries(values, empty, "skip")
    assert mean == pytest.approx(0.6)
    assert kept.isnan().tolist() == [False, True, False]
    with pytest.raises(ValueError, match="1 of 3 queries have no relevant item"):
        measures.mean_over_queries(values, empty, "error")
    with pytest.raises(ValueError, match="Q = 0"):
        measures.mean_over_queries(values[:0], empty[:0])
    assert measures.mean_over_queries(values, torch.ones(3, dtype=torch.bool), "skip")[0] is None


@pytest.mark.parametrize("k", [0, -1])
def test_all_is_never_spelled_as_a_number(k: int) -> None:
    query, query_labels, database, labels, _ = untied(0)
    profile = code_profile(query, query_labels, database, labels)
    for function in (
        measures.average_precision,
        measures.precision_at,
        measures.ndcg,
        measures.acg,
        measures.chance,
    ):
        with pytest.raises(ValueError, match="whole database is k=None"):
            function(profile, k)
    with pytest.raises(ValueError, match="whole database is k=None"):
        measures.legacy_average_precision(query, query_labels, database, labels, k)


def test_no_queries_is_an_error() -> None:
    empty = torch.zeros(0, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match="Q = 0"):
        measures.average_precision(Profile(empty, empty, empty, empty.double(), empty))


def test_chance_at_a_cut_is_the_mean_over_random_orders() -> None:
    profile = profile_of([2, 3, 7], [1, 3, 0])
    random = np.random.default_rng(0)
    relevance = np.array([1] * 4 + [0] * 8)
    samples = []
    for _ in range(20_000):
        top = random.permutation(relevance)[:5]
        hits = top.cumsum()
        samples.append((top * hits / np.arange(1, 6)).sum() / max(hits[-1], 1))
    error = np.std(samples) / math.sqrt(len(samples))
    assert float(measures.chance(profile, 5, "hits")) == pytest.approx(np.mean(samples), abs=4 * error)


# ---------------------------------------------------------------------------------------------- protocols


def test_house_protocol_names_every_number() -> None:
    query, query_labels = random_set(40, 12, 6, 5)
    query_labels[3] = 0
    database, labels = random_set(300, 12, 6, 6)
    made = measure(load_protocol("house"), query, query_labels, database, labels)
    profile = code_profile(query, query_labels, database, labels)
    assert made.values["MAP"] == pytest.approx(float(measures.average_precision(profile).mean()))
    assert made.values["MAP@5000/mink"] == pytest.approx(made.values["MAP"])
    assert made.values["MAP/optimistic"] - made.values["MAP/pessimistic"] == pytest.approx(
        made.values["tie_gap"]
    )
    assert made.values["P@r<=2"] == pytest.approx(float(measures.precision_within(profile, 2).mean()))
    assert made.values["nDCG@100"] == pytest.approx(float(measures.ndcg(profile, 100, "exp").mean()))
    assert made.empty == 1
    assert any("MAP@5000: k clipped to the 300 items" in note for note in made.notes)
    assert made.reference["least"] < made.reference["chance"] < 1
    assert set(made.reference) == {"chance", "chance/MAP@5000", "chance/MAP@5000/mink", "least"}
    nothing = made.per_query["P@100"] == 0
    assert nothing.sum() == 1  # the query without a relevant item, which recall counts by the same rule
    assert torch.equal(made.per_query["R@100"] == 0, nothing)
    assert set(made.curves) == {"PR", "PR/radius", "P@N"}
    assert made.curves["PR"]["precision"].shape == (100,)


def test_skip_leaves_empty_queries_out_of_everything() -> None:
    query, query_labels = random_set(10, 12, 6, 7)
    query_labels[[2, 5]] = 0
    database, labels = random_set(100, 12, 6, 8)
    zero = measure(Protocol("zero", ("MAP", "nDCG@10")), query, query_labels, database, labels)
    skip = measure(Protocol("skip", ("MAP", "nDCG@10"), empty="skip"), query, query_labels, database, labels)
    for name in ("MAP", "nDCG@10"):
        assert skip.values[name] * 8 == pytest.approx(zero.values[name] * 10)
        assert skip.per_query[name].isnan().tolist() == [row in (2, 5) for row in range(10)]
    assert zero.empty == skip.empty == 2
    with pytest.raises(ValueError, match="2 of 10 queries"):
        measure(Protocol("error", ("MAP",), empty="error"), query, query_labels, database, labels)


def test_all_queries_empty_gives_zero_or_nothing() -> None:
    query, query_labels = random_set(4, 12, 6, 9)
    database, labels = random_set(200, 12, 6, 10)
    made = measure(load_protocol("house"), query, torch.zeros_like(query_labels), database, labels)
    assert made.values["MAP"] == 0
    assert made.empty == 4
    assert made.values["R@100"] == made.values["P@100"] == 0
    skip = load_protocol({"name": "house", "empty": "skip"})
    left = measure(skip, query, torch.zeros_like(query_labels), database, labels)
    assert left.values == {}
    assert any(note.startswith("R@100 is undefined") for note in left.notes)
    assert "PR" not in made.curves


@pytest.mark.parametrize("name", ["saat", "sfcl", "dsarh", "crossmodal"])
def test_paper_protocols_use_the_row_order(name: str) -> None:
    protocol = load_protocol(name)
    query, query_labels = random_set(20, 8, 6, 11)
    database, labels = random_set(400, 8, 6, 12)
    made = measure(protocol, query, query_labels, database, labels)
    expected = measures.legacy_average_precision(
        query, query_labels, database, labels, protocol.k, protocol.ap
    )
    assert torch.equal(made.per_query[protocol.headline], expected)
    assert all(value >= 0 for value in made.values.values())
    with pytest.raises(ValueError, match="score the codes, not a profile"):
        measure_profile(protocol, code_profile(query, query_labels, database, labels))


@pytest.mark.parametrize("name", [card.name for card in catalogue("protocol")])
def test_every_protocol_takes_the_number_of_targets_in_one_way(name: str) -> None:
    assert load_protocol(name).targets == TargetRule(1 if name == "copies" else 3)
    assert build("protocol", {"name": name, "targets": 1}).targets == TargetRule(1)
    for wrong in (0, -1, 1.5, "two"):
        with pytest.raises(ValueError, match=f"targets .*(whole number|not be below 0).*, got {wrong!r}"):
            build("protocol", {"name": name, "targets": wrong})


def test_the_recipe_reader_refuses_a_protocol_that_cannot_be_made() -> None:
    for protocol, said in (
        ({"name": "saat", "targets": 0}, "targets per query must be a whole number of at least 1, got 0"),
        ({"name": "crossmodal", "k": 0}, "k must be at least 1"),
        ({"name": "crossmodal", "k": "all"}, "k of protocol 'crossmodal' must be a whole number, got 'all'"),
    ):
        with pytest.raises(ConfigError, match=f"evaluation.protocol: .*{said}"):
            make_config({"name": "x", "evaluation": {"protocol": protocol}})
    made = make_config({"name": "x", "evaluation": {"protocol": {"name": "saat", "targets": 1}}})
    assert made.evaluation.protocol == {"name": "saat", "targets": 1}


def test_measure_names_are_checked_when_the_protocol_is_made() -> None:
    for wrong in (
        "mAP",
        "MAP@0",
        "MAP@-5",
        "P",
        "P@100/mink",
        "WAP@10",
        "MAP/randomly",
        "nDCG@10/mink",
        "PR@5",
        "R@r<=2",
    ):
        with pytest.raises(ValueError, match=r"measure|option"):
            Protocol("wrong", ("MAP", wrong))
    with pytest.raises(ValueError, match="must measure its headline 'MAP@10'"):
        Protocol("wrong", ("MAP",), k=10)
    with pytest.raises(ValueError, match="legacy order only"):
        Protocol("wrong", ("MAP@10",), k=10, ap="first-k-relevant")
    with pytest.raises(ValueError, match="at least 1"):
        Protocol("wrong", ("MAP",), k=0)
    with pytest.raises(ValueError, match="ap 'top'"):
        Protocol("wrong", ("MAP",), ap="top")  # type: ignore[arg-type]


def test_options_in_a_name_override_the_protocol() -> None:
    query, query_labels = random_set(10, 8, 6, 13)
    database, labels = random_set(100, 8, 6, 14)
    names = ("MAP", "MAP@20/rel", "nDCG@20/lin", "tie_gap@20/mink", "PR/area", "R@20")
    made = measure(Protocol("own", names), query, query_labels, database, labels)
    profile = code_profile(query, query_labels, database, labels)
    assert torch.equal(made.per_query["MAP@20/rel"], measures.average_precision(profile, 20, "rel"))
    assert torch.equal(made.per_query["nDCG@20/lin"], measures.ndcg(profile, 20, "lin"))
    assert torch.equal(made.per_query["tie_gap@20/mink"], measures.tie_gap(profile, 20, "mink"))
    assert torch.equal(made.per_query["PR/area"], measures.pr_area(profile))


def test_a_value_below_the_least_is_an_error() -> None:
    query, query_labels = random_set(10, 8, 6, 15)
    database, labels = random_set(100, 8, 6, 16)
    protocol = Protocol("legacy", ("MAP",), ties="legacy")
    profile = code_profile(query, query_labels, database, labels)
    with pytest.raises(ArithmeticError, match="below the least"):
        measure_profile(protocol, profile, {"MAP": measures.least_ap(profile) - 0.01})


def test_targets_are_disjoint_and_keyed_by_id() -> None:
    _, query_labels = random_set(30, 8, 6, 17)
    _, labels = random_set(100, 8, 6, 18)
    rule = TargetRule(seed=3)
    drawn = rule.draw(query_labels, torch.arange(30), labels)
    assert drawn.shape == (30, 3, 6)
    assert float((drawn * query_labels[:, None]).sum()) == 0
    again = rule.draw(query_labels[10:20], torch.arange(10, 20), labels)
    assert torch.equal(again, drawn[10:20])
    assert not torch.equal(
        dataclasses.replace(rule, seed=4).draw(query_labels, torch.arange(30), labels), drawn
    )
