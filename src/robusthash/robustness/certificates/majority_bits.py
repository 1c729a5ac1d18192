"""Bits by majority under Gaussian noise, and the l2 radius within which each majority cannot change.

Randomised smoothing (Cohen, Rosenfeld and Kolter, "Certified adversarial robustness via randomized
smoothing", ICML 2019): where a bit is +1 with probability p > 1/2 under noise N(0, sigma^2 I), its majority
stays +1 within the l2 radius sigma Phi^-1(p) (Theorem 1, Equation 3, with p_B = 1 - p). Here it is applied
to each of K bits.

Differs from their Algorithm CERTIFY: a bit has two values, so the votes that bound p also choose the
majority (a two-sided interval, half of the error on each side) and no separate sample selects it; the error
is divided by K (Bonferroni), so that all radii of a query hold together. As there, a bit whose interval
holds 1/2 abstains: its radius is 0, and it may take either value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.special import betaincinv, ndtri
from torch import Tensor


@dataclass(frozen=True)
class MajorityBits:
    """(Q, K) int8 signs by majority, and (Q, K) float64 certified l2 radii, 0 where a bit abstains."""

    signs: Tensor
    radii: Tensor

    def free(self, radius: float) -> Tensor:
        """(Q, K) bool: the bits that a change of at most ``radius`` may flip, for all that is proven."""
        return self.radii <= radius


def least_probability(votes: Tensor, samples: int, error: float) -> Tensor:
    """Clopper-Pearson lower bound of a probability: it fails with probability ``error`` at most.

    Args:
        votes: successes among ``samples`` independent trials, of any shape.

    Returns:
        float64, the ``error`` quantile of Beta(votes, samples - votes + 1); 0 without a success.
    """
    successes = votes.to(torch.float64)
    bound = betaincinv(successes.clamp(min=1).numpy(), (samples - successes + 1).numpy(), error)
    return torch.where(successes > 0, torch.from_numpy(bound), 0.0)


def majority_bits(votes: Tensor, samples: int, sigma: float, alpha: float) -> MajorityBits:
    """Signs and certified radii from votes; all K radii of a query hold with probability 1 - ``alpha``.

    Args:
        votes: (Q, K) samples under noise whose bit is +1, of ``samples`` in all.
        sigma: standard deviation of the noise, in units of the range of the input.
    """
    error = alpha / (2 * votes.shape[1])
    plus = votes * 2 >= samples
    least = least_probability(torch.where(plus, votes, samples - votes), samples, error)
    radii = sigma * torch.from_numpy(ndtri(least.clamp(min=0.5).numpy()))
    return MajorityBits(torch.where(plus, 1, -1).to(torch.int8), radii)


def furthest_radius(samples: int, sigma: float, alpha: float, bits: int) -> float:
    """The radius of a bit that all samples agree on: no number of votes certifies more."""
    return float(majority_bits(torch.full((1, bits), samples), samples, sigma, alpha).radii[0, 0])
