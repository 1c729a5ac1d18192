"""Numbers -> matplotlib figures for papers: one style, readable in grey and to the colour-blind, fonts
embedded.

Every function takes plain numbers and gives a ``Figure``; ``save`` writes it as PDF and PNG. No pyplot, no
state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from robusthash.core.atomic_files import write_all_aside

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, ordered so that neighbours differ in lightness; dashes and markers say the same in
# grey
_COLOURS = ("#0072B2", "#D55E00", "#7A7A7A", "#56B4E9", "#009E73", "#CC79A7", "#E69F00", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)), (0, (8, 2)), (0, (3, 1)), "-", (0, (2, 2)))
_HATCHES = ("", "////", "....", "\\\\\\\\", "xxxx", "----", "++++", "oo")
_STYLE: Any = {  # matplotlib types its settings by their names
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "hatch.linewidth": 0.6,
    "pdf.fonttype": 42,  # embedded as TrueType, so that publishers and editors can read the text
    "savefig.dpi": 200,
}

Interval = tuple[float, float]
Measured = tuple[float, Interval]
"""A value and its 95 % interval."""


def require_matplotlib() -> None:
    """Raise before any work is done where figures cannot be drawn."""
    try:
        import matplotlib  # noqa: F401 - looked for, not used
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install robusthash[figures]") from error


@contextmanager
def _styled(width: float, height: float) -> Iterator[Figure]:
    require_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        yield Figure(figsize=(width, height))


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write ``stem.pdf`` and ``stem.png``; both are whole before either replaces an older one."""
    from matplotlib import rc_context

    paths = [stem.with_name(f"{stem.name}.{ending}") for ending in ("pdf", "png")]
    with rc_context(_STYLE), write_all_aside(paths) as asides:
        for aside in asides:
            # without a date the same numbers give the same file
            figure.savefig(aside, metadata={"CreationDate": None} if aside.suffix == ".pdf" else None)
    return paths


