"""DACM-style: away from the center code, through what the features of image and text do not share."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from robusthash.attacks.base import Attack, Guide, Loss, Probe
from robusthash.attacks.guides import Center
from robusthash.attacks.published import steps_on
from robusthash.attacks.threat_model import threat_on
from robusthash.core.registry import register
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, Goal, Guidance, Reference
from robusthash.data.base import RetrievalData, batches
from robusthash.models.hasher import Hasher, frozen

Modality = Literal["image", "text"]
_PAPER = "Li et al., KDD 2020"


@dataclass(frozen=True)
class Shared(Guidance):
    """A center code for each query, its clean features, and the basis of the shared part of features."""

    features: Tensor | None = None  # (B, D)
    basis: Tensor | None = None  # (D, r)


def shared_basis(own: Tensor, other: Tensor, rank: int) -> Tensor:
    """(D, r) the left singular vectors of largest value of the cross-covariance of (N, D) and (N, D')."""
    own, other = (x - x.mean(0) for x in (own.double(), other.double()))
    left, _, _ = torch.linalg.svd(own.T @ other / len(own), full_matrices=False)
    return left[:, :rank]


@register("attack-guide", "shared-features", paper=_PAPER, evidence="reconstruction")
@dataclass(frozen=True)
class SharedFeatures(Guide):
    """CgAT's center code, and what the features of this modality share with the other's on the training set.

    Args:
        modality: that is attacked.
        rank: of the shared part; the code length by default.
    """

    modality: str = "image"
    rank: int | None = None
    basis: Tensor | None = field(default=None, compare=False)
    fit_steps: int = field(default=0, compare=False)
    fit_items: int = field(default=0, compare=False)
    learns = True

    def fitted(
        self, victim: Hasher, data: RetrievalData, reference: Reference | None, draws: Draws
    ) -> SharedFeatures:
        both = ("image", "text")
        if missing := [m for m in both if m not in victim.modalities or m not in data.modalities]:
            raise ValueError(
                f"DACM needs image and text, and {data.name} or this victim has no {missing[0]}; take cgat"
            )
        features: dict[str, list[Tensor]] = {name: [] for name in both}
        with frozen(victim), torch.no_grad():
            for batch in batches(data.train, 256, modalities=both):
                for name, output in victim(batch.to(victim.device).inputs).items():
                    features[name].append(output.features.flatten(1))
        other = "text" if self.modality == "image" else "image"
        own, across = torch.cat(features[self.modality]), torch.cat(features[other])
        basis = shared_basis(own, across, self.rank or victim.bits)
        return replace(self, basis=basis.to(own), fit_steps=1, fit_items=len(data.train))

    def __call__(
        self, victim: Hasher, batch: Batch, goal: Goal, reference: Reference | None, draws: Draws
    ) -> Shared:
        if self.basis is None:
            raise ValueError("the shared features are not known yet: call attack.fit(...) on the victim")
        center = Center()(victim, batch, goal, reference, draws)
        with torch.no_grad():
            clean = victim({self.modality: batch.inputs[self.modality]})[self.modality].features.flatten(1)
        return Shared(center.codes, features=clean, basis=self.basis.to(clean))


@register("attack-loss", "dacm", paper=_PAPER, evidence="reconstruction")
@dataclass(frozen=True)
class DACMLoss(Loss):
    """(1/K) h' . c + weight |U U^T (f' - f)|^2 / |f|^2, descended: the shared part of the features stays."""

    weight: float = 0.1

    def __call__(self, probe: Probe, guidance: Guidance) -> Tensor:
        if not isinstance(guidance, Shared) or guidance.features is None or guidance.basis is None:
            raise ValueError("the loss 'dacm' needs the guide 'shared-features'")
        (output,) = probe.outputs.values()
        moved = (output.features.flatten(1) - guidance.features) @ guidance.basis
        shared = moved.square().sum(1) / guidance.features.square().sum(1).clamp_min(1e-12)
        return (output.relaxed(probe.alpha) * guidance.codes).mean(1) + self.weight * shared


@register(
    "attack",
    "dacm",
    paper=_PAPER,
    evidence="reconstruction",
    modality="cross-modal",
    state="measured",
    published={"steps": 100},
)
def dacm(
    eps: float | None = None, steps: int = 100, step_size: float | None = None, modality: Modality = "image"
) -> Attack:
    """DACM-style: through what image and text features do not share, by an SVD on the training set.

    No text of the paper was found; its idea alone is known (parts related and unrelated to the other
    modality, the unrelated one attacked). The SVD, its rank K, the center code and the weight 0.1 are ours.
    """
    if modality not in get_args(Modality):
        raise ValueError(f"DACM attacks one modality by what it shares with the other, not {modality!r}")
    search, guide = steps_on(modality, steps, step_size), SharedFeatures(modality)
    return Attack("dacm", guide, DACMLoss(), search, threat_on(modality, eps))
