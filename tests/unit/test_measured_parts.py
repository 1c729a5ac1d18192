"""Registered parts: "measured" where the kept results have them, and there alone; whole sentences."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from robusthash.core.limited_files import read_yaml
from robusthash.core.registry import catalogue

RESULTS = Path(__file__).resolve().parents[2] / "results"
SECTIONS = {
    "data": ("data",),
    "head": ("hasher", "head"),
    "image-encoder": ("hasher", "image"),
    "objective": ("training", "objective"),
    "outer": ("training", "outer"),
    "purifier": ("hasher", "purifiers"),
    "recipe": ("training", "recipe"),
    "text-encoder": ("hasher", "text"),
}
"""By kind: where a config names its parts."""
OTHERWISE = {
    ("data", "copies"),  # of the hash for copies, which has results of its own
    ("image-encoder", "block-means"),
    ("data", "photos"),  # the demo
    ("outer", "attacked-alone"),  # the recipe tpap takes it without being asked
}
"""Measured without a kept run that names them."""


def names(value: Any) -> Iterator[str]:
    """Of a section: its name, and those of the parts in it."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from names(each)


@cache
def used() -> set[tuple[str, str]]:
    """Kind and name of all that stands in a config of the kept results."""
    found = set()
    for path in RESULTS.glob("*/*/config.yaml"):
        config = read_yaml(path)
        for kind, keys in SECTIONS.items():
            part = config
            for key in keys:
                part = (part or {}).get(key)
            found |= {(kind, name) for name in names(part)}
    return found


@pytest.mark.parametrize("kind", SECTIONS)
def test_measured_parts_have_kept_results(kind: str) -> None:
    cards = [card for card in catalogue(kind) if (kind, card.name) not in OTHERWISE]
    assert cards
    wrong = {
        card.name: card.state for card in cards if (card.state == "measured") != ((kind, card.name) in used())
    }
    assert not wrong


def test_summaries_are_whole_sentences() -> None:
    assert not {card.name: card.summary for card in catalogue() if not card.summary.endswith(".")}
