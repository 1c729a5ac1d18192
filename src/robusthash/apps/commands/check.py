from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from rich.text import Text
from typer import Exit, Option

from robusthash.apps.commands.options import (
    AsJson,
    BudgetOptions,
    Device,
    Direction,
    Queries,
    RunPath,
    with_option_groups,
)
from robusthash.apps.commands.terminal import print_json, print_table, progress_bars

if TYPE_CHECKING:
    from robusthash.metrics.results import Flag

_COLOUR = {"pass": "green", "amber": "yellow", "red": "bold red"}


@with_option_groups
def check(
    run: RunPath,
    queries: Queries = 128,
    steps: Annotated[int, Option(min=2, help="Steps of the search whose path is checked.")] = 100,
    budget: BudgetOptions = BudgetOptions(),
    direction: Direction = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Look for signs that a robustness number may not be trusted; exit code 1 where one is red."""
    from robusthash.apps.experiment.assess_run import check_run, plain_flags
    from robusthash.apps.experiment.run_directory import load_run

    victim = load_run(run)
    threat = budget.name_for(victim, direction)
    with progress_bars() as progress:
        flags = check_run(victim, progress, threat=threat, queries=queries, steps=steps, direction=direction)
    if as_json:
        print_json({"run": str(run), "flags": plain_flags(flags)})
    else:
        _print_flags(f"checks of {run}", flags)
    if any(flag.level == "red" for flag in flags):
        raise Exit(1)


def _print_flags(title: str, flags: Sequence[Flag]) -> None:
    from robusthash.robustness.checks.base import CHECKS

    rows = []
    for flag in flags:
        level = Text(flag.level, _COLOUR[flag.level])
        remedy = "" if flag.level == "pass" else f" -> {flag.remedy}"
        numbers = (f"{flag.value:.4g}", f"{flag.threshold:.4g}")
        rows.append([flag.id, level, *numbers, f"{CHECKS[flag.id].title}{remedy}"])
    columns = ["check", "level", "value", "threshold", "what the value is; what to do"]
    print_table(title, columns, rows, right=False)
