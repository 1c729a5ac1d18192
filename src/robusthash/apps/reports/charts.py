"""Numbers -> inline SVG: line charts with bands, and rows of dots with intervals. Titled, labelled, with
legends.

Colours are CSS classes ``tone-a`` to ``tone-f`` of the page, so that charts follow its light or dark scheme;
dashes and hollow dots say the same without colour.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from robusthash.apps.reports.html import Markup, tag

Tone = Literal["a", "b", "c", "d", "e", "f"]
TONES: tuple[Tone, ...] = ("a", "b", "d", "e", "f", "c")

_WIDTH, _HEIGHT = 430, 290  # narrow, so that text stays legible on a phone
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 10, 42


@dataclass(frozen=True)
class Series:
    """One line. ``low`` and ``high``, where given, draw a band around it."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    tone: Tone
    dashed: bool = False
    dots: bool = False
    low: Sequence[float] = ()
    high: Sequence[float] = ()

    def __post_init__(self) -> None:
        lengths = {len(self.x), len(self.y), *(len(side) for side in (self.low, self.high) if side)}
        if len(lengths) != 1:
            raise ValueError(f"series {self.name!r} has parts of different length: {sorted(lengths)}")
        if len(self.x) == 0:
            raise ValueError(f"series {self.name!r} has no points")


@dataclass(frozen=True)
class Axis:
    """A linear axis from the first to the last tick."""

    label: str
    ticks: Sequence[float]
    format: str = "{:g}"

    def share(self, value: float) -> float:
        """Where ``value`` lies between the ends, 0 to 1."""
        first, last = self.ticks[0], self.ticks[-1]
        return (value - first) / (last - first)


UNIT = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def line_chart(
    title: str,
    description: str,
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    reference: tuple[str, float] | None = None,
    caption: str = "",
) -> Markup:
    """A figure with lines over two linear axes.

    Args:
        description: what the chart shows in a sentence, for screen readers.
        reference: name and height of a horizontal line, such as chance.
        caption: text below the legend.
    """

    def across(value: float) -> float:
        return round(_LEFT + x.share(value) * (_WIDTH - _LEFT - _RIGHT), 1)

    def up(value: float) -> float:
        return round(_HEIGHT - _BOTTOM - y.share(value) * (_HEIGHT - _TOP - _BOTTOM), 1)

    drawn: list[Markup] = _frame(x, y, across, up)
    if reference is not None:
        level = up(reference[1])
        drawn.append(tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=level, y2=level, class_="reference"))
    for line in series:
        points = [f"{across(a)},{up(b)}" for a, b in zip(line.x, line.y, strict=True)]
        parts = []
        if line.low:
            edge = [f"{across(a)},{up(b)}" for a, b in zip(line.x, line.high, strict=True)]
            back = [f"{across(a)},{up(b)}" for a, b in zip(line.x, line.low, strict=True)]
            parts.append(tag("polygon", points=" ".join([*edge, *reversed(back)]), class_="band"))
        parts.append(
            tag("polyline", points=" ".join(points), class_="line dashed" if line.dashed else "line")
        )
        if line.dots:
            parts += [
                tag("circle", cx=across(a), cy=up(b), r=3.2, class_="hollow" if line.dashed else "dot")
                for a, b in zip(line.x, line.y, strict=True)
            ]
        drawn.append(tag("g", *parts, class_=f"tone-{line.tone}"))
    keys = [(line.name, _swatch(line.tone, line.dashed)) for line in series]
    if reference is not None:
        keys.append((reference[0], tag("line", x1=1, x2=25, y1=6, y2=6, class_="reference")))
    return _figure(title, description, drawn, _HEIGHT, keys, caption)


@dataclass(frozen=True)
class Dot:
    """A value with its interval, of one of the things compared."""

    tone: Tone
    value: float
    low: float
    high: float
    hollow: bool = False


