"""Certified radii against linear hashers, whose bit probabilities and true radii are known in closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, norm

from robusthash.core.runtime import Draws
from robusthash.robustness.certificates.certified_codes import (
    furthest_radius,
    least_probability,
    majority_bits,
    noise_votes,
)
from tests.helpers import linear_hasher

SIGMA = 0.25


def test_the_bound_of_a_probability_is_that_of_clopper_and_pearson() -> None:
    votes = torch.tensor([0, 1, 37, 99, 100])
    found = least_probability(votes, 100, 0.01)
    exact = [binomtest(int(v), 100, alternative="greater").proportion_ci(0.99, "exact").low for v in votes]
    assert found.tolist() == pytest.approx(exact)


def test_radii_hold_together_in_all_but_alpha_of_the_repetitions() -> None:
    """A bit of margin d is +1 with probability Phi(d / sigma), and its true radius is d."""
    margins, alpha, samples, repetitions = np.linspace(0.02, 0.4, 16), 0.1, 200, 4000
    votes = np.random.default_rng(0).binomial(samples, norm.cdf(margins / SIGMA), (repetitions, 16))
    found = majority_bits(torch.from_numpy(votes), samples, SIGMA, alpha)
    certified = found.radii > 0
    wrong = certified & ((found.signs < 0) | (found.radii > torch.from_numpy(margins)))
    assert wrong.any(1).double().mean() <= alpha, "a query fails where any of its bits does"
    assert wrong.any(1).double().mean() > 0, "the bound is no looser than it has to be: some do fail"
    assert (found.radii.mean(0)[-6:] > 0.5 * torch.from_numpy(margins)[-6:]).all()


def test_votes_of_a_linear_hasher_have_the_known_probabilities() -> None:
    torch.manual_seed(0)
    weight = torch.nn.functional.normalize(torch.randn(6, 4), dim=1)
    inputs, samples = torch.rand(3, 4) - 0.5, 4000
    votes = noise_votes(linear_hasher(weight), "image", inputs, ["a", "b", "c"], SIGMA, samples, Draws(0))
    share = torch.from_numpy(norm.cdf((inputs @ weight.T).numpy() / SIGMA))
    assert (votes / samples - share).abs().max() < 0.04


def test_votes_depend_on_the_item_and_not_on_its_neighbours() -> None:
    hasher, inputs = linear_hasher(torch.eye(4)), torch.rand(3, 4) - 0.5
    together = noise_votes(hasher, "image", inputs, ["a", "b", "c"], SIGMA, 100, Draws(0))
    alone = noise_votes(hasher, "image", inputs[1:2], ["b"], SIGMA, 100, Draws(0))
    assert torch.equal(alone[0], together[1])
    assert not torch.equal(noise_votes(hasher, "image", inputs[1:2], ["c"], SIGMA, 100, Draws(0)), alone)


def test_no_attack_inside_a_radius_changes_a_certified_bit() -> None:
    """The worst change of length r moves every margin by r: bits that flip are none of the certified."""
    torch.manual_seed(1)
    weight = torch.nn.functional.normalize(torch.randn(32, 8), dim=1)
    inputs = torch.rand(20, 8) - 0.5
    votes = noise_votes(
        linear_hasher(weight), "image", inputs, [str(i) for i in range(20)], SIGMA, 500, Draws(0)
    )
    found, margins = majority_bits(votes, 500, SIGMA, 0.001), (inputs @ weight.T).double()
    for radius in (0.05, 0.1, 0.3):
        fixed = ~found.free(radius)
        assert fixed.any(), "or the test says nothing"
        assert (margins.abs()[fixed] > radius).all()
        assert (margins.sign() == found.signs)[fixed].all()


def test_a_bit_that_is_even_abstains() -> None:
    found = majority_bits(torch.tensor([[50, 52, 100]]), 100, SIGMA, 0.001)
    assert found.radii[0, :2].tolist() == [0.0, 0.0]
    assert found.radii[0, 2] == pytest.approx(furthest_radius(100, SIGMA, 0.001, 3))
    assert found.free(0.0).tolist() == [[True, True, False]]
