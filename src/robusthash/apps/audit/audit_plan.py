"""A search that was opened, with what it is measured by, and what an audit found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from robusthash.apps.audit.measured_rows import AuditExample, AuditRow, Columns
from robusthash.apps.audit.photo_collection import Categories, Photos
from robusthash.apps.audit.targets import AuditOptions, Target
from robusthash.core.runtime import Draws, Progress
from robusthash.data.transforms import EVERYDAY, noise
from robusthash.metrics.results import Flag

_BY_SIZE = ("resize", "blur")  # changes whose effect goes with the size of what is changed


@dataclass(frozen=True)
class AuditPlan:
    """An opened target, and the photographs and options to measure it with."""

    target: Target
    photos: Photos
    categories: Categories | None
    options: AuditOptions
    progress: Progress

    @property
    def images(self) -> Tensor:
        """(Q, 3, S, S) float: the photographs that are searched for."""
        return self.photos.first(self.options.tier.queries)

    @property
    def by_radius(self) -> bool:
        """Pictures within a radius that somebody has set count as the same."""
        return self.target.radius is not None or self.options.radius is not None

    def changes(self) -> list[tuple[Columns, Callable[[Tensor], Tensor]]]:
        """Everyday changes and noise: the first columns of the row of each, and the change."""
        eps, draws = self.options.eps, Draws(self.options.seed, ("audit",))

        def noisy(images: Tensor) -> Tensor:
            return noise(images, torch.arange(len(images)), eps, draws)

        words = f"random noise of {eps * 255:g} of 255 brightness levels"
        everyday: list[tuple[Columns, Callable[[Tensor], Tensor]]]
        size = f" (at the model's size, {self.images.shape[-1]} px)"  # quickstart changes larger ones
        everyday = [
            ((each.name, each.words + size * (each.name in _BY_SIZE), each.visible, "everyday"), each)
            for each in EVERYDAY
        ]
        return [*everyday, (("noise", words, "slight grain", "noise"), noisy)]


@dataclass(frozen=True)
class MeasuredAudit:
    """Rows and pictures of an audit, with what was noted and checked."""

    rows: tuple[AuditRow, ...]
    examples: tuple[AuditExample, ...] = ()
    remarks: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    radius: float | None = None
    false_matches: float | None = None
    flags: tuple[Flag, ...] = ()
