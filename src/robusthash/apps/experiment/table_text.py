"""Tables of runs as text: Markdown, LaTeX, plain cells, and the caption that says what was attacked."""

from __future__ import annotations

from collections.abc import Sequence

from robusthash.apps.experiment.tables import Cell, Row


def markdown(rows: Sequence[Row], results: Sequence[str] | None = None) -> str:
    """A Markdown table; ``results`` chooses and orders the columns, by default all that the first row has."""
    head, *lines = text_table(rows, results)
    written = [f"| {' | '.join(line)} |" for line in [head, *lines]]
    return "\n".join([written[0], "|" + " --- |" * len(head), *written[1:]])


def latex(rows: Sequence[Row], results: Sequence[str] | None = None) -> str:
    """A LaTeX ``tabular`` with the rules of the package ``booktabs``."""
    head, *lines = ([_tex(cell) for cell in line] for line in text_table(rows, results))
    body = [f"{' & '.join(line)} \\\\" for line in lines]
    start = [f"\\begin{{tabular}}{{{'l' * len(head)}}}", "\\toprule", f"{' & '.join(head)} \\\\", "\\midrule"]
    return "\n".join([*start, *body, "\\bottomrule", "\\end{tabular}"])


def _tex(text: str) -> str:
    return "".join(f"\\{mark}" if mark in "&%$#_{}" else mark for mark in text)


def plain_table(rows: Sequence[Row], columns: Sequence[str]) -> list[list[str]]:
    """Header and lines with value, ends of the interval and seeds of each column apart; "" where there is no
    value."""
    head = ["recipe", *(f"{column}{part}" for column in columns for part in ("", " low", " high", " seeds"))]
    lines = []
    for row in rows:
        cells = [row.cells.get(column) for column in columns]
        parts = [_numbers(cell) for cell in cells]
        lines.append([row.name, *(part for cell in parts for part in cell)])
    return [head, *lines]


def _numbers(cell: Cell | None) -> list[str]:
    return (
        [""] * 4
        if cell is None
        else [*(f"{value:.6f}" for value in (cell.value, *cell.interval)), str(cell.seeds)]
    )


def text_table(rows: Sequence[Row], results: Sequence[str] | None = None) -> list[list[str]]:
    """Header and lines of a table for reading; of differences without chance and training, which are no
    differences."""
    columns = list(rows[0].cells) if results is None else list(results)
    shown = {row.scored[column] for row in rows for column in columns if column in row.scored}
    contexts = [context for context in rows[0].chance if context in shown and not _signed(rows)]
    minutes = [] if _signed(rows) else ["training minutes"]
    table = [["recipe", *columns, *(f"chance {context}".strip() for context in contexts), *minutes, "seeds"]]
    for row in rows:
        cells = [row.cells[column].text() if column in row.cells else "-" for column in columns]
        cells += [f"{row.chance[context]:.3f}" for context in contexts]
        cells += [f"{row.minutes:.1f}"] * len(minutes)
        table.append([row.name, *cells, str(max((cell.seeds for cell in row.cells.values()), default=0))])
    return table


def _signed(rows: Sequence[Row]) -> bool:
    return any(cell.signed for row in rows for cell in row.cells.values())


def captions(rows: Sequence[Row], results: Sequence[str] | None = None) -> list[str]:
    """Lines below the table: threat, attacks and budget of the attacked columns.

    Columns of the same words share a line. A column whose rows were attacked differently has a line for each,
    and is said not to compare.
    """
    columns = list(rows[0].cells) if results is None else list(results)
    subjects: dict[str, list[str]] = {}
    mixed = []
    for column in columns:
        said: dict[str, list[str]] = {}
        for row in rows:
            if row.attacked.get(column):
                said.setdefault(row.attacked[column], []).append(row.name)
        for text, names in said.items():
            subjects.setdefault(text, []).append(
                column if len(said) == 1 else f"{column} of {' and '.join(names)}"
            )
        mixed += [column] * (len(said) > 1)
    lines = [f"{', '.join(named)}: {text}." for text, named in subjects.items()]
    if mixed:
        lines.append(
            f"Columns whose rows do not compare, since they were attacked differently: {', '.join(mixed)}."
        )
    if any(column not in row.cells for row in rows for column in columns):
        lines.append("-: not evaluated in every seed, or the seeds of the recipe were attacked differently.")
    return lines
