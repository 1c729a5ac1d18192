"""Attacks on a search that counts bits: leave the radius of the own code, or enter that of another.

A perceptual hash is used with a radius, so its enemy needs no bit more than that. Of the bits, those count
that are easiest to turn: on the others the budget would be wasted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robusthash.attacks.base import Attack, Loss, Probe
from robusthash.attacks.guides import Anchor, Own
from robusthash.attacks.pgd import APGD, PGD
from robusthash.attacks.threat_model import threat_on
from robusthash.core.hamming import sign
from robusthash.core.types import Guidance
from robusthash.evaluation.attack_spec import GradientAttack

_BEYOND = 0.5  # of the radius: bits turned beyond what is needed, so that saving as a file does not undo it
_MARGIN = 0.3  # of the median magnitude: how far past its threshold a turned bit is pushed
_SHARP = 24.0  # slope of tanh in median magnitudes, at the end of a search


@dataclass(frozen=True)
class EasiestBits(Loss):
    """Mean agreement t_k u_k / s of the ``count`` bits that agree least, s the item's median |u|, cut where a
    bit has turned by a margin. ``towards``: of those that agree most, cut where they agree by a margin.
    """

    count: int
    towards: bool = False

    def __call__(self, probe: Probe, guidance: Guidance) -> Tensor:
        agreement = _agreement(probe, guidance)
        nearest = agreement.topk(min(self.count, agreement.shape[1]), largest=self.towards).values
        return (nearest.clamp(max=_MARGIN) if self.towards else nearest.clamp(min=-_MARGIN)).mean(1)


@dataclass(frozen=True)
class SharpBits(Loss):
    """mean_k tanh(24 alpha t_k u_k / s), s the item's median |u|: nearly the number of bits that agree.

    alpha rises from 0.1 to 1 with the published schedule, so that the search starts smooth. A soft tanh
    wastes the budget on bits that have turned, or that will not turn.
    """

    def __call__(self, probe: Probe, guidance: Guidance) -> Tensor:
        return torch.tanh(_SHARP * probe.alpha * _agreement(probe, guidance)).mean(1)


def _agreement(probe: Probe, guidance: Guidance) -> Tensor:
    """(B, K) t_k u_k / s, the mean over attacked modalities; s is held constant."""
    logits = torch.stack([output.logits for output in probe.outputs.values()]).mean(0)
    size = logits.detach().abs().median(1, keepdim=True).values.clamp_min(1e-12)
    return logits / size * sign(guidance.codes)


def radius_attacks(bits: int, radius: int, steps: int, eps: float) -> list[GradientAttack]:
    """``evade`` and ``evade-sharp`` leave the radius around the own code, ``collide`` enters a target's.

    Args:
        bits: K of the search.
        radius: bits that may differ between two pictures that count as the same.
        eps: budget in pixels, L-infinity.
    """
    beyond = round(_BEYOND * radius)
    away, towards = EasiestBits(radius + 1 + beyond), EasiestBits(bits - radius + beyond, towards=True)
    own, others = threat_on("image", eps, knowledge="W0"), threat_on("image", eps, knowledge="W2")
    evade = Attack("evade", Own(), away, APGD(steps), own)
    ramp = PGD(steps, step_size=eps / 4, momentum=0.75)
    sharp = Attack("evade-sharp", Own(), SharpBits(), ramp, own, slope="published")
    collide = Attack("collide", Anchor(1), towards, APGD(steps), others, targeted=True)
    return [GradientAttack(attack.name, attack) for attack in (evade, sharp, collide)]
