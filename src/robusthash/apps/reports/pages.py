"""Templates -> HTML files that open from disk, with the filters, table data and words that all pages share."""

from __future__ import annotations

import base64
import functools
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from robusthash.metrics.results import EvalResult, Flag

if TYPE_CHECKING:
    from torch import Tensor

WORST_CASE = (
    "A worst case is the mean over queries of the lowest AP that any listed attack found: an upper bound on true "
    "robustness, under this attack set and this budget."
)
ROUNDING = {
    "/8bit": "The 8-bit column rounds the perturbation to whole grey levels. ",
    "/rounded": "The column of whole words rounds attacked bags to 0 and 1: no text has a part of a word. ",
    "": "",
}


class Cell(NamedTuple):
    """A value of a table or of a list of facts, with smaller text below it."""

    text: str
    below: str = ""
    element: str = ""  # "code", or "alarm" for what must be seen; plain by default


CellLike = str | int | float | Cell | None


@dataclass(frozen=True)
class Table:
    """A table whose first column names the row and whose others hold numbers; ``marked`` rows stand out."""

    head: Sequence[CellLike]
    rows: Sequence[Sequence[CellLike]]
    caption: str = ""
    marked: Sequence[int] = ()


Facts = list[tuple[str, CellLike]]
"""Names and values, one below the other."""

Tiles = list[tuple[str, str, str]]
"""The few numbers that matter: label, number, remark."""


class Png(NamedTuple):
    """An image as an ``img`` element takes it."""

    source: str
    width: int
    height: int


def png(image: Tensor) -> Png:
    """Encode a (3, H, W) image, uint8, or float in [0, 1], which is rounded to the nearest of 256 levels."""
    import numpy as np
    from PIL import Image

    if image.is_floating_point():
        image = (image.clamp(0, 1) * 255).round()
    pixels = image.permute(1, 2, 0).cpu().numpy().astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", optimize=True)
    source = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
    return Png(source, pixels.shape[1], pixels.shape[0])


def number(value: float, digits: int = 3) -> str:
    """Format a number in plain digits; infinite ones as the sign for it."""
    return f"{value:.{digits}f}" if math.isfinite(value) else ("∞" if value > 0 else "−∞")


def span_text(ends: tuple[float, float] | None) -> str:
    """Format an interval; nothing where there is none."""
    return "" if ends is None else f"{ends[0]:.3f} to {ends[1]:.3f}"


def _asset(name: str) -> Markup:
    """A style sheet or script of this package, to be written into a page as it is."""
    return Markup(files("robusthash.apps.reports").joinpath(name).read_text(encoding="utf-8"))


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("robusthash.apps.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["asset"] = _asset
    environment.filters.update(number=number, span=span_text, png=png, red_flag_warning=red_flag_warning)
    environment.tests["cell"] = lambda value: isinstance(value, Cell)
    return environment


def render(template: str, **data: Any) -> str:
    """Fill a template of ``templates/``; text is escaped, and a name that is not given is an error."""
    return _environment().get_template(template).render(data)


# ---------------------------------------------------------------------------------------------- shared words


def stored_as(results: Iterable[EvalResult]) -> tuple[str, str]:
    """How queries are stored outside of a model: the ending of the measure that is taken of it, and its words.

    Images are stored with 8 bits a channel, bags of words in whole words, token ids and vectors of features
    as they are.
    """
    some = list(results)
    if not some[0].setting.direction.startswith("T"):
        return "/8bit", "8-bit images"
    words = any(name.endswith("/rounded") for result in some for name in result.values)
    return ("/rounded", "whole words") if words else ("", "")


def remark(flags: Sequence[Flag], checked: bool) -> str:
    """What the checks make of a number. ``checked``: any check was run."""
    if reds := [flag.id for flag in flags if flag.level == "red"]:
        return f"UNRELIABLE ({', '.join(reds)})"
    if not checked:
        return "not checked"
    return ", ".join(f"{flag.id} amber" for flag in flags if flag.level == "amber") or "no flag"


def red_flag_warning(names: Sequence[str]) -> str:
    """Whose numbers are not to be believed."""
    return f"A red flag stands against: {', '.join(names)}. Their numbers prove nothing."


def span(result: EvalResult, name: str) -> str:
    """The 95 % interval of a value, or nothing where it has none."""
    return span_text(result.interval.get(name))


def with_span(result: EvalResult, name: str) -> CellLike:
    """A value with its interval below it; a dash where the result does not have it."""
    return Cell(number(result.values[name]), span(result, name)) if name in result.values else "–"


def notes(results: Iterable[EvalResult]) -> list[str]:
    """What was clipped or left out, each note once."""
    return list(dict.fromkeys(note for result in results for note in result.notes))


def setting_facts(result: EvalResult, results: Mapping[str, EvalResult]) -> Facts:
    """Everything that the numbers are a statement about."""
    setting = result.setting
    protocol = {
        key: value for key, value in setting.protocol.items() if key not in ("measures", "directions")
    }
    directions = dict.fromkeys(each.setting.direction for each in results.values())
    threats = sorted({each.setting.threat for each in results.values()} - {"none"})
    facts: Facts = [
        ("queries", setting.asked),
        ("database", setting.database),
        ("direction, bits", f"{', '.join(directions)}, {setting.bits} bits"),
        ("protocol", ", ".join(f"{key} {one_line(value)}" for key, value in protocol.items())),
        ("objective, defense", f"{setting.objective}, {setting.defense}"),
        ("training attack", setting.training_attack or "none"),
        ("threats", ", ".join(threats) or "none"),
        ("seeds", f"evaluation {', '.join(map(str, setting.seeds))}"),
    ]
    facts += [
        (name, each.setting.budget)
        for name, each in results.items()
        if name.rpartition(" ")[2] not in ("clean", "worst")
    ]
    return facts + [
        (f"digest of {name}", Cell(value, element="code")) for name, value in setting.digests.items()
    ]


def one_line(value: Any) -> str:
    """A setting on one line."""
    return json.dumps(value, sort_keys=True) if isinstance(value, dict | list) else str(value)
