"""The page of an audit, in plain words: effect of each change, in numbers and pictures, and what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from robusthash.apps.audit.measured_rows import Example, Row
from robusthash.apps.audit.photo_collection import STORED_QUALITY
from robusthash.apps.reports.charts import UNIT, Axis, Chart, Dot, IntervalChart, Tone
from robusthash.apps.reports.pages import Cell, CellLike, Table, Tiles, render
from robusthash.metrics.results import Flag
from robusthash.robustness.checks.base import CHECKS

_FEW = 0.9  # of the photographs: below, an everyday change is a weakness
_BROKEN = 0.5
_TAKEN = 0.1  # of the photographs: above, imitation is a danger
_LUCK = 0.1  # of MAP: less above a random order is hardly more than luck

_TONES: dict[str, Tone] = {"everyday": "b", "random noise": "f", "on purpose": "a", "unchanged": "e"}
_SERIES = {
    "same": "unchanged",
    "everyday": "everyday",
    "noise": "random noise",
    "hide": "on purpose",
    "hide-worst": "on purpose",
}
_PLAIN_TITLES = {
    "F1": "Asked again, it gives another code: share of the photographs.",
    "F2": "The weights show an attack no way, because the gradient is exactly 0: share of the photographs.",
    "F3": "Answers or gradients that are no numbers: share of the photographs.",
    "F15": "It adapts itself to each picture while it looks at it (1 is yes).",
    "F17": "Many pictures share a code, so that luck decides which comes first.",
    "F19": "Parts that still run as in training, where answers depend on luck or company.",
    "F20": "The largest number that reaches its first layer; too large where pictures are normalised twice.",
}
_REMEDIES = {
    (
        "crop-5",
        "crop-10",
    ): "Store a few crops of each picture, or hash parts of it, so that a trimmed copy is still known",
    ("brighter", "darker"): "Level the brightness before hashing, or train with changed brightness",
    (
        "blur",
        "resize",
    ): "Bring all pictures to one small size before hashing, so that sharpness does not matter",
}


def audit_page(
    summary: Mapping[str, Any], rows: Sequence[Row], examples: Sequence[Example], flags: Sequence[Flag] = ()
) -> str:
    """The whole page. ``summary`` is that of ``run_audit``."""
    order = ["red", "amber", "pass"]
    by_level = sorted(flags, key=lambda flag: order.index(flag.level))
    return render(
        "audit.html.j2",
        title=f"How easily is {summary['title']} fooled?",
        summary=summary,
        verdict=_verdict(summary, rows),
        tiles=_tiles(summary, rows),
        examples=examples,
        chart=_chart(summary, rows),
        changes=_table(summary, [row for row in rows if row.kind in _SERIES], "done to the photograph"),
        imitation=_table(summary, [row for row in rows if row.kind not in _SERIES], "attack"),
        advice=_advice(summary, rows),
        flags=[(flag, _PLAIN_TITLES.get(flag.id, CHECKS[flag.id].title)) for flag in by_level],
        reds=sum(flag.level == "red" for flag in flags),
        stored_quality=STORED_QUALITY,
    )


def _share(row: Row, summary: Mapping[str, Any]) -> float:
    """The share that the page speaks of: within the radius where the search has one, else coming first."""
    if summary["matches by"] == "radius" and row.recognised is not None:
        return row.recognised
    return row.first


def _word(summary: Mapping[str, Any]) -> str:
    """What ``_share`` counts, as a reader says it."""
    return "recognised" if summary["matches by"] == "radius" else "found first"


def _count(share: float, row: Row) -> str:
    return f"{share * row.asked:.0f} of {row.asked}"


def _one(rows: Sequence[Row], kind: str) -> Row | None:
    return next((row for row in rows if row.kind == kind), None)


def _unchanged(rows: Sequence[Row]) -> Row:
    return next(row for row in rows if row.kind == "same")


def _has_red(summary: Mapping[str, Any]) -> bool:
    return any(flag["level"] == "red" for flag in summary["flags"])


# ---------------------------------------------------------------------------------------------- numbers


def _tiles(summary: Mapping[str, Any], rows: Sequence[Row]) -> Tiles:
    word, same = _word(summary), _unchanged(rows)
    everyday = min(
        (row for row in rows if row.kind == "everyday"), key=lambda row: (_share(row, summary), row.map)
    )
    shown = [
        ("nothing changed", same, word),
        ("worst everyday change", everyday, f"{word}: {everyday.words}"),
    ]
    if hide := _one(rows, "hide-worst"):
        shown.append(("hidden on purpose", hide, f"still {word}"))
    if imitate := _one(rows, "imitate-worst"):
        shown.append(("taken for another on purpose", imitate, "succeeded"))
    return [(label, _count(_share(row, summary), row), remark) for label, row, remark in shown]


def _chart(summary: Mapping[str, Any], rows: Sequence[Row]) -> Chart:
    """A dot for each change that should not matter: share of the photographs found, with its 95 % interval."""
    from scipy.stats import binomtest  # a second to import, and only this chart needs it

    dots = []
    for row in (row for row in rows if row.kind in _SERIES):
        share = _share(row, summary)
        ends = binomtest(round(share * row.asked), row.asked).proportion_ci(method="wilson")
        low, high = min(ends.low, share), max(ends.high, share)
        dots.append((row.name, [Dot(_SERIES[row.kind], share, low, high, row.kind == "hide")]))
    series = {dot.series for _, (dot,) in dots}
    return IntervalChart(
        title=f"Share of the photographs {_word(summary)}",
        description="; ".join(f"{name} {dot.value:.2f}" for name, (dot,) in dots),
        rows=dots,
        tones={name: tone for name, tone in _TONES.items() if name in series},
        x=Axis("share", UNIT),
        caption=(
            "Further right is better; the lines are 95 % intervals for the number of photographs that were tried. "
            "Hollow: one attack alone."
        ),
    )


def _table(summary: Mapping[str, Any], rows: Sequence[Row], title: str) -> Table:
    """Rows of changes, or of imitation; the worst case is marked."""
    head: list[CellLike] = [title, "can you see it?", "came first"]
    if summary["bits"] is not None:
        head.append(Cell("counts as the same", f"≤ {summary['radius']} bits"))
        head.append(Cell("bits apart", f"of {summary['bits']}"))
    head.append("MAP")
    if summary["kinds"] is not None:
        head.append(Cell("same kind found", "MAP"))
    body: list[Sequence[CellLike]] = []
    for row in rows:
        name = row.name if row.words == "nothing" else Cell(row.name, row.words)
        cells: list[CellLike] = [name, row.visible, _count(row.first, row)]
        if row.recognised is not None and row.bits is not None:
            cells += [_count(row.recognised, row), f"{row.bits:.1f}"]
        cells.append(f"{row.map:.3f}")
        if row.same_kind is not None:
            cells.append(Cell(f"{row.same_kind:.3f}", f"luck {row.same_kind_chance:.3f}"))
        elif summary["kinds"] is not None:
            cells.append("none to find")
        body.append(cells)
    return Table(head, body, "", [i for i, row in enumerate(rows) if row.kind.endswith("worst")])


# ---------------------------------------------------------------------------------------------- sentences


def category_sentence(rows: Sequence[Row]) -> str:
    """How well photographs of the same category are found, unchanged and under attack."""
    same, hide = _unchanged(rows), _one(rows, "hide-worst")
    if same.same_kind is None:
        return (
            "None of the photographs that asked has another of its kind, so nothing was measured about kinds."
        )
    sentence = (
        f"Asked for other photographs of the same kind, the subfolder, it scores {same.same_kind:.2f}, where 1 is "
        f"perfect and {same.same_kind_chance:.2f} is luck."
    )
    if hide is None or hide.same_kind is None:
        return sentence
    before = [value for value in same.same_kind_each[: hide.asked] if value is not None]
    return (
        f"{sentence} For the {len(before)} photographs that were changed on purpose this goes from "
        f"{sum(before) / len(before):.2f} to {hide.same_kind:.2f}; those attacks were aimed at the photograph itself, "
        "so one that is aimed at its kind may do more harm."
    )


def _verdict(summary: Mapping[str, Any], rows: Sequence[Row]) -> list[str]:
    """The page's first sentences."""
    word, same = _word(summary), _unchanged(rows)
    sentences = ["Do not rely on what follows yet: a warning is red, see below."] if _has_red(summary) else []
    sentences.append(
        f"{same.asked} photographs were looked up in a search that stores a copy of each. Unchanged, "
        f"{_share(same, summary) * same.asked:.0f} of them were {word}."
    )
    everyday = [row for row in rows if row.kind == "everyday"]
    worst = min(everyday, key=lambda row: _share(row, summary))
    if _share(worst, summary) < _FEW:
        left = _count(_share(worst, summary), worst)
        sentences.append(f"Everyday changes already cost it: {worst.words}, only {left} are {word}.")
    else:
        sentences.append("Everyday changes do it little harm: saving again, cropping, scaling, blur, light.")
    hide, imitate = _one(rows, "hide-worst"), _one(rows, "imitate-worst")
    if hide is None:
        nothing = "Nothing was tried here that looks for its weak spots on purpose, apart from random noise."
        return [*sentences, nothing]
    share, level = _share(hide, summary), f"{summary['eps'] * 255:g} of 255 brightness levels"
    count = f"{_count(share, hide)} are still {word}."
    if share < 0.8:
        many = "almost any photograph" if share <= 0.2 else "many photographs"
        sentences.append(
            f"Someone who changes pixels by at most {level}, on purpose, hides {many} from it: {count}"
        )
    else:
        sentences.append(f"Changing pixels by at most {level} on purpose did not hide much: {count}")
    if imitate is not None:
        taken = _count(_share(imitate, summary), imitate)
        sentences.append(f"In the same way {taken} photographs could be made to pass for another.")
    return sentences


