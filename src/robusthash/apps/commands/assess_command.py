"""The verb ``robusthash assess``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robusthash.apps.commands.terminal import AsJson, RunPath, console, print_json, print_table, progress_bars

if TYPE_CHECKING:
    from robusthash.metrics.results import EvalResult


def assess(
    run: RunPath,
    tier: Annotated[
        str, typer.Option(help="Effort: smoke, fast, standard or full; or paper: attacks as published.")
    ] = "fast",
    threat: Annotated[
        str, typer.Option(help="What may be changed: img-linf-8 (of 255), img-l2-0.5, txt-bow-3.")
    ] = ("img-linf-8"),
    queries: Annotated[
        int | None, typer.Option(help="Queries, chosen by content; those of the tier by default.")
    ] = None,
    direction: Annotated[
        str | None, typer.Option(help="I2I, I2T, T2I or T2T of an image-text hasher.")
    ] = None,
    eps_curve: Annotated[
        bool, typer.Option("--eps-curve", help="The worst case at seven budgets too.")
    ] = False,
    shard: Annotated[
        str | None,
        typer.Option(help="Run only part I of N (0/2, 1/2) of the work; a call without it joins the parts."),
    ] = None,
    surrogate: Annotated[
        list[Path] | None,
        typer.Option(help="Run to transfer attacks from, on the same data. Repeatable."),
    ] = None,
    unchecked: Annotated[
        bool, typer.Option("--unchecked", help="Raise no flags, which saves time; smoke never does.")
    ] = False,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tier paper: no attack takes more; by default each takes its paper's, up to 2,000."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a run by a suite of attacks: the worst case of each query over all of them.

    Goes on where it was stopped. The result is added to assess.json in the run directory.
    """
    from robusthash.apps.experiment import assess_run as assessing
    from robusthash.apps.experiment.run_directory import load_run

    part = None if shard is None else _shard(shard)
    if direction is not None and not re.fullmatch("[IT]2[IT]", direction):
        raise ValueError(f"direction must be I2I, I2T, T2I or T2T, got {direction!r}")
    with progress_bars() as progress:
        result = assessing.assess(
            load_run(run),
            tier,
            threat,
            queries,
            progress,
            direction=direction,
            curve=eps_curve,
            shard=part,
            surrogates=[load_run(path) for path in surrogate or ()],
            checked=not unchecked,
            steps=steps,
        )
    if result is None:
        console.print(f"shard {shard} is done; when all are, the same command without --shard joins them")
    elif as_json:
        print_json({"run": str(run), **_plain(result)})
    else:
        _show(result)


def _shard(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or int(found[1]) >= int(found[2]):
        raise ValueError(f"--shard takes I/N with I from 0 to N - 1, as 0/2 and 1/2; got {text!r}")
    return int(found[1]), int(found[2])


def _plain(result: EvalResult) -> dict[str, Any]:
    """The result as plain data, without the values of single queries."""
    from dataclasses import asdict

    return {
        "name": result.name,
        "setting": asdict(result.setting),
        "values": result.values,
        "interval": {name: ends for name, ends in result.interval.items() if name in result.values},
        "reference": result.reference,
        "attacks": result.attacks,
        "curves": {
            name: {axis: v.tolist() for axis, v in curve.items()} for name, curve in result.curves.items()
        },
        "perceptibility": result.perceptibility,
        "flags": [asdict(flag) for flag in result.flags],
        "unreliable": result.unreliable,
        "notes": result.notes,
        "cost": asdict(result.cost),
    }


def _show(result: EvalResult) -> None:
    """Tables on stderr: the numbers, the lines beside each other, the curve, the flags."""
    queries = len(next(iter(result.per_query.values())))
    rows: list[list[Any]] = []
    for name, value in result.values.items():
        ends = result.interval.get(name)
        rows.append([name, value, "" if ends is None else "{:.4f} .. {:.4f}".format(*ends)])
    chosen = f" ({result.setting.chosen})" if result.setting.chosen else ""
    print_table(f"{result.name}, {queries} queries{chosen}", ["measure", "value", "95 % interval"], rows)
    print_table("reference", ["", "value"], [[name, value] for name, value in result.reference.items()])
    columns = list(dict.fromkeys(name for line in result.attacks.values() for name in line))
    columns = [name for name in columns if name not in ("forward", "backward", "oracle")]
    print_table(
        "lines",
        ["line", *columns],
        [
            [name, *(_cell(column, line.get(column)) for column in columns)]
            for name, line in result.attacks.items()
        ],
    )
    for name, curve in result.curves.items():
        axes = [axis for axis in curve if axis != "eps"]
        steps = zip(curve["eps"].tolist(), *(curve[axis].tolist() for axis in axes), strict=True)
        print_table(name, ["eps", *axes], [[f"{eps:.6g}", *values] for eps, *values in steps])
    if result.flags:
        flagged = [[flag.id, flag.level, flag.value, flag.remedy] for flag in result.flags]
        print_table("checks", ["check", "level", "value", "remedy"], flagged)
    if result.unreliable:
        console.print("[bold red]unreliable:[/] a red check stands, and the numbers above may be too high")
    for note in result.notes:
        console.print(note)


def _cell(column: str, value: float | None) -> str | float:
    if value is None:
        return ""
    return (
        f"{value:.0f}"
        if column in ("unique wins", "fit steps")
        else f"{value:.1f}"
        if column in ("seconds", "flips")
        else value
    )
