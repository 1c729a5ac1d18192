"""Recipes that make a hasher robust."""

from robusthash.defenses.adversarial_training import AdversarialTraining, Round
from robusthash.defenses.atrdh import ATRDHOuter
from robusthash.defenses.outer_losses import CgATOuter, PlainAT, SAATOuter
from robusthash.defenses.saah import SAAHOuter

__all__ = ["ATRDHOuter", "AdversarialTraining", "CgATOuter", "PlainAT", "Round", "SAAHOuter", "SAATOuter"]
