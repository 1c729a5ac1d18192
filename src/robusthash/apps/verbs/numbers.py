"""The verbs score, compare and table: numbers of codes and of evaluated runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from robusthash.apps.verbs.results import plain, result_of
from robusthash.apps.verbs.terminal import AsJson, RunPath, console, escape, print_json, print_table


def score(
    query: Annotated[Path, typer.Argument(help="Query codes (.npz).")],
    database: Annotated[Path, typer.Argument(help="Database codes (.npz).")],
    protocol: Annotated[str, typer.Option(help="Protocol by name; see `robusthash list protocol`.")] = "house",
    as_json: AsJson = False,
) -> None:
    """Score codes made by any program: every measure of the protocol, exact under ties.

    Each file holds `codes` (N, K) in -1/+1 or 0/1, or packed uint8 with `bits`; and `labels`, (N,) classes or (N, C)
    multi-hot.
    """
    from robusthash.evaluation.score import read_codes
    from robusthash.evaluation.score import score as score_codes

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
        str, typer.Option(help="Which result of both runs: clean, an attack, worst, or a suite: 'img-linf-8 standard'.")
    ] = "worst",
    as_json: AsJson = False,
) -> None:
    """Paired differences of two runs (first minus second); refused where more than the model differs."""
    from dataclasses import asdict

    from robusthash.apps.pages.wording import doubt
    from robusthash.evaluation.results import compare as compare_results

    found = {run: result_of(run, result) for run in (first, second)}
    differences = compare_results(found[first], found[second])
    if doubtful := [str(run) for run, side in found.items() if side.unreliable]:
        console.print(f"[bold red]UNRELIABLE[/] {escape(doubt(doubtful))}")
    if as_json:
        print_json({name: asdict(difference) for name, difference in differences.items()})
        return
    print_table(
        f"{result}: {first} minus {second}",
        ["measure", "difference", "95 % interval", "p (Holm)", "queries"],
        [[n, d.mean, "{:+.4f} .. {:+.4f}".format(*d.interval), d.p_holm, d.queries] for n, d in differences.items()],
    )


def table(
    paths: Annotated[
        list[Path], typer.Argument(help="Run directories; runs that differ in the seed alone share a row.")
    ],
    column: Annotated[
        list[str] | None, typer.Option(help="Result to show: clean, mainstay, worst. Repeatable.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """One Markdown table of several runs, with intervals over seeds and queries; below it attacks and budgets."""
    from dataclasses import asdict

    from robusthash.apps.tables import captions, make_rows, markdown

    rows = make_rows(paths)
    if as_json:
        print_json([asdict(row) for row in rows])
        return
    said = "".join(f"\n{line}\n" for line in captions(rows, column))
    sys.stdout.write(f"{markdown(rows, column)}\n{said}")
