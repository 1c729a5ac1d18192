"""Cards of saved models: checks of what they say, and a digest that covers all of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from robusthash.core.atomic_files import json_text
from robusthash.core.damaged_files import shortened
from robusthash.core.limited_files import parse_json
from robusthash.core.runtime import digest

SEAL = "card"  # the digest of all other fields; earlier versions wrote none
MOST_BITS, MOST_SIDE = 1 << 16, 1 << 14
"""Limits of a code and of the side of an image in pixels, beyond which a card is not believed."""

_MODALITIES = ("image", "text")


def sealed(card: Mapping[str, Any]) -> dict[str, Any]:
    """The card as it reads from its file, with the digest of all other fields."""
    plain = parse_json(json_text({name: value for name, value in card.items() if name != SEAL}), "the card")
    return {**plain, SEAL: digest(plain, 16)}


def is_digest(value: Any) -> bool:
    """A digest of weights, as cards and codes carry it."""
    return isinstance(value, str) and (value == "none" or re.fullmatch("[0-9a-f]{16}", value) is not None)


def is_count(value: Any, least: int = 1) -> bool:
    """A whole number from ``least`` on."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_size(value: Any) -> bool:
    """Sides of images in pixels, or the width of vectors; nothing where there are no images."""
    return isinstance(value, list) and len(value) <= 2 and all(map(is_count, value))


def beyond_limits(card: Mapping[str, Any]) -> str:
    """The fault of a card whose model would take more memory than any that is trained; "" of others."""
    if card["bits"] > MOST_BITS:
        return f"bits is {card['bits']}, more than {MOST_BITS}"
    if len(card["image_size"]) == 2 and max(card["image_size"]) > MOST_SIDE:
        return f"image_size is {card['image_size']}, more than {MOST_SIDE} a side"
    return ""


def _is_modalities(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(name in _MODALITIES for name in value)


Checks = Mapping[str, Callable[[Any], bool]]
MODEL: Checks = {"bits": is_count, "modalities": _is_modalities, "image_size": _is_size, "digest": is_digest}
"""Fields of every card, and whether a value fits."""


def field_fault(facts: Mapping[str, Any], fields: Checks) -> str:
    """The first field that is missing or does not fit, in words; "" where all do."""
    for name, fits in fields.items():
        if name not in facts:
            return f"it lacks {name}"
        if not fits(facts[name]):
            return f"{name} is {shortened(repr(facts[name]))}"
    return ""


def model_fault(card: Any, fields: Checks = MODEL) -> str:
    """The fault of a card of a run or of a saved model, if it has one: a wrong or edited field."""
    if not isinstance(card, dict) or not isinstance(card.get("hasher"), dict):
        return "it names no hasher"
    if fault := field_fault(card, fields) or beyond_limits(card):
        return fault
    if SEAL in card and sealed(card)[SEAL] != card[SEAL]:
        return "a field was changed after it was written: its digest is another"
    if card["hasher"].get("bits") != card["bits"]:
        return f"bits is {card['bits']}, and its hasher has {shortened(repr(card['hasher'].get('bits')))}"
    return ""
