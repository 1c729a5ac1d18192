"""Tables of Markdown and LaTeX, and cells of CSV, of values that may come from strangers' files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

_TEX = str.maketrans(
    {**{mark: f"\\{mark}" for mark in "&%$#_{}"}, "\\": r"\textbackslash{}", "~": r"\textasciitilde{}"}
    | {"^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}"}
)
_INTERVAL = re.compile(r"\([-+]?[\d.,]+(?:-| to )[-+]?[\d.,]+\)")
_RANGE = re.compile(r"(?<=\d)-(?=\d)")
_HTML = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; floats with three digits, and "-" for None."""
    lines = [f"| {' | '.join(markdown_cell(_text(cell)) for cell in row)} |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + " --- |" * len(head), *lines[1:]])


def latex_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], caption: Sequence[str] = (), label: str = ""
) -> str:
    """A LaTeX ``tabular`` with the rules of the package ``booktabs``; in a ``table*`` where it has a caption.

    Intervals get the dash of ranges, and are set small.
    """
    title, *lines = [f"{' & '.join(map(_latex_number, row))} \\\\" for row in (head, *rows)]
    start = f"\\begin{{tabular}}{{{'l' * len(head)}}}"
    body = [start, "\\toprule", title, "\\midrule", *lines, "\\bottomrule", "\\end{tabular}"]
    if caption:
        words = f"\\caption{{{' '.join(map(latex_cell, caption))}}}" + (
            f"\\label{{tab:{label}}}" if label else ""
        )
        body = ["\\begin{table*}", "\\centering\\footnotesize", words, *body, "\\end{table*}"]
    return "\n".join(body)


def _latex_number(text: str) -> str:
    """A cell, "0.68 (0.65-0.71)" with a small interval; after a line "[" and "*" are options of LaTeX."""
    cell = latex_cell(text)
    cell = f"{{}}{cell}" if cell.startswith(("[", "*")) else cell
    return _INTERVAL.sub(lambda found: rf"{{\scriptsize {_RANGE.sub('--', found[0])}}}", cell)


def _text(cell: Any) -> str:
    if isinstance(cell, float):
        return f"{cell:.3f}"
    return "-" if cell is None else str(cell)


def markdown_cell(text: str) -> str:
    """A text that neither ends a cell or a line of a Markdown table nor is HTML, a link or emphasis in it."""
    plain = re.sub(r"([\\`*|]|\](?=[(\[]))", r"\\\1", _one_line(text).translate(_HTML))
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", plain)


def latex_cell(text: str) -> str:
    """A text whose characters are no commands of LaTeX."""
    return _one_line(text).translate(_TEX).replace("--", "-{}-")  # two hyphens would be a dash


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
