"""Bounds of the bits that a change can flip in codes that are linear in the pixels."""

from __future__ import annotations

import itertools

import pytest
import torch

from robusthash.robustness.certificates.linear_codes import most_flips


def test_thresholds_of_one_component_are_counted_exactly() -> None:
    """Of 0.5 x1 + 0.5 x2 with thresholds at 0.1, 0.2, 0.3, 0.5 from 0.16: within 0.15 lie three, at most two
    on one side, and no change passes both sides."""
    weights = torch.full((4, 2), 0.5)
    logits = 0.16 - torch.tensor([[0.1, 0.2, 0.3, 0.5]])
    flips = [int(most_flips(weights, logits, eps, torch.ones(2))) for eps in (0.03, 0.05, 0.07, 0.15)]
    assert flips == [0, 1, 1, 2]


@pytest.mark.parametrize("seed", range(6))
def test_no_change_of_a_grid_flips_more(seed: int) -> None:
    """Three components of four pixels, two to four thresholds each, against 9^4 changes."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(3, 4, generator=generator)
    weights = rows[[0, 0, 0, 1, 1, 1, 1, 2, 2]]
    image = torch.rand(4, generator=generator)
    bias = -weights @ image + 0.25 * torch.randn(9, generator=generator)
    pixel_weights = torch.rand(4, generator=generator) + 0.5
    for eps in (0.05, 0.1, 0.3):
        steps = torch.tensor(list(itertools.product(torch.linspace(-eps, eps, 9), repeat=4)))
        clean = weights @ image + bias
        changed = (image + steps) @ weights.T + bias
        worst = int(((changed > 0) != (clean > 0)).sum(1).max())
        bound = int(most_flips(weights, clean[None], eps, pixel_weights))
        assert worst <= bound <= 9
        assert int(most_flips(weights, clean[None], eps, torch.ones(4))) >= worst


def test_a_shared_budget_is_counted_once() -> None:
    """Orthogonal components with a threshold 0.9 eps away each: by itself each can be passed, all four
    together need 4 x 0.81 of the budget 4 eps^2 / 4 that one direction has."""
    rows = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 4
    logits = torch.full((1, 4), 0.9)
    alone = [int(most_flips(rows[:1], logits[:, :1], 1.0, torch.ones(4)))]
    assert alone == [1]
    assert int(most_flips(rows, logits, 1.0, torch.ones(4))) == 1


def test_pixel_weights_must_fit() -> None:
    weights, logits = torch.ones(2, 3), torch.ones(1, 2)
    for bad in (torch.ones(2), torch.tensor([1.0, 0.0, 1.0])):
        with pytest.raises(ValueError, match="3 positive numbers"):
            most_flips(weights, logits, 0.1, bad)
