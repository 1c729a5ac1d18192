import csv
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from robusthash.apps.commands.options import AsJson
from robusthash.apps.commands.terminal import note, print_json


class Format(StrEnum):
    """Format of a table."""

    markdown = "markdown"
    latex = "latex"
    csv = "csv"


def table(
    paths: Annotated[list[Path], Argument(help="Runs, or folders of them; seeds share a row.")],
    column: Annotated[
        list[str] | None,
        Option(
            help="'[MEASURE of ]RESULT[ minus RESULT][ as LABEL]': 'nDCG@100 of clean', 'worst minus hag'."
        ),
    ] = None,
    row: Annotated[
        list[str] | None, Option(help="Rows in this order: 'RECIPE[ as LABEL]'. Repeatable.")
    ] = None,
    against: Annotated[str | None, Option(help="Paired differences to this recipe.")] = None,
    seed: Annotated[list[int] | None, Option(help="Only runs of this training seed. Repeatable.")] = None,
    format: Annotated[Format, Option(help="csv: six digits; intervals in columns.")] = Format.markdown,
    caption: Annotated[bool, Option(help="Name threat, attacks and budget below the table.")] = True,
    as_json: AsJson = False,
) -> None:
    """One table of several runs, with intervals over seeds and queries; below it attacks and budgets.

    Of a folder, runs that were not evaluated are left out and named; a run that is given itself must have
    been.
    """
    from dataclasses import asdict

    from robusthash.apps.experiment import table_text, tables
    from robusthash.apps.experiment.run_directory import RunError
    from robusthash.apps.experiment.run_selection import runs_with
    from robusthash.apps.reports.cell_text import markdown_cell

    runs, waiting = runs_with(lambda run: run.was_evaluated, paths)
    for run in waiting:
        note(f"{run.path} has no results yet and is left out")
    if not runs:
        raise RunError("none of these runs was evaluated; run 'robusthash evaluate RUN' first")
    evaluated = [run.path for run in runs]
    seeds = tables.read_seeds(evaluated, seed or ())
    columns = None if column is None else tables.named_columns(column, seeds)
    rows = tables.differences_of(seeds, columns, against) if against else tables.rows_of(seeds, columns)
    rows = rows if row is None else tables.selected_rows(rows, row)
    if as_json:
        print_json([asdict(row) for row in rows])
        return
    titles = list(rows[0].cells) if columns is None else [column.title for column in columns]
    if format is Format.csv:
        csv.writer(sys.stdout, lineterminator="\n").writerows(table_text.plain_table(rows, titles))
        return
    write = table_text.latex if format is Format.latex else table_text.markdown
    sys.stdout.write(f"{write(rows, titles)}\n")
    comment = "% " * (format is Format.latex)
    for line in table_text.captions(rows, titles) if caption else ():
        sys.stdout.write(f"\n{comment}{' '.join(line.split()) if comment else markdown_cell(line)}\n")
