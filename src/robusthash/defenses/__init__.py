"""Recipes that make a hasher robust."""

from robusthash.core.registry import discover
from robusthash.defenses.adversarial import AdversarialTraining, Round
from robusthash.defenses.atrdh import ATRDHOuter
from robusthash.defenses.outer import CgATOuter, PlainAT, SAATOuter

__all__ = ["ATRDHOuter", "AdversarialTraining", "CgATOuter", "PlainAT", "Round", "SAATOuter"]

discover(__name__, __path__)
