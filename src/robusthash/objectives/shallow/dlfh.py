"""DLFH: discrete latent factors of the similarity between images and texts."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from robusthash.core.hamming import sign
from robusthash.core.registry import register
from robusthash.objectives.shallow.base import (
    Projection,
    ShallowMethod,
    TrainingFeatures,
    random_signs,
    ridge,
)


def discrete_likelihood(codes: Tensor, others: Tensor, similar: Tensor, lam: float) -> float:
    """sum_ij [S_ij T_ij - softplus(T_ij)], T = (lam / K) U V^T; what DLFH raises."""
    theta = lam / codes.shape[1] * codes @ others.T
    return float((similar * theta - softplus(theta)).sum())


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
