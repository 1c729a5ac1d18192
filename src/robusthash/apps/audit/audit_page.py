"""The page of an audit, in plain words: what the search loses under which change, in pictures, and what to
do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from robusthash.apps.audit.advice import advice, verdict
from robusthash.apps.audit.measured_rows import Example, Row, Shot, kept, kept_words
from robusthash.apps.audit.page_notes import facts, lights, words
from robusthash.apps.reports import html
from robusthash.apps.reports.charts import UNIT, Axis, Dot, Tone, dot_chart
from robusthash.apps.reports.html import Child, Markup, tag
from robusthash.metrics.results import Flag

_TONES: dict[str, Tone] = {"same": "e", "everyday": "b", "noise": "f", "hide": "a", "hide-worst": "a"}
_GROUPS = {"b": "everyday", "f": "random noise", "a": "on purpose", "e": "unchanged"}
_SMOOTH = 128  # pixels a side from which pictures may be smoothed when drawn larger


def audit_page(
    summary: Mapping[str, Any], rows: Sequence[Row], examples: Sequence[Example], flags: Sequence[Flag] = ()
) -> str:
    """The whole page. ``summary`` is that of ``run_audit``."""
    kinds = [] if summary["kinds"] is None else [summary["kinds"]["said"]]
    return html.page(
        f"How easily is {summary['title']} fooled?",
        [tag("p", sentence) for sentence in [*verdict(summary, rows), *kinds]],
        _tiles(summary, rows),
        html.section("In pictures", [_example(example, summary) for example in examples], slug="pictures")
        if examples
        else Markup(""),
        html.section(
            "What it loses, change by change",
            tag("div", _chart(summary, rows), class_="narrow"),
            _table(summary, rows),
            _imitation(summary, rows),
            slug="changes",
        ),
        html.section(
            "What to do", tag("ul", [tag("li", line) for line in advice(summary, rows)]), slug="advice"
        ),
        html.section("Warning lights", lights(summary, flags), slug="checks"),
        html.section("The words", words(summary), slug="words"),
        html.section("How this was measured", facts(summary), slug="setting"),
        foot=", ".join(f"{name} {version}" for name, version in summary["software"].items()),
    )


def _of(share: float, asked: int) -> str:
    return f"{share * asked:.0f} of {asked}"


def _tiles(summary: Mapping[str, Any], rows: Sequence[Row]) -> Markup:
    word = kept_words(summary)
    same = next(row for row in rows if row.kind == "same")
    everyday = min(
        (row for row in rows if row.kind == "everyday"), key=lambda row: (kept(row, summary), row.map)
    )
    made: list[tuple[str, str, Child]] = [
        ("nothing changed", _of(kept(same, summary), same.asked), word),
        ("worst everyday change", _of(kept(everyday, summary), everyday.asked), f"{word}: {everyday.words}"),
    ]
    for row in rows:
        if row.kind == "hide-worst":
            made.append(("hidden on purpose", _of(kept(row, summary), row.asked), f"still {word}"))
        if row.kind == "imitate-worst":
            made.append(("taken for another on purpose", _of(kept(row, summary), row.asked), "succeeded"))
    return html.tiles(made)


# ---------------------------------------------------------------------------------------------- pictures


def _example(example: Example, summary: Mapping[str, Any]) -> Markup:
    shots = [
        (example.original, "the photograph", ""),
        (example.changed, "changed", "as the search saw it"),
        (
            (0.5 + example.gain * (example.changed - example.original)).clamp(0, 1),
            f"the difference, {example.gain:.0f} times" if example.gain >= 1.5 else "the difference",
            "grey is no change",
        ),
    ]
    smooth = " smooth" if example.original.shape[-1] >= _SMOOTH else ""
    figures = [
        tag("figure", html.picture(image, name), tag("figcaption", tag("b", name), text))
        for image, name, text in shots
    ]
    return tag(
        "div",
        tag("h3", example.title),
        tag("p", example.text),
        tag("div", figures, class_=f"shots three{smooth}"),
        tag(
            "div",
            _search("before", "What the search returned for the photograph:", example.before, summary),
            _search("after", "What it returned for the changed one:", example.after, summary),
            class_="searches",
        ),
        class_="example",
    )


def _search(state: str, text: str, shots: Sequence[Shot], summary: Mapping[str, Any]) -> Markup:
    return tag(
        "div",
        tag("div", tag("b", state), tag("span", text), class_="what said"),
        tag("ol", [_shot(shot, summary) for shot in shots], class_="hits five"),
        class_="search",
    )


def _shot(shot: Shot, summary: Mapping[str, Any]) -> Markup:
    roles = {
        "own": ("✓ ", "yes", "its own copy"),
        "target": ("◎ ", "no", "the target"),
        "other": ("✗ ", "no", "another"),
    }
    mark, style, word = roles[shot.role]
    far = "" if shot.distance is None else f", {shot.distance} bits apart"
    match = " — a match" if shot.distance is not None and shot.distance <= summary["radius"] else ""
    return tag(
        "li",
        html.picture(shot.picture, f"{shot.name}: {word}{far}"),
        tag("span", mark, class_="mark", aria_hidden="true"),
        f"{word}{far}{match}",
        class_=style,
    )


# ---------------------------------------------------------------------------------------------- numbers


def _chart(summary: Mapping[str, Any], rows: Sequence[Row]) -> Markup:
    """One dot for each change that should not matter: the share of photographs kept, with its 95 %
    interval."""
    from scipy.stats import binomtest  # a second to import, and only this chart needs it

    drawn, described = [], []
    for row in rows:
        if row.kind not in _TONES:
            continue
        share = kept(row, summary)
        span = binomtest(round(share * row.asked), row.asked).proportion_ci(method="wilson")
        tone = _TONES[row.kind]
        drawn.append(
            (row.name, [Dot(tone, share, min(span.low, share), max(span.high, share), row.kind == "hide")])
        )
        described.append(f"{row.name} {share:.2f}")
    used = {dots[0].tone for _, dots in drawn}
    keys = [(text, tone, False) for tone, text in _GROUPS.items() if tone in used]
    title = f"Share of the photographs {kept_words(summary)}"
    caption = (
        "Further right is better; the lines are 95 % intervals for the number of photographs that were tried. Hollow: "
        "one attack alone."
    )
    return dot_chart(title, "; ".join(described), drawn, keys, Axis("share", UNIT), caption=caption)


def _table(summary: Mapping[str, Any], rows: Sequence[Row]) -> Markup:
    head, cells = _columns(summary)
    shown = [row for row in rows if row.kind in _TONES]
    caption = (
        "Each row is one thing done to the photographs before the search was asked for their stored copies."
    )
    worst = [number for number, row in enumerate(shown) if row.kind == "hide-worst"]
    return html.table(
        ["done to the photograph", *head], [[_label(row), *cells(row)] for row in shown], caption, worst
    )


def _imitation(summary: Mapping[str, Any], rows: Sequence[Row]) -> Markup | None:
    shown = [row for row in rows if row.kind in ("imitate", "imitate-worst")]
    if not shown:
        return None
    head, cells = _columns(summary)
    caption = (
        "Made to look like another photograph: here the numbers say how often the attack succeeded, that is, how often "
        "the copy of the other photograph came first or counted as the same. Lower is better; the row before the "
        "attack says how often that happens by itself."
        + (
            " The last column alone speaks of the photograph's own kind."
            if summary["kinds"] is not None
            else ""
        )
    )
    worst = [number for number, row in enumerate(shown) if row.kind == "imitate-worst"]
    return html.table(["attack", *head], [[_label(row), *cells(row)] for row in shown], caption, worst)


def _label(row: Row) -> Child:
    return row.name if row.words == "nothing" else _two(row.name, row.words)


def _two(above: str, below: str) -> Child:
    return [above, tag("span", below, class_="span")]


def _columns(summary: Mapping[str, Any]) -> tuple[list[Child], Any]:
    head: list[Child] = ["can you see it?", "came first"]
    if summary["bits"] is not None:
        head += [
            _two("counts as the same", f"≤ {summary['radius']} bits"),
            _two("bits apart", f"of {summary['bits']}"),
        ]
    head += ["MAP"]
    if summary["kinds"] is not None:
        head += [_two("same kind found", "MAP")]

    def cells(row: Row) -> list[Child]:
        made: list[Child] = [row.visible, _of(row.first, row.asked)]
        if row.recognised is not None and row.bits is not None:
            made += [_of(row.recognised, row.asked), f"{row.bits:.1f}"]
        made.append(f"{row.map:.3f}")
        if summary["kinds"] is not None:
            made.append(_of_kind(row))
        return made

    return head, cells


def _of_kind(row: Row) -> Child:
    if row.same_kind is None:
        return "none to find"
    return _two(f"{row.same_kind:.3f}", f"luck {row.same_kind_chance:.3f}")
