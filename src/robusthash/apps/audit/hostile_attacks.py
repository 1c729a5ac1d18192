"""The attacks of an audit, of those who have the model and those who may only query it.

A perceptual hash is used with a radius, so its enemy needs no bit more than that: further attacks leave the
radius of the own code, or enter that of another. Of the bits, those count that are easiest to turn: on the
others the budget would be wasted.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from robusthash.apps.audit.targets import Target, Tier
from robusthash.attacks.base import Attack, Loss, Probe
from robusthash.attacks.guides import Anchor, Own
from robusthash.attacks.losses import ScaleFree, SharpBits, scaled_logits
from robusthash.attacks.pgd import APGD, MomentumSteps
from robusthash.attacks.published import guided_apgd, mainstay
from robusthash.attacks.query_search import Square
from robusthash.attacks.ranking_losses import MarginPN, Tallied
from robusthash.attacks.threat_model import threat_on
from robusthash.core.hamming import sign
from robusthash.core.types import Guidance
from robusthash.evaluation.attack_spec import AttackSpec, GradientAttack
from robusthash.robustness.specs.oracle_attacks import OracleAttack

_LONGER = 3  # attacks on a radius take this many times the steps: their models are small


def hostile_attacks(
    target: Target, tier: Tier, eps: float, radius: tuple[int, int] | None = None
) -> list[AttackSpec]:
    """The attacks of an audit: untargeted ones hide a photograph, targeted ones make it look like another.

    Attacks that follow gradients know weights and stored codes. Vectors have no mainstay code; an attack on
    the margin to the nearest other photographs takes its place. A target without gradients, such as an
    endpoint, gets black-box attacks alone.

    Args:
        eps: budget in pixels, L-infinity.
        radius: (bits K, bits that may differ) of a search that counts bits; those attacks are then run too.
    """
    specs: list[AttackSpec] = []
    if target.gradients:
        flip = Attack("flip", Own(), ScaleFree(), APGD(tier.steps), threat_on("image", eps, knowledge="W0"))
        known = threat_on("image", eps, knowledge="W2")
        imitate = Attack("imitate", Anchor(1), ScaleFree(), APGD(tier.steps), known, targeted=True)
        follow = mainstay(eps, tier.steps, step_size=2.5 * eps / tier.steps, slope="one")
        on_codes = target.hasher is None or target.hasher.distance == "hamming"
        last = Attack("margin-pn", Tallied(), MarginPN(10), APGD(tier.steps), known)
        specs = [
            GradientAttack("guided-apgd", guided_apgd(eps, tier.steps)),
            GradientAttack("flip", flip),
            GradientAttack("mainstay", follow) if on_codes else GradientAttack("margin-pn", last),
            GradientAttack("imitate", imitate),
            *(radius_attacks(*radius, _LONGER * tier.steps, eps) if radius else ()),
        ]
    # judged by bits, since AP is flat while the photograph is still found first
    by_queries = threat_on("image", eps, knowledge="B2")
    return [*specs, OracleAttack("square", Square(), by_queries, "codes", "moved", tier.questions)]


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
