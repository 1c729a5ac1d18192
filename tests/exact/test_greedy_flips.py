"""Edits of words on hashers whose best edits can be found by trying all of them."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from helpers import linear_hasher
from torch import Tensor

from robusthash.attacks.base import Attack
from robusthash.attacks.edits import GreedyFlips
from robusthash.attacks.guides import Mainstay
from robusthash.attacks.losses import Agreement
from robusthash.attacks.threat import Edits, edit_threat
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
    return Attack("t", Mainstay(), Agreement(), GreedyFlips(), edit_threat(1)), weight, batch, Goal(LABELS, -1)


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
    attack.threat.verify(out.batch.inputs, batch.inputs)
    for row in range(len(batch)):
        code = out.guidance.codes[row]
        found = float((torch.tanh(weight @ out.batch.inputs["text"][row]) * code).mean())
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
    assert torch.equal(out.batch.inputs["text"], alone)


def test_projection_keeps_the_largest_changes() -> None:
    origin = torch.tensor([[0.0, 1.0, 0.0, 1.0]])
    moved = torch.tensor([[0.9, 0.2, 0.4, 0.3]])
    assert Edits(2).project(moved, origin).tolist() == [[1.0, 0.0, 0.0, 1.0]]
    assert Edits(3).project(moved, origin).tolist() == [[1.0, 0.0, 0.0, 0.0]]
    assert Edits(0).project(moved, origin).tolist() == origin.tolist()
    assert Edits(2.9).count == 2
