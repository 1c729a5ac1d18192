"""The verbs of attackers without the victim's gradients: transfer, questions."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from robusthash.apps.commands.terminal import AsJson, RunPath, print_json, print_table, progress_bars


def transfer(
    runs: Annotated[list[Path], typer.Argument(help="Run directories, two or more, of one data set.")],
    queries: Annotated[int, typer.Option(min=1, help="Queries, chosen by content.")] = 200,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the search.")] = 20,
    eps: Annotated[
        str | None,
        typer.Option(
            help="Budget in units of the range; by default 8/255, and with l2 0.5 at 32 x 32 pixels."
        ),
    ] = None,
    norm: Annotated[
        Literal["linf", "l2", "l1"], typer.Option(help="linf, l2 or l1 (which needs --eps).")
    ] = "linf",
    as_json: AsJson = False,
) -> None:
    """How attacks carry over between models: a table of surrogates (rows) and victims (columns)."""
    from robusthash.apps.experiment.config import value_of
    from robusthash.apps.experiment.transfer_run import transfer_table

    radius = None if eps is None else value_of(eps)
    if radius is not None and not isinstance(radius, int | float):
        raise ValueError(f"--eps takes a number such as 8/255, got {eps!r}")
    with progress_bars() as progress:
        table = transfer_table(runs, queries, steps, radius, norm, progress)
    if as_json:
        print_json(table.plain())
        return
    sys.stdout.write(table.markdown())


def questions(
    run: RunPath,
    budgets: Annotated[
        str,
        typer.Option(
            help="Questions of each query at which the search is looked at, rising; the last ends it."
        ),
    ] = "100,1000,5000",
    shows: Annotated[
        Literal["codes", "distances", "ids", "all"],
        typer.Option(help="What the search service answers with."),
    ] = "all",
    queries: Annotated[int, typer.Option(min=1, help="Queries, chosen by content.")] = 100,
    search: Annotated[
        str | None,
        typer.Option(help="square (the default for images), nes, or greedy-words (for bags of words)."),
    ] = None,
    threat: Annotated[
        str, typer.Option(help="What may be changed: img-linf-8 (of 255), img-l2-0.5, txt-bow-3.")
    ] = ("img-linf-8"),
    direction: Annotated[
        Literal["I2I", "I2T", "T2I", "T2T"] | None, typer.Option(help="Of an image-text hasher.")
    ] = None,
    figure: Annotated[
        Path | None,
        typer.Option(help="Draw it here, .pdf or .png; both are written (needs the extra `figures`)."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """MAP by number of questions asked of a run's search service, for what the service shows.

    Goes on where it was stopped.
    """
    from robusthash.apps.experiment.oracle_run import JUDGES, draw_questions, question_table
    from robusthash.apps.experiment.run_directory import load_run
    from robusthash.apps.reports.charts import require_matplotlib

    marks = _rising(budgets)
    if figure is not None:
        require_matplotlib()
        if figure.suffix not in (".pdf", ".png"):
            raise ValueError(f"--figure takes a path that ends in .pdf or .png, got {str(figure)!r}")
        figure.parent.mkdir(parents=True, exist_ok=True)
    chosen = list(JUDGES) if shows == "all" else [shows]
    with progress_bars() as progress:
        table = question_table(load_run(run), marks, chosen, queries, search, threat, direction, progress)
    drawn = [] if figure is None else draw_questions(table, figure)
    if as_json:
        print_json({**table.plain(), "figures": [str(path) for path in drawn]})
        return
    title = (
        f"wMAP by questions, {table.search} under {table.threat}, {len(table.clean)} queries ({table.chosen})"
    )
    print_table(title, ["questions", *table.curves], table.rows())
    for path in drawn:
        sys.stdout.write(f"{path}\n")


def _rising(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    found = [int(part) for part in parts if part.isdigit()]
    if len(found) < len(parts) or found[0] < 1 or sorted(set(found)) != found:
        raise ValueError(f"--budgets takes rising whole numbers from 1 on, as 100,1000,5000; got {text!r}")
    return found
