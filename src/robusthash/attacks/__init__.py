"""Batch -> attacked batch: guides, losses, searches, threats, and the published attacks by name."""

from robusthash.attacks.base import Attack, AttackOutput
from robusthash.attacks.edits import text_edits
from robusthash.attacks.house import flip_apgd, guided_targeted_apgd, margin_pn_apgd, soft_ap_apgd, wrong_apgd
from robusthash.attacks.named import cgat, dhta, guided_apgd, hag, mainstay, mainstay_targeted, p2p, pgd, sdha
from robusthash.attacks.prototype import tha
from robusthash.attacks.swaps import Swaps
from robusthash.attacks.threat import Ball, Edits, Threat, image_threat
from robusthash.attacks.threats import named_threat
from robusthash.attacks.tokens import token_swaps

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
