"""Batch -> attacked batch: guides, losses, searches, threats, and the published attacks by name."""

from robusthash.attacks.base import Attack, SearchResult
from robusthash.attacks.budgets import Ball, Edits, Swaps
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
from robusthash.attacks.text_edits import text_edits, token_swaps
from robusthash.attacks.tha import tha
from robusthash.attacks.threat_model import Threat, image_threat, named_threat

__all__ = [
    "Attack",
    "Ball",
    "Edits",
    "SearchResult",
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