def dot_chart(
    title: str,
    description: str,
    rows: Sequence[tuple[str, Sequence[Dot]]],
    keys: Sequence[tuple[str, Tone, bool]],
    x: Axis,
    reference: tuple[str, float] | None = None,
    caption: str = "",
) -> Markup:
    """A figure with one row for each name and, in it, one dot with its interval for each thing compared.

    Args:
        rows: row name and its dots, top down.
        keys: (name, tone, hollow) of each thing compared, for the legend.
    """
    step, left = 34, 30 + int(6.6 * max(len(name) for name, _ in rows))
    height = _TOP + step * len(rows) + _BOTTOM
    bottom = height - _BOTTOM

    def across(value: float) -> float:
        return round(left + x.share(value) * (_WIDTH - left - _RIGHT), 1)

    drawn = []
    for tick in x.ticks:
        drawn.append(tag("line", x1=across(tick), x2=across(tick), y1=_TOP, y2=bottom, class_="grid"))
        drawn.append(tag("text", x.format.format(tick), x=across(tick), y=bottom + 16, text_anchor="middle"))
    drawn.append(tag("text", x.label, x=(left + _WIDTH - _RIGHT) / 2, y=height - 6, text_anchor="middle"))
    if reference is not None:
        place = across(reference[1])
        drawn.append(tag("line", x1=place, x2=place, y1=_TOP, y2=bottom, class_="reference"))
    for number, (name, dots) in enumerate(rows):
        middle = _TOP + step * (number + 0.5)
        drawn.append(tag("text", name, x=left - 14, y=middle + 4, text_anchor="end", class_="row"))
        for place, dot in enumerate(dots):
            height_of_dot = round(middle + (place - (len(dots) - 1) / 2) * 10, 1)
            drawn.append(
                tag(
                    "g",
                    tag(
                        "line",
                        x1=across(dot.low),
                        x2=across(dot.high),
                        y1=height_of_dot,
                        y2=height_of_dot,
                        class_="whisker",
                    ),
                    tag(
                        "circle",
                        cx=across(dot.value),
                        cy=height_of_dot,
                        r=4.2,
                        class_="hollow" if dot.hollow else "dot",
                    ),
                    class_=f"tone-{dot.tone}",
                )
            )
    drawn.append(tag("line", x1=left, x2=_WIDTH - _RIGHT, y1=bottom, y2=bottom, class_="axis"))
    legend = [(name, _dot_swatch(tone, hollow)) for name, tone, hollow in keys]
    if reference is not None:
        legend.append((reference[0], tag("line", x1=1, x2=25, y1=6, y2=6, class_="reference")))
    return _figure(title, description, drawn, height, legend, caption)


@dataclass(frozen=True)
class Point:
    """One of the things compared, in a plane; intervals as thin lines, a cross where it is not to be
    trusted."""

    tone: Tone
    x: float
    y: float
    x_interval: tuple[float, float] | None = None
    y_interval: tuple[float, float] | None = None
    label: str = ""  # beside it
    title: str = ""  # when hovered
    of: str = ""  # id of the element that it stands for
    crossed: bool = False


