"""Results of suites of attacks on a run: data of one section of its report for every result in ``assess.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from robusthash.apps.reports.charts import UNIT, Axis, LineChart, Series
from robusthash.apps.reports.pages import (
    WORST_CASE,
    Cell,
    CellLike,
    Table,
    notes,
    number,
    remark,
    setting_facts,
    span,
    stored_as,
)
from robusthash.metrics.results import EvalResult, Flag
from robusthash.robustness.checks.base import CHECKS
from robusthash.robustness.specs.published_suite import LEGACY, published

_GROUPS = ("white-box", "adaptive", "refined", "transfer", "black-box", "noise")
_COLUMNS = {
    "unique wins": "{:.0f}",
    "completeness": "{:.0%}",
    "ASR": "{:.0%}",
    "bits flipped": "{:.1f}",
    "seconds": "{:.1f}",
}


def unreliable_names(results: Sequence[EvalResult], checked: Sequence[Flag]) -> list[str]:
    """The results against which a red flag stands; a red flag of the model stands against every number.

    Args:
        checked: flags that ``check`` raised on the model.
    """
    red = [flag.id for flag in checked if flag.level == "red"]
    names = [f"every number of this model ({', '.join(red)})"] * bool(red)
    return names + [result.name for result in results if result.unreliable]


def suite_data(result: EvalResult) -> dict[str, Any]:
    """What the template ``suite_section`` shows of a result."""
    measure, low = result.setting.headline, f"w{result.setting.headline}"
    ending, stored = stored_as([result])
    return {
        "result": result,
        "measure": measure,
        "low": low,
        "worst_case": WORST_CASE,
        "published": published(result.setting.budget.partition(",")[0].removeprefix("suite ")),
        "reds": [flag for flag in result.flags if flag.level == "red"],
        "checks": remark(result.flags, True),
        "count": len(_untargeted(result)),
        "stored": f"; of {stored} {number(result[f'{low}{ending}'])}" if stored else "",
        "spans": {name: span(result, name) for name in ("clean", low, "HRS")},
        "attacks": _attack_table(result),
        "targeted": _targeted_table(result),
        "curve": _curve(result),
        "raised": _check_table(result.flags, ("red", "amber")),
        "passed": _check_table(result.flags, ("pass",)),
        "notes": notes([result]),
        "setting": setting_facts(result, {result.name: result}),
    }


def _untargeted(result: EvalResult) -> dict[str, dict[str, float]]:
    """The attacks that count for the worst case, the strongest first."""
    measure = result.setting.headline
    attacks = {name: attack for name, attack in result.attacks.items() if measure in attack}
    return dict(sorted(attacks.items(), key=lambda item: item[1][measure]))


def _group(name: str, attack: Mapping[str, float], result: EvalResult) -> str:
    """What an attack knows of the model; the setting lists all attacks but the adaptive ones."""
    if name not in result.setting.attacks:
        return "adaptive"
    for group in ("refined", "transfer"):
        if name.startswith(f"{group} "):
            return group
    if attack.get("oracle", 0) > 0:
        return "noise" if name.endswith("noise") or name == "random edits" else "black-box"
    return "white-box"


def _attack_table(result: EvalResult) -> Table:
    """Every untargeted attack: by group, the strongest first; attacks as published form no groups."""
    measure, attacks = result.setting.headline, _untargeted(result)
    grouped = not published(result.setting.budget.partition(",")[0].removeprefix("suite "))
    groups: dict[str, list[str]] = {group: [] for group in _GROUPS}
    for name, attack in attacks.items():
        groups[_group(name, attack, result) if grouped else "white-box"].append(name)
    legacy = any(LEGACY in attack for attack in attacks.values())
    head = ["", measure, *[LEGACY] * legacy, *_COLUMNS]
    rows: list[list[CellLike]] = []
    marked = []
    for group, names in groups.items():
        if names and grouped:
            marked.append(len(rows))
            rows.append([group, *[None] * (len(head) - 1)])
        for name in names:
            attack = attacks[name]
            row: list[CellLike] = [
                name,
                Cell(number(attack[measure]), span(result, f"{measure} under {name}")),
            ]
            row += [_text(attack, LEGACY, "{:.3f}")] * legacy
            row += [_text(attack, "flips" if column == "bits flipped" else column, form)
                    for column, form in _COLUMNS.items()]  # fmt: skip
            rows.append(row)
    explained = f"{LEGACY} is what published code prints. " if legacy else ""
    caption = (
        f"Each attack alone, the strongest first; 95 % intervals over queries. {explained}Unique wins: queries that "
        "it alone brings lowest. Completeness: how much of the way from clean to the floor it went. ASR: queries that "
        f"lose half their AP. Bits flipped: of {result.setting.bits}, mean."
    )
    return Table(head, rows, caption, marked)


def _text(attack: Mapping[str, float], name: str, form: str) -> str:
    return form.format(attack[name]) if name in attack else "–"


def _targeted_table(result: EvalResult) -> Table | None:
    """The attacks that pull a target up, and what they come to together."""
    measure = f"t-{result.setting.headline}"
    attacks = {name: attack for name, attack in result.attacks.items() if measure in attack}
    if not attacks:
        return None
    rows = [
        [name, _text(attack, measure, "{:.3f}"), _text(attack, "seconds", "{:.1f}")]
        for name, attack in attacks.items()
    ]
    caption = (
        f"Targeted attacks: how high the items of a target come. Clean queries give them {measure} "
        f"{number(result.reference['t-clean'])}; all attacks together gain {number(result['gain'])} on average and "
        f"leave {number(result['collateral ' + result.setting.headline])} of the original {result.setting.headline}."
    )
    return Table(["", measure, "seconds"], rows, caption)


def _curve(result: EvalResult) -> LineChart | None:
    """The worst case over budgets, where it was run."""
    low = f"w{result.setting.headline}"
    curve = result.curves.get(f"{low}/eps")
    if curve is None:
        return None
    budgets, values = curve["eps"].tolist(), curve[low].tolist()
    lows, highs = zip(*(result.interval[f"{low} eps {eps:.6g}"] for eps in budgets), strict=True)
    of_images = result.setting.threat.startswith("img-linf")
    x = [eps * 255 for eps in budgets] if of_images else budgets
    mark = " (UNRELIABLE)" if result.unreliable else ""
    return LineChart(
        title=f"{low} over eps",
        description=f"{low} falls from {number(values[0])} to {number(values[-1])}",
        series=[Series(f"{low}{mark}", x, values, "b", result.unreliable, True, lows, highs)],
        x=Axis("eps, in 1/255" if of_images else "eps", [max(x) * step / 4 for step in range(5)]),
        y=Axis(low, UNIT),
        reference=("chance", result.reference["chance"]),
        caption=(
            "By a part of the attacks. Each budget also starts from what the smaller one found, so the curve cannot "
            f"rise. Its mean height is {number(result['curve score'])}."
        ),
    )


def _check_table(flags: Sequence[Flag], levels: Sequence[str]) -> Table | None:
    """The checks of these levels, the first level first; remedies unless they passed."""
    raised = "pass" not in levels
    rows: list[list[CellLike]] = []
    for flag in (flag for level in levels for flag in flags if flag.level == level):
        title = CHECKS[flag.id].title if flag.id in CHECKS else ""
        value = f"{flag.value:.3g}" if math.isfinite(flag.value) else "–"
        level = Cell(flag.level, element="alarm" if flag.level == "red" else "")
        row: list[CellLike] = [Cell(flag.id, title), level, value, f"{flag.threshold:g}"]
        rows.append([*row, *[flag.remedy] * raised])
    head = ["check", "level", "value", "threshold", *["remedy"] * raised]
    return Table(head, rows, "Checks that raised a flag." * raised) if rows else None
