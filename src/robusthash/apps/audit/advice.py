"""What an audit says and advises, in sentences: rules from measured rows to words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from robusthash.apps.audit.measured_rows import Row, kept, kept_words

_FEW = 0.9  # of the photographs: below, an everyday change is a weakness
_BROKEN = 0.5
_TAKEN = 0.1  # of the photographs: above, imitation is a danger
_LUCK = 0.1  # of MAP: less above a random order is hardly more than luck


def about_kinds(rows: Sequence[Row]) -> str:
    """How well photographs of the same kind are found, unchanged and under attack."""
    same, hide = _one(rows, "same"), _maybe(rows, "hide-worst")
    if same.same_kind is None:
        return (
            "None of the photographs that asked has another of its kind, so nothing was measured about kinds."
        )
    said = (
        f"Asked for other photographs of the same kind, the subfolder, it scores {same.same_kind:.2f}, where 1 is "
        f"perfect and {same.same_kind_chance:.2f} is luck."
    )
    if hide is None or hide.same_kind is None:
        return said
    before = [value for value in same.same_kind_each[: hide.asked] if value is not None]
    return (
        f"{said} For the {len(before)} photographs that were changed on purpose this goes from "
        f"{sum(before) / len(before):.2f} to {hide.same_kind:.2f}; those attacks were aimed at the photograph itself, "
        "so one that is aimed at its kind may do more harm."
    )


def verdict(summary: Mapping[str, Any], rows: Sequence[Row]) -> list[str]:
    """The page's first sentences."""
    word, same = kept_words(summary), _one(rows, "same")
    everyday = [row for row in rows if row.kind == "everyday"]
    weak = sorted((row for row in everyday if kept(row, summary) < _FEW), key=lambda row: kept(row, summary))
    said = ["Do not rely on what follows yet: a warning light is red, see below."] if _red(summary) else []
    said += [
        f"{same.asked} photographs were looked up in a search that stores a copy of each. Unchanged, "
        f"{kept(same, summary) * same.asked:.0f} of them were {word}."
    ]
    if not weak:
        said.append("Everyday changes do it little harm: saving again, cropping, scaling, blur, light.")
    else:
        worst = weak[0]
        said.append(
            f"Everyday changes already cost it: {worst.words}, only {kept(worst, summary) * worst.asked:.0f} of "
            f"{worst.asked} are {word}."
        )
    hide, imitate = _maybe(rows, "hide-worst"), _maybe(rows, "imitate-worst")
    if hide is None:
        said.append(
            "Nothing was tried here that looks for its weak spots on purpose, apart from random noise."
        )
        return said
    left = kept(hide, summary)
    level = f"{summary['eps'] * 255:g} of 255 brightness levels"
    count = f"{left * hide.asked:.0f} of {hide.asked} are still {word}."
    if left < 0.8:
        many = "almost any photograph" if left <= 0.2 else "many photographs"
        said.append(
            f"Someone who changes pixels by at most {level}, on purpose, hides {many} from it: {count}"
        )
    else:
        said.append(f"Changing pixels by at most {level} on purpose did not hide much: {count}")
    if imitate is not None:
        share = kept(imitate, summary)
        said.append(
            f"In the same way {share * imitate.asked:.0f} of {imitate.asked} photographs could be made to pass for "
            "another."
        )
    return said


def advice(summary: Mapping[str, Any], rows: Sequence[Row]) -> list[str]:
    """What to do about it, most urgent first."""
    lines = []
    same = _one(rows, "same")
    if summary["doubts"] or _red(summary):
        lines.append("First mend what the warning lights below say; the other numbers may change then.")
    if kept(same, summary) < _FEW:
        lines.append(
            "The search misses photographs that nobody changed. Check that pictures go in as it expects (size, colour "
            "order, normalisation), and whether the photographs here are very much alike."
        )
    hide, imitate, noise = (_maybe(rows, kind) for kind in ("hide-worst", "imitate-worst", "noise"))
    if hide is not None and kept(hide, summary) < _BROKEN:
        lines.append(
            "Do not rely on this search alone where somebody gains by not being found. Put a second, different method "
            "beside it, keep distances and codes away from those who ask, limit how often one may ask, and log near "
            "misses."
        )
        if summary["gradients"]:
            lines.append(
                "A model that is learned can be hardened: train it on attacked pictures (the recipes saat, cgat and "
                "others of this package do so), then repeat this audit."
            )
        else:
            lines.append(
                "A fixed formula cannot be trained against attacks. A learned, hardened hash can; until then treat a "
                "miss as 'not known', never as 'not there'."
            )
    if imitate is not None and kept(imitate, summary) > _TAKEN:
        lines.append(
            "A match is no proof: a harmless picture can be made to match another. Never block, delete or accuse on a "
            "match alone; have a person look, or compare the pictures themselves."
        )
    mends: dict[str, list[str]] = {}
    for row in rows:
        if row.kind == "everyday" and kept(row, summary) < _FEW:
            mends.setdefault(_mend(row), []).append(
                f"{row.words}: {kept(row, summary) * row.asked:.0f} of {row.asked}"
            )
    lines += [f"{mend} ({'; '.join(causes)})." for mend, causes in mends.items()]
    if noise is not None and kept(noise, summary) < _FEW:
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


def _mend(row: Row) -> str:
    if row.name.startswith("crop"):
        return "Store a few crops of each picture, or hash parts of it, so that a trimmed copy is still known"
    if row.name in ("brighter", "darker"):
        return "Level the brightness before hashing, or train with changed brightness"
    if row.name in ("blur", "resize"):
        return "Bring all pictures to one small size before hashing, so that sharpness does not matter"
    return "Train with compressed pictures, or shrink pictures before hashing"


def _red(summary: Mapping[str, Any]) -> bool:
    return any(flag["level"] == "red" for flag in summary["flags"])


def _one(rows: Sequence[Row], kind: str) -> Row:
    return next(row for row in rows if row.kind == kind)


def _maybe(rows: Sequence[Row], kind: str) -> Row | None:
    return next((row for row in rows if row.kind == kind), None)
