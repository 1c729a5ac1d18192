"""Recipes and losses that make a hasher robust, and the attacks of somebody who knows them."""

from robusthash.defenses.adversarial_training import AdversarialTraining
from robusthash.defenses.base import OuterLoss, Round
from robusthash.defenses.outer_losses import ATRDHOuter, CgATOuter, PlainAT, SAATOuter
from robusthash.defenses.saah import SAAHOuter

__all__ = ["ATRDHOuter", "AdversarialTraining", "CgATOuter", "OuterLoss", "PlainAT", "Round"]
__all__ += ["SAAHOuter", "SAATOuter"]
