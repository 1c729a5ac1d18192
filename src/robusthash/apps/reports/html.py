"""Text -> one HTML file that opens from disk: tags that escape what they hold, tables, pictures, the page
around."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from importlib.resources import files

import numpy as np
from PIL import Image
from torch import Tensor


class Markup(str):
    """HTML that is safe as it stands. Every other string is escaped where it is put into a tag."""

    __slots__ = ()


Child = str | int | float | None | Iterable["Child"]

_VOID = frozenset(
    ["img", "meta", "circle", "line", "polyline", "polygon", "input"]
)  # hold nothing; inside SVG the slash counts


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


def tag(name: str, /, *children: Child, **attributes: str | int | float | bool | None) -> Markup:
    """One element. Attributes are escaped; ``class_`` is ``class``, ``_`` is ``-``, None and False are left
    out."""
    written = []
    for key, value in attributes.items():
        key = key.removesuffix("_").replace("_", "-")
        if value is True:
            written.append(f" {key}")
        elif value is not None and value is not False:
            written.append(f' {key}="{html.escape(str(value))}"')
    start = f"<{name}{''.join(written)}"
    return Markup(f"{start}/>" if name in _VOID else f"{start}>{text_of(*children)}</{name}>")


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
    made = tag(
        "table", tag("thead", tag("tr", [tag("th", cell, scope="col") for cell in head])), tag("tbody", body)
    )
    # the caption stays outside of what scrolls sideways on a narrow screen
    return tag(
        "figure",
        tag("figcaption", caption) if caption else None,
        tag("div", made, class_="scroll", tabindex=0, role="region", aria_label=caption or "table"),
        class_="table",
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
        tag(
            "li",
            tag("span", label, class_="label"),
            tag("strong", number),
            tag("span", remark, class_="remark"),
        )
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


def read_asset(name: str) -> str:
    """A file that lies beside this module."""
    return files("robusthash.apps.reports").joinpath(name).read_text(encoding="utf-8")


def page(
    title: str, lead: Child, *sections: Child, foot: Child = None, style: str = "", script: str = ""
) -> str:
    """A whole document: nothing loaded from elsewhere, light or dark as the reader's system is.

    Args:
        style, script: of this page alone, written into it; by default there is no script.
    """
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Markup(read_asset("page.css") + style)),
    )
    header = tag("header", tag("h1", title), tag("div", lead, class_="lead"))
    last = tag("script", Markup(script)) if script else None
    body = tag("body", header, tag("main", *sections), tag("footer", foot) if foot else None, last)
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"
