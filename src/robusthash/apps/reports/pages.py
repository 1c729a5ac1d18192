"""Templates -> HTML files that open from disk, with the filters and the words that all pages share."""

from __future__ import annotations

import base64
import functools
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from robusthash.metrics.measure_key import MeasureKey
from robusthash.metrics.result_words import budget_words, empty_notes, p_text, result_notes
from robusthash.metrics.results import EvalResult, Flag

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

WORST_CASE = (
    "A worst case is the mean over queries of the lowest AP that any listed attack found: an upper bound on "
    "true robustness, under this attack set and this budget."
)


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


def picture_of(file: Path | None, max_pixels: int) -> Png | None:
    """The picture of a file, padded to a square; None where there is none that can be read."""
    from robusthash.data.image_files import read_image

    try:
        return None if file is None else png(read_image(file, 160, "pad", max_pixels))
    except (OSError, ValueError):
        return None


def number(value: float, digits: int = 3) -> str:
    """Format a number in plain digits; infinite ones as the sign for it."""
    return f"{value:.{digits}f}" if math.isfinite(value) else ("∞" if value > 0 else "−∞")


def decibels(mse: float) -> float:
    """PSNR of a mean squared error of images in [0, 1]."""
    return -10 * math.log10(max(mse, 1e-12))


def span(result: EvalResult, name: str) -> str:
    """The 95 % interval of a value, or nothing where it has none."""
    return ends(result.interval.get(name))


def ends(interval: Sequence[float] | None) -> str:
    """Format an interval; nothing where there is none."""
    return "" if interval is None else "{:.3f} to {:.3f}".format(*interval)


def one_line(value: Any) -> str:
    """A setting on one line."""
    return json.dumps(value, sort_keys=True) if isinstance(value, dict | list) else str(value)


def remark(flags: Sequence[Flag], checked: bool) -> str:
    """Summarise the flags against a number. ``checked``: any check was run."""
    if reds := [flag.id for flag in flags if flag.level == "red"]:
        return f"UNRELIABLE ({', '.join(reds)})"
    if not checked:
        return "not checked"
    return ", ".join(f"{flag.id} amber" for flag in flags if flag.level == "amber") or "no flag"


def red_flag_warning(names: Sequence[str]) -> str:
    """Whose numbers are not to be believed."""
    return f"A red flag stands against: {', '.join(names)}. Their numbers prove nothing."


def stored_as(results: Iterable[EvalResult]) -> tuple[str, str]:
    """Form in which queries are stored outside of a model: the ending of its measure, and its words.

    Images are stored with 8 bits a channel, bags of words in whole words, token ids and vectors of features
    as they are.
    """
    some = list(results)
    if not some[0].setting.direction.startswith("T"):
        return "/8bit", "8-bit images"
    words = any(MeasureKey.parse(name).storage == "rounded" for result in some for name in result.values)
    return ("/rounded", "whole words") if words else ("", "")


def notes(results: Mapping[str, EvalResult]) -> list[str]:
    """Notes on what was clipped or left out, each once; queries without a relevant item first."""
    return [*empty_notes(results), *result_notes(results).values()]


def _asset(name: str) -> Markup:
    """A style sheet or script of this package, to be written into a page as it is."""
    return Markup(files("robusthash.apps.reports").joinpath(name).read_text(encoding="utf-8"))


@functools.cache
def environment() -> Environment:
    """The Jinja environment of all templates."""
    loader = PackageLoader("robusthash.apps.reports")
    options: dict[str, Any] = {"autoescape": True, "undefined": StrictUndefined}
    templates = Environment(loader=loader, trim_blocks=True, lstrip_blocks=True, **options)
    for function in (number, decibels, span, ends, one_line, red_flag_warning, png, p_text, budget_words):
        templates.filters[function.__name__] = function
    templates.globals["asset"] = _asset
    return templates


def render(template: str, **data: Any) -> str:
    """Fill a template of ``templates/``; text is escaped, and a name that is not given is an error."""
    return environment().get_template(template).render(data)