@dataclass(frozen=True)
class Line:
    """One line; ``low`` and ``high``, where given, are a band around it."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()

    def __post_init__(self) -> None:
        lengths = {len(part) for part in (self.x, self.y, self.low, self.high) if len(part)}
        if len(lengths) != 1 or len(self.x) != len(self.y) or len(self.low) != len(self.high):
            raise ValueError(
                f"the line {self.name!r} needs x and y of one length, at least 1, and both edges or none"
            )


def line_plot(
    lines: Sequence[Line],
    x: str,
    y: str,
    *,
    references: Mapping[str, float] | None = None,
    ticks: Sequence[str] = (),
    unit: bool = False,
    log: bool = False,
    whiskers: bool = False,
) -> Figure:
    """Lines over two axes: curves over budgets, precision and recall, sweeps, convergence.

    Args:
        references: named heights, such as chance.
        ticks: names of the places 0, 1, ... on the x axis, where x is no number.
        unit: y starts at 0.
        log: logarithmic y.
        whiskers: intervals as bars beside each other, where bands would lie on one another.
    """
    if not lines:
        raise ValueError("a line plot needs at least one line")
    with _styled(4.6, 3.1) as figure:
        from matplotlib.ticker import MaxNLocator

        axes = figure.subplots()
        for number, line in enumerate(lines):
            style = number % len(_COLOURS)
            few = len(line.x) <= 25
            axes.plot(
                line.x,
                line.y,
                color=_COLOURS[style],
                linestyle=_DASHES[style],
                marker=_MARKERS[style],
                markevery=1 if few else max(1, len(line.x) // 12),
                label=line.name,
            )
            if len(line.low) and whiskers:
                place = (number - (len(lines) - 1) / 2) * 0.08
                axes.errorbar(
                    [at + place for at in line.x],
                    line.y,
                    _whiskers(np.array(line.y), list(zip(line.low, line.high, strict=True))),
                    color=_COLOURS[style],
                    linestyle="none",
                    elinewidth=1.0,
                    capsize=2,
                )
            elif len(line.low):
                axes.fill_between(line.x, line.low, line.high, color=_COLOURS[style], alpha=0.18, linewidth=0)
        for name, height in (references or {}).items():
            _level(axes, name, height)
        if ticks:
            axes.set_xticks(range(len(ticks)), ticks)
        elif all(float(at).is_integer() for line in lines for at in line.x):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if unit:
            axes.set_ylim(bottom=0.0)
        if log:
            axes.set_yscale("log")
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        _legend(figure, axes, len(lines))
    return figure


def _level(axes: Any, name: str, height: float) -> None:
    """A dotted line with its name beside the axes, where no data lies."""
    axes.axhline(height, color="#333333", linewidth=1.0, linestyle=(0, (1, 2)))
    axes.annotate(
        name,
        (1.0, height),
        (3, 0),
        ("axes fraction", "data"),
        "offset points",
        ha="left",
        va="center",
        fontsize=7.5,
    )


def _legend(figure: Figure, axes: Any, entries: int) -> None:
    """Below the axes, so that it never lies on the data."""
    handles, labels = axes.get_legend_handles_labels()
    longest = max(len(label) for label in labels)
    columns = max(1, min(entries, int(62 / (longest + 6))))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8)


def bar_plot(groups: Mapping[str, Mapping[str, Measured]], y: str, chance: float | None = None) -> Figure:
    """Bars with intervals: a group for each name (an attack), in it a bar for each model that has it.

    Args:
        groups: by group, then by model.
    """
    models = list(dict.fromkeys(model for group in groups.values() for model in group))
    if not models:
        raise ValueError("a bar plot needs at least one value")
    width = 0.8 / len(models)
    with _styled(max(4.6, 1.0 + len(groups) * (0.25 + 0.17 * len(models))), 3.4) as figure:
        axes = figure.subplots()
        for number, model in enumerate(models):
            places = [place for place, group in enumerate(groups.values()) if model in group]
            found = [group[model] for group in groups.values() if model in group]
            values = np.array([value for value, _ in found])
            axes.bar(
                [place + (number - (len(models) - 1) / 2) * width for place in places],
                values,
                width * 0.92,
                color=_COLOURS[number % len(_COLOURS)],
                edgecolor="white",
                hatch=_HATCHES[number % len(_HATCHES)],
                yerr=_whiskers(values, [interval for _, interval in found]),
                error_kw={"elinewidth": 0.9, "capsize": 1.5, "ecolor": "#333333"},
                label=model,
            )
        if chance is not None:
            _level(axes, "chance", chance)
        axes.set_xticks(range(len(groups)), list(groups), rotation=25, ha="right", rotation_mode="anchor")
        axes.set_ylabel(y)
        axes.grid(visible=False, axis="x")
        _legend(figure, axes, len(models))
    return figure


def _whiskers(values: Any, intervals: Sequence[Interval]) -> Any:
    """(2, n) lengths below and above; an interval of another estimate may leave the value outside by a
    hair."""
    ends = np.array(intervals).T
    return np.stack([values - ends[0], ends[1] - values]).clip(min=0.0)


def scatter_plot(
    points: Mapping[str, tuple[Measured, Measured]], x: str, y: str, chance: float | None = None
) -> Figure:
    """Each model once, its value across and up with both intervals; the diagonal is where nothing is lost."""
    if not points:
        raise ValueError("a scatter plot needs at least one point")
    with _styled(4.6, 3.9) as figure:
        axes = figure.subplots()
        for number, (name, (across, up)) in enumerate(points.items()):
            style = number % len(_COLOURS)
            axes.errorbar(
                [across[0]],
                [up[0]],
                xerr=_whiskers(np.array([across[0]]), [across[1]]),
                yerr=_whiskers(np.array([up[0]]), [up[1]]),
                color=_COLOURS[style],
                marker=_MARKERS[style],
                markersize=7,
                elinewidth=1.0,
                capsize=2,
                linestyle="none",
                label=name,
            )
        end = max(max(across[1][1], up[1][1]) for across, up in points.values()) * 1.05
        axes.plot([0, end], [0, end], color="#999999", linewidth=0.9, zorder=0)
        if chance is not None:
            _level(axes, "chance", chance)
        axes.set_xlim(0, end)
        axes.set_ylim(0, end)
        axes.set_aspect("equal")
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        _legend(figure, axes, len(points))
    return figure


def matrix_plot(
    rows: Sequence[str], columns: Sequence[str], values: Any, x: str, y: str, measure: str
) -> Figure:
    """A heat map with its numbers, such as a transfer matrix: surrogates down, victims across. NaN is left
    blank."""
    values = np.asarray(values, dtype=float)
    if values.shape != (len(rows), len(columns)):
        raise ValueError(f"{len(rows)} rows and {len(columns)} columns, but values of shape {values.shape}")
    with _styled(2.2 + 0.62 * len(columns), 1.7 + 0.42 * len(rows)) as figure:
        axes = figure.subplots()
        low, high = float(np.nanmin(values)), float(np.nanmax(values))
        image = axes.imshow(values, cmap="cividis", vmin=low, vmax=high, aspect="auto")
        for row, column in np.argwhere(np.isfinite(values)):
            dark = values[row, column] < (low + high) / 2
            text = f"{values[row, column]:.2f}"
            axes.text(
                column, row, text, ha="center", va="center", fontsize=8, color="white" if dark else "black"
            )
        axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(rows)), rows)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(visible=False)
        figure.colorbar(image, ax=axes, label=measure, shrink=0.9)
    return figure


def band_plot(maps: Mapping[str, tuple[Any, Any]], measure: str) -> Figure:
    """Heat maps of band attributions side by side on one scale, with a small circle where a value is within
    two standard errors of 0 and a minus where it is below that.

    The scale is that of the square root, for the lowest bands outweigh all others.

    Args:
        maps: by model, (n, n) values and (n, n) standard errors; u runs down, v across.
    """
    if not maps:
        raise ValueError("a heat map needs at least one model")
    with _styled(1.0 + 1.65 * len(maps), 2.15) as figure:
        from matplotlib.colors import PowerNorm

        panels = figure.subplots(1, len(maps), squeeze=False, sharey=True)[0]
        highest = max(float(np.asarray(values).max()) for values, _ in maps.values())
        for panel, (name, (values, errors)) in zip(panels, maps.items(), strict=True):
            values, errors = np.asarray(values), np.asarray(errors)
            image = panel.imshow(values.clip(min=0), cmap="cividis", norm=PowerNorm(0.5, 0.0, highest))
            for u, v in np.ndindex(values.shape):
                if values[u, v] <= 2 * errors[u, v]:
                    mark = "−" if values[u, v] < -2 * errors[u, v] else "∘"
                    panel.text(v, u, mark, ha="center", va="center", fontsize=7, color="white")
            panel.set_title(name, fontsize=9)
            panel.set_xlabel("v (across)")
            panel.set_xticks(range(values.shape[1]))
            panel.set_yticks(range(values.shape[0]))
            panel.tick_params(labelsize=7)
            panel.grid(visible=False)
        panels[0].set_ylabel("u (down)")
        figure.colorbar(image, ax=list(panels), label=measure, shrink=0.9, pad=0.02)
    return figure
