"""The verbs ``table``, ``compare`` and ``score``: results next to each other, and codes of any program."""

import csv
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, Option

from robusthash.apps.commands.options import AsJson, RunPath, runs_with_results
from robusthash.apps.commands.terminal import note, plain, print_json, print_table, print_values, warn


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
    format: Annotated[
        Literal["markdown", "latex", "csv"],
        Option(help="latex: for booktabs. csv: six digits; intervals in columns."),
    ] = "markdown",
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
    from robusthash.apps.reports.cell_text import markdown_cell

    runs = runs_with_results(lambda run: run.was_evaluated, paths)
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
    titles = table_text.titles_of(rows) if columns is None else [column.title for column in columns]
    if format == "csv":
        csv.writer(sys.stdout, lineterminator="\n").writerows(table_text.plain_table(rows, titles))
        return
    words = table_text.captions(rows, titles) if caption else []
    if format == "latex":
        sys.stdout.write(f"{table_text.latex(rows, titles, words)}\n")
        return
    sys.stdout.write(f"{table_text.markdown(rows, titles)}\n")
    for line in words:
        sys.stdout.write(f"\n{markdown_cell(line)}\n")


def compare(
    first: RunPath,
    second: RunPath,
    result: Annotated[
        str, Option(help="clean, an attack, worst, or a suite: 'img-linf-8 standard'.")
    ] = "worst",
    as_json: AsJson = False,
) -> None:
    """Paired differences of two runs (first minus second); refused where more than the model differs."""
    from dataclasses import asdict

    from robusthash.apps.experiment.run_directory import load_run
    from robusthash.apps.reports.pages import red_flag_warning
    from robusthash.core.registry import nearest
    from robusthash.metrics.comparison import compare as compare_results
    from robusthash.metrics.result_words import budget_words, empty_note, p_text

    stored = [load_run(run).results() for run in (first, second)]
    for run, results in zip((first, second), stored, strict=True):
        if result not in results:
            raise ValueError(f"{run} has no result {result!r}{nearest(result, results)}")
    sides = [results[result] for results in stored]
    try:
        differences = compare_results(*sides)
    except ValueError as error:
        raise ValueError(f"{result}: {error}{_others(*stored)}") from None
    if unreliable := [str(run) for run, side in zip((first, second), sides, strict=True) if side.unreliable]:
        warn("UNRELIABLE", red_flag_warning(unreliable))
    if as_json:
        print_json({name: asdict(difference) for name, difference in differences.items()})
        return
    rows = [
        [name, d.mean, "{:+.4f} .. {:+.4f}".format(*d.interval), p_text(d.p_holm), d.queries]
        for name, d in differences.items()
    ]
    columns = ["measure", "difference", "95 % interval", "p (Holm)", "queries"]
    print_table(f"{result}: {first} minus {second}", columns, rows)
    if (setting := sides[0].setting).attacks:
        note(
            f"threat: {setting.threat}; attacks: {', '.join(setting.attacks)}; {budget_words(setting.budget)}"
        )
    for run, side in zip((first, second), sides, strict=True):
        if text := empty_note(side):
            note(f"{run}: {text}")


def _others(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """Options that name the results which two runs have in common and which compare; "" where none does."""
    same = [
        name
        for name, one in first.items()
        if name in second and not one.setting.differs(second[name].setting)
    ]
    names = " or ".join(f"--result '{name}'" if " " in name else f"--result {name}" for name in same)
    return f"; these two have comparable results: {names}" if names else ""


def score(
    query: Annotated[Path, Argument(help="Query codes (.npz).")],
    database: Annotated[Path, Argument(help="Database codes (.npz).")],
    protocol: Annotated[
        str, Option(help="A protocol by name or as YAML: '{name: house, empty: skip}'.")
    ] = "house",
    as_json: AsJson = False,
) -> None:
    """Score codes made by any program: every measure of the protocol, exact under ties.

    Each file holds `codes` (N, K) in -1/+1 or 0/1, or packed uint8 with `bits`; and `labels`, (N,) classes or
    (N, C) multi-hot.
    """
    from robusthash.apps.experiment.config import value_of
    from robusthash.metrics.code_scoring import read_codes
    from robusthash.metrics.code_scoring import score as score_codes
    from robusthash.metrics.protocol import load_protocol
    from robusthash.metrics.result_words import empty_note

    result = score_codes(read_codes(query), read_codes(database), load_protocol(value_of(protocol)))
    if as_json:
        print_json(plain(result))
        return
    print_values(f"{protocol}: {result.setting.queries} against {result.setting.database}", result)
    for text in filter(None, (empty_note(result), *result.notes)):
        note(text)
