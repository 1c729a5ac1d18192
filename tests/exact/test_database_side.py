"""Exposure of inserted items against brute force over all orders, and attacks whose best result is known."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import linear_hasher

from robusthash.attacks import Attack, named_threat
from robusthash.attacks.guides import Own
from robusthash.attacks.losses import Agreement, ScaleFree
from robusthash.attacks.pgd import APGD
from robusthash.core.registry import build
from robusthash.core.types import Codes
from robusthash.data import ArraySource, RetrievalData, Split
from robusthash.evaluation import EvaluationContext, make_context, score_clean
from robusthash.metrics.results import load_results, save_results
from robusthash.models import Hasher
from robusthash.objectives import DPSH
from robusthash.robustness.database_attacks import at_least_one, exposure, insert_items, perturb_database

PIXELS, BITS = 12, 6


def by_all_orders(items: list[int], inserted: list[int], k: int) -> tuple[float, float]:
    """Probability that one is found, and expected share of the top k, over every order within the groups."""
    groups = [
        sorted(set(itertools.permutations([0] * n + [1] * a))) or [()]
        for n, a in zip(items, inserted, strict=True)
    ]
    found = slots = total = 0
    for chosen in itertools.product(*groups):
        top = list(itertools.chain(*chosen))[:k]
        found, slots, total = found + any(top), slots + sum(top), total + 1
    return found / total, slots / total


@pytest.mark.parametrize("k", [1, 2, 3, 5, 9, 20])
@pytest.mark.parametrize(
    ("items", "inserted"),
    [
        ([2, 3, 1], [0, 2, 1]),
        ([4], [3]),
        ([0, 2], [1, 0]),
        ([3, 0, 2], [0, 2, 2]),
        ([1, 1], [0, 0]),
        ([3, 3], [0, 3]),
    ],
)
def test_exposure_is_the_mean_over_all_orders(items: list[int], inserted: list[int], k: int) -> None:
    found = at_least_one(torch.tensor([items]), torch.tensor([inserted]), k)
    assert float(found[0]) == pytest.approx(by_all_orders(items, inserted, k)[0], abs=1e-12)


def split_of(name: str, count: int, seed: int) -> Split:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.eye(2)[torch.arange(count) % 2]
    # class 0 is bright on the left half, class 1 on the right
    side = torch.where(
        labels[:, :1] > 0, torch.tensor([1.0] * 6 + [-1.0] * 6), torch.tensor([-1.0] * 6 + [1.0] * 6)
    )
    values = 0.5 + 0.08 * side + 0.02 * torch.randn(count, PIXELS, generator=generator)
    pixels = (
        (values.view(count, 1, 1, PIXELS).expand(-1, 3, -1, -1) * 255).round().clamp(0, 255).to(torch.uint8)
    )
    source = ArraySource({"image": pixels.contiguous()})
    return Split(name, source, torch.arange(count), labels, source.hashes())


@pytest.fixture(scope="module")
def world() -> EvaluationContext:
    splits = {
        name: split_of(name, n, seed)
        for seed, (name, n) in enumerate((("train", 30), ("query", 20), ("database", 40)))
    }
    data = RetrievalData("toy", **splits, label_names=("a", "b"))
    generator = torch.Generator().manual_seed(9)
    half = torch.tensor([1.0] * 6 + [-1.0] * 6)
    weight = (
        torch.rand(BITS, PIXELS, generator=generator) * half * torch.tensor([1, -1, 1, -1, 1, -1.0])[:, None]
    )
    return make_context(linear_hasher(weight.repeat(1, 3) / 3), data, batch_size=7)


def attack_of(kind: str, eps: str = "img-linf-8", steps: int = 20) -> Attack:
    made: Attack = build("attack", {"name": "guided-apgd", "steps": steps}, objective=DPSH())
    return replace(made, threat=named_threat(f"{kind}-{eps}"))


def test_the_whole_database_can_be_turned_over(world: EvaluationContext) -> None:
    """A linear hash under a budget beyond every margin: most bits flip, so what was nearest is farthest."""
    clean = score_clean(world)
    assert clean["MAP"] > 0.95
    result = perturb_database(world, attack_of("db-perturb", "img-linf-64"), 1.0)
    assert result.values["items"] == 40
    assert result.values["item flips"] > 4.5
    assert result["MAP"] < 0.5
    assert result.reference["clean"] == clean["MAP"]
    assert result["drop"] == pytest.approx(clean["MAP"] - result["MAP"])
    assert result.perceptibility["linf/max"] <= 64 / 255 + 1e-6
    assert result.setting.threat == "db-perturb-img-linf-64"
    assert result.setting.differs(clean.setting) == ["threat", "attacks", "budget"]


def test_no_budget_changes_nothing_and_more_items_cost_more(world: EvaluationContext) -> None:
    clean = score_clean(world)
    still = perturb_database(world, attack_of("db-perturb", "img-linf-0"), 1.0)
    assert still.values["item flips"] == 0
    assert torch.equal(still.per_query["MAP"], clean.per_query["MAP"])
    part, most = (
        perturb_database(world, attack_of("db-perturb", "img-linf-64"), share) for share in (0.1, 0.8)
    )
    assert part.values["items"] == 4
    assert most["MAP"] < part["MAP"] < clean["MAP"]
    again = perturb_database(world, attack_of("db-perturb", "img-linf-64"), 0.1)
    assert torch.equal(again.per_query["MAP"], part.per_query["MAP"])


def test_inserted_items_reach_their_aims(world: EvaluationContext) -> None:
    """With a budget beyond every margin the codes are those aimed at, and so is the exposure."""
    result = insert_items(world, attack_of("db-insert", "img-linf-128", 40), 4, 5)
    assert result["exposure@5"] >= result.reference["clean"] - 1e-12
    assert result["exposure@5"] == pytest.approx(result.reference["reached aims"], abs=0.1)
    assert result.reference["chance"] == pytest.approx(1 - by_hand_missed(40, 4, 5))
    assert 0 < result["slots@5"] <= 4 / 5
    assert result.setting.threat == "db-insert-img-linf-128"
    assert result.setting.budget.startswith("4 items, APGD")


def by_hand_missed(items: int, inserted: int, k: int) -> float:
    """Probability that a random order has no inserted item in the top k."""
    missed = 1.0
    for place in range(k):
        missed *= (items - place) / (items + inserted - place)
    return missed


def test_exposure_counts_the_codes_themselves(world: EvaluationContext) -> None:
    """An item with the code of a query, alone at distance 0, is found by it at k = 1; ties share the
    place."""
    own = world.query.packed[:1]
    found, slots = exposure(world, Codes(own, BITS, torch.zeros(1, dtype=torch.int64)), 1)
    same = int((world.database.packed == own).all(1).sum())
    assert float(found[0]) == pytest.approx(1 / (same + 1))
    assert float(slots[0]) == pytest.approx(1 / (same + 1))


def test_the_purifier_of_queries_is_not_in_the_way(world: EvaluationContext) -> None:
    """Items are attacked through what encodes the database, not through a purifier of queries."""
    asked: list[str] = []

    class Asked(Hasher):
        def for_database(self) -> Hasher:
            asked.append("database")
            return super().for_database()

    victim = Asked(dict(world.victim.encoders), dict(world.victim.heads))
    perturb_database(replace(world, victim=victim), attack_of("db-perturb"), 0.05)
    assert asked


def test_results_are_kept(world: EvaluationContext, tmp_path: Path) -> None:
    result = insert_items(world, attack_of("db-insert"), 2, 3)
    save_results(tmp_path / "poison.json", [result])
    assert load_results(tmp_path / "poison.json")[0].values == result.values


def test_bad_input_is_named(world: EvaluationContext) -> None:
    insert, perturb = attack_of("db-insert"), attack_of("db-perturb")
    for share in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"must lie in \(0, 1\]"):
            perturb_database(world, perturb, share)
    with pytest.raises(ValueError, match="31 items to insert and 30 training items"):
        insert_items(world, insert, 31)
    with pytest.raises(ValueError, match="at least 1, got 0 and 10"):
        insert_items(world, insert, 0)
    own = Attack("own", Own(), Agreement(), APGD(2), named_threat("db-insert", "W0"))
    with pytest.raises(ValueError, match=r"\(W2\), and 'own' is W0"):
        insert_items(world, own)
    with pytest.raises(ValueError, match="is targeted"):
        perturb_database(world, replace(perturb, targeted=True))
    text = Attack("text", Own(), ScaleFree(), APGD(2), named_threat("txt-linf-0.05", "W2"))
    with pytest.raises(ValueError, match=r"changes \['text'\], and the database is of 'image'"):
        perturb_database(world, text)
