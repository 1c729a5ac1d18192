"""First sentences of an audit, on the page and in the terminal: the strongest attack, and who was tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from robusthash.apps.audit.measured_rows import AuditRow
from robusthash.metrics.results import Flag

HELD = 0.8
"""Share of the attacked photographs still found, below which a search is fooled."""


@dataclass(frozen=True)
class Verdict:
    """The first sentences of an audit.

    Args:
        asked: how many photographs were looked up among how many.
        level: ``fooled``; ``unknown``, where nobody who has the model was tried; ``held``.
        alarm: why the numbers may not be believed; "" where no check is red.
        first: what the strongest attack did.
        tried: which attackers were.
        untried: which were not.
    """

    level: Literal["fooled", "unknown", "held"]
    alarm: str
    first: str
    tried: str
    untried: str
    asked: str


def share_found(row: AuditRow, by_radius: bool) -> float:
    """Share of the photographs of a row that the search still finds, as it is used."""
    return row.recognised if by_radius and row.recognised is not None else row.first


def counted(share: float, asked: int) -> str:
    """A share of ``asked`` photographs as a number of them; ties make parts of one."""
    return f"{round(share * asked, 1):g}"


def within(summary: Mapping[str, Any]) -> str:
    """The radius in words, where pictures within one count as the same; "" where there are no codes."""
    if summary["radius"] is None:
        return ""
    if summary["distance"] == "hamming":
        return f"{summary['radius']:g} bits"
    return f"a {summary['distance']} distance of {summary['radius']:.3g}"


def idle_attacks(rows: Sequence[AuditRow]) -> list[str]:
    """A sentence for each attack that did less than random noise of the same budget."""
    noise = next((row for row in rows if row.kind == "noise"), None)
    attacks = [row for row in rows if row.kind == "hide"]
    if noise is None:
        return []
    if noise.bits is None:
        idle = [(row, f"MAP {row.map:.3f}", f"{noise.map:.3f}") for row in attacks if row.map > noise.map]
    else:
        idle = [
            (row, f"moved by {row.bits:.3g}", f"{noise.bits:.3g}")
            for row in attacks
            if row.bits is not None and row.bits < noise.bits
        ]
    nothing = "so its row says nothing good of this search"
    return [f"{row.name} got nowhere ({did}; random noise: {blind}), {nothing}." for row, did, blind in idle]


def verdict(summary: Mapping[str, Any], rows: Sequence[AuditRow], flags: Sequence[Flag]) -> Verdict:
    """The verdict on measured rows. ``summary`` is that of ``run_audit``."""
    hide = next(row for row in rows if row.kind == "hide-worst")
    share, tier = share_found(hide, summary["matches by"] == "radius"), summary["tier"]
    change = f"no pixel by more than {summary['eps'] * 255:g} of 255 brightness levels"
    by_radius = summary["matches by"] == "radius" and within(summary)
    missed = f"their copies are then further than {within(summary)}" if by_radius else "not found first"
    count, asked = (
        f"{counted(1 - share, hide.asked)} of {hide.asked} photographs ({missed})",
        f"{tier['questions']} questions about each photograph",
    )
    some = "everyday changes, random noise, "
    tried = f"{some}and somebody who may only ask the search, {asked}"
    if summary["gradients"]:
        tried = f"{some}somebody who has the model and follows its gradient, "
        tried += f"and somebody who may only ask it, {asked}"
        untried = "longer attacks, and changes of other kinds, such as turning a picture or covering a part"
        first = f"Somebody who has this search and changes {change} hides from it {count}."
        if share >= HELD:
            first = f"Attackers who have this search and change {change} hid {count}; longer attacks may "
            first += "hide more."
        level: Literal["fooled", "unknown", "held"] = "held" if share >= HELD else "fooled"
    else:
        untried = f"somebody who has the model, since {summary['black box']}; expect far more harm from one"
        first = (
            f"Black box only: {asked} hid {count}, changing {change}, and nobody who has the model was tried."
        )
        level = "unknown" if share >= HELD else "fooled"
    sentences = first, f"Tried: {tried}.", f"Not tried: {untried}.", _asked(summary, rows)
    return Verdict(level, _alarm(flags), *sentences)


def _asked(summary: Mapping[str, Any], rows: Sequence[AuditRow]) -> str:
    asked, stored = rows[0].asked, summary["photographs"]["used"]
    if asked == stored:
        return f"{asked} photographs were looked up in a search that stores a copy of each"
    return f"{asked} photographs were looked up in a search that stores copies of {stored}, these among them"


def _alarm(flags: Sequence[Flag]) -> str:
    reds = [flag.id for flag in flags if flag.level == "red"]
    if not reds:
        return ""
    checks = f"check {reds[0]} is" if len(reds) == 1 else f"checks {', '.join(reds)} are"
    return f"Do not rely on these numbers: {checks} red, so attacks may have seen nothing of this search."
