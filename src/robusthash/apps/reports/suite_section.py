"""What suites of attacks found on a run: one section of its report for every result in ``assess.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from robusthash.apps.reports import html
from robusthash.apps.reports.charts import UNIT, Axis, Series, line_chart
from robusthash.apps.reports.html import Child, Markup, tag, text_of
from robusthash.apps.reports.wording import (
    WORST_CASE,
    doubt,
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


def suite_sections(results: Sequence[EvalResult]) -> list[Markup]:
    """One section a result; attacks as published come last."""
    return [_section(result) for result in sorted(results, key=_published)]


def doubt_line(results: Sequence[EvalResult], checked: Sequence[Flag]) -> Markup | None:
    """What to see before any number of the page: the suites against whose result a red flag stands.

    Args:
        checked: what ``check`` said of the model; a red flag of it stands against every number.
    """
    red = [flag.id for flag in checked if flag.level == "red"]
    doubtful = [f"every number of this model ({', '.join(red)})"] * bool(red)
    doubtful += [result.name for result in results if result.unreliable]
    if not doubtful:
        return None
    return tag("p", _badge(), " ", doubt(doubtful))


def _section(result: EvalResult) -> Markup:
    return tag(
        "section",
        tag("h2", f"Suite: {result.name} ", _badge() if result.unreliable else None),
        _standing(result),
        tag("p", _summary(result)),
        html.tiles(_tiles(result)),
        _lines(result),
        _targeted(result),
        _curve(result),
        _checks(result),
        notes([result]),
        _folded("The setting of these numbers", setting_facts(result, {result.name: result})),
        class_="suite unreliable" if result.unreliable else "suite",
    )


def _published(result: EvalResult) -> bool:
    """Attacks as published, which are no evidence of robustness."""
    return published(result.setting.tier)


def _badge() -> Markup:
    return tag("strong", "UNRELIABLE", class_="alarm")


def _folded(summary: str, *children: Child) -> Markup:
    return tag("details", tag("summary", summary), *children)


def _standing(result: EvalResult) -> list[Markup]:
    """How far the numbers may be trusted."""
    said = []
    if _published(result):
        text = "Attacks as published, to be held beside printed numbers: no evidence of robustness."
        said.append(tag("p", tag("strong", text)))
    reds = [flag for flag in result.flags if flag.level == "red"]
    if reds:
        remedies = [tag("li", f"{flag.id}: {flag.remedy}") for flag in reds]
        text = "The numbers of this section prove nothing until these red flags are cleared up:"
        said.append(tag("div", tag("p", text), tag("ul", remedies), class_="alarmed", role="note"))
    elif not result.flags:
        text = "Not checked: no check looked for signs that these attacks were blind to this model."
        said.append(tag("p", text, class_="note"))
    else:
        said.append(tag("p", f"Checks: {remark(result.flags, True)}.", class_="note"))
    return said


def _summary(result: EvalResult) -> str:
    measure, low = result.setting.headline, result.setting.key.name("worst")
    untargeted = len(_untargeted(result))
    fall = f"{measure} falls from {number(result.reference['clean'])} to {number(result[low])}"
    return (
        f"Under {result.setting.threat} {fall} where each of {len(result.per_query[low])} queries meets the worst of "
        f"{untargeted} {'line' if untargeted == 1 else 'lines'} of attack. {'' if _published(result) else WORST_CASE}"
    )


def _tiles(result: EvalResult) -> list[tuple[str, str, Child]]:
    key, reference = result.setting.key, result.reference
    measure, low = str(key), key.name("worst")
    worst = tag("span", number(result[low]), class_="doubt" if result.unreliable else None)
    storage, kind = stored_as([result])
    stored = f"; of {kind} {number(result[key.name('worst', storage=storage)])}" if kind else ""
    lowest = text_of(worst, _badge() if result.unreliable else None)
    tiles: list[tuple[str, str, Child]] = [
        (f"clean {measure}", number(reference["clean"]), span(result, "clean")),
        (f"{low}, worst case", lowest, f"{span(result, low)}{stored}"),
        ("harmonic robustness score", number(result["HRS"]), span(result, "HRS")),
        ("chance", number(reference["chance"]), "a random order of the database"),
    ]
    if "floor" in reference:
        tiles.append(
            ("floor", number(reference["floor"]), "the lowest that a search over codes found; not a bound")
        )
    return tiles


# ---------------------------------------------------------------------------------------------- lines


def _untargeted(result: EvalResult) -> dict[str, dict[str, float]]:
    """The lines that count for the worst case, the strongest first."""
    measure = result.setting.headline
    lines = {name: line for name, line in result.attacks.items() if measure in line}
    return dict(sorted(lines.items(), key=lambda item: item[1][measure]))


def _group(name: str, line: Mapping[str, float], result: EvalResult) -> str:
    """What a line knows of the model, by what a result keeps: the setting lists all lines but the adaptive
    ones."""
    if name not in result.setting.attacks:
        return "adaptive"
    for group in ("refined", "transfer"):
        if name.startswith(f"{group} "):
            return group
    if line.get("oracle", 0) > 0:
        return "noise" if name.endswith("noise") or name == "random edits" else "black-box"
    return "white-box"


def _lines(result: EvalResult) -> Markup:
    """Every untargeted line: by group, the strongest first."""
    measure, lines = result.setting.headline, _untargeted(result)
    groups: dict[str, list[str]] = {group: [] for group in _GROUPS}
    for name, line in lines.items():
        groups["white-box" if _published(result) else _group(name, line, result)].append(name)
    printed = any(LEGACY in line for line in lines.values())
    head = ["", measure, *[LEGACY] * printed, "unique wins", "completeness", "ASR", "bits flipped", "seconds"]
    rows: list[list[Child]] = []
    marked = []
    for group, names in groups.items():
        if names and not _published(result):
            marked.append(len(rows))
            rows.append([group, *[None] * (len(head) - 1)])
        for name in names:
            line, ends = lines[name], span(result, result.setting.key.name(attack=name))
            row: list[Child] = [
                name,
                [number(line[measure]), tag("span", ends, class_="span") if ends else None],
            ]
            row += [_cell(line, LEGACY, "{:.3f}")] * printed
            row += [_cell(line, "unique wins", "{:.0f}"), _cell(line, "completeness", "{:.0%}")]
            row += [
                _cell(line, "ASR", "{:.0%}"),
                _cell(line, "flips", "{:.1f}"),
                _cell(line, "seconds", "{:.1f}"),
            ]
            rows.append(row)
    legacy = f"{LEGACY} is what published code prints. " if printed else ""
    caption = (
        f"Each line alone, the strongest first; 95 % intervals over queries. {legacy}Unique wins: queries that it "
        "alone brings lowest. Completeness: how much of the way from clean to the floor it went. ASR: queries that "
        f"lose half their AP. Bits flipped: of {result.setting.bits}, mean."
    )
    return html.table(head, rows, caption, marked)


def _cell(line: Mapping[str, float], name: str, form: str) -> str:
    return form.format(line[name]) if name in line else "–"


def _targeted(result: EvalResult) -> Markup | None:
    """The lines that pull a target up, and what they come to together."""
    measure = result.setting.key.name("targeted")
    lines = {name: line for name, line in result.attacks.items() if measure in line}
    if not lines:
        return None
    rows = [
        [name, _cell(line, measure, "{:.3f}"), _cell(line, "seconds", "{:.1f}")]
        for name, line in lines.items()
    ]
    caption = (
        f"Targeted lines: how high the items of a target come. Clean queries give them {measure} "
        f"{number(result.reference['t-clean'])}; all lines together gain {number(result['gain'])} on average and leave "
        f"{number(result[result.setting.key.name('collateral')])} of the original {result.setting.headline}."
    )
    return html.table(["", measure, "seconds"], rows, caption)


# ---------------------------------------------------------------------------------------------- curve and
# checks


def _curve(result: EvalResult) -> Markup | None:
    """The worst case over budgets, where it was run."""
    key = result.setting.key
    low = key.name("worst")
    curve = result.curves.get(key.name("worst", option="eps"))
    if curve is None:
        return None
    budgets, values = curve["eps"].tolist(), curve[low].tolist()
    spans = [result.interval[key.name("worst", eps=eps)] for eps in budgets]
    of_images = result.setting.threat.startswith("img-linf")
    x = [eps * 255 for eps in budgets] if of_images else budgets
    mark = " (UNRELIABLE)" if result.unreliable else ""
    lows, highs = zip(*spans, strict=True)
    series = Series(f"{low}{mark}", x, values, "b", result.unreliable, True, lows, highs)
    chart = line_chart(
        f"{low} over eps",
        f"{low} falls from {number(values[0])} to {number(values[-1])}",
        [series],
        Axis("eps, in 1/255" if of_images else "eps", [max(x) * step / 4 for step in range(5)]),
        Axis(low, UNIT),
        ("chance", result.reference["chance"]),
        "By a part of the lines. Each budget also starts from what the smaller one found, so the curve cannot rise. "
        f"Its mean height is {number(result['curve score'])}.",
    )
    return tag("div", chart, class_="budgets")


def _checks(result: EvalResult) -> list[Markup]:
    """Red and amber checks with their remedies; those that found nothing are folded away."""
    levels = ("red", "amber")
    raised = [flag for level in levels for flag in result.flags if flag.level == level]
    passed = [flag for flag in result.flags if flag.level == "pass"]
    made = []
    if raised:
        rows = [[*_check(flag), flag.remedy] for flag in raised]
        made.append(
            html.table(["check", "level", "value", "threshold", "remedy"], rows, "Checks that raised a flag.")
        )
    if passed:
        rows = [_check(flag) for flag in passed]
        said = f"{len(passed)} of {len(result.flags)} checks found nothing"
        made.append(_folded(said, html.table(["check", "level", "value", "threshold"], rows)))
    return [tag("div", *made, class_="checks")] if made else []


def _check(flag: Flag) -> list[Child]:
    title = tag("span", CHECKS[flag.id].title, class_="span") if flag.id in CHECKS else None
    level = tag("strong", flag.level, class_="alarm") if flag.level == "red" else flag.level
    value = f"{flag.value:.3g}" if math.isfinite(flag.value) else "–"
    return [text_of(flag.id, title), level, value, f"{flag.threshold:g}"]
