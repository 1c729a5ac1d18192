"""Edits of words on hashers whose best edits can be found by trying all of them."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from helpers import linear_hasher
from torch import Tensor

from robusthash.attacks.base import Attack
from robusthash.attacks.guides import Mainstay
from robusthash.attacks.losses import Agreement
from robusthash.attacks.text_edits import ExactFlips, GreedyFlips
from robusthash.attacks.threat_model import Edits, edit_threat
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, Goal, Reference

WORDS, BITS = 7, 5
CODES = torch.where(torch.rand(6, BITS, generator=torch.Generator().manual_seed(5)) < 0.5, -1.0, 1.0)
LABELS = torch.eye(2)[torch.arange(6) % 2]
REFERENCE = Reference({"text": CODES}, LABELS)


def world(scale: float) -> tuple[Attack, Tensor, Batch, Goal]:
    generator = torch.Generator().manual_seed(3)
    weight = scale * torch.randn(BITS, WORDS, generator=generator)
    bags = (torch.rand(6, WORDS, generator=generator) < 0.4).float()
    batch = Batch({"text": bags}, LABELS, torch.arange(6))
    return (
        Attack("t", Mainstay(), Agreement(), GreedyFlips(), edit_threat(1)),
        weight,
        batch,
        Goal(LABELS, -1),
    )


def brute_force(weight: Tensor, bag: Tensor, code: Tensor, edits: int) -> float:
    """The lowest agreement over every choice of at most so many flips."""
    lowest = []
    for count in range(edits + 1):
        for chosen in combinations(range(WORDS), count):
            flipped = bag.clone()
            flipped[list(chosen)] = 1 - flipped[list(chosen)]
            lowest.append(float((torch.tanh(weight @ flipped) * code).mean()))
    return min(lowest)


@pytest.mark.parametrize(
    ("scale", "edits", "candidates"),
    [(1.0, 1, WORDS), (1e-2, 1, 1), (1e-2, 2, 1), (1e-2, 3, 1)],
    ids=["all-tried", "one-tried-linear", "two-edits-linear", "three-edits-linear"],
)
def test_greedy_equals_brute_force(scale: float, edits: int, candidates: int) -> None:
    """One edit with every word tried; or any number where the hasher is linear, so that gains add up."""
    attack, weight, batch, goal = world(scale)
    attack = Attack("t", attack.guide, attack.loss, GreedyFlips(candidates), edit_threat(edits))
    victim = linear_hasher(weight, modality="text")
    out = attack(victim, batch, goal, REFERENCE, draws=Draws(0))
    attack.threat.verify(out.inputs, batch.inputs)
    for row in range(len(batch)):
        code = out.guidance.codes[row]
        found = float((torch.tanh(weight @ out.inputs["text"][row]) * code).mean())
        best = brute_force(weight, batch.inputs["text"][row], code, edits)
        assert found == pytest.approx(best, abs=1e-6)
    assert (out.forward, out.backward) == (edits * (1 + candidates), edits)


def test_a_text_that_no_edit_helps_stays() -> None:
    attack, weight, _, _ = world(1.0)
    alone = torch.zeros(1, WORDS)
    victim = linear_hasher(torch.abs(weight), modality="text")
    reference = Reference({"text": torch.ones(2, BITS)}, torch.ones(2, 1))
    small = Batch({"text": alone}, torch.ones(1, 1), torch.arange(1))
    out = attack(victim, small, Goal(torch.ones(1, 1), -1), reference, draws=Draws(0))
    assert torch.equal(out.inputs["text"], alone)


def test_projection_keeps_the_largest_changes() -> None:
    origin = torch.tensor([[0.0, 1.0, 0.0, 1.0]])
    moved = torch.tensor([[0.9, 0.2, 0.4, 0.3]])
    assert Edits(2).project(moved, origin).tolist() == [[1.0, 0.0, 0.0, 1.0]]
    assert Edits(3).project(moved, origin).tolist() == [[1.0, 0.0, 0.0, 0.0]]
    assert Edits(0).project(moved, origin).tolist() == origin.tolist()
    assert Edits(2.9).count == 2


def metric_of(weight: Tensor, wanted: Tensor):
    """A reported metric: how many bits leave the wanted code, which many texts share."""
    return lambda signs: (signs != wanted).sum(1).double()


def best_of_all(weight: Tensor, bag: Tensor, wanted: Tensor, edits: int) -> int:
    return max(
        int((torch.where(weight @ flipped >= 0, 1.0, -1.0) != wanted).sum())
        for count in range(edits + 1)
        for chosen in combinations(range(WORDS), count)
        for flipped in [bag + (1 - 2 * bag) * torch.eye(WORDS)[list(chosen)].sum(0)]
    )


@pytest.mark.parametrize(("edits", "best"), [(1, 6), (2, 5), (3, 4)])
def test_one_exact_flip_is_the_best_of_all_and_several_nearly(edits: int, best: int) -> None:
    attack, weight, batch, goal = world(1.0)
    victim = linear_hasher(weight, modality="text")
    wanted = torch.where(batch.inputs["text"] @ weight.T >= 0, 1.0, -1.0)
    exact = Attack("t", attack.guide, attack.loss, ExactFlips(), edit_threat(edits, "W2"), selects=True)
    select = metric_of(weight, wanted)
    out = exact(victim, batch, goal, REFERENCE, draws=Draws(0), select=select)
    exact.threat.verify(out.inputs, batch.inputs)
    reached = select(out.signs)
    highest = [
        best_of_all(weight, bag, code, edits) for bag, code in zip(batch.inputs["text"], wanted, strict=True)
    ]
    assert all(own <= most for own, most in zip(reached.tolist(), highest, strict=True))
    assert sum(own == most for own, most in zip(reached.tolist(), highest, strict=True)) >= best  # of 6 texts
    assert out.backward == 0


def test_exact_flips_go_on_from_a_start_and_never_below_it() -> None:
    attack, weight, batch, goal = world(1.0)
    victim = linear_hasher(weight, modality="text")
    wanted = torch.where(batch.inputs["text"] @ weight.T >= 0, 1.0, -1.0)
    select = metric_of(weight, wanted)
    exact = Attack("t", attack.guide, attack.loss, ExactFlips(), edit_threat(2, "W2"), selects=True)
    start = batch.inputs["text"].clone()
    start[:, :2] = 1 - start[:, :2]  # both edits are spent: only an exchange can help
    out = exact(victim, batch, goal, REFERENCE, draws=Draws(0), select=select, start={"text": start})
    before = select(torch.where(start @ weight.T >= 0, 1.0, -1.0))
    assert bool((select(out.signs) >= before).all())
    assert bool((select(out.signs) > before).any())


def test_exact_flips_need_the_reported_metric() -> None:
    attack, weight, batch, goal = world(1.0)
    victim = linear_hasher(weight, modality="text")
    blind = Attack("t", attack.guide, attack.loss, ExactFlips(), edit_threat(1))
    with pytest.raises(ValueError, match="give the attack selects=True"):
        blind(victim, batch, goal, REFERENCE, draws=Draws(0))
