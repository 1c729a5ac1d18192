from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from typer import Option

from robusthash.apps.commands.options import AsJson, Device, Direction, Eps, Norm, RunPath, with_option_groups
from robusthash.apps.commands.terminal import print_json, print_lines, print_values, progress_bars


@dataclass(frozen=True)
class DatabaseChanges:
    """Options of the items that are put in or changed."""

    attack: Annotated[str | None, Option(help="Attack of db-perturb, as YAML or by name: dsarh.")] = None
    count: Annotated[int, Option(min=1, help="Items put in, of db-insert.")] = 10
    k: Annotated[int, Option("-k", "--k", min=1, help="Ranks that count, of db-insert.")] = 10
    share: Annotated[float, Option(help="Share of the database items that is changed, of db-perturb.")] = 0.1
    steps: Annotated[int | None, Option(min=2, help="Steps of guided-apgd, 100.")] = None


@with_option_groups
def poison(
    run: RunPath,
    threat: Annotated[str, Option(help="db-insert or db-perturb, or with a bound: db-insert-img-linf-4.")],
    eps: Eps = None,
    norm: Norm = None,
    changes: DatabaseChanges = DatabaseChanges(),
    direction: Direction = None,
    out: Annotated[Path | None, Option(help="Write the result here (.json) instead of into the run.")] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Attack the database of a run: insert items to be found often, or change items to be found no more."""
    from robusthash.apps.experiment import poison_run
    from robusthash.apps.experiment.config import value_of
    from robusthash.apps.experiment.run_directory import load_run
    from robusthash.apps.experiment.threat_options import threat_name

    if direction in ("I2T", "T2T"):
        raise ValueError(
            f"direction must be I2I or T2I, since images of the database are changed, got {direction!r}"
        )
    budget = threat_name(threat, eps, norm)
    settings = None if changes.attack is None else value_of(changes.attack)
    with progress_bars() as progress:
        result, path = poison_run.poison(
            load_run(run),
            budget,
            **{**vars(changes), "attack": settings},
            direction=direction,
            out=out,
            progress=progress,
        )
    setting = result.setting
    if as_json:
        values = {"values": result.values, "reference": result.reference, "interval": result.interval}
        print_json({"out": str(path), "threat": setting.threat, "budget": setting.budget, **values})
        return
    print_values(f"{setting.threat}, {setting.budget}", result)
    print_lines([path])
