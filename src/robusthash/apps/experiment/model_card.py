"""Cards of trained models: checks of what they say, and a digest that covers all of it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from robusthash.apps.experiment.config import Config, is_folder_name, shortened
from robusthash.core.atomic_files import json_text
from robusthash.core.limited_files import parse_json
from robusthash.core.runtime import digest
from robusthash.metrics.results import EvalResult

SEAL = "card"  # the digest of all other fields; earlier versions wrote none
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


def _is_duration(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _is_size(value: Any) -> bool:
    """Sides of images in pixels, or the width of vectors; nothing where there are no images."""
    return isinstance(value, list) and len(value) <= 2 and all(map(is_count, value))


def _is_modalities(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(name in _MODALITIES for name in value)


_MODEL = {"bits": is_count, "modalities": _is_modalities, "image_size": _is_size, "digest": is_digest}
_RUN = {
    "name": is_folder_name,
    "id": is_folder_name,
    **_MODEL,
    "declared": lambda value: isinstance(value, str),
    "hasher": lambda value: isinstance(value, dict),
    "epochs": lambda value: is_count(value, 0),
    "last": lambda value: isinstance(value, dict),
    "seconds": _is_duration,
}


def model_fault(card: Any, fields: Sequence[str] | None = None) -> str:
    """The fault of a card of a run or of an exported model, if it has one: a wrong or edited field."""
    if not isinstance(card, dict) or not isinstance(card.get("hasher"), dict):
        return "it names no hasher"
    for name, fits in (_MODEL if fields is None else {name: _RUN[name] for name in fields}).items():
        if name not in card:
            return f"it lacks {name}"
        if not fits(card[name]):
            return f"{name} is {shortened(repr(card[name]))}"
    if SEAL in card and sealed(card)[SEAL] != card[SEAL]:
        return "a field was changed after it was written: its digest is another"
    if card["hasher"].get("bits") != card["bits"]:
        return f"bits is {card['bits']}, and its hasher has {shortened(repr(card['hasher'].get('bits')))}"
    return ""


def in_place(path: Path, config: Config) -> bool:
    """The directory of a run is called as training calls it; a copy elsewhere may have any name."""
    return path.resolve().parent.name == config.name


def run_fault(card: Any, path: Path, config: Config, kept: bool = False) -> str:
    """The fault of the card of the run at ``path``, or of a ``kept`` copy, which is written aside."""
    if fault := model_fault(card, list(_RUN)):
        return fault
    if card["name"] != config.name:
        return f"it is of {card['name']!r}, and the config of {config.name!r}"
    if in_place(path, config) and not kept and card["id"] != path.resolve().name:
        return f"it is of the run {card['id']}, and the directory of {path.resolve().name}"
    size = config.data.get("size") if isinstance(config.data, dict) else None
    own = isinstance(config.data, dict) and ":" not in str(
        config.data.get("name")
    )  # the size of others may differ
    if own and is_count(size) and len(card["image_size"]) == 2 and card["image_size"] != [size, size]:
        return f"image_size is {card['image_size']}, and the config says {size} pixels a side"
    return ""


def other_weights(results: Mapping[str, EvalResult], card: Mapping[str, Any]) -> str:
    """The first result that is of other weights than those of the card, in words; "" of none."""
    for name, result in results.items():
        if (seen := result.setting.digests.get("model", card["digest"])) != card["digest"]:
            return f"the result {name!r} is of the weights {seen}, and the model card says {card['digest']}"
    return ""
