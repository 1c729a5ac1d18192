"""Recipes that make a hasher robust."""

from robusthash.defenses.adversarial import AdversarialTraining, Round
from robusthash.defenses.atrdh import ATRDHOuter
from robusthash.defenses.outer import CgATOuter, PlainAT, SAATOuter
from robusthash.defenses.saah import SAAHOuter

__all__ = ["ATRDHOuter", "AdversarialTraining", "CgATOuter", "PlainAT", "Round", "SAAHOuter", "SAATOuter"]
