"""The verbs score, compare, table and keep: numbers of codes and of evaluated runs."""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from robusthash.apps.commands.show_results import plain, result_of
from robusthash.apps.commands.terminal import AsJson, RunPath, console, escape, print_json, print_table

if TYPE_CHECKING:
    from robusthash.apps.experiment.run_directory import Run


def score(
    query: Annotated[Path, typer.Argument(help="Query codes (.npz).")],
    database: Annotated[Path, typer.Argument(help="Database codes (.npz).")],
    protocol: Annotated[
        str, typer.Option(help="Protocol by name; see `robusthash list protocol`.")
    ] = "house",
    as_json: AsJson = False,
) -> None:
    """Score codes made by any program: every measure of the protocol, exact under ties.

    Each file holds `codes` (N, K) in -1/+1 or 0/1, or packed uint8 with `bits`; and `labels`, (N,) classes or
    (N, C) multi-hot.
    """
    from robusthash.metrics.code_scoring import read_codes
    from robusthash.metrics.code_scoring import score as score_codes

    result = score_codes(read_codes(query), read_codes(database), protocol)
    if as_json:
        print_json(plain(result))
        return
    print_table(
        f"{protocol}: {result.setting.queries} against {result.setting.database}",
        ["measure", "value", "95 % interval"],
        [
            [n, v, "{:.4f} .. {:.4f}".format(*result.interval[n]) if n in result.interval else ""]
            for n, v in result.values.items()
        ],
    )
    print_table("reference", ["", "value"], [[n, v] for n, v in result.reference.items()])
    for note in result.notes:
        console.print(note)


def compare(
    first: RunPath,
    second: RunPath,
    result: Annotated[
        str,
        typer.Option(
            help="Which result of both runs: clean, an attack, worst, or a suite: 'img-linf-8 standard'."
        ),
    ] = "worst",
    as_json: AsJson = False,
) -> None:
    """Paired differences of two runs (first minus second); refused where more than the model differs."""
    from dataclasses import asdict

    from robusthash.apps.reports.pages import red_flag_warning
    from robusthash.metrics.comparison import compare as compare_results

    found = {run: result_of(run, result) for run in (first, second)}
    differences = compare_results(found[first], found[second])
    if doubtful := [str(run) for run, side in found.items() if side.unreliable]:
        console.print(f"[bold red]UNRELIABLE[/] {escape(red_flag_warning(doubtful))}")
    if as_json:
        print_json({name: asdict(difference) for name, difference in differences.items()})
        return
    print_table(
        f"{result}: {first} minus {second}",
        ["measure", "difference", "95 % interval", "p (Holm)", "queries"],
        [
            [n, d.mean, "{:+.4f} .. {:+.4f}".format(*d.interval), d.p_holm, d.queries]
            for n, d in differences.items()
        ],
    )


def _say_left_out(runs: Sequence[Run]) -> None:
    for run in runs:
        console.print(escape(f"{run.path} has no results yet and is left out"), soft_wrap=True)


class Format(StrEnum):
    """How a table is written."""

    markdown = "markdown"
    latex = "latex"
    csv = "csv"


def table(
    paths: Annotated[
        list[Path],
        typer.Argument(
            help="Run directories, or folders of them; runs that differ in the seed alone share a row."
        ),
    ],
    column: Annotated[
        list[str] | None,
        typer.Option(
            help="'[MEASURE of ]RESULT[ minus RESULT][ as LABEL]': worst, 'img-linf-8 standard as suite', "
            "'nDCG@100 of clean', 'mainstay minus hag'. Repeatable."
        ),
    ] = None,
    row: Annotated[
        list[str] | None,
        typer.Option(help="'RECIPE[ as LABEL]': these rows in this order, under these labels. Repeatable."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="Paired differences to this recipe over common seeds, instead of values."),
    ] = None,
    seed: Annotated[
        list[int] | None, typer.Option(help="Only runs of this training seed. Repeatable.")
    ] = None,
    format: Annotated[
        Format, typer.Option(help="csv: six digits; ends of intervals and seeds in columns of their own.")
    ] = Format.markdown,
    caption: Annotated[bool, typer.Option(help="Say below the table what was attacked, and how.")] = True,
    as_json: AsJson = False,
) -> None:
    """One table of several runs, with intervals over seeds and queries; below it attacks and budgets.

    Of a folder, runs that were not evaluated are left out and named; a run that is given itself must have
    been.
    """
    from dataclasses import asdict

    from robusthash.apps.experiment import tables
    from robusthash.apps.experiment.run_directory import RunError, runs_with

    runs, waiting = runs_with(lambda run: run.was_evaluated, paths)
    _say_left_out(waiting)
    if not runs:
        raise RunError("none of these runs was evaluated; run 'robusthash evaluate RUN' first")
    found = [run.path for run in runs]
    seeds = tables.read_seeds(found, seed or ())
    columns = None if column is None else tables.named_columns(column, seeds)
    rows = tables.differences_of(seeds, columns, against) if against else tables.rows_of(seeds, columns)
    rows = rows if row is None else tables.chosen_rows(rows, row)
    if as_json:
        print_json([asdict(row) for row in rows])
        return
    titles = list(rows[0].cells) if columns is None else [column.title for column in columns]
    if format is Format.csv:
        csv.writer(sys.stdout, lineterminator="\n").writerows(tables.plain_table(rows, titles))
        return
    sys.stdout.write(f"{(tables.latex if format is Format.latex else tables.markdown)(rows, titles)}\n")
    lines = tables.captions(rows, titles) if caption else []
    sys.stdout.write("".join(f"\n{'% ' * (format is Format.latex)}{line}\n" for line in lines))


def keep(
    paths: Annotated[list[Path], typer.Argument(help="Evaluated run directories, or folders of them.")],
    out: Annotated[Path, typer.Option(help="Folder of the copies: OUT/RECIPE/ID.")] = Path("results"),
    as_json: AsJson = False,
) -> None:
    """Keep the results of runs for a repository: small copies without weights, which `table` and its like
    read.

    Of a folder, runs without results are left out and named; a run that is given itself must have some.
    """
    from robusthash.apps.experiment import kept_results as keeping
    from robusthash.apps.experiment.run_directory import runs_with

    runs, waiting = runs_with(keeping.has_results, paths)
    made = [keeping.keep(run, out) for run in runs]
    _say_left_out(waiting)
    if as_json:
        print_json({"kept": [str(path) for path in made]})
        return
    sys.stdout.write("".join(f"{path}\n" for path in made))
