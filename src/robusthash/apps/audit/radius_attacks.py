"""Attacks on a search that counts bits: leave the radius of the own code, or enter that of another.

A perceptual hash is used with a radius, so its enemy needs no bit more than that. Of the bits, those count
that are easiest to turn: on the others the budget would be wasted.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from robusthash.attacks.base import Attack, Loss, Probe
from robusthash.attacks.guides import Anchor, Own
from robusthash.attacks.losses import SharpBits, scaled_logits
from robusthash.attacks.pgd import APGD, MomentumSteps
from robusthash.attacks.threat_model import threat_on
from robusthash.core.hamming import sign
from robusthash.core.types import Guidance
from robusthash.evaluation.attack_spec import GradientAttack

_BEYOND = 0.5  # of the radius: bits turned beyond what is needed, so that saving as a file does not undo it
_MARGIN = 0.3  # of the median magnitude: how far past its threshold a turned bit is pushed


@dataclass(frozen=True)
class EasiestBits(Loss):
    """Mean agreement t_k u_k / s of the ``count`` bits that agree least, s the item's median |u|, cut where a
    bit has turned by a margin. ``towards``: of those that agree most, cut where they agree by a margin.
    """

    count: int
    towards: bool = False

    def __call__(self, probe: Probe, guidance: Guidance) -> Tensor:
        agreement = scaled_logits(probe) * sign(guidance.codes)
        nearest = agreement.topk(min(self.count, agreement.shape[1]), largest=self.towards).values
        return (nearest.clamp(max=_MARGIN) if self.towards else nearest.clamp(min=-_MARGIN)).mean(1)


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
    sharp = Attack("evade-sharp", Own(), SharpBits(), MomentumSteps(steps), own, slope="published")
    collide = Attack("collide", Anchor(1), towards, APGD(steps), others, targeted=True)
    return [GradientAttack(attack.name, attack) for attack in (evade, sharp, collide)]
