"""Gaussian noise before a hasher: the random model whose majority is a smoothed code."""

from __future__ import annotations

import torch
from torch import Tensor

from robusthash.models.hasher import Hasher
from robusthash.models.purifier import Encode, Purifier


class GaussianNoise(Purifier):
    """x + N(0, sigma^2 I), drawn again at each call and not cut to [0, 1]; then the purifier that was there.

    Not cut, since a bound on the majority needs noise that is the same around every input.
    """

    declares = "randomised"

    def __init__(self, sigma: float, then: Purifier | None = None) -> None:
        super().__init__()
        self.sigma = sigma
        self.then = then

    def forward(self, x: Tensor, encode: Encode) -> tuple[Tensor, dict[str, Tensor]]:
        noisy = x + self.sigma * torch.randn_like(x)
        return (noisy, {}) if self.then is None else self.then(noisy, encode)


def noisy_hasher(hasher: Hasher, modality: str, sigma: float) -> Hasher:
    """The hasher behind Gaussian noise in one modality, declared ``randomised``; its modules are shared."""
    parts = dict(hasher.purifiers)
    noise = GaussianNoise(sigma, parts.get(modality))  # type: ignore[arg-type]
    result = hasher.with_parts(purifiers={modality: noise})
    result.declared = "randomised"
    return result.train(hasher.training)
