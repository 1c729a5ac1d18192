"""Markdown tables of the measurements of ``hardening_run``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from robusthash.apps.reports.cell_text import markdown_cell


def hardening_tables(content: dict[str, Any], parts: Collection[str]) -> str:
    """The tables of these parts, where a file has them.

    Raises:
        ValueError: content of another shape.
    """
    try:
        tables = [
            table
            for part, tables_of in _TABLES.items()
            if part in content and part in parts
            for table in tables_of(content[part])
        ]
        head = f"{content['run']}, {content['threat']}, {content['queries']} queries"
    except (KeyError, TypeError) as error:
        raise ValueError(f"this is no file of 'robusthash hardening': {error!r}") from None
    return "\n\n".join([head, *tables])


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [[markdown_cell(_text(cell)) for cell in row] for row in (head, *rows)]
    drawn = [f"| {' | '.join(cells)} |" for cells in lines]
    return "\n".join([drawn[0], "|" + " --- |" * len(head), *drawn[1:]])


def _text(cell: Any) -> str:
    if isinstance(cell, float):
        return f"{cell:.3f}"
    return "-" if cell is None else str(cell)


def _whole(number: float | None) -> str:
    return "never" if number is None else f"{number:.0f}"


def _answers(found: dict[str, Any]) -> list[str]:
    rows, budgets = [], []
    for search, table in found.items():
        budgets = [f"after {budget:,}" for budget in table["budgets"]]
        for shows, curve in table["shows"].items():
            rows.append([search, shows, table["clean"], *curve["wMAP"]])
    return [_table(["search", "what answers show", "wMAP clean", *budgets], rows)]


def _learned(found: list[dict[str, Any]]) -> list[str]:
    rows = [[one["attack"], one["shows"], f"{one['in all']:,}", one["wMAP"]] for one in found]
    return [_table(["attack", "what answers show", "oracle queries in all", "wMAP attacked"], rows)]


def _detection(found: dict[str, Any]) -> list[str]:
    marks = list(found["attackers"][0]["wMAP"])
    head = ["search", "attacker", "attackers refused", "slowed at", "refused at", "answered of all"]
    for mark in marks:
        head += [f"wMAP after {int(mark):,}", "without detection"]
    rows = []
    for one in found["attackers"]:
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
        for one in found["traffic"]
    ]
    return [_table(head, rows), _table(["ordinary traffic", "", "queries", "slowed", "refused"], traffic)]


def _agreement(found: dict[str, Any]) -> list[str]:
    head = ["queries", "wMAP"]
    for bits in found["within"]:
        head += [f"refused, {bits} bits", "wMAP of the rest"]
    rows = []
    for one in found["rows"]:
        row = [one["queries"], one["wMAP"]]
        for refused, rest in zip(one["refused"], one["wMAP of the rest"], strict=True):
            row += [refused, rest]
        rows.append(row)
    return [_table(head, rows)]


_TABLES: dict[str, Callable[[Any], list[str]]] = {
    "answers": _answers,
    "learned": _learned,
    "detection": _detection,
    "agreement": _agreement,
}
