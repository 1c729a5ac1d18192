"""Descriptions of figures, drawn as inline SVG by the templates of pages and by matplotlib for papers.

In SVG, colours are CSS classes ``tone-a`` to ``tone-f`` of the page, so that charts follow its light or dark
scheme; dashes and hollow dots say the same without colour. In papers, one style serves print in grey and the
colour-blind, with fonts embedded; no pyplot, no state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from robusthash.core.atomic_files import write_all_aside

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Tone = Literal["a", "b", "c", "d", "e", "f"]
TONES: tuple[Tone, ...] = ("a", "b", "d", "e", "f", "c")
UNIT = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
Interval = tuple[float, float]

# ---------------------------------------------------------------------------------------------- descriptions


@dataclass(frozen=True)
class ChartAxis:
    """A linear axis from the first to the last tick; without ticks, which only papers allow, from the data.

    Args:
        names: of the ticks (of 0, 1, ... without ticks), in papers.
        from_zero, log: where the axis starts, and its scale, in papers.
    """

    label: str
    ticks: Sequence[float] = ()
    names: Sequence[str] = ()
    from_zero: bool = False
    log: bool = False

    def share(self, value: float) -> float:
        """Place of ``value`` between the ends, 0 to 1."""
        first, last = self.ticks[0], self.ticks[-1]
        return min(max((value - first) / (last - first), 0.0), 1.0)


@dataclass(frozen=True)
class Series:
    """One line. ``low`` and ``high``, where given, draw a band around it."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    tone: Tone = "a"
    dashed: bool = False
    dots: bool = False
    low: Sequence[float] = ()
    high: Sequence[float] = ()

    def __post_init__(self) -> None:
        lengths = {len(self.x), len(self.y), *(len(side) for side in (self.low, self.high) if len(side))}
        if len(lengths) != 1 or len(self.low) != len(self.high):
            raise ValueError(f"series {self.name!r} has parts of different length: {sorted(lengths)}")
        if len(self.x) == 0:
            raise ValueError(f"series {self.name!r} has no points")


@dataclass(frozen=True)
class Dot:
    """A value with its interval, of one of the series compared."""

    series: str
    value: float
    low: float
    high: float
    hollow: bool = False


