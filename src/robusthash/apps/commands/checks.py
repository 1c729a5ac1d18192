"""The verb ``robusthash check``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from robusthash.apps.commands.terminal import AsJson, RunPath, console, escape, print_json, progress_bars

if TYPE_CHECKING:
    from robusthash.metrics.results import Flag

_COLOUR = {"pass": "green", "amber": "yellow", "red": "bold red"}


def check(
    run: RunPath,
    queries: Annotated[int, typer.Option(min=1, help="Queries, chosen by content.")] = 128,
    steps: Annotated[int, typer.Option(min=2, help="Steps of the search whose path is checked.")] = 100,
    eps: Annotated[str | None, typer.Option(help="Budget, e.g. 4/255; the customary one by default.")] = None,
    norm: Annotated[
        Literal["linf", "l2", "l1"], typer.Option(help="linf, l2 or l1 (which needs --eps).")
    ] = "linf",
    direction: Annotated[
        str | None, typer.Option(help="I2I, I2T, T2I or T2T; the run's first by default.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Look for signs that a robustness number may not be trusted; exit code 1 where one is red."""
    from robusthash.apps.experiment import check_run as checking
    from robusthash.apps.experiment.config import numbers
    from robusthash.apps.experiment.run_directory import load_run

    opened = load_run(run)
    budget = None if eps is None else float(numbers(eps))
    with progress_bars() as progress:
        flags = checking.check_run(
            opened, progress, eps=budget, norm=norm, queries=queries, steps=steps, direction=direction
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
