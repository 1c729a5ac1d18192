from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from robusthash.apps.commands.options import (
    AnyQueries,
    AsJson,
    BudgetOptions,
    Device,
    Direction,
    Relevance,
    RunPath,
    shard_of,
    with_option_groups,
)
from robusthash.apps.commands.terminal import (
    console,
    note,
    plain,
    print_json,
    print_table,
    print_values,
    progress_bars,
)

if TYPE_CHECKING:
    from robusthash.metrics.results import EvalResult, Flag


@dataclass(frozen=True)
class SuiteOptions:
    """Options of the suite of attacks, next to its tier and budget."""

    eps_curve: Annotated[bool, Option("--eps-curve", help="The worst case at seven budgets too.")] = False
    shard: Annotated[str | None, Option(help="Part I/N of the work (0/2); a call without it joins them.")] = (
        None
    )
    surrogate: Annotated[list[Path] | None, Option(help="Run to transfer attacks from. Repeatable.")] = None
    unchecked: Annotated[bool, Option("--unchecked", help="Skip the checks, which raise flags.")] = False
    steps: Annotated[int | None, Option(min=1, help="Tier paper: steps of an attack at most.")] = None
    attack: Annotated[
        list[str] | None, Option(help="Attack of your own besides, under the same budget. Repeatable.")
    ] = None


@with_option_groups
def assess(
    run: RunPath,
    tier: Annotated[str, Option(help="Effort: smoke, fast, standard, full; paper: as published.")] = "fast",
    budget: BudgetOptions = BudgetOptions(),
    queries: AnyQueries = None,
    direction: Direction = None,
    relevance: Relevance = "own",
    suite: SuiteOptions = SuiteOptions(),
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure a run by a suite of attacks: the worst case of each query over all of them.

    Goes on where it was stopped. The result is added to assess.json in the run directory.
    """
    from robusthash.apps.experiment import assess_run
    from robusthash.apps.experiment.run_directory import load_run
    from robusthash.core.processes import follows

    shard, victim = None if suite.shard is None else shard_of(suite.shard), load_run(run)
    threat = budget.name_for(victim, direction)
    with progress_bars() as progress:
        result = assess_run.assess(
            victim,
            tier,
            threat,
            queries,
            progress,
            direction=direction,
            relevance=relevance,
            surrogates=[load_run(path) for path in suite.surrogate or ()],
            curve=suite.eps_curve,
            shard=shard,
            checked=not suite.unchecked,
            steps=suite.steps,
            attacks=suite.attack or (),
        )
    if result is None:
        console.print(
            f"shard {suite.shard} is done; when all are, the same command without --shard joins them"
        )
    elif as_json and not follows():
        print_json({"run": str(run), **_plain(result)})
    elif not follows():
        print_assessment(result)


def _plain(result: EvalResult) -> dict[str, Any]:
    """The result as plain data, without the values of single queries."""
    curves = {
        name: {axis: values.tolist() for axis, values in curve.items()}
        for name, curve in result.curves.items()
    }
    interval = {name: ends for name, ends in result.interval.items() if name in result.values}
    flags = {"flags": [asdict(flag) for flag in result.flags], "unreliable": result.unreliable}
    return {"name": result.name, **plain(result), "interval": interval, "curves": curves, **flags}


def print_assessment(result: EvalResult) -> None:
    """Tables: the numbers, the attacks next to each other, curves and flags."""
    from robusthash.metrics.result_words import empty_note

    queries = len(next(iter(result.per_query.values())))
    subset = f" ({result.setting.chosen})" if result.setting.chosen else ""
    print_values(f"{result.name}, {queries} queries{subset}", result)
    names = dict.fromkeys(name for facts in result.attacks.values() for name in facts)
    columns = [name for name in names if name not in ("forward", "backward", "oracle")]
    rows = [[name, *(_cell(c, facts.get(c)) for c in columns)] for name, facts in result.attacks.items()]
    print_table("attacks", ["attack", *columns], rows)
    for name, curve in result.curves.items():
        axes = [axis for axis in curve if axis != "eps"]
        points = zip(curve["eps"].tolist(), *(curve[axis].tolist() for axis in axes), strict=True)
        print_table(name, ["eps", *axes], [[f"{eps:.6g}", *values] for eps, *values in points])
    _print_checks(result.flags)
    if result.unreliable:
        console.print("[bold red]unreliable:[/] a check is red, and the numbers above may be too high")
    for text in filter(None, (empty_note(result), *result.notes)):
        note(text)


def _print_checks(flags: Sequence[Flag]) -> None:
    """Print the checks that raised a flag, red ones first, with their titles; passed ones in one line."""
    from robusthash.robustness.checks.base import CHECKS

    raised = [flag for level in ("red", "amber") for flag in flags if flag.level == level]
    rows = [
        [
            f"{flag.id}: {CHECKS[flag.id].title}" if flag.id in CHECKS else flag.id,
            flag.level,
            f"{flag.value:.3g}" if math.isfinite(flag.value) else "not run",
            flag.remedy.removeprefix("not run: "),
        ]
        for flag in raised
    ]
    if rows:
        print_table("checks that raised a flag", ["check", "level", "value", "remedy"], rows, right=False)
    if passed := [flag.id for flag in flags if flag.level == "pass"]:
        note(f"{len(passed)} checks passed: {', '.join(passed)}")


def _cell(column: str, value: float | None) -> str | float:
    digits = {"unique wins": 0, "fit steps": 0, "seconds": 1, "flips": 1}
    if value is None:
        return ""
    return f"{value:.{digits[column]}f}" if column in digits else value
