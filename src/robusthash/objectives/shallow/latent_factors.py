"""LFH and DLFH: latent factors of the similarity between items, real and then discrete."""

from __future__ import annotations

import torch
from torch import Tensor

from robusthash.core.hamming import sign
from robusthash.core.registry import register
from robusthash.objectives.shallow.base import (
    Projection,
    ShallowMethod,
    TrainingFeatures,
    random_signs,
    ridge,
)


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


def raise_codes(codes: Tensor, others: Tensor, similar: Tensor, lam: float) -> Tensor:
    """U (N, K) bit by bit by a lower bound of the likelihood to V (m, K), which never falls."""
    u, bits = codes.clone(), codes.shape[1]
    theta = lam / bits * u @ others.T
    for k in range(bits):
        gap = similar - torch.sigmoid(theta)
        slope = lam / bits * gap @ others[:, k] + len(others) * lam**2 / (4 * bits**2) * u[:, k]
        changed = torch.where(slope == 0, u[:, k], slope.sign())
        theta = theta + lam / bits * torch.outer(changed - u[:, k], others[:, k])
        u[:, k] = changed
    return u


@register(
    "shallow",
    "dlfh",
    paper="Jiang and Li, TIP 2019",
    evidence="paper+code",
    modality="image+text",
    state="measured",
)
class DLFH(ShallowMethod):
    """DLFH: max sum_ij [S_ij T_ij - softplus(T_ij)], T = (lam / K) U V^T, U and V codes of images and texts.

    U and V in turn, bit by bit, against ``columns`` sampled items of the other; then sgn(X W) with W by
    ridge regression of U, and of V. O(N m K) a round.

    Args:
        lam: 8.
        gamma: of the ridge regression, 0.01.
        rounds: 30.
        columns: m, sampled in each round; 0 is K, as in the paper.
    """

    modalities = 2
    pairwise = True

    def __init__(self, lam: float = 8.0, gamma: float = 0.01, rounds: int = 30, columns: int = 0) -> None:
        if lam <= 0 or gamma <= 0:
            raise ValueError(f"lam and gamma must be above 0, got {lam:g} and {gamma:g}")
        self.lam = lam
        self.gamma = gamma
        self.rounds = rounds
        self.columns = columns

    def fit(self, known: TrainingFeatures) -> dict[str, Projection]:
        names, similar = list(known.values), known.similar()
        codes = {name: random_signs(known, "codes", name) for name in names}
        generator = known.draws.within("columns").generator()
        size = min(self.columns or known.bits, known.items)
        for _ in range(self.rounds):
            for own, other in (names, reversed(names)):
                sampled = torch.randperm(known.items, generator=generator)[:size]
                codes[own] = raise_codes(codes[own], codes[other][sampled], similar[:, sampled], self.lam)
        return {name: ridge(x, sign(codes[name]), self.gamma) for name, x in known.values.items()}
