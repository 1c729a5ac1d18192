"""What pages say in the same words: numbers, intervals, notes, settings, and what the checks make of a
result."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from robusthash.apps.reports import html
from robusthash.apps.reports.html import Child, Markup, tag
from robusthash.metrics.measure_key import MeasureKey, Storage
from robusthash.metrics.results import EvalResult, Flag

WORST_CASE = (
    "A worst case is the mean over queries of the lowest AP that any listed attack found: an upper bound on true "
    "robustness, under this attack set and this budget."
)


ROUNDING: dict[Storage, str] = {
    "8bit": "The 8-bit column rounds the perturbation to whole grey levels. ",
    "rounded": "The column of whole words rounds attacked bags to 0 and 1: no text has a part of a word. ",
    "": "",
}


def stored_as(results: Iterable[EvalResult]) -> tuple[Storage, str]:
    """The form in which queries are kept outside of a model, as measures name it, and in words.

    Pictures are kept in eight bits, bags of words in whole words, token ids and vectors of features as they
    are.
    """
    found = list(results)
    if not found[0].setting.direction.startswith("T"):
        return "8bit", "8-bit images"
    words = any(MeasureKey.parse(name).storage == "rounded" for result in found for name in result.values)
    return ("rounded", "whole words") if words else ("", "")


def remark(flags: Sequence[Flag], checked: bool) -> str:
    """What the checks say of a number: what must be seen before it. ``checked``: any check was run."""
    if reds := [flag.id for flag in flags if flag.level == "red"]:
        return f"UNRELIABLE ({', '.join(reds)})"
    if not checked:
        return "not checked"
    return ", ".join(f"{flag.id} amber" for flag in flags if flag.level == "amber") or "no flag"


def doubt(names: Sequence[str]) -> str:
    """Whose numbers are not to be believed."""
    return f"A red flag stands against: {', '.join(names)}. Their numbers prove nothing."


def number(value: float, digits: int = 3) -> str:
    """A number in plain digits; infinite ones as the sign for it."""
    return f"{value:.{digits}f}" if math.isfinite(value) else ("∞" if value > 0 else "−∞")


def span(result: EvalResult, name: str) -> str:
    """The 95 % interval of a value, or nothing where it has none."""
    return "{:.3f} to {:.3f}".format(*result.interval[name]) if name in result.interval else ""


def with_span(result: EvalResult, name: str) -> Child:
    """A value with its interval below it; a dash where the result does not have it."""
    if name not in result.values:
        return "–"
    return [number(result.values[name]), tag("span", span(result, name), class_="span")]


def notes(results: Iterable[EvalResult]) -> Markup | None:
    """What was clipped or left out, each remark once."""
    said = dict.fromkeys(note for result in results for note in result.notes)
    return tag("p", "Notes: " + "; ".join(said) + ".", class_="note") if said else None


def setting_facts(result: EvalResult, results: Mapping[str, EvalResult]) -> Markup:
    """Everything that the numbers are a statement about."""
    setting = result.setting
    protocol = {
        key: value for key, value in setting.protocol.items() if key not in ("measures", "directions")
    }
    directions = dict.fromkeys(found.setting.direction for found in results.values())
    pairs: list[tuple[Child, Child]] = [
        ("queries", setting.asked),
        ("database", setting.database),
        ("direction, bits", f"{', '.join(directions)}, {setting.bits} bits"),
        ("protocol", ", ".join(f"{key} {short(value)}" for key, value in protocol.items())),
        ("objective, defense", f"{setting.objective}, {setting.defense}"),
        ("training attack", setting.training_attack or "none"),
        ("threats", ", ".join(sorted({r.setting.threat for r in results.values()} - {"none"})) or "none"),
        ("seeds", f"evaluation {', '.join(map(str, setting.seeds))}"),
    ]
    for name, found in results.items():
        if found.attack not in ("clean", "worst") or found.setting.tier:
            pairs.append((name, found.setting.budget))
    pairs += [(f"digest of {name}", tag("code", value)) for name, value in setting.digests.items()]
    return html.facts(pairs)


def short(value: Any) -> str:
    """A setting on one line."""
    return json.dumps(value, sort_keys=True) if isinstance(value, dict | list) else str(value)
