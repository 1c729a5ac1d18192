"""Batch -> attacked batch: guides, losses, searches, threats, and the published attacks by name."""

from robusthash.attacks.base import Attack, AttackOutput
from robusthash.attacks.published import (
    cgat,
    dhta,
    guided_apgd,
    hag,
    mainstay,
    mainstay_targeted,
    p2p,
    pgd,
    sdha,
)
from robusthash.attacks.ranking_losses import (
    flip_apgd,
    guided_targeted_apgd,
    margin_pn_apgd,
    soft_ap_apgd,
    wrong_apgd,
)
from robusthash.attacks.tha import tha
from robusthash.attacks.threat_model import Ball, Edits, Threat, image_threat
from robusthash.attacks.threat_registry import named_threat
from robusthash.attacks.token_budget import Swaps
from robusthash.attacks.token_swaps import token_swaps
from robusthash.attacks.word_edits import text_edits

__all__ = [
    "Attack",
    "AttackOutput",
    "Ball",
    "Edits",
    "Swaps",
    "Threat",
    "cgat",
    "dhta",
    "flip_apgd",
    "guided_apgd",
    "guided_targeted_apgd",
    "hag",
    "image_threat",
    "mainstay",
    "mainstay_targeted",
    "margin_pn_apgd",
    "named_threat",
    "p2p",
    "pgd",
    "sdha",
    "soft_ap_apgd",
    "text_edits",
    "tha",
    "token_swaps",
    "wrong_apgd",
]
