"""Text -> one HTML file that opens from disk: tags that escape what they hold, tables, pictures, the page around them."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image
from torch import Tensor


class Markup(str):
    """HTML that is safe as it stands. Every other string is escaped where it is put into a tag."""

    __slots__ = ()


Child = str | int | float | None | Iterable["Child"]

_VOID = frozenset(["br", "img", "meta", "circle", "line", "path", "rect", "polyline", "polygon"])


def text_of(*children: Child) -> Markup:
    """Children put end to end: markup as it is, None as nothing, all else escaped."""
    parts: list[str] = []
    for child in children:
        if isinstance(child, Markup):
            parts.append(child)
        elif child is None:
            continue
        elif isinstance(child, str | int | float):
            parts.append(html.escape(str(child)))
        else:
            parts.append(text_of(*child))
    return Markup("".join(parts))


def tag(name: str, *children: Child, **attributes: str | int | float | bool | None) -> Markup:
    """One element. Attributes are escaped; ``class_`` is ``class``, ``_`` becomes ``-``, None and False leave it out."""
    written = []
    for key, value in attributes.items():
        key = key.removesuffix("_").replace("_", "-")
        if value is True:
            written.append(f" {key}")
        elif value is not None and value is not False:
            written.append(f' {key}="{html.escape(str(value))}"')
    opening = f"<{name}{''.join(written)}>"
    return Markup(opening if name in _VOID else f"{opening}{text_of(*children)}</{name}>")


def table(
    head: Sequence[Child], rows: Iterable[Sequence[Child]], caption: str = "", marked: Iterable[int] = ()
) -> Markup:
    """A table whose first column names the row and whose others hold numbers; ``marked`` rows stand out."""
    marked = set(marked)
    body = [
        tag(
            "tr",
            tag("th", row[0], scope="row"),
            [tag("td", cell) for cell in row[1:]],
            class_="marked" if number in marked else None,
        )
        for number, row in enumerate(rows)
    ]
    return tag(
        "div",
        tag(
            "table",
            tag("caption", caption) if caption else None,
            tag("thead", tag("tr", [tag("th", cell, scope="col") for cell in head])),
            tag("tbody", body),
        ),
        class_="scroll",
        tabindex=0,
        role="region",
        aria_label=caption or "table",
    )


def facts(pairs: Iterable[tuple[Child, Child]]) -> Markup:
    """Names and values one below the other."""
    return tag("dl", [tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs], class_="facts")


def section(title: str, *children: Child, slug: str | None = None) -> Markup:
    """A titled part of the page."""
    return tag("section", tag("h2", title), *children, id=slug)


def tiles(items: Iterable[tuple[str, str, Child]]) -> Markup:
    """The few numbers that matter: (label, number, remark)."""
    made = [
        tag("li", tag("span", label, class_="label"), tag("strong", number), tag("span", remark, class_="remark"))
        for label, number, remark in items
    ]
    return tag("ul", made, class_="tiles")


def commands(lines: Iterable[str]) -> Markup:
    """Shell commands, to be copied."""
    return tag("pre", tag("code", "\n".join(lines)), tabindex=0)


def picture(image: Tensor, alt: str, **attributes: str | int | None) -> Markup:
    """An ``img`` that carries its own PNG.

    Args:
        image: (3, H, W), uint8, or float in [0, 1], which is rounded to the nearest of 256 levels.
        alt: what it shows, for those who do not see it.
    """
    if image.is_floating_point():
        image = (image.clamp(0, 1) * 255).round()
    pixels = image.permute(1, 2, 0).cpu().numpy().astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", optimize=True)
    source = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
    return tag("img", src=source, alt=alt, width=pixels.shape[1], height=pixels.shape[0], **attributes)


def page(title: str, lead: Child, *sections: Child, foot: Child = None) -> str:
    """A whole document: no script, nothing loaded from elsewhere, light or dark as the reader's system is."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Markup(STYLE)),
    )
    header = tag("header", tag("h1", title), tag("div", lead, class_="lead"))
    body = tag("body", header, tag("main", *sections), tag("footer", foot) if foot else None)
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


