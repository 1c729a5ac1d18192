"""CMFH: one latent code for image and text by collective matrix factorisation."""

from __future__ import annotations

import torch
from torch import Tensor

from robusthash.core.registry import register
from robusthash.objectives.shallow.base import Projection, ShallowMethod, TrainingFeatures


@register(
    "shallow",
    "cmfh",
    paper="Ding et al., CVPR 2014",
    evidence="paper+code",
    modality="image+text",
    supervised=False,
    state="measured",
)
class CMFH(ShallowMethod):
    """CMFH: min sum_t a_t (||X_t - Y U_t||^2 + mu ||Y - X_t W_t||^2) + gamma R, Y one latent code.

    U, Y and W in turn, each in closed form; codes are sgn(X_t W_t). No labels. O(N D K + D^3) a round. On
    data whose modalities share little it ends near chance, as published.

    Args:
        share: a of the first modality, 0.5; the other has the rest.
        mu: 100.
        gamma: weight of R = sum_t a_t (||U_t||^2 + ||W_t||^2) + ||Y||^2, 0.01.
        rounds: 25.
    """

    modalities = 2
    supervised = False

    def __init__(self, share: float = 0.5, mu: float = 100.0, gamma: float = 0.01, rounds: int = 25) -> None:
        if not 0 < share < 1 or mu <= 0 or gamma <= 0 or rounds < 1:
            values = f"share {share:g}, mu {mu:g}, gamma {gamma:g}, rounds {rounds}"
            raise ValueError(f"CMFH needs share in (0, 1), mu and gamma above 0, and a round; got {values}")
        self.share = share
        self.mu = mu
        self.gamma = gamma
        self.rounds = rounds

    def fit(self, known: TrainingFeatures) -> dict[str, Projection]:
        parts = list(known.values.values())
        generator = known.draws.within("latent").generator()
        y = torch.randn(known.items, known.bits, generator=generator, dtype=torch.float64)
        maps = [torch.linalg.solve(self._inner(x), self.mu * x.T) for x in parts]  # X_t -> W_t of any Y
        for _ in range(self.rounds):
            factors, weights = self._factors(parts, y), [m @ y for m in maps]
            y = self._latent(parts, factors, weights)
        offset = torch.zeros(known.bits, dtype=torch.float64)
        return {name: Projection(m @ y, offset) for name, m in zip(known.values, maps, strict=True)}

    def _inner(self, x: Tensor) -> Tensor:
        return self.mu * x.T @ x + self.gamma * torch.eye(x.shape[1], dtype=x.dtype)

    def _factors(self, parts: list[Tensor], y: Tensor) -> list[Tensor]:
        """U_t (K, D_t), the ridge regression of X_t on Y."""
        inner = y.T @ y + self.gamma * torch.eye(y.shape[1], dtype=y.dtype)
        return [torch.linalg.solve(inner, y.T @ x) for x in parts]

    def _latent(self, parts: list[Tensor], factors: list[Tensor], weights: list[Tensor]) -> Tensor:
        """Y (N, K) with U and W held."""
        eye = torch.eye(factors[0].shape[0], dtype=torch.float64)
        shares = (self.share, 1.0 - self.share)
        inner = sum(
            (a * (u @ u.T + self.mu * eye) for a, u in zip(shares, factors, strict=True)), self.gamma * eye
        )
        terms = zip(shares, parts, factors, weights, strict=True)
        outer = sum((a * (x @ u.T + self.mu * x @ w) for a, x, u, w in terms), torch.zeros(()))
        return torch.linalg.solve(inner, outer.T).T
