"""The foot of an audit's page: its warning lights, the words it uses, and how it was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from robusthash.apps.audit.photo_collection import STORED_QUALITY
from robusthash.apps.audit.warnings import looks_for
from robusthash.apps.reports import html
from robusthash.apps.reports.html import Child, Markup, tag
from robusthash.metrics.results import Flag


def lights(summary: Mapping[str, Any], flags: Sequence[Flag]) -> Child:
    """What looks wrong with the model itself, the worst first."""
    parts: list[Child] = []
    if summary["doubts"]:
        parts.append(
            tag("ul", [tag("li", tag("b", "✗ ", class_="bad"), doubt) for doubt in summary["doubts"]])
        )
    if flags:
        mark = {"red": "✗ red", "amber": "▲ amber", "pass": "✓ pass"}
        order = ["red", "amber", "pass"]
        shown = sorted(flags, key=lambda flag: order.index(flag.level))
        rows = [
            [_looked_at(flag), mark[flag.level], f"{flag.value:g}", f"{flag.threshold:g}"] for flag in shown
        ]
        red = [number for number, flag in enumerate(shown) if flag.level == "red"]
        if red:
            parts.append(
                tag("p", tag("b", f"{len(red)} red: do not rely on the numbers of this page until mended."))
            )
        parts.append(html.table(["check", "light", "value", "limit"], rows, "", red))
    if not parts:
        parts.append(tag("p", "None: the model answers the same when asked twice, alone and in company."))
    return parts


def _looked_at(flag: Flag) -> Child:
    remedy = (
        None if flag.level == "pass" else tag("span", tag("b", f"What to do: {flag.remedy}."), class_="span")
    )
    return [flag.id, tag("span", looks_for(flag.id), class_="span"), remedy]


def words(summary: Mapping[str, Any]) -> Markup:
    """What the words of the page mean."""
    pairs: list[tuple[Child, Child]] = []
    if summary["bits"] is not None:
        pairs += [
            ("code", f"The {summary['bits']} bits by which this search knows a picture."),
            (
                "bits apart",
                "In how many of them two pictures differ: 0 is the same to the search, half is unrelated.",
            ),
            (
                "counts as the same",
                f"At most {summary['radius']} bits apart. Of the pairs of different photographs here, "
                f"{summary['false matches']:.1%} are as near as that by accident.",
            ),
        ]
    pairs += [
        ("came first", "The stored copy of the photograph was the nearest of all stored pictures."),
        (
            "MAP",
            "1 where the copy always comes first, 0.5 where it always comes second, near 0 where it is lost.",
        ),
    ]
    if summary["kinds"] is not None:
        text = (
            "1 where all other photographs of the same kind, that is of the same subfolder, come before all others. "
            "The own copy is left out, as the other columns speak of it. Luck is what a random order scores."
        )
        pairs.append(("same kind found", text))
    pairs += [
        (
            "on purpose",
            "Changed by someone who knows this search, or may ask it many questions, and wants it to fail.",
        ),
    ]
    return html.facts(pairs)


def facts(summary: Mapping[str, Any]) -> Markup:
    """What was audited, on which photographs, and how hard it was tried."""
    photos = summary["photographs"]
    pairs: list[tuple[Child, Child]] = [
        (
            "what was audited",
            [tag("code", summary["target"]), *[f" {sentence}" for sentence in summary["said"]]],
        ),
        (
            "photographs",
            f"{photos['used']} from {photos['folder']}, as central squares of {summary['size']} pixels. The search "
            f"holds a JPEG copy (quality {STORED_QUALITY}) of each; a photograph that asks should find its own copy, "
            "and nothing else counts as right. Similar photographs, such as a burst, count as different.",
        ),
    ]
    if summary["kinds"] is not None:
        pairs.append(("kinds", _kinds(summary["kinds"])))
    for name in ("unreadable", "the same as another", "unchanged by saving again"):
        if photos[name]:
            few = ", ".join(photos[name][:5]) + (", …" if len(photos[name]) > 5 else "")
            pairs.append((f"left out: {name}", f"{len(photos[name])}: {few}"))
    if photos["beyond the limit"]:
        pairs.append(("left out: beyond the limit", str(photos["beyond the limit"])))
    tier = summary["tier"]
    pairs += [
        (
            "changed on purpose",
            f"No pixel by more than {summary['eps'] * 255:g} of 255 brightness levels, kept as a file keeps it; at "
            f"most {tier['attacked']} photographs, {tier['steps']} steps for attacks that follow the weights (tier "
            f"{tier['name']}). A longer attack finds more: these numbers are the best that the search can claim.",
        ),
        ("seed and time", f"{summary['seed']}; {summary['seconds']:.0f} seconds"),
    ]
    if summary["questions"] is not None:
        pairs.append(("questions asked", str(summary["questions"])))
    return html.facts(pairs)


def _kinds(kinds: Mapping[str, Any]) -> str:
    counted = ", ".join(f"{kind} {count}" for kind, count in kinds["photographs"].items())
    others = (
        f"; {kinds['in no subfolder']} in no subfolder, so of no kind" if kinds["in no subfolder"] else ""
    )
    return (
        f"The subfolders: {counted}{others}. Every attack was aimed at the photograph itself, none at its kind: the "
        "column on kinds says what that does to kinds in passing."
    )
