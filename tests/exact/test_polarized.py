"""DPN against its card: the hinge at rest, at zero, and on tanh codes."""

from __future__ import annotations

import pytest
import torch
from helpers import facts_of, memory_of, output_of

from robusthash.core.hamming import sign
from robusthash.objectives import DPN

LABELS = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])


def made(**options: float | bool) -> DPN:
    objective = DPN(**options)
    objective.setup(facts_of(LABELS, 8, seed=1))
    return objective


@pytest.mark.parametrize("margin", [0.5, 1.0])
def test_hinge_is_zero_past_the_margin_and_the_margin_at_zero(margin: float) -> None:
    objective = made(margin=margin)
    targets = objective.targets(LABELS)
    nothing = torch.empty(0)
    assert torch.equal(objective.similarity(output_of(2 * targets), LABELS, nothing, nothing), torch.zeros(4))
    at_zero = objective.similarity(output_of(torch.zeros(4, 8)), LABELS, nothing, nothing)
    assert at_zero.tolist() == pytest.approx([margin] * 4)
    wrong = objective.similarity(output_of(-3 * targets), LABELS, nothing, nothing)
    assert wrong.tolist() == pytest.approx([margin + 3] * 4)


def test_on_tanh_the_loss_is_one_minus_the_agreement() -> None:
    logits = 3 * torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    objective = made(on_tanh=True)
    value = objective.similarity(output_of(logits), LABELS, torch.empty(0), torch.empty(0))
    torch.testing.assert_close(value, 1 - (torch.tanh(logits) * objective.targets(LABELS)).mean(1))


def test_targets_are_balanced_and_follow_the_seed() -> None:
    objective, again = made(), made()
    assert torch.equal(objective.centers, again.centers)
    assert bool(((objective.centers == -1).sum(1) == 4).all())
    other = DPN()
    other.setup(facts_of(LABELS, 8, seed=2))
    assert not torch.equal(other.centers, objective.centers)
    several = objective.targets(LABELS)[3]
    total = objective.centers[0] + objective.centers[1]
    assert torch.equal(several[total != 0], sign(total)[total != 0])
    assert torch.equal(several[total == 0], objective.filler[total == 0])


def test_adaptive_targets_are_the_majority_of_the_class() -> None:
    codes = torch.tensor([[0.5, -2.0], [0.1, -0.1], [-3.0, -1.0], [0.2, 0.3]])
    labels = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1]])
    fixed, moving = DPN(), DPN(adaptive=True)
    for objective in (fixed, moving):
        objective.setup(facts_of(labels, 2))
        before = objective.centers.clone()
        objective.end_epoch(memory_of({"image": codes}, labels))
        expected = torch.tensor([[1.0, -1.0], [1.0, 1.0]]) if objective.adaptive else before
        assert torch.equal(objective.centers, expected)


def test_a_tie_keeps_the_bit() -> None:
    objective = DPN(adaptive=True)
    labels = torch.tensor([[1.0], [1.0]])
    objective.setup(facts_of(labels, 2))
    before = objective.centers.clone()
    objective.end_epoch(memory_of({"image": torch.tensor([[1.0, 1.0], [-1.0, -1.0]])}, labels))
    assert torch.equal(objective.centers, before)


def test_unlabelled_items_are_left_alone() -> None:
    value = made().similarity(output_of(torch.zeros(2, 8)), torch.zeros(2, 3), torch.empty(0), torch.empty(0))
    assert torch.equal(value, torch.zeros(2))
