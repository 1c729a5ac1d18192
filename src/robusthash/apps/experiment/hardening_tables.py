"""Markdown tables of the measurements of ``hardening_run``."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from robusthash.apps.reports.cell_text import markdown_table


def hardening_tables(content: dict[str, Any], parts: Collection[str]) -> str:
    """The tables of these parts, where a file has them.

    Raises:
        ValueError: content of another shape, or an unknown part.
    """
    if unknown := set(parts) - set(_TABLES):
        raise ValueError(f"parts are {', '.join(_TABLES)}, not {', '.join(sorted(unknown))}")
    try:
        subject = f"{content['run']}, {content['threat']}"
        return "\n\n".join(
            text
            for part, tables_of in _TABLES.items()
            if part in content and part in parts
            for text in (f"{subject}, {content['queries'][part]} queries", *tables_of(content[part]))
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"this is no file of 'robusthash hardening': {error!r}") from None


def _whole(number: float | None) -> str:
    return "never" if number is None else f"{number:.0f}"


def _answers(part: dict[str, Any]) -> list[str]:
    rows, budgets = [], []
    for search, table in part.items():
        budgets = [f"after {budget:,}" for budget in table["budgets"]]
        for shows, curve in table["shows"].items():
            rows.append([search, shows, table["clean"], *curve["wMAP"]])
    return [markdown_table(["search", "what answers show", "wMAP clean", *budgets], rows)]


def _learned(part: list[dict[str, Any]]) -> list[str]:
    rows = [[one["attack"], one["shows"], f"{one['in all']:,}", one["wMAP"]] for one in part]
    return [markdown_table(["attack", "what answers show", "oracle queries in all", "wMAP attacked"], rows)]


def _detection(part: dict[str, Any]) -> list[str]:
    marks = list(part["attackers"][0]["wMAP"])
    head = ["search", "attacker", "attackers refused", "slowed at", "refused at", "answered of all"]
    for mark in marks:
        head += [f"wMAP after {int(mark):,}", "without detection"]
    rows = []
    for one in part["attackers"]:
        row = [
            one["search"],
            one["evasion"],
            one["refused"],
            _whole(one["slowed at"]),
            _whole(one["refused at"]),
        ]
        row.append(f"{one['answered']:.0f} of {one['budget']:,}")
        for mark in marks:
            row += [one["wMAP"][mark], one["wMAP without detection"][mark]]
        rows.append(row)
    traffic = [
        [
            one["kind"],
            one["words"],
            one["queries"],
            f"{one['slowed'] / one['queries']:.2%}",
            f"{one['refused'] / one['queries']:.2%}",
        ]
        for one in part["traffic"]
    ]
    return [
        markdown_table(head, rows),
        markdown_table(["ordinary traffic", "", "queries", "slowed", "refused"], traffic),
    ]


def _agreement(part: dict[str, Any]) -> list[str]:
    head = ["queries", "wMAP"]
    for bits in part["within"]:
        head += [f"refused, {bits} bits", "wMAP of the rest"]
    rows = []
    for one in part["rows"]:
        row = [one["queries"], one["wMAP"]]
        for refused, rest in zip(one["refused"], one["wMAP of the rest"], strict=True):
            row += [refused, rest]
        rows.append(row)
    return [markdown_table(head, rows)]


_TABLES: dict[str, Callable[[Any], list[str]]] = {
    "answers": _answers,
    "learned": _learned,
    "detection": _detection,
    "agreement": _agreement,
}
