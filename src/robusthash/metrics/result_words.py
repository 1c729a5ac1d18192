"""Results in words: p-values, budgets, and queries without a relevant item."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from robusthash.core.words import some_names

if TYPE_CHECKING:
    from robusthash.metrics.results import EvalResult

_KNOWLEDGE = {
    "W2": "knows weights, labels and database codes",
    "W1": "knows weights and training labels",
    "W0": "knows the weights alone",
    "B2": "sees codes or distances",
    "B1": "sees the order of the top k",
    "T": "knows other models alone",
}
_SEARCH = re.compile(r"\b([A-Z]\w*)\(([^()]*)\)")
_OTHERS = re.compile(r", slope (\w+), starts (\d+), (W2|W1|W0|B2|B1|T)\b")


def p_text(p: float) -> str:
    """A p-value with four digits, ``< 0.0001`` below that."""
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}"


def budget_words(budget: str) -> str:
    """A budget as results carry it, in words.

    Example:
        >>> budget_words("PGD(steps=20, step_size=0.00784313725490196), slope one, starts 1, W1")
        'PGD, 20 steps, step size 2/255, fixed slope, knows weights and training labels'
    """
    words = _OTHERS.sub(_others, _SEARCH.sub(_search, budget))
    return re.sub(r"\b1 lines\b", "1 line", words)  # of a suite


def _search(match: re.Match[str]) -> str:
    name, options = match.groups()
    pairs = [pair.split("=", 1) for pair in options.split(", ") if "=" in pair]
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)  # GreedyFlips is 'greedy flips', PGD stays
    words = spaced if name.isupper() else spaced.lower()
    return ", ".join([words, *filter(None, (_option(key, value) for key, value in pairs))])


def _option(key: str, value: str) -> str:
    """One parameter of a search; "" where it changes nothing."""
    words = key.replace("_", " ")
    if key in ("steps", "candidates"):
        return f"{value} {words.removesuffix('s') if value == '1' else words}"
    if value == "True":
        return words
    if value in ("False", "None") or (key, value) in (("momentum", "0.0"), ("select_every", "10")):
        return ""
    return f"{words} {_levels(value) if key == 'step_size' else _number(value)}"


def _levels(text: str) -> str:
    """A step as a fraction of 255 where it is a whole number of quarter levels."""
    try:
        quarters = float(text) * 1020
    except ValueError:
        return text
    whole = round(quarters)
    return f"{whole / 4:g}/255" if whole and abs(whole - quarters) < 1e-6 else _number(text)


def _number(text: str) -> str:
    try:
        return f"{float(text):g}"
    except ValueError:
        return text.strip("'")


def _others(match: re.Match[str]) -> str:
    slope, starts, knowledge = match.groups()
    slopes = {"one": "fixed slope", "published": "slope by the published schedule"}
    many = f", {starts} starts" if starts != "1" else ""
    return f", {slopes.get(slope, slope)}{many}, {_KNOWLEDGE[knowledge]}"


def empty_note(result: EvalResult) -> str:
    """The number of queries without a relevant item in the database, and how they count; "" for none."""
    if not result.empty or any(name.startswith("t-") for name in result.values):  # of targets: in its notes
        return ""
    if result.setting.protocol.get("empty") == "skip":
        return f"{result.empty} queries have no relevant item in the database and are left out"
    queries = len(next(iter(result.per_query.values()), ()))
    remedy = "the protocol's option 'empty: skip' leaves them out"
    if result.empty == queries:
        remedy = "look whether both sides name their labels alike"
    return (
        f"{result.empty} of {queries} queries have no relevant item in the database and count 0 in every "
        f"measure; {remedy}"
    )


def empty_notes(results: Mapping[str, EvalResult]) -> list[str]:
    """The notes of ``empty_note``, each once, after the directions and relevances where there are several."""
    notes: dict[str, dict[str, None]] = {}
    for result in results.values():
        if text := empty_note(result):
            notes.setdefault(text, {})[result.scored_on] = None
    return [f"{', '.join(filter(None, where))}: {text}".removeprefix(": ") for text, where in notes.items()]


def result_notes(results: Mapping[str, EvalResult]) -> dict[str, str]:
    """Each note of the results once, and how it is printed: after the names of the results that have it,
    where not all do."""
    having: dict[str, list[str]] = {}
    for name, result in results.items():
        for text in dict.fromkeys(result.notes):
            having.setdefault(text, []).append(name)
    return {
        text: text if len(names) == len(results) else f"{some_names(names)}: {text}"
        for text, names in having.items()
    }
