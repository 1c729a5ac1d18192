"""The verb ``robusthash check``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from robusthash.apps.commands.terminal import AsJson, console, escape, print_json, progress_bars

if TYPE_CHECKING:
    from robusthash.apps.experiment.run_directory import Run
    from robusthash.metrics.results import Flag

_COLOUR = {"pass": "green", "amber": "yellow", "red": "bold red"}


def check(
    run: Annotated[Path | None, typer.Argument(help="Run directory; may be left out with --zoo.")] = None,
    queries: Annotated[int, typer.Option(min=1, help="Queries, chosen by content.")] = 128,
    steps: Annotated[int, typer.Option(min=2, help="Steps of the search whose path is looked at.")] = 100,
    eps: Annotated[str | None, typer.Option(help="Budget, e.g. 4/255; the customary one by default.")] = None,
    norm: Annotated[
        Literal["linf", "l2", "l1"], typer.Option(help="linf, l2 or l1 (which needs --eps).")
    ] = "linf",
    direction: Annotated[
        str | None, typer.Option(help="I2I, I2T, T2I or T2T; the run's first by default.")
    ] = None,
    zoo: Annotated[
        bool, typer.Option("--zoo", help="Calibrate the checks on deliberately masked models.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Look for signs that a robustness number may not be trusted; exit code 1 where one is red.

    With --zoo: mask a model in every way we know, and show whether the check meant for it turns red.
    """
    from robusthash.apps.experiment import check_run as checking
    from robusthash.apps.experiment.config import numbers
    from robusthash.apps.experiment.run_directory import load_run

    if run is None and not zoo:
        raise ValueError("name a run directory to check, or ask for --zoo")
    opened = None if run is None else load_run(run)
    if zoo or opened is None:
        _show_zoo(opened, min(queries, 40), as_json)
        return
    budget = None if eps is None else float(numbers(eps))
    with progress_bars() as progress:
        flags = checking.check_run(
            opened,
            progress,
            eps=budget,
            norm=norm,
            queries=queries,
            steps=steps,
            direction=direction,
        )
    if as_json:
        print_json({"run": str(run), "flags": checking.plain(flags)})
    else:
        _show(f"checks of {run}", flags)
    if any(flag.level == "red" for flag in flags):
        raise typer.Exit(1)


def _show(title: str, flags: Sequence[Flag]) -> None:
    from robusthash.robustness.checks.base import CHECKS

    table = Table(title=escape(title), title_justify="left")
    for column in ("check", "level", "value", "threshold", "what the value is; what to do"):
        table.add_column(column)
    for flag in flags:
        colour, text = _COLOUR[flag.level], CHECKS[flag.id].title
        if flag.level != "pass":
            text = f"{text} -> {flag.remedy}"
        table.add_row(
            flag.id, f"[{colour}]{flag.level}[/]", f"{flag.value:.4g}", f"{flag.threshold:.4g}", escape(text)
        )
    console.print(table)


def _show_zoo(run: Run | None, queries: int, as_json: bool) -> None:
    """The calibration: JSON or a Markdown table on stdout."""
    from robusthash.apps.experiment import check_run as checking

    with progress_bars() as progress:
        honest, rows = checking.calibration(run, progress, queries=queries)
    red = [flag.id for flag in honest if flag.level == "red"]
    if as_json:
        print_json({"honest": checking.plain(honest), "zoo": [asdict(row) for row in rows]})
    else:
        sys.stdout.write(f"{checking.as_markdown(rows)}\n\n")
        sys.stdout.write(f"the honest model: {'no red check' if not red else 'red: ' + ', '.join(red)}\n")
    if red or not all(row.caught for row in rows):
        raise typer.Exit(1)