@dataclass(frozen=True)
class ScatterPoint:
    """One of the things compared, in a plane; intervals as thin lines, a cross where it is not to be trusted.

    Args:
        label: next to it. title: when hovered. of: id of the element that it stands for.
    """

    series: str
    x: float
    y: float
    x_interval: Interval | None = None
    y_interval: Interval | None = None
    label: str = ""
    title: str = ""
    of: str = ""
    crossed: bool = False


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A figure with its title, a sentence for screen readers, and a named line such as chance."""

    form: ClassVar[str]  # macro of the template that draws it
    width: ClassVar[int] = 430  # of the SVG: narrow, so that text stays legible on a phone
    right: ClassVar[int] = 418
    top: ClassVar[int] = 10

    x: ChartAxis
    title: str = ""
    description: str = ""
    reference: tuple[str, float] | None = None

    @property
    def left(self) -> int:
        return 46

    @property
    def height(self) -> int:
        return 290

    @property
    def bottom(self) -> int:
        return self.height - 42

    def across(self, value: float) -> float:
        """Horizontal place of a value in the SVG."""
        return round(self.left + self.x.share(value) * (self.right - self.left), 1)


@dataclass(frozen=True, kw_only=True)
class Plane(Chart):
    """A figure over two axes."""

    y: ChartAxis

    def up(self, value: float) -> float:
        """Vertical place of a value in the SVG."""
        return round(self.bottom - self.y.share(value) * (self.bottom - self.top), 1)


@dataclass(frozen=True, kw_only=True)
class LineChart(Plane):
    """Lines over two axes: curves over budgets, precision and recall, sweeps, convergence.

    Args:
        whiskers: in papers, intervals as bars side by side, where bands would lie on one another.
    """

    form = "lines"
    series: Sequence[Series]
    whiskers: bool = False

    def points(self, x: Sequence[float], y: Sequence[float]) -> str:
        """Places as an SVG element takes them."""
        return " ".join(f"{self.across(a)},{self.up(b)}" for a, b in zip(x, y, strict=True))


@dataclass(frozen=True, kw_only=True)
class IntervalChart(Chart):
    """A row for each name and in it a dot with its interval for each series; in papers, groups of bars.

    Args:
        tones: by series, for the legend; unused in papers.
    """

    form = "intervals"
    step: ClassVar[int] = 34
    rows: Sequence[tuple[str, Sequence[Dot]]]
    tones: Mapping[str, Tone] = field(default_factory=dict)

    @property
    def left(self) -> int:
        return 30 + int(6.6 * max(len(name) for name, _ in self.rows))

    @property
    def height(self) -> int:
        return self.top + self.step * len(self.rows) + 42


@dataclass(frozen=True, kw_only=True)
class ScatterChart(Plane):
    """Points over two linear axes and the diagonal of equal values; a reference is a line on both axes.

    Args:
        tones: by series, for the legend; unused in papers.
    """

    form = "scatter"
    points: Sequence[ScatterPoint]
    tones: Mapping[str, Tone] = field(default_factory=dict)

    @property
    def diagonal(self) -> Interval:
        """The values that both axes show."""
        return max(self.x.ticks[0], self.y.ticks[0]), min(self.x.ticks[-1], self.y.ticks[-1])


# ---------------------------------------------------------------------------------------------- papers

# Okabe and Ito's colours, so ordered that neighbours differ in lightness; dashes and markers say the same
_COLOURS = ("#0072B2", "#D55E00", "#7A7A7A", "#56B4E9", "#009E73", "#CC79A7", "#E69F00", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)), (0, (8, 2)), (0, (3, 1)), "-", (0, (2, 2)))
_HATCHES = ("", "////", "....", "\\\\\\\\", "xxxx", "----", "++++", "oo")
_STYLE: Any = {  # matplotlib types its settings by their names
    **{"font.size": 9, "font.family": "DejaVu Sans", "axes.spines.top": False, "axes.spines.right": False},
    **{"axes.grid": True, "axes.axisbelow": True, "grid.color": "#DDDDDD", "grid.linewidth": 0.6},
    **{"lines.linewidth": 1.6, "lines.markersize": 5, "hatch.linewidth": 0.6, "savefig.dpi": 200},
    **{"text.parse_math": False, "legend.frameon": False, "figure.constrained_layout.use": True},
    "pdf.fonttype": 42,  # embedded as TrueType, so that publishers and editors can read the text
}


def require_matplotlib() -> None:
    """Raise before any work is done where figures cannot be drawn."""
    try:
        import matplotlib  # noqa: F401 - looked for, not used
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install robusthash[figures]") from error


@contextmanager
def paper_figure(width: float, height: float) -> Iterator[Figure]:
    """An empty figure, to be filled in the style of papers; sizes in inches."""
    require_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        yield Figure(figsize=(width, height))


def save(figure: Figure | Chart, stem: Path) -> list[Path]:
    """Write ``stem.pdf`` and ``stem.png``; both are whole before either replaces an older one."""
    require_matplotlib()
    from matplotlib import rc_context

    drawn = draw(figure) if isinstance(figure, Chart) else figure
    paths = [stem.with_name(f"{stem.name}.{ending}") for ending in ("pdf", "png")]
    with rc_context(_STYLE), write_all_aside(paths) as asides:
        for aside in asides:
            # without a date the same numbers give the same file
            drawn.savefig(aside, metadata={"CreationDate": None} if aside.suffix == ".pdf" else None)
    return paths


def draw(chart: Chart) -> Figure:
    """Draw a chart by matplotlib.

    Raises:
        ValueError: nothing to draw.
    """
    if isinstance(chart, LineChart) and chart.series:
        return _draw_lines(chart)
    if isinstance(chart, IntervalChart) and any(dots for _, dots in chart.rows):
        return _draw_bars(chart)
    if isinstance(chart, ScatterChart) and chart.points:
        return _draw_points(chart)
    raise ValueError(f"a figure of {chart.form} needs at least one value")


def _draw_lines(chart: LineChart) -> Figure:
    with paper_figure(4.6, 3.1) as figure:
        from matplotlib.ticker import MaxNLocator

        axes = figure.subplots()
        for number, line in enumerate(chart.series):
            look = _look(number)
            every = 1 if len(line.x) <= 25 else max(1, len(line.x) // 12)
            dashes = _DASHES[number % len(_DASHES)]
            axes.plot(line.x, line.y, linestyle=dashes, markevery=every, label=line.name, **look)
            if len(line.low) and chart.whiskers:
                shift = (number - (len(chart.series) - 1) / 2) * 0.08
                ends = _whiskers(line.y, list(zip(line.low, line.high, strict=True)))
                bars: dict[str, Any] = {"linestyle": "none", "elinewidth": 1.0, "capsize": 2}
                axes.errorbar([at + shift for at in line.x], line.y, ends, color=look["color"], **bars)
            elif len(line.low):
                axes.fill_between(line.x, line.low, line.high, color=look["color"], alpha=0.18, linewidth=0)
        _draw_reference(axes, chart)
        if chart.x.names:
            axes.set_xticks(chart.x.ticks or range(len(chart.x.names)), chart.x.names)
        elif all(float(at).is_integer() for line in chart.series for at in line.x):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if chart.y.from_zero:
            axes.set_ylim(bottom=0.0)
        if chart.y.log:
            axes.set_yscale("log")
        axes.set(xlabel=chart.x.label, ylabel=chart.y.label)
        _draw_legend(figure, axes, len(chart.series))
    return figure


def _draw_bars(chart: IntervalChart) -> Figure:
    series = list(dict.fromkeys(dot.series for _, dots in chart.rows for dot in dots))
    width = 0.8 / len(series)
    with paper_figure(max(4.6, 1.0 + len(chart.rows) * (0.25 + 0.17 * len(series))), 3.4) as figure:
        axes = figure.subplots()
        error = {"elinewidth": 0.9, "capsize": 1.5, "ecolor": "#333333"}
        for number, name in enumerate(series):
            bars = [(i, dot) for i, (_, dots) in enumerate(chart.rows) for dot in dots if dot.series == name]
            places = [place + (number - (len(series) - 1) / 2) * width for place, _ in bars]
            values = [dot.value for _, dot in bars]
            ends = _whiskers(values, [(dot.low, dot.high) for _, dot in bars])
            hatch = _HATCHES[number % len(_HATCHES)]
            look: dict[str, Any] = {"color": _look(number)["color"], "edgecolor": "white", "hatch": hatch}
            axes.bar(places, values, width * 0.92, yerr=ends, error_kw=error, label=name, **look)
        _draw_reference(axes, chart)
        names = [name for name, _ in chart.rows]
        axes.set_xticks(range(len(names)), names, rotation=25, ha="right", rotation_mode="anchor")
        axes.set_ylabel(chart.x.label)
        axes.grid(visible=False, axis="x")
        _draw_legend(figure, axes, len(series))
    return figure


def _draw_points(chart: ScatterChart) -> Figure:
    with paper_figure(4.6, 3.9) as figure:
        axes = figure.subplots()
        end = 0.0
        for number, point in enumerate(chart.points):
            across, up = point.x_interval or (point.x,) * 2, point.y_interval or (point.y,) * 2
            ends = {"xerr": _whiskers([point.x], [across]), "yerr": _whiskers([point.y], [up])}
            bars: dict[str, Any] = {"elinewidth": 1.0, "capsize": 2, "linestyle": "none", "markersize": 7}
            axes.errorbar([point.x], [point.y], label=point.series, **ends, **bars, **_look(number))
            end = max(end, across[1] * 1.05, up[1] * 1.05)
        axes.plot([0, end], [0, end], color="#999999", linewidth=0.9, zorder=0)
        _draw_reference(axes, chart)
        axes.set(xlim=(0, end), ylim=(0, end), aspect="equal", xlabel=chart.x.label, ylabel=chart.y.label)
        _draw_legend(figure, axes, len(chart.points))
    return figure


def _look(number: int) -> dict[str, Any]:
    return {"color": _COLOURS[number % len(_COLOURS)], "marker": _MARKERS[number % len(_MARKERS)]}


def _whiskers(values: Sequence[float], intervals: Sequence[Interval]) -> Any:
    """(2, n) lengths below and above; an interval of another estimate may just leave the value outside."""
    middle, (low, high) = np.array(values), np.array(intervals).T
    return np.stack([middle - low, high - middle]).clip(min=0.0)


def _draw_reference(axes: Any, chart: Chart) -> None:
    """A dotted line with its name next to the axes, where no data lies."""
    if chart.reference is None:
        return
    name, height = chart.reference
    axes.axhline(height, color="#333333", linewidth=1.0, linestyle=(0, (1, 2)))
    place = ("axes fraction", "data"), "offset points"
    axes.annotate(name, (1.0, height), (3, 0), *place, ha="left", va="center", fontsize=7.5)


def _draw_legend(figure: Figure, axes: Any, entries: int) -> None:
    """Below the axes, so that it never lies on the data."""
    handles, labels = axes.get_legend_handles_labels()
    columns = max(1, min(entries, int(62 / (max(map(len, labels)) + 6))))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8)
