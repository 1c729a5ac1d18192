"""Boards -> one page that opens from disk: sortable tables, filters, robustness over accuracy, curves."""

from __future__ import annotations

import math
from collections.abc import Sequence

from robusthash.apps.experiment.leaderboard import (
    Leaderboard,
    RankedModel,
    claim_text,
    legend,
    remark,
    setting_pairs,
    source_text,
)  # fmt: skip
from robusthash.apps.reports import html
from robusthash.apps.reports.charts import TONES, UNIT, Axis, Point, Series, Tone, line_chart, scatter_chart
from robusthash.apps.reports.html import Child, Markup, tag
from robusthash.apps.reports.run_report import number, pr_chart
from robusthash.apps.reports.wording import doubt
from robusthash.metrics.results import EvalResult

_DRAWN = 6  # models whose curves a chart shows


def leaderboard_page(boards: Sequence[Leaderboard]) -> str:
    """The whole page. Filters and order live in its address, so that a view can be linked:
    ``#bits=32&sort=hrs.up``."""
    rows = [row for board in boards for row in board.rows]
    lead = [
        tag(
            "p",
            f"{len(rows)} rows in {len(boards)} settings. Only numbers of one setting stand in one table.",
        ),
        tag("p", legend(any(board.methods for board in boards)), class_="note"),
    ]
    doubtful = [row.name for row in rows if row.unreliable]
    if doubtful:
        badge = tag("span", "UNRELIABLE", class_="badge")
        lead.append(tag("p", badge, " ", doubt(doubtful)))
    return html.page(
        "Leaderboard",
        lead,
        _filters(boards),
        *(_section(board, place, boards) for place, board in enumerate(boards)),
        foot="Made by robusthash. Empirical robustness is an upper bound; send in evidence to lower it.",
        style=html.read_asset("leaderboard.css"),
        script=html.read_asset("leaderboard.js"),
    )


def _filters(boards: Sequence[Leaderboard]) -> Markup:
    """Shown by the script alone: without it they could do nothing."""
    choices = {
        "data": ("data set", sorted({board.data for board in boards})),
        "threat": ("threat", sorted({board.setting.threat for board in boards})),
        "bits": (
            "bits",
            [str(bits) for bits in sorted({row.setting.bits for b in boards for row in b.rows})],
        ),
    }
    made = []
    for key, (label, values) in choices.items():
        options = [tag("option", "all", value=""), *(tag("option", value, value=value) for value in values)]
        made.append(tag("label", label, tag("select", options, data_filter=key)))
    made.append(
        tag("label", "model", tag("input", type="search", placeholder="part of a name", data_filter="find"))
    )
    return tag("div", *made, tag("span", id="count", role="status"), class_="filters", hidden=True)


