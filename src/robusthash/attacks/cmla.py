"""CMLA: apart from the other modality's relevant items, while the relations of the own one are kept."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from robusthash.attacks.base import Attack, Loss, Probe, Score, SearchResult, Select, Start
from robusthash.attacks.budgets import Ball, Budget
from robusthash.attacks.guides import Unguided
from robusthash.attacks.pgd import RawGradient
from robusthash.attacks.threat_model import Attacked, Threat, threat_on
from robusthash.core.labels import relevant
from robusthash.core.registry import register
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, Guidance

_PAPER = "Li et al., NeurIPS 2019"
OTHER = {"image": "text", "text": "image"}


@register("attack-guide", "pairs", paper=_PAPER, evidence="paper+code")
@dataclass(frozen=True)
class KnownPairs(Unguided):
    """No code of its own; the loss needs the known codes of both modalities."""

    pairs = True


@register("attack-loss", "cmla", paper=_PAPER, evidence="paper+code")
@dataclass(frozen=True)
class CMLALoss(Loss):
    """mean_j [S a + softplus(-a)] + mean_j [softplus(c) - S c] + mean |x' - x|, which the search descends.

    a_j = h' . b_j over known codes of the other modality, c_j over those of the own: the first term pushes
    relevant pairs apart and pulls the others together, the second keeps the relations within the modality.

    Args:
        size: weight of the mean absolute change, in units of 1/255 for images and of 1 for texts.
    """

    size: float = 1.0

    def __call__(self, probe: Probe, guidance: Guidance) -> Tensor:
        reference, labels = probe.reference, probe.goal.labels
        if reference is None or reference.labels is None or labels is None:
            raise ValueError("CMLA needs labelled reference codes: use a W1 or W2 threat and labelled data")
        similar, total = relevant(labels, reference.labels).float(), torch.zeros(len(labels)).to(labels)
        for name, output in probe.outputs.items():
            if missing := {name, OTHER[name]} - set(reference.codes):
                raise ValueError(
                    f"CMLA compares image and text, and no codes of {', '.join(sorted(missing))} are known; "
                    "on one modality take mainstay"
                )
            h = output.relaxed(probe.alpha)
            across, within = h @ reference.codes[OTHER[name]].to(h).T, h @ reference.codes[name].to(h).T
            total = total + (similar * across + softplus(-across)).mean(1)
            total = total + (softplus(within) - similar * within).mean(1)
            change = (probe.inputs[name] - probe.origin.inputs[name]).abs().flatten(1).mean(1)
            total = total + self.size * change * (255 if name == "image" else 1)
        return total


@dataclass(frozen=True)
class UpperHalf(Ball):
    """The half of a ball that only brightens an image, or adds words: origin <= x <= origin + eps."""

    def project(self, x: Tensor, origin: Tensor) -> Tensor:
        return torch.maximum(super().project(x, origin), origin)


@register("attack-search", "gradient-upwards", paper=_PAPER, evidence="paper+code")
@dataclass(frozen=True)
class GradientUpwards(RawGradient):
    """The raw gradient in the upper half of the budget, as CMLA's code clips its change to [0, eps]."""

    def __call__(
        self, score: Score, batch: Batch, threat: Threat, draws: Draws, select: Select | None, start: Start
    ) -> SearchResult:
        upper: dict[str, Budget] = {}
        for name, ball in threat.balls.items():
            if not isinstance(ball, Ball):
                raise ValueError(f"CMLA's official bound halves a ball, not {ball.norm}; take bound: ball")
            upper[name] = UpperHalf(ball.norm, ball.eps, ball.bounds)
        return super().__call__(score, batch, replace(threat, balls=upper), draws, select, start)


@register(
    "attack",
    "cmla",
    paper=_PAPER,
    evidence="paper+code",
    modality="cross-modal",
    state="measured",
    published={"steps": 500},
)
def cmla(
    eps: float | None = None,
    steps: int = 100,
    lr: float | None = None,
    bound: Literal["ball", "official"] = "ball",
    modality: Attacked = "image",
) -> Attack:
    """CMLA: Adam on the change, 0.5/255 for images and 0.002 for texts, 500 steps in the paper.

    ``bound: official`` lets a change only brighten or add words, as the code clips it to [0, 10/255] and
    [0, 0.01]. Differs: the references are the known pairs (there the batch of 128), so no query depends on
    others; softplus in place of log(1 + exp), which overflows from 88 bits; 8/255 and 0.05 for all attacks.
    """
    if bound not in ("ball", "official"):
        raise ValueError(f"bound must be 'ball' or 'official', got {bound!r}")
    rate = lr if lr is not None else (0.002 if modality == "text" else 0.5 / 255)
    search = (GradientUpwards if bound == "official" else RawGradient)(steps, "adam", rate)
    return Attack("cmla", KnownPairs(), CMLALoss(), search, threat_on(modality, eps))
