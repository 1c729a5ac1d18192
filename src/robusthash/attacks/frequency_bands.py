"""Perturbations in one band of frequencies: steps are projected onto it, inside the same ball."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from robusthash.attacks.base import Score, Search, SearchResult, Select, Start
from robusthash.attacks.budgets import Ball, Budget
from robusthash.attacks.threat_model import Threat
from robusthash.core.registry import register
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, Inputs
from robusthash.models.block_dct import BlockDCT

Band = Literal["low", "mid", "high"]
BANDS: tuple[Band, ...] = get_args(Band)


def band_mask(band: Band, block: int = 8) -> Tensor:
    """(n, n) bool: the frequencies (u, v) of a band of n x n blocks, thirds of u + v = 0 .. 2n - 2.

    With n = 8: low u + v <= 4 (15 of 64), mid 5..9 (34), high >= 10 (15).
    """
    if band not in BANDS:
        raise ValueError(f"band must be one of {', '.join(BANDS)}, got {band!r}")
    if block < 2:
        raise ValueError(f"blocks of {block} have no three bands; take at least 2")
    order = torch.arange(block)
    third = (order[:, None] + order) * 3 // (2 * block - 1)
    return third == BANDS.index(band)


@dataclass(frozen=True)
class BandBall(Ball):
    """A ball of perturbations whose coefficients outside a band are 0.

    Steps and perturbations are projected onto the band, an orthogonal projection, then into ball and range.
    Clipping is last, so that nothing leaves the ball; what it cuts off at the corners spills into other
    bands.

    Raises:
        ValueError: an ``l1`` ball; at the first image whose sides are not multiples of the block.
    """

    band: Band = "low"
    block: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm == "l1":
            raise ValueError("a band spreads over all pixels, and an l1 ball changes few; take linf or l2")
        band_mask(self.band, self.block)

    def in_band(self, delta: Tensor) -> Tensor:
        """(B, C, H, W) -> the part of it that lies in the band."""
        dct = BlockDCT(self.block).to(delta)
        z = dct(delta) * band_mask(self.band, self.block).to(delta)
        return dct.inverse(z, *delta.shape[2:])

    def project(self, x: Tensor, origin: Tensor) -> Tensor:
        return super().project(origin + self.in_band(x - origin), origin)

    def steepest(self, grad: Tensor, at: Tensor | None = None) -> Tensor:
        """The step of the norm along the gradient in the band, itself in the band: it still ascends."""
        step = super().steepest(self.in_band(grad))
        return self.in_band(step) if self.norm == "linf" else step


@register("attack-search", "banded")
@dataclass(frozen=True)
class Banded(Search):
    """A search of norm balls whose perturbation of the image stays in one band of the DCT."""

    search: Search
    band: Band
    block: int = 8

    def __post_init__(self) -> None:
        band_mask(self.band, self.block)
        if self.search.edits:
            raise ValueError(f"{type(self.search).__name__} edits words, which have no bands of frequency")

    def check(self, threat: Threat, origin: Inputs | None = None) -> None:
        self.search.check(threat, origin)

    def reach(self, threat: Threat) -> float:
        return self.search.reach(threat)

    def __call__(
        self, score: Score, batch: Batch, threat: Threat, draws: Draws, select: Select | None, start: Start
    ) -> SearchResult:
        ball = threat.balls.get("image")
        if not isinstance(ball, Ball):
            raise ValueError(f"bands of frequency belong to images, and {threat.name} does not attack them")
        banded = BandBall(ball.norm, ball.eps, ball.bounds, self.band, self.block)
        balls: dict[str, Budget] = {**threat.balls, "image": banded}
        return self.search(score, batch, replace(threat, balls=balls), draws, select, start)
