from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from robusthash.apps.commands.options import AsJson, Device, Eps, Norm, RunPath, Threat
from robusthash.apps.commands.terminal import (
    plain,
    print_headlines,
    print_json,
    print_lines,
    print_table,
    progress_bars,
)

if TYPE_CHECKING:
    from robusthash.metrics.results import EvalResult


def evaluate(
    run: RunPath,
    attack: Annotated[list[str] | None, Option(help="Attack to add to the results. Repeatable.")] = None,
    threat: Threat = None,
    eps: Eps = None,
    norm: Norm = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate a trained run clean, under each attack, and in the worst case per query.

    The attacks are those of the recipe, or with --attack these, added to the results that are there; without
    --attack, results added before are left out again. The attacks of a recipe hold their budgets; --threat is
    for those of --attack.
    """
    from robusthash.apps.experiment import evaluation_stages
    from robusthash.apps.experiment.run_directory import load_run
    from robusthash.apps.experiment.threat_options import attack_under
    from robusthash.core.processes import follows

    if (budget := threat or eps or norm) and not attack:
        raise ValueError(f"the attacks of a recipe hold their budgets; {budget!r} needs --attack")
    attacks = [attack_under(text, threat, eps, norm) for text in attack or ()] or None
    with progress_bars() as progress:
        evaluation_stages.evaluate(load_run(run), progress, attacks)
    if not follows():
        print_evaluation(run, as_json)


def print_evaluation(run: Path, as_json: bool) -> None:
    """All results of the evaluation of a run, and its path on stdout."""
    from robusthash.apps.experiment.run_directory import load_run

    results = load_run(run).evaluated()
    if as_json:
        print_json({"run": str(run), "results": {name: plain(result) for name, result in results.items()}})
        return
    print_headlines(results)
    print_copies(results)
    print_lines([run])


def print_copies(results: Mapping[str, EvalResult]) -> None:
    """The table of copy detection, where the queries are changed copies."""
    from robusthash.apps.experiment.copy_table import copy_table
    from robusthash.metrics.results import by_direction

    for context, group in by_direction(results).items():
        columns, rows = copy_table(group)
        if rows:
            print_table(f"{context} copies that find their image".strip(), columns, rows)