def _section(board: Leaderboard, place: int, boards: Sequence[Leaderboard]) -> Markup:
    charts = [_scatter(board, place)] if len(board.rows) > 1 else []
    charts += [chart for chart in (_eps_chart(board), _pr(board)) if chart is not None]
    return tag(
        "section",
        tag("h2", board.title),
        _table(board, place),
        tag("div", *charts, class_="pair") if charts else None,
        tag("details", tag("summary", "The setting of these numbers"), html.facts(setting_pairs(board, boards)),
            class_="settings"),
        id=f"setting-{board.id}",
        data_data=board.data,
        data_threat=board.setting.threat,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- table


def _table(board: Leaderboard, place: int) -> Markup:
    key, targeted = board.setting.key, any(row.targeted is not None for row in board.rows)
    low = key.name("worst")
    head = [
        ("name", "model", True),
        ("clean", f"clean {board.measure}", False),
        ("own", f"{low}, our attacks", False),
        ("known", f"best-known {low}", False),
        ("by", "found by", True),
        ("hrs", "HRS", False),
        *([("targeted", f"highest {key.name('targeted')}", False)] if targeted else []),
        ("checks", "checks", True),
        ("claim", "claim", True),
        ("bits", "bits", False),
        ("defense", "defense", True),
    ]
    heads = [
        tag(
            "th",
            tag("button", label, type="button"),
            scope="col",
            data_key=key,
            class_="text" if text else None,
        )
        for key, label, text in head
    ]
    body = [_line(board, row, rank, _id(place, rank), targeted) for rank, row in enumerate(board.rows, 1)]
    made = tag("table", tag("thead", tag("tr", heads)), tag("tbody", body), class_="board")
    scroll = tag("div", made, class_="scroll", tabindex=0, role="region", aria_label=board.title)
    return tag("figure", scroll, class_="table")


def _id(place: int, rank: int) -> str:
    return f"row-{place}-{rank}"


def _line(board: Leaderboard, row: RankedModel, rank: int, slug: str, targeted: bool) -> Markup:
    low, setting = board.setting.key.name("worst"), row.setting
    badge = tag("span", "UNRELIABLE", class_="badge") if row.unreliable else None
    summary = tag("summary", tag("span", f"{rank}", class_="rank"), row.name, badge)
    queries = setting.asked
    attacked = f"{setting.threat}; worst of {', '.join(setting.attacks)}; {setting.budget}; {queries}"
    reds = "; ".join(f"{flag.id}: {flag.remedy}" for flag in row.flags)
    cells: list[Markup] = [
        tag("th", tag("details", summary, _details(row)), scope="row", data_v=row.name),
        _value(row.clean, row.clean_interval, f"clean {board.measure}; {queries}", row.bold(board.measure)),
        _value(row.worst.value, row.worst.interval, attacked, doubt=True),
        _value(
            row.known.value,
            row.known.interval,
            f"{attacked}; found by {source_text(row)}",
            row.bold(low),
            True,
        ),
        tag("td", source_text(row), data_v=source_text(row), class_="text"),
        _value(row.hrs, row.hrs_interval, f"clean and worst case above chance {row.chance:.3f}", doubt=True),
    ]
    if targeted:
        cells.append(
            _value(row.targeted, None, "highest over the targeted attacks of their mean") if row.targeted is not None
            else tag("td", "–", data_v="")
        )  # fmt: skip
    cells += [
        tag("td", remark(row), data_v=remark(row), class_="text", title=reds or None),
        tag("td", claim_text(row), data_v=f"{row.claim} {len(row.records)}", class_="text"),
        tag("td", setting.bits, data_v=setting.bits),
        tag("td", setting.defense, data_v=setting.defense, class_="text"),
    ]
    return tag(
        "tr",
        *cells,
        id=slug,
        data_bits=setting.bits,
        data_name=row.name,
        class_="unreliable" if row.unreliable else None,
    )


def _value(
    value: float, interval: tuple[float, float] | None, title: str, best: bool = False, doubt: bool = False
) -> Markup:
    span = None if interval is None else tag("span", f"{interval[0]:.3f} to {interval[1]:.3f}", class_="span")
    kind = " ".join(name for name, holds in (("best", best), ("doubt", doubt)) if holds)
    shown = tag("span", number(value), class_="n")
    return tag("td", shown, span, data_v=repr(value), title=title, class_=kind or None)


def _details(row: RankedModel) -> Markup:
    """What stands behind a row: models, training, every attack, the flags with their remedies."""
    setting = row.setting
    pairs: list[tuple[Child, Child]] = [
        ("models", ", ".join(record.own.setting.model for record in row.records)),
        ("objective", setting.objective),
        ("training attack", setting.training_attack or "none"),
        ("under each attack", ", ".join(f"{name} {value:.3f}" for name, value in row.attacks.items())),
        ("chance", number(row.chance)),
    ]
    pairs += [
        (f"{flag.id} {flag.level}", f"{flag.value:g}, threshold {flag.threshold:g}: {flag.remedy}")
        for flag in row.flags
    ]
    if not row.checked:
        pairs.append(("checks", "none was run on these numbers: 'robusthash check' does"))
    for column, aggregate in row.aggregate.items():
        if not aggregate.best:
            low, high = aggregate.interval
            text = f"{aggregate.difference:+.3f} ({low:+.3f} to {high:+.3f}), p {aggregate.p_holm:.2g} after Holm"
            pairs.append((f"{column}, from the best", text))
    return html.facts(pairs)


# ---------------------------------------------------------------------------------------------- charts


def _scatter(board: Leaderboard, place: int) -> Markup:
    """Best-known value over clean value; hovering a point shows its row."""
    kinds = sorted({row.setting.defense for row in board.rows})
    tones: dict[str, Tone] = {kind: TONES[i % len(TONES)] for i, kind in enumerate(kinds)}
    points = []
    for rank, row in enumerate(board.rows, 1):
        mark = "UNRELIABLE: " if row.unreliable else ""
        text = f"{mark}{row.name}: clean {number(row.clean)}, best-known worst case {row.known.text()}"
        points.append(
            Point(
                tones[row.setting.defense],
                row.clean,
                row.known.value,
                row.clean_interval,
                row.known.interval,
                label=str(rank),
                title=text,
                of=_id(place, rank),
                crossed=row.unreliable,
            )
        )
    across = [value for point in points for value in (point.x, *(point.x_interval or ()))]
    up = [value for point in points for value in (point.y, *(point.y_interval or ()))]
    best = board.rows[0]
    return scatter_chart(
        "Robustness over accuracy",
        f"{len(points)} models; the most robust is {best.name} with {number(best.known.value)} at {number(best.clean)}",
        points,
        list(tones.items()),
        Axis(f"clean {board.measure}", _ticks([*across, best.chance])),
        Axis(f"best-known {board.setting.key.name('worst')}", _ticks([0.0, *up, best.chance])),
        ("chance", best.chance),
        "Numbers are those of the table, thin lines 95 % intervals; on the dashed diagonal attacks change nothing.",
    )


def _ticks(values: Sequence[float]) -> list[float]:
    """Ticks over values in [0, 1], of one digit each."""
    step = 1 if max(values) - min(values) <= 0.5 else 2
    first, last = math.floor(10 * min(values) / step), math.ceil(10 * max(values) / step)
    return [place * step / 10 for place in range(first, max(last, first + 1) + 1)]


def _eps_chart(board: Leaderboard) -> Markup | None:
    """Worst case over eps of the first rows whose records hold the curve, of the first seed."""
    series: list[Series] = []
    for row in board.rows:
        curve = row.records[0].own.curves.get(board.setting.key.name("worst", option="eps"))
        if curve is not None and len(series) < _DRAWN:
            name = next(axis for axis in curve if axis != "eps")
            tone, mark = TONES[len(series) % len(TONES)], " (UNRELIABLE)" if row.unreliable else ""
            eps = [value * 255 for value in curve["eps"].tolist()]
            series.append(
                Series(f"{row.name}{mark}", eps, curve[name].tolist(), tone, row.unreliable, dots=True)
            )
    if not series:
        return None
    furthest = max(line.x[-1] for line in series)
    return line_chart(
        f"{board.setting.key.name('worst')} over eps",
        "; ".join(f"{line.name} ends at {line.y[-1]:.3f}" for line in series),
        series,
        Axis("eps, in 1/255", [furthest * step / 4 for step in range(5)]),
        Axis(board.setting.key.name("worst"), UNIT),
        ("chance", board.rows[0].chance),
    )


def _pr(board: Leaderboard) -> Markup | None:
    """Precision over recall of the first rows: clean, and dashed under the single attack of lowest mean."""
    lines: dict[str, tuple[EvalResult, Tone, bool]] = {}
    for place, row in enumerate(board.rows[: _DRAWN // 2]):
        record, tone = row.records[0], TONES[place % len(TONES)]
        if record.clean is not None and "PR" in record.clean.curves:
            lines[f"{row.name}, clean"] = (record.clean, tone, False)
        curved = {n: r for n, r in record.parts.items() if "PR" in r.curves and board.measure in r.values}
        if curved:
            name = min(curved, key=lambda attack: curved[attack].values[board.measure])
            lines[f"{row.name}, {name}"] = (curved[name], tone, True)
    seeds = " First training seed of each." if board.methods else ""
    return (
        pr_chart(lines, f"The three best models, clean and under their strongest single attack.{seeds}")
        if lines
        else None
    )