def scatter_chart(
    title: str,
    description: str,
    points: Sequence[Point],
    keys: Sequence[tuple[str, Tone]],
    x: Axis,
    y: Axis,
    reference: tuple[str, float] | None = None,
    caption: str = "",
) -> Markup:
    """A figure with points over two linear axes and the diagonal of equal values.

    Args:
        keys: (name, tone) for the legend.
        reference: name and value of a line on both axes, such as chance.
    """

    def across(value: float) -> float:
        return round(_LEFT + min(max(x.share(value), 0.0), 1.0) * (_WIDTH - _LEFT - _RIGHT), 1)

    def up(value: float) -> float:
        return round(_HEIGHT - _BOTTOM - min(max(y.share(value), 0.0), 1.0) * (_HEIGHT - _TOP - _BOTTOM), 1)

    drawn = _frame(x, y, across, up)
    least, most = max(x.ticks[0], y.ticks[0]), min(x.ticks[-1], y.ticks[-1])
    ends = {"x1": across(least), "y1": up(least), "x2": across(most), "y2": up(most)}
    if most > least:
        drawn.append(tag("line", **ends, class_="reference"))
    if reference is not None:
        level, place = up(reference[1]), across(reference[1])
        drawn.append(tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=level, y2=level, class_="reference"))
        drawn.append(tag("line", x1=place, x2=place, y1=_TOP, y2=_HEIGHT - _BOTTOM, class_="reference"))
        drawn.append(tag("text", reference[0], x=_WIDTH - _RIGHT, y=level - 4, text_anchor="end"))
    for point in points:
        left, top = across(point.x), up(point.y)
        parts = [tag("title", point.title)] if point.title else []
        if point.x_interval is not None:
            low, high = map(across, point.x_interval)
            parts.append(tag("line", x1=low, x2=high, y1=top, y2=top, class_="whisker"))
        if point.y_interval is not None:
            low, high = map(up, point.y_interval)
            parts.append(tag("line", x1=left, x2=left, y1=low, y2=high, class_="whisker"))
        parts.append(tag("circle", cx=left, cy=top, r=4.6, class_="hollow" if point.crossed else "dot"))
        if point.crossed:
            for slope in (-1, 1):
                ends = {"x1": left - 7, "x2": left + 7, "y1": top - 7 * slope, "y2": top + 7 * slope}
                parts.append(tag("line", **ends, class_="cross"))
        parts.append(tag("text", point.label, x=left + 7, y=top - 5, class_="number"))
        drawn.append(tag("g", *parts, class_=f"tone-{point.tone}", data_of=point.of or None))
    legend = [(name, _dot_swatch(tone, False)) for name, tone in keys]
    if any(point.crossed for point in points):
        cross = (
            tag("line", x1=7, x2=19, y1=0, y2=12, class_="cross"),
            tag("line", x1=7, x2=19, y1=12, y2=0, class_="cross"),
        )
        legend.append(("unreliable", tag("g", *cross)))
    figure = _figure(title, description, drawn, _HEIGHT, legend, caption)
    return tag("div", figure, class_="scatter")


def _frame(x: Axis, y: Axis, across: Callable[[float], float], up: Callable[[float], float]) -> list[Markup]:
    """Grid, ticks and labels of both axes."""
    drawn = []
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    for tick in y.ticks:
        drawn.append(tag("line", x1=_LEFT, x2=right, y1=up(tick), y2=up(tick), class_="grid"))
        drawn.append(tag("text", y.format.format(tick), x=_LEFT - 7, y=up(tick) + 4, text_anchor="end"))
    for tick in x.ticks:
        drawn.append(tag("text", x.format.format(tick), x=across(tick), y=bottom + 16, text_anchor="middle"))
        drawn.append(tag("line", x1=across(tick), x2=across(tick), y1=bottom, y2=bottom + 4, class_="axis"))
    drawn.append(tag("line", x1=_LEFT, x2=right, y1=bottom, y2=bottom, class_="axis"))
    drawn.append(tag("text", x.label, x=(_LEFT + right) / 2, y=_HEIGHT - 6, text_anchor="middle"))
    middle = (_TOP + bottom) / 2
    drawn.append(
        tag("text", y.label, x=12, y=middle, text_anchor="middle", transform=f"rotate(-90 12 {middle})")
    )
    return drawn


def _figure(
    title: str,
    description: str,
    drawn: Sequence[Markup],
    height: int,
    keys: Sequence[tuple[str, Markup]],
    caption: str,
) -> Markup:
    swatches = [
        tag("li", tag("svg", mark, viewBox="0 0 26 12", aria_hidden="true"), name) for name, mark in keys
    ]
    return tag(
        "figure",
        tag("h3", title),
        tag(
            "svg",
            tag("title", title),
            tag("desc", description),
            drawn,
            viewBox=f"0 0 {_WIDTH} {height}",
            role="img",
            aria_label=f"{title}. {description}",
        ),
        tag("ul", swatches, class_="legend"),
        tag("figcaption", caption) if caption else None,
        class_="chart",
    )


def _swatch(tone: Tone, dashed: bool) -> Markup:
    style = "line dashed" if dashed else "line"
    return tag("g", tag("polyline", points="1,6 25,6", class_=style), class_=f"tone-{tone}")


def _dot_swatch(tone: Tone, hollow: bool) -> Markup:
    parts = (
        tag("line", x1=2, x2=24, y1=6, y2=6, class_="whisker"),
        tag("circle", cx=13, cy=6, r=4.2, class_="hollow" if hollow else "dot"),
    )
    return tag("g", *parts, class_=f"tone-{tone}")
