"""The verb that attacks the database instead of the queries."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from robusthash.apps.commands.terminal import AsJson, RunPath, print_json, print_table, progress_bars


def poison(
    run: RunPath,
    threat: Annotated[
        str, typer.Option(help="db-insert or db-perturb; db-insert-img-linf-4 for another bound.")
    ],
    attack: Annotated[
        str | None, typer.Option(help="Attack of db-perturb, as YAML or by name: dsarh.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Items put in, of db-insert.")] = 10,
    k: Annotated[int, typer.Option("-k", "--k", min=1, help="Ranks that count, of db-insert.")] = 10,
    share: Annotated[
        float, typer.Option(help="Share of the database items that is changed, of db-perturb.")
    ] = 0.1,
    steps: Annotated[int | None, typer.Option(min=2, help="Steps of guided-apgd, 100.")] = None,
    direction: Annotated[
        str | None, typer.Option(help="I2I or T2I; the hasher's first modality by default.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the result here (.json) instead of into the run.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Attack the database of a run: insert items to be found often, or change items to be found no more."""
    from robusthash.apps.experiment.config import value_of
    from robusthash.apps.experiment.poison_run import poison as poison_run
    from robusthash.apps.experiment.run_directory import load_run

    if direction not in (None, "I2I", "T2I"):
        raise ValueError(
            f"direction must be I2I or T2I, since images of the database are changed, got {direction!r}"
        )
    with progress_bars() as progress:
        result, path = poison_run(
            load_run(run),
            threat,
            attack=None if attack is None else value_of(attack),
            count=count,
            k=k,
            share=share,
            steps=steps,
            direction=direction,
            out=out,
            progress=progress,
        )
    if as_json:
        values = {"values": result.values, "reference": result.reference, "interval": result.interval}
        print_json(
            {"out": str(path), "threat": result.setting.threat, "budget": result.setting.budget, **values}
        )
        return
    rows = []
    for name, value in result.values.items():
        low, high = result.interval.get(name, (float("nan"),) * 2)
        rows.append([name, value, f"{low:.4f} .. {high:.4f}" if low == low else ""])
    print_table(
        f"{result.setting.threat}, {result.setting.budget}", ["measure", "value", "95 % interval"], rows
    )
    print_table("reference", ["", "value"], [[name, value] for name, value in result.reference.items()])
    sys.stdout.write(f"{path}\n")