def _advice(summary: Mapping[str, Any], rows: Sequence[Row]) -> list[str]:
    """What to do about it, most urgent first."""
    same, hide = _unchanged(rows), _one(rows, "hide-worst")
    lines = []
    if summary["doubts"] or _has_red(summary):
        lines.append("First fix what the warnings below say; the other numbers may change then.")
    if _share(same, summary) < _FEW:
        lines.append(
            "The search misses photographs that nobody changed. Check that pictures go in as it expects (size, colour "
            "order, normalisation), and whether the photographs here are very much alike."
        )
    lines += _advice_on_attacks(summary, rows)
    causes: dict[str, list[str]] = {}
    for row in (row for row in rows if row.kind == "everyday" and _share(row, summary) < _FEW):
        causes.setdefault(_remedy(row.name), []).append(f"{row.words}: {_count(_share(row, summary), row)}")
    lines += [f"{remedy} ({'; '.join(parts)})." for remedy, parts in causes.items()]
    noise = _one(rows, "noise")
    if noise is not None and _share(noise, summary) < _FEW:
        lines.append("Random noise alone breaks it. Blur or shrink pictures slightly before they are hashed.")
    near = summary["false matches"]
    if near is not None and near > 0.02:
        lines.append(
            f"{near:.1%} of the pairs of different photographs count as the same. Lower the number of bits that may "
            "differ, or use longer codes."
        )
    if same.same_kind is not None and same.same_kind < (same.same_kind_chance or 0.0) + _LUCK:
        lines.append(
            "It hardly knows kinds: photographs of the same kind are found little better than by luck. Take it to find "
            "copies, and a model that learned kinds where they matter."
        )
    if hide is None:
        lines.append(
            "This audit could not follow the weights of the search, so it says nothing about somebody who tries on "
            "purpose. Assume that it can be fooled."
        )
    return lines or [
        "Nothing urgent. Repeat the audit with more photographs of your own, and after every change."
    ]


def _advice_on_attacks(summary: Mapping[str, Any], rows: Sequence[Row]) -> list[str]:
    hide, imitate = _one(rows, "hide-worst"), _one(rows, "imitate-worst")
    lines = []
    if hide is not None and _share(hide, summary) < _BROKEN:
        lines.append(
            "Do not rely on this search alone where somebody gains by not being found. Put a second, different method "
            "next to it, keep distances and codes away from those who ask, limit how often one may ask, and log near "
            "misses."
        )
        lines.append(
            "A model that is learned can be hardened: train it on attacked pictures (the recipes saat, cgat and "
            "others of this package do so), then repeat this audit."
            if summary["gradients"]
            else "A fixed formula cannot be trained against attacks. A learned, hardened hash can; until then treat a "
            "miss as 'not known', never as 'not there'."
        )
    if imitate is not None and _share(imitate, summary) > _TAKEN:
        lines.append(
            "A match is no proof: a harmless picture can be made to match another. Never block, delete or accuse on a "
            "match alone; have a person look, or compare the pictures themselves."
        )
    return lines


def _remedy(change: str) -> str:
    for names, remedy in _REMEDIES.items():
        if change in names:
            return remedy
    return "Train with compressed pictures, or shrink pictures before hashing"
