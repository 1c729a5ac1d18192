"""Values that may come from strangers' files, as cells of Markdown, LaTeX and CSV."""

from __future__ import annotations

import re

_TEX = str.maketrans(
    {**{mark: f"\\{mark}" for mark in "&%$#_{}"}, "\\": r"\textbackslash{}", "~": r"\textasciitilde{}"}
    | {"^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}"}
)
_HTML = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})


def markdown_cell(text: str) -> str:
    """A text that neither ends a cell or a line of a Markdown table nor is HTML, a link or emphasis in it."""
    plain = re.sub(r"([\\`*|]|\](?=[(\[]))", r"\\\1", _one_line(text).translate(_HTML))
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", plain)


def latex_cell(text: str) -> str:
    """A text whose characters are no commands of LaTeX."""
    return _one_line(text).translate(_TEX)


def csv_cell(text: str) -> str:
    """A text that no spreadsheet takes for a formula: one that begins as such gets an apostrophe in front."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) and not is_number(text) else text


def is_number(text: str) -> bool:
    """True where Python reads the text as a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _one_line(text: str) -> str:
    return " ".join(text.split())
