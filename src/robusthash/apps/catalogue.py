"""All registered names: importing the rooms is what registers them."""

from __future__ import annotations

import importlib

from robusthash.core.registry import Card, catalogue

ROOMS = ("data", "models", "objectives", "attacks", "defenses", "evaluation")


def everything() -> list[Card]:
    """Every card, ordered by kind and name."""
    for room in ROOMS:
        importlib.import_module(f"robusthash.{room}")
    return catalogue()
