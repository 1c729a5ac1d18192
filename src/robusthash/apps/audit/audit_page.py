"""The page of an audit, in plain words: effect of each change, in numbers and pictures, and what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from robusthash.apps.audit.measured_rows import AuditExample, AuditRow
from robusthash.apps.audit.photo_collection import STORED_QUALITY
from robusthash.apps.audit.verdict import counted, share_found, verdict
from robusthash.apps.reports.charts import UNIT, Chart, ChartAxis, Dot, IntervalChart, Tone
from robusthash.apps.reports.pages import render
from robusthash.metrics.results import Flag
from robusthash.models.external.loaders import NAMES
from robusthash.robustness.checks.base import CHECKS

_TONES: dict[str, Tone] = {"everyday": "b", "random noise": "f", "on purpose": "a", "unchanged": "e"}
_SERIES = {
    "same": "unchanged",
    "everyday": "everyday",
    "noise": "random noise",
    "hide": "on purpose",
    "hide-worst": "on purpose",
    "hide-saved": "on purpose",
}
_PLAIN_TITLES = {
    "F1": "Asked again, it gives another code: share of the photographs.",
    "F2": "The weights show an attack no way, because the gradient is exactly 0: share of the photographs.",
    "F3": "Answers or gradients that are no numbers: share of the photographs.",
    "F10": "What an attack follows goes with what it is scored by: 1 is always, 0 is never.",
    "F11": "The attack gave back a worse picture than it had found: share of the photographs.",
    "F12": "The attack was still getting stronger when it ended: share of the photographs.",
    "F13": "Steps at random beat the step along the gradient: share of the photographs.",
    "F14": "The gradient is not that of the model, measured by small changes: share of the photographs.",
    "F15": "It adapts itself to each picture while it looks at it (1 is yes).",
    "F16": "Bits that depend on rounding inside the computer: share of them.",
    "F17": "Many pictures share a code, so that luck decides which comes first.",
    "F19": "Parts that still run as in training, where answers depend on luck or company.",
    "F20": "The largest number that reaches its first layer; too large where pictures are normalised twice.",
    "F21": "Photographs that are asked for and stored pixel by pixel the same.",
    "F22": "An attack that may change nothing changes the answer: share of the photographs.",
    "F23": "Ways in which it does not behave as it says.",
}
_REMEDIES = {
    "crop-5": "Store a few crops of each picture, or hash parts of it, so that a trimmed copy is still known",
    "brighter": "Level the brightness before hashing, or train with changed brightness",
    "blur": "Bring all pictures to one small size before hashing, so that sharpness does not matter",
}
_REMEDIES |= {"crop-10": _REMEDIES["crop-5"], "darker": _REMEDIES["brighter"], "resize": _REMEDIES["blur"]}
_REMEDY = "Train with compressed pictures, or shrink pictures before hashing"
_FEW = 0.9  # of the photographs: below, an everyday change is a weakness


def audit_page(
    summary: Mapping[str, Any],
    rows: Sequence[AuditRow],
    examples: Sequence[AuditExample],
    flags: Sequence[Flag] = (),
) -> str:
    """The whole page. ``summary`` is that of ``run_audit``."""
    by_radius = summary["matches by"] == "radius"
    first = {row.kind: row for row in reversed(rows)}
    shares = {row: share_found(row, by_radius) for row in rows}
    everyday = [row for row in rows if row.kind == "everyday"]
    weak: dict[str, list[AuditRow]] = {}
    for row in (row for row in everyday if shares[row] < _FEW):
        weak.setdefault(_REMEDIES.get(row.name, _REMEDY), []).append(row)
    return render(
        "audit.html.j2",
        title=f"How easily is {summary['title']} fooled?",
        summary=summary,
        verdict=verdict(summary, rows, flags),
        counted=counted,
        word="counted as the same"
        if by_radius
        else "found first",  # what a share counts, as a reader says it
        formula=summary["target"] in NAMES,  # nothing in it is learned
        shares=shares,
        few=_FEW,
        same=first["same"],
        everyday=min(everyday, key=lambda row: (shares[row], row.map)),
        weakest=min(everyday, key=lambda row: shares[row]),
        noise=first.get("noise"),
        hide=first["hide-worst"],
        imitate=first.get("imitate-worst"),
        weak=weak,
        changes=[row for row in rows if row.kind in _SERIES],
        imitation=[row for row in rows if row.kind not in _SERIES],
        chart=_chart(rows, shares, by_radius),
        examples=examples,
        raised=[flag for level in ("red", "amber") for flag in flags if flag.level == level],
        passed=[flag for flag in flags if flag.level == "pass"],
        titles={flag.id: _PLAIN_TITLES.get(flag.id, CHECKS[flag.id].title) for flag in flags},
        stored_quality=STORED_QUALITY,
    )


def _chart(rows: Sequence[AuditRow], shares: Mapping[AuditRow, float], by_radius: bool) -> Chart:
    """A dot for each change that should not matter: share of the photographs found, and its interval."""
    from scipy.stats import binomtest  # a second to import, and only this chart needs it

    dots = []
    for row in (row for row in rows if row.kind in _SERIES):
        share = shares[row]
        ends = binomtest(round(share * row.asked), row.asked).proportion_ci(method="wilson")
        low, high = min(ends.low, share), max(ends.high, share)
        dots.append((row.name, [Dot(_SERIES[row.kind], share, low, high, row.kind == "hide")]))
    series = {dot.series for _, (dot,) in dots}
    return IntervalChart(
        title=f"Share of the photographs {'counted as the same' if by_radius else 'found first'}",
        description="; ".join(f"{name} {dot.value:.2f}" for name, (dot,) in dots),
        rows=dots,
        tones={name: tone for name, tone in _TONES.items() if name in series},
        x=ChartAxis("share", UNIT),
    )


def category_sentence(rows: Sequence[AuditRow]) -> str:
    """Say how well photographs of the same category are found, unchanged and under attack."""
    first = {row.kind: row for row in reversed(rows)}
    same, hide = first["same"], first.get("hide-worst")
    if same.same_kind is None:
        return (
            "None of the photographs that asked has another of its kind, so nothing was measured about kinds."
        )
    mean, chance = f"{same.same_kind:.2f}", f"{same.same_kind_chance:.2f}"
    sentence = (
        f"Asked for other photographs of the same kind, the subfolder, it scores {mean}, where 1 is perfect "
        f"and {chance} is luck."
    )
    if hide is None or hide.same_kind is None:
        return sentence
    before = [value for value in same.same_kind_each[: hide.asked] if value is not None]
    change = f"{sum(before) / len(before):.2f} to {hide.same_kind:.2f}"
    return (
        f"{sentence} For the {len(before)} photographs that were changed on purpose this goes from {change}; "
        "those attacks were aimed at the photograph itself, so one that is aimed at its kind may do more "
        "harm."
    )
