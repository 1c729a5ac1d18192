from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.text import Text
from typer import Argument, Exit, Option

from robusthash.apps.commands.options import AsJson, Direction, Eps, Norm, Queries, Threat
from robusthash.apps.commands.terminal import print_json, print_lines, print_table, progress_bars

if TYPE_CHECKING:
    from robusthash.apps.experiment.run_directory import Run
    from robusthash.metrics.results import Flag

_COLOUR = {"pass": "green", "amber": "yellow", "red": "bold red"}


def check(
    run: Annotated[Path | None, Argument(help="Run directory; may be left out with --zoo.")] = None,
    queries: Queries = 128,
    steps: Annotated[int, Option(min=2, help="Steps of the search whose path is looked at.")] = 100,
    threat: Threat = None,
    eps: Eps = None,
    norm: Norm = None,
    direction: Direction = None,
    zoo: Annotated[bool, Option("--zoo", help="Calibrate the checks on deliberately masked models.")] = False,
    as_json: AsJson = False,
) -> None:
    """Look for signs that a robustness number may not be trusted; exit code 1 where one is red.

    With --zoo: mask a model in every way we know, and show whether the check meant for it turns red.
    """
    from robusthash.apps.experiment import check_run as checking
    from robusthash.apps.experiment.budgets import query_modality, threat_name
    from robusthash.apps.experiment.run_directory import load_run

    if run is None and not zoo:
        raise ValueError("name a run directory to check, or ask for --zoo")
    victim = None if run is None else load_run(run)
    if zoo or victim is None:
        _check_zoo(victim, min(queries, 40), as_json)
        return
    budget = threat_name(threat, eps, norm, query_modality(victim, direction))
    with progress_bars() as progress:
        options: dict[str, Any] = {"queries": queries, "steps": steps, "direction": direction}
        flags = checking.check_run(victim, progress, threat=budget, **options)
    if as_json:
        print_json({"run": str(run), "flags": checking.plain(flags)})
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


def _check_zoo(run: Run | None, queries: int, as_json: bool) -> None:
    """The calibration: JSON or a Markdown table on stdout."""
    from robusthash.apps.experiment import check_run as checking

    with progress_bars() as progress:
        honest, rows = checking.calibration(run, progress, queries=queries)
    red = [flag.id for flag in honest if flag.level == "red"]
    if as_json:
        print_json({"honest": checking.plain(honest), "zoo": [asdict(row) for row in rows]})
    else:
        verdict = "no red check" if not red else "red: " + ", ".join(red)
        print_lines([checking.as_markdown(rows), "", f"the honest model: {verdict}"])
    if red or not all(row.caught for row in rows):
        raise Exit(1)
