"""Cards of trained runs: checks of what they say, beyond those of every saved model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from robusthash.apps.experiment.config import Config, is_folder_name
from robusthash.metrics.results import EvalResult
from robusthash.models.saved_hasher import MODEL, is_count, model_fault
from robusthash.models.saved_hasher import SEAL as SEAL
from robusthash.models.saved_hasher import sealed as sealed


def _is_duration(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


_RUN = {
    "name": is_folder_name,
    "id": is_folder_name,
    **MODEL,
    "declared": lambda value: isinstance(value, str),
    "hasher": lambda value: isinstance(value, dict),
    "epochs": lambda value: is_count(value, 0),
    "last": lambda value: isinstance(value, dict),
    "seconds": _is_duration,
}


def in_place(path: Path, config: Config) -> bool:
    """The directory of a run is called as training calls it; a copy elsewhere may have any name."""
    return path.resolve().parent.name == config.name


def run_fault(card: Any, path: Path, config: Config, results_only: bool = False) -> str:
    """The fault of the card of the run at ``path``, or of a copy of results, written aside."""
    if fault := model_fault(card, _RUN):
        return fault
    if card["name"] != config.name:
        return f"it is of {card['name']!r}, and the config of {config.name!r}"
    if in_place(path, config) and not results_only and card["id"] != path.resolve().name:
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
        if (weights := result.setting.digests.get("model", card["digest"])) != card["digest"]:
            return f"the result {name!r} is of the weights {weights}, and the card says {card['digest']}"
    return ""
