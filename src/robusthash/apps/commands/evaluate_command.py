"""The verbs ``evaluate`` and ``attack``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from robusthash.apps.commands.options import (
    AsJson,
    AttackName,
    BudgetOptions,
    Device,
    RunPath,
    with_option_groups,
)
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


@with_option_groups
def evaluate(
    run: RunPath,
    attack: Annotated[list[str] | None, Option(help="Attack to add to the results. Repeatable.")] = None,
    budget: BudgetOptions = BudgetOptions(),
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
    from robusthash.core.processes import follows

    if (given := budget.threat or budget.eps or budget.norm) and not attack:
        raise ValueError(f"the attacks of a recipe hold their budgets; {given!r} needs --attack")
    attacks = [budget.attack(text) for text in attack or ()] or None
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
    from robusthash.apps.experiment.table_text import copy_table
    from robusthash.metrics.results import by_direction

    for context, group in by_direction(results).items():
        columns, rows = copy_table(group)
        if rows:
            print_table(f"{context} copies that find their image".strip(), columns, rows)


@with_option_groups
def attack(
    run: RunPath,
    name: AttackName,
    out: Annotated[Path, Option(help="The attacked queries (.npz: inputs, codes, labels).")],
    budget: BudgetOptions = BudgetOptions(),
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Attack the queries of a run and write the attacked inputs."""
    from robusthash.apps.experiment.evaluation_stages import attack_to_file
    from robusthash.apps.experiment.run_directory import load_run
    from robusthash.core.processes import follows

    with progress_bars() as progress:
        settings = budget.attack(name)
        result = attack_to_file(load_run(run), settings, out, progress)
    if follows():
        return
    if as_json:
        print_json({"out": str(out), **plain(result)})
        return
    print_headlines({result.setting.attacks[0]: result})
    print_lines([out])
