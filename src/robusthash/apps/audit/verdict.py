"""First sentences of an audit, on the page and in the terminal: the strongest attack, and who was tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from robusthash.apps.audit.measured_rows import AuditRow
from robusthash.metrics.results import Flag

_HELD = 0.8  # of the attacked photographs still found: below, the search is fooled


@dataclass(frozen=True)
class Verdict:
    """The first sentences of an audit.

    Args:
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


def share_found(row: AuditRow, by_radius: bool) -> float:
    """Share of the photographs of a row that the search still finds, as it is used."""
    return row.recognised if by_radius and row.recognised is not None else row.first


def verdict(summary: Mapping[str, Any], rows: Sequence[AuditRow], flags: Sequence[Flag]) -> Verdict:
    """The verdict on measured rows. ``summary`` is that of ``run_audit``."""
    hide = next(row for row in rows if row.kind == "hide-worst")
    share, tier = share_found(hide, summary["matches by"] == "radius"), summary["tier"]
    gone = hide.asked - round(share * hide.asked)
    change = f"no pixel by more than {summary['eps'] * 255:g} of 255 brightness levels"
    count, asked = (
        f"{gone} of {hide.asked} photographs",
        f"{tier['questions']} questions about each photograph",
    )
    some = "everyday changes, random noise, "
    tried = f"{some}and somebody who may only ask the search, {asked}"
    if summary["gradients"]:
        tried = f"{some}somebody who has the model and follows its gradient, "
        tried += f"and somebody who may only ask it, {asked}"
        untried = "longer attacks, and changes of other kinds, such as turning a picture or covering a part"
        first = f"Somebody who has this search and changes {change} hides {count} from it."
        if share >= _HELD:
            first = f"Attackers who have this search and change {change} hid {count}; longer attacks may "
            first += "hide more."
        level: Literal["fooled", "unknown", "held"] = "held" if share >= _HELD else "fooled"
    else:
        untried = f"somebody who has the model, since {summary['black box']}; expect far more harm from one"
        first = (
            f"Black box only: {asked} hid {count}, changing {change}, and nobody who has the model was tried."
        )
        level = "unknown" if share >= _HELD else "fooled"
    return Verdict(level, _alarm(flags), first, f"Tried: {tried}.", f"Not tried: {untried}.")


def _alarm(flags: Sequence[Flag]) -> str:
    reds = [flag.id for flag in flags if flag.level == "red"]
    if not reds:
        return ""
    checks = f"check {reds[0]} is" if len(reds) == 1 else f"checks {', '.join(reds)} are"
    return f"Do not rely on these numbers: {checks} red, so attacks may have seen nothing of this search."
