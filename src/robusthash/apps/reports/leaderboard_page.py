"""Boards -> one page that opens from disk: sortable tables, filters, robustness over accuracy, curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from robusthash.apps.experiment.certify_run import certified_text
from robusthash.apps.experiment.leaderboard import (
    Leaderboard,
    claim_text,
    legend,
    remark,
    setting_pairs,
    source_text,
)
from robusthash.apps.reports.charts import (
    TONES,
    UNIT,
    Chart,
    ChartAxis,
    LineChart,
    ScatterChart,
    ScatterPoint,
    Series,
    Tone,
)
from robusthash.apps.reports.pages import number, render
from robusthash.apps.reports.run_report import pr_chart
from robusthash.metrics.results import EvalResult

_DRAWN = 6  # models whose curves a chart shows


def leaderboard_page(boards: Sequence[Leaderboard]) -> str:
    """The whole page. Filters and order live in its address, to be linked: ``#bits=32&sort=hrs.up``."""
    rows = [row for board in boards for row in board.rows]
    return render(
        "leaderboard.html.j2",
        title="Leaderboard",
        rows=len(rows),
        legend=legend(boards),
        unreliable=[row.name for row in rows if row.unreliable],
        filters=[
            ("data", "data set", sorted({board.data for board in boards})),
            ("threat", "threat", sorted({board.setting.threat for board in boards})),
            ("bits", "bits", sorted({row.setting.bits for row in rows})),
        ],
        source_text=source_text,
        claim_text=claim_text,
        certified_text=certified_text,
        remark=remark,
        boards=[_board(board, place, boards) for place, board in enumerate(boards)],
    )


def _board(board: Leaderboard, place: int, boards: Sequence[Leaderboard]) -> dict[str, Any]:
    """A board as the template takes it."""
    return {
        "board": board,
        "low": board.setting.key.name("worst"),
        "targeted": any(row.targeted is not None for row in board.rows),
        "certified": any(row.certified for row in board.rows),
        "place": place,
        "scatter": _scatter(board, place) if len(board.rows) > 1 else None,
        "eps_chart": _eps_chart(board),
        "pr_chart": _pr_chart(board),
        "setting": setting_pairs(board, boards),
    }


# ---------------------------------------------------------------------------------------------- charts


def _scatter(board: Leaderboard, place: int) -> Chart:
    """Best-known value over clean value; hovering a point shows its row."""
    defenses = sorted({row.setting.defense for row in board.rows})
    points = []
    for rank, row in enumerate(board.rows, 1):
        mark = "UNRELIABLE: " if row.unreliable else ""
        title = f"{mark}{row.name}: clean {number(row.clean)}, best-known worst case {row.known.text()}"
        values = row.clean, row.known.value, row.clean_interval, row.known.interval
        points.append(
            ScatterPoint(
                row.setting.defense, *values, str(rank), title, f"row-{place}-{rank}", crossed=row.unreliable
            )
        )
    across = [value for point in points for value in (point.x, *(point.x_interval or ()))]
    up = [value for point in points for value in (point.y, *(point.y_interval or ()))]
    best = board.rows[0]
    highest = f"{best.name} with {number(best.known.value)} at {number(best.clean)}"
    return ScatterChart(
        title="Robustness over accuracy",
        description=f"{len(points)} models; the most robust is {highest}",
        points=points,
        tones={defense: TONES[i % len(TONES)] for i, defense in enumerate(defenses)},
        x=ChartAxis(f"clean {board.measure}", _ticks([*across, best.chance])),
        y=ChartAxis(f"best-known {board.setting.key.name('worst')}", _ticks([0.0, *up, best.chance])),
        reference=("chance", best.chance),
    )


def _ticks(values: Sequence[float]) -> list[float]:
    """Ticks over values in [0, 1], of one digit each."""
    step = 1 if max(values) - min(values) <= 0.5 else 2
    first, last = math.floor(10 * min(values) / step), math.ceil(10 * max(values) / step)
    return [place * step / 10 for place in range(first, max(last, first + 1) + 1)]


def _eps_chart(board: Leaderboard) -> Chart | None:
    """Worst case over eps of the first rows whose records hold the curve, of the first seed."""
    series: list[Series] = []
    for row in board.rows:
        curve = row.records[0].own.curves.get(board.setting.key.name("worst", option="eps"))
        if curve is not None and len(series) < _DRAWN:
            name = next(axis for axis in curve if axis != "eps")
            label = f"{row.name}{' (UNRELIABLE)' * row.unreliable}"
            eps = [value * 255 for value in curve["eps"].tolist()]
            tone = TONES[len(series) % len(TONES)]
            series.append(Series(label, eps, curve[name].tolist(), tone, row.unreliable, dots=True))
    if not series:
        return None
    furthest = max(line.x[-1] for line in series)
    return LineChart(
        title=f"{board.setting.key.name('worst')} over eps",
        description="; ".join(f"{line.name} ends at {line.y[-1]:.3f}" for line in series),
        series=series,
        x=ChartAxis("eps, in 1/255", [furthest * step / 4 for step in range(5)]),
        y=ChartAxis(board.setting.key.name("worst"), UNIT),
        reference=("chance", board.rows[0].chance),
    )


def _pr_chart(board: Leaderboard) -> Chart | None:
    """Precision over recall of the first rows: clean, and dashed under the single attack of lowest mean."""
    curves: dict[str, tuple[EvalResult, Tone, bool]] = {}
    for place, row in enumerate(board.rows[: _DRAWN // 2]):
        record, tone = row.records[0], TONES[place % len(TONES)]
        if record.clean is not None and "PR" in record.clean.curves:
            curves[f"{row.name}, clean"] = (record.clean, tone, False)
        drawn = {n: r for n, r in record.parts.items() if "PR" in r.curves and board.measure in r.values}
        if drawn:
            name = min(drawn, key=lambda attack: drawn[attack].values[board.measure])
            curves[f"{row.name}, {name}"] = (drawn[name], tone, True)
    return pr_chart(curves)
