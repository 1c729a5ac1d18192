"""Tables of runs as text: Markdown, LaTeX, plain numbers, the lines below; the table of copy detection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from robusthash.apps.experiment.tables import TableRow
from robusthash.apps.reports.cell_text import csv_cell, latex_table, markdown_table
from robusthash.data.copies import CHANGES, HELD_OUT, TRAINED
from robusthash.metrics.measure_key import MeasureKey
from robusthash.metrics.results import EvalResult


def markdown(rows: Sequence[TableRow], results: Sequence[str] | None = None) -> str:
    """A Markdown table; ``results`` chooses and orders the columns, by default those of any row."""
    head, *lines = text_table(rows, results)
    return markdown_table(head, lines)


def titles_of(rows: Sequence[TableRow]) -> list[str]:
    """The columns of any row, in the order of the first that has them."""
    return list(dict.fromkeys(column for row in rows for column in row.cells))


def latex(rows: Sequence[TableRow], results: Sequence[str] | None = None, caption: Sequence[str] = ()) -> str:
    """A LaTeX ``tabular`` with the rules of the package ``booktabs``; in a ``table*`` with its caption."""
    head, *lines = text_table(rows, results)
    return latex_table(head, lines, caption)


def plain_table(rows: Sequence[TableRow], columns: Sequence[str]) -> list[list[str]]:
    """Header and lines with value, ends of the interval and seeds of each column apart; "" for none.

    After them the columns that ``text_table`` has next to the results.
    """
    parts = [f"{column}{part}" for column in columns for part in ("", " low", " high", " seeds")]
    titles, side_cells = _side_columns(rows, columns, 6)
    table = [["recipe", *parts, *titles]]
    for row, own in zip(rows, side_cells, strict=True):
        numbers = [row.cells[c].numbers() if c in row.cells else [""] * 4 for c in columns]
        table.append([row.name, *(number for group in numbers for number in group), *own])
    return [list(map(csv_cell, cells)) for cells in table]


def text_table(rows: Sequence[TableRow], results: Sequence[str] | None = None) -> list[list[str]]:
    """Header and lines of a table for reading; one of differences has neither chance nor training minutes."""
    columns = titles_of(rows) if results is None else list(results)
    titles, side_cells = _side_columns(rows, columns, 3)
    table = [["recipe", *columns, *titles]]
    for row, own in zip(rows, side_cells, strict=True):
        without = ["not run" if column in row.not_run else "-" for column in columns]
        cells = [
            row.cells[c].text() if c in row.cells else gap for c, gap in zip(columns, without, strict=True)
        ]
        table.append([row.name, *cells, *own])
    return table


def _side_columns(
    rows: Sequence[TableRow], columns: Sequence[str], digits: int
) -> tuple[list[str], list[list[str]]]:
    """Titles and lines of the columns next to the results: chance, training minutes and seeds."""
    signed = any(cell.signed for row in rows for cell in row.cells.values())
    shown = {(row.scored[c], c in row.target_chance): c for row in rows for c in columns if c in row.scored}
    contexts = dict.fromkeys(on for row in rows for on in row.chance)
    chances = [on for on in contexts if (on, False) in shown and not signed]
    targets = {on: column for (on, aimed), column in shown.items() if aimed and not signed}
    minutes = [] if signed else ["training minutes"]
    lines = []
    for row in rows:
        known = [row.chance.get(on) for on in chances] + [row.target_chance.get(c) for c in targets.values()]
        cells = ["-" if value is None else f"{value:.{digits}f}" for value in known]
        cells += [f"{row.minutes:.1f}"] * len(minutes)
        lines.append([*cells, str(max((cell.seeds for cell in row.cells.values()), default=0))])
    titles = [f"chance {on}".strip() for on in chances] + [
        f"chance {on} t-MAP".replace("  ", " ") for on in targets
    ]
    return [*titles, *minutes, "seeds"], lines


def captions(rows: Sequence[TableRow], results: Sequence[str] | None = None) -> list[str]:
    """Lines below the table: threat, attacks and budget of the attacked columns; equal ones share a line.

    A column whose rows were attacked differently has a line for each, and one that says they do not compare.
    """
    columns = titles_of(rows) if results is None else list(results)
    subjects: dict[str, list[str]] = {}  # columns by words
    mixed = []
    for column in columns:
        words = dict.fromkeys(row.attacked[column] for row in rows if row.attacked.get(column))
        for text in words:
            names = " and ".join(row.name for row in rows if row.attacked.get(column) == text)
            subjects.setdefault(text, []).append(column if len(words) == 1 else f"{column} of {names}")
        mixed += [column] * (len(words) > 1)
    lines = [f"{', '.join(subject)}: {text}." for text, subject in subjects.items()]
    if mixed:
        start = "Columns whose rows do not compare, since they were attacked differently"
        lines.append(f"{start}: {', '.join(mixed)}.")
    lines += _numbers_of_queries(rows, columns)
    empty = [f"{on}: {text}.".removeprefix(": ") for row in rows for on, text in row.empty.items()]
    lines += dict.fromkeys(empty)
    if any(column not in {*row.cells, *row.not_run} for row in rows for column in columns):
        lines.append("-: not evaluated in every seed, or the seeds of the recipe were attacked differently.")
    return lines


def _numbers_of_queries(rows: Sequence[TableRow], columns: Sequence[str]) -> list[str]:
    """A line where results of one table are of different numbers of queries; none else."""
    numbers = {
        column: sorted({row.queries[column] for row in rows if column in row.queries}) for column in columns
    }
    if len({number for some in numbers.values() for number in some}) < 2:
        return []
    subjects: dict[str, list[str]] = {}  # columns by words
    for column, some in numbers.items():
        if some:
            subjects.setdefault(" or ".join(map(str, some)), []).append(column)
    parts = [f"{words} of {', '.join(subject)}" for words, subject in subjects.items()]
    return [f"Numbers of queries differ: {'; '.join(parts)}."]


WORDS = {change.name: change.words for change in CHANGES}
"""What a change does, by its name in the table."""

_CHANGES = (*WORDS, TRAINED, HELD_OUT)


def copy_table(results: Mapping[str, EvalResult]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows: each change, then copies of all images, of those trained on and of the others.

    The share found first (P@1), with its interval, and among the first ten (R@10); found first under each
    untargeted attack; and the worst case over these, the mean of 1 / rank. No rows where the queries are not
    in groups.

    Args:
        results: of one direction, by attack: ``clean``, each attack, ``worst``.
    """
    clean = results["clean"]
    attacked = {
        name: result
        for name, result in results.items()
        if name not in ("clean", "worst") and result.setting.key.name("targeted") not in result.values
    }
    if not clean.groups or "P@1" not in clean.values:
        return [], []
    columns = ["copies", "queries", "found first", "95 % interval", "in first 10"]
    columns += [f"first under {name}" for name in attacked]
    worst = results.get("worst")
    columns += ["worst 1/rank"] if worst else []
    rows: list[list[Any]] = []
    for name in (*(name for name in _CHANGES if name in clean.groups), None):
        scores = [_scores(result, name) for result in (clean, *attacked.values())]
        values, interval = scores[0]
        low, high = interval["P@1"]
        queries = clean.groups[name].queries if name else len(clean.per_query[clean.setting.headline])
        row: list[Any] = [name or "all", queries, values["P@1"], f"{low:.2f}..{high:.2f}"]
        row += [values["R@10"], *(other["P@1"] for other, _ in scores[1:])]
        if worst:
            row.append(_scores(worst, name)[0][MeasureKey(worst.setting.headline).name("worst")])
        rows.append(row)
    return columns, rows


def _scores(result: EvalResult, group: str | None) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Values and intervals of a group of queries, or of all."""
    scores = result if group is None else result.groups[group]
    return scores.values, scores.interval
