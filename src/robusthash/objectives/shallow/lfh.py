"""LFH: latent factors of the similarity between items, and their signs regressed on features."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from robusthash.core.hamming import sign
from robusthash.core.registry import register
from robusthash.objectives.shallow.base import Projection, ShallowMethod, TrainingFeatures, ridge


def factor_likelihood(factors: Tensor, similar: Tensor, beta: float) -> float:
    """sum_{i != j} [S_ij T_ij - softplus(T_ij)] - ||U||^2 / (2 beta), T = U U^T / 2; what LFH raises."""
    theta = factors @ factors.T / 2
    terms = similar * theta - softplus(theta)
    return float(terms.sum() - terms.diagonal().sum() - factors.square().sum() / (2 * beta))


def raise_factors(factors: Tensor, similar: Tensor, beta: float) -> Tensor:
    """One Newton step a row of U, by a lower bound of the Hessian; the likelihood never falls."""
    u, bits = factors.clone(), factors.shape[1]
    eye = torch.eye(bits, dtype=u.dtype) / beta
    gram = u.T @ u
    for i in range(len(u)):
        row = u[i].clone()
        gap = similar[i] - torch.sigmoid(u @ row / 2)
        gap[i] = 0.0
        others = gram - torch.outer(row, row)
        u[i] = row + torch.linalg.solve(others / 8 + eye, gap @ u - row / beta)
        gram = others + torch.outer(u[i], u[i])
    return u


@register("shallow", "lfh", paper="Zhang et al., SIGIR 2014", evidence="paper", state="measured")
class LFH(ShallowMethod):
    """LFH: max sum_ij [S_ij T_ij - softplus(T_ij)] - ||U||^2 / (2 beta), T = U U^T / 2.

    Row by row by a Newton step, from random normal factors; codes are sgn(X W), W the ridge regression of
    sgn U. O(N^2 K) a round and N^2 numbers in memory: for thousands of training items.

    Args:
        beta: 30.
        rounds: over all rows, 20 (ours; the paper samples columns and takes more).
        gamma: of the ridge regression, 1.

    Differs: all columns in every step where the paper samples K; an item's similarity to itself is left out,
    with which no step lowers the objective.
    """

    pairwise = True

    def __init__(self, beta: float = 30.0, rounds: int = 20, gamma: float = 1.0) -> None:
        if beta <= 0:
            raise ValueError(f"beta must be above 0, got {beta:g}")
        self.beta = beta
        self.rounds = rounds
        self.gamma = gamma

    def fit(self, known: TrainingFeatures) -> dict[str, Projection]:
        ((modality, x),) = known.values.items()
        similar, generator = known.similar(), known.draws.within("factors").generator()
        factors = torch.randn(known.items, known.bits, generator=generator, dtype=torch.float64)
        for _ in range(self.rounds):
            factors = raise_factors(factors, similar, self.beta)
        return {modality: ridge(x, sign(factors), self.gamma)}
