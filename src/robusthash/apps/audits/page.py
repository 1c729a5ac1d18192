"""The page of an audit, in plain words: what the search loses under which change, in pictures, and what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scipy.stats import binomtest

from robusthash.apps.audits.advice import advice, verdict
from robusthash.apps.audits.photos import STORED_QUALITY
from robusthash.apps.audits.rows import Example, Row, Shot, kept, kept_words
from robusthash.apps.pages import html
from robusthash.apps.pages.charts import UNIT, Axis, Dot, Tone, dot_chart
from robusthash.apps.pages.html import Child, Markup, tag
from robusthash.evaluation.results import Flag

_TONES: dict[str, Tone] = {"same": "e", "everyday": "b", "noise": "f", "hide": "a", "hide-worst": "a"}
_GROUPS = {"b": "everyday", "f": "random noise", "a": "on purpose", "e": "unchanged"}
_SMOOTH = 128  # pixels a side from which pictures may be smoothed when drawn larger


def audit_page(
    summary: Mapping[str, Any], rows: Sequence[Row], examples: Sequence[Example], flags: Sequence[Flag] = ()
) -> str:
    """The whole page. ``summary`` is that of ``run_audit``."""
    return html.page(
        f"How easily is {summary['title']} fooled?",
        [tag("p", sentence) for sentence in verdict(summary, rows)],
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
        html.section("What to do", tag("ul", [tag("li", line) for line in advice(summary, rows)]), slug="advice"),
        html.section("Warning lights", _lights(summary, flags), slug="checks"),
        html.section("The words", _words(summary), slug="words"),
        html.section("How this was measured", _facts(summary), slug="setting"),
        foot=", ".join(f"{name} {version}" for name, version in summary["software"].items()),
    )


def _of(share: float, asked: int) -> str:
    return f"{share * asked:.0f} of {asked}"


def _tiles(summary: Mapping[str, Any], rows: Sequence[Row]) -> Markup:
    word = kept_words(summary)
    same = next(row for row in rows if row.kind == "same")
    everyday = min((row for row in rows if row.kind == "everyday"), key=lambda row: (kept(row, summary), row.map))
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
        tag("figure", html.picture(image, name), tag("figcaption", tag("b", name), text)) for image, name, text in shots
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
    """One dot for each change that should not matter: the share of photographs kept, with its 95 % interval."""
    drawn, described = [], []
    for row in rows:
        if row.kind not in _TONES:
            continue
        share = kept(row, summary)
        span = binomtest(round(share * row.asked), row.asked).proportion_ci(method="wilson")
        tone = _TONES[row.kind]
        drawn.append((row.name, [Dot(tone, share, min(span.low, share), max(span.high, share), row.kind == "hide")]))
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
    caption = "Each row is one thing done to the photographs before the search was asked for their stored copies."
    worst = [number for number, row in enumerate(shown) if row.kind == "hide-worst"]
    return html.table(["done to the photograph", *head], [[_label(row), *cells(row)] for row in shown], caption, worst)


def _imitation(summary: Mapping[str, Any], rows: Sequence[Row]) -> Markup | None:
    shown = [row for row in rows if row.kind in ("imitate", "imitate-worst")]
    if not shown:
        return None
    head, cells = _columns(summary)
    caption = (
        "Made to look like another photograph: here the numbers say how often the attack succeeded, that is, how often "
        "the copy of the other photograph came first or counted as the same. Lower is better; the row before the "
        "attack says how often that happens by itself."
    )
    worst = [number for number, row in enumerate(shown) if row.kind == "imitate-worst"]
    return html.table(["attack", *head], [[_label(row), *cells(row)] for row in shown], caption, worst)


def _label(row: Row) -> Child:
    return row.name if row.words == "nothing" else [row.name, tag("span", row.words, class_="span")]


def _columns(summary: Mapping[str, Any]) -> tuple[list[Child], Any]:
    head: list[Child] = ["can you see it?", "came first"]
    if summary["bits"] is not None:
        head += [f"counts as the same (≤ {summary['radius']} bits)", f"bits apart, of {summary['bits']}"]
    head += ["MAP"]

    def cells(row: Row) -> list[Child]:
        made: list[Child] = [row.visible, _of(row.first, row.asked)]
        if row.recognised is not None and row.bits is not None:
            made += [_of(row.recognised, row.asked), f"{row.bits:.1f}"]
        return [*made, f"{row.map:.3f}"]

    return head, cells


def _lights(summary: Mapping[str, Any], flags: Sequence[Flag]) -> Child:
    parts: list[Child] = []
    if summary["doubts"]:
        parts.append(tag("ul", [tag("li", tag("b", "✗ ", class_="bad"), doubt) for doubt in summary["doubts"]]))
    if flags:
        mark = {"red": "✗ red", "amber": "▲ amber", "pass": "✓ pass"}
        order = ["red", "amber", "pass"]
        rows: list[list[Child]] = [
            [flag.id, mark[flag.level], f"{flag.value:g}", f"{flag.threshold:g}", flag.remedy]
            for flag in sorted(flags, key=lambda flag: order.index(flag.level))
        ]
        red = [number for number, row in enumerate(rows) if "red" in str(row[1])]
        if red:
            parts.append(tag("p", tag("b", f"{len(red)} red: do not rely on the numbers of this page until mended.")))
        parts.append(html.table(["check", "light", "value", "limit", "what to do"], rows, "", red))
    if not parts:
        parts.append(tag("p", "None: the model answers the same when asked twice, alone and in company."))
    return parts


# ---------------------------------------------------------------------------------------------- circumstances


def _words(summary: Mapping[str, Any]) -> Markup:
    pairs: list[tuple[Child, Child]] = []
    if summary["bits"] is not None:
        pairs += [
            ("code", f"The {summary['bits']} bits by which this search knows a picture."),
            ("bits apart", "In how many of them two pictures differ: 0 is the same to the search, half is unrelated."),
            (
                "counts as the same",
                f"At most {summary['radius']} bits apart. Of the pairs of different photographs here, "
                f"{summary['false matches']:.1%} are as near as that by accident.",
            ),
        ]
    pairs += [
        ("came first", "The stored copy of the photograph was the nearest of all stored pictures."),
        ("MAP", "1 where the copy always comes first, 0.5 where it always comes second, near 0 where it is lost."),
        ("on purpose", "Changed by someone who knows this search, or may ask it many questions, and wants it to fail."),
    ]
    return html.facts(pairs)


def _facts(summary: Mapping[str, Any]) -> Markup:
    photos = summary["photographs"]
    pairs: list[tuple[Child, Child]] = [
        ("what was audited", [tag("code", summary["target"]), *[f" {sentence}" for sentence in summary["said"]]]),
        (
            "photographs",
            f"{photos['used']} from {photos['folder']}, as central squares of {summary['size']} pixels. The search "
            f"holds a JPEG copy (quality {STORED_QUALITY}) of each; a photograph that asks should find its own copy, "
            "and nothing else counts as right. Similar photographs, such as a burst, count as different.",
        ),
    ]
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
