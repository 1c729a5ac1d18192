"""The attacks of an audit, of those who have the model and those who may only ask it."""

from __future__ import annotations

from robusthash.apps.audit.radius_attacks import radius_attacks
from robusthash.apps.audit.targets import Target, Tier
from robusthash.attacks.base import Attack
from robusthash.attacks.guides import Anchor, Own
from robusthash.attacks.losses import ScaleFree
from robusthash.attacks.pgd import APGD
from robusthash.attacks.published import guided_apgd, mainstay
from robusthash.attacks.query_search import Square
from robusthash.attacks.ranking_losses import MarginPN, Tallied
from robusthash.attacks.threat_model import threat_on
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
    asked = threat_on("image", eps, knowledge="B2")
    return [*specs, OracleAttack("square", Square(), asked, "codes", "moved", tier.questions)]