STYLE = """
:root {
  --paper: #fbfaf8; --card: #ffffff; --ink: #1c2026; --soft: #5c6470; --rule: #dfdcd5; --grid: #e9e6df;
  --a: #c2410c; --b: #0f6cad; --c: #6d7480; --d: #7a4fb5; --e: #0d8577; --f: #a16207; --good: #0d8577; --bad: #b3261e;
  --wash: #f1eee7;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171c; --card: #1b1f26; --ink: #e6e8eb; --soft: #9aa3af; --rule: #323842; --grid: #2a3038;
    --a: #fb923c; --b: #5fb3ee; --c: #9aa3af; --d: #b794f0; --e: #4fc9b8; --f: #e0b040; --good: #4fc9b8; --bad: #ff8a80;
    --wash: #232831;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2.2rem 1.25rem 3rem; max-width: 1120px; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums; -webkit-text-size-adjust: 100%;
}
h1 { font-size: clamp(1.55rem, 4vw, 2.2rem); line-height: 1.18; margin: 0 0 .5rem; letter-spacing: -.015em; text-wrap: balance; }
h2 { font-size: 1.25rem; margin: 0 0 .4rem; letter-spacing: -.005em; }
h3 { font-size: 1rem; margin: 0 0 .3rem; }
p { margin: .4rem 0 .8rem; max-width: 74ch; }
code { font: .92em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.lead { font-size: 1.08rem; color: var(--soft); }
.lead p { max-width: 68ch; }
section { margin-top: 2.6rem; }
.note, figcaption, caption { color: var(--soft); font-size: .88rem; line-height: 1.45; }
.undefended { color: var(--a); } .saat { color: var(--b); }

.tiles { list-style: none; display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: .8rem; margin: 1.4rem 0 0; padding: 0; }
.tiles li { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: .8rem 1rem; display: flex; flex-direction: column; }
.tiles strong { font-size: 1.75rem; line-height: 1.25; letter-spacing: -.02em; }
.tiles .label, .tiles .remark { color: var(--soft); font-size: .86rem; line-height: 1.4; }

.scroll { overflow-x: auto; border: 1px solid var(--rule); border-radius: 8px; background: var(--card); margin: .8rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
caption { text-align: left; padding: .7rem .9rem .5rem; caption-side: top; }
th, td { padding: .42rem .9rem; text-align: right; border-top: 1px solid var(--rule); white-space: nowrap; }
thead th { font-weight: 600; color: var(--soft); font-size: .84rem; vertical-align: bottom; border-top: 0; }
caption + thead th { border-top: 1px solid var(--rule); }
th:first-child { text-align: left; font-weight: 500; }
tr.marked { background: var(--wash); } tr.marked th, tr.marked td { font-weight: 650; }
td .span { display: block; color: var(--soft); font-size: .8rem; font-weight: 400; }

.facts { margin: .8rem 0; border: 1px solid var(--rule); border-radius: 8px; background: var(--card); font-size: .92rem; }
.facts div { display: grid; grid-template-columns: minmax(8rem, 14rem) 1fr; gap: 1rem; padding: .45rem .9rem; }
.facts div + div { border-top: 1px solid var(--rule); }
.facts dt { color: var(--soft); } .facts dd { margin: 0; overflow-wrap: anywhere; }
pre { overflow-x: auto; background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: .8rem 1rem; margin: .8rem 0; }

.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 1rem; align-items: start; }
.pair > * { min-width: 0; margin-top: 0; }
figure { margin: .8rem 0; }
figure.chart { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: .9rem 1rem; }
figure.chart svg { display: block; width: 100%; height: auto; overflow: visible; }
figcaption { margin-top: .5rem; }
.chart h3 + svg { margin-top: .4rem; }
.chart text { fill: var(--soft); font-size: 11.5px; font-family: inherit; }
.chart .axis { stroke: var(--soft); stroke-width: 1; } .chart .grid { stroke: var(--grid); stroke-width: 1; }
.chart .reference { stroke: var(--c); stroke-width: 1.2; stroke-dasharray: 2 3; }
.chart .line { fill: none; stroke-width: 2.2; stroke-linejoin: round; stroke-linecap: round; }
.chart .dashed { stroke-dasharray: 6 4; } .chart .band { opacity: .16; }
.chart .row { font-size: 12.5px; fill: var(--ink); } .chart .whisker { stroke-width: 2.2; stroke-linecap: round; }
.tone-a { --tone: var(--a); } .tone-b { --tone: var(--b); } .tone-c { --tone: var(--c); }
.tone-d { --tone: var(--d); } .tone-e { --tone: var(--e); } .tone-f { --tone: var(--f); }
.chart .line, .chart .whisker { stroke: var(--tone); } .chart .band, .chart .dot { fill: var(--tone); }
.chart .hollow { fill: var(--card); stroke: var(--tone); stroke-width: 2; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .15rem 1.1rem; margin: .5rem 0 0; padding: 0; font-size: .86rem; }
.legend li { display: flex; align-items: center; gap: .45rem; } .legend svg { width: 26px !important; flex: none; }

.shots { display: grid; grid-template-columns: repeat(5, 1fr); gap: .9rem; margin: 1rem 0; }
.shots figure { margin: 0; } .shots img { width: 100%; height: auto; display: block; border-radius: 6px; image-rendering: pixelated; border: 1px solid var(--rule); }
.shots figcaption b { display: block; color: var(--ink); font-weight: 600; }
.searches { display: grid; gap: .8rem; margin: 1rem 0; }
.search { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: .7rem .9rem .8rem; display: grid; grid-template-columns: 11.5rem 1fr; gap: .5rem 1rem; align-items: center; }
.search .what { display: grid; grid-template-columns: 64px 1fr; gap: .8rem; align-items: center; font-size: .88rem; line-height: 1.35; }
.search .what img { width: 64px; height: 64px; border-radius: 5px; image-rendering: pixelated; }
.search .what span { color: var(--soft); display: block; }
.hits { list-style: none; display: grid; grid-template-columns: repeat(8, minmax(0, 1fr)); gap: .5rem; margin: 0; padding: 0; }
.hits li { font-size: .78rem; color: var(--soft); text-align: center; line-height: 1.3; }
.hits img { width: 100%; height: auto; aspect-ratio: 1; display: block; border-radius: 6px; border: 3px solid; }
.hits .yes img { border-color: var(--good); } .hits .no img { border-color: var(--bad); border-style: dashed; opacity: .88; }
.hits .yes .mark { color: var(--good); } .hits .no .mark { color: var(--bad); } .mark { font-weight: 700; }
footer { margin-top: 3rem; padding-top: .8rem; border-top: 1px solid var(--rule); color: var(--soft); font-size: .86rem; }
@media (max-width: 760px) {
  .shots { grid-template-columns: repeat(2, 1fr); } .shots figure:first-child { grid-column: 1 / -1; max-width: 50%; }
  .search { grid-template-columns: 1fr; } .hits { grid-template-columns: repeat(4, minmax(0, 1fr)); }
  .facts div { grid-template-columns: 1fr; gap: 0; } th, td { padding: .4rem .6rem; }
}
@media print { body { max-width: none; } section { break-inside: avoid; } }
"""
