from pathlib import Path
from typing import Annotated

from typer import Option

from robusthash.apps.commands.options import AsJson, Device, Figure, Recipe, RunsFolder, Sets
from robusthash.apps.commands.terminal import note, print_json, print_lines, progress_bars


def sweep(
    recipe: Recipe,
    over: Annotated[list[str], Option(help="Values of a setting: training.clip=0,1. Repeatable.")],
    seeds: Annotated[str, Option(help="Training seeds, each a run of every point.")] = "0",
    jobs: Annotated[int, Option(min=1, help="Runs at a time, one thread each.")] = 1,
    sets: Sets = None,
    runs: RunsFolder = Path("runs"),
    out: Annotated[Path | None, Option(help="Folder of table, figure and logs.")] = None,
    figure: Figure = True,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Run a recipe over values of its settings and over seeds; goes on where it was stopped."""
    from dataclasses import asdict

    from robusthash.apps.experiment import parameter_sweep as sweeping
    from robusthash.apps.reports.charts import require_matplotlib
    from robusthash.apps.reports.figures import draw_sweep
    from robusthash.core.atomic_files import write_text
    from robusthash.core.runtime import digest

    if figure:
        require_matplotlib()
    sets = [*(sets or ()), *([] if device is None else [f"runtime.device={device}"])]  # of each process
    axes = [sweeping.read_axis(text) for text in over]
    points = sweeping.points_of(recipe, axes, sweeping.whole_numbers(seeds), sets)
    folder = out or runs / "sweeps" / f"{recipe.stem}-{digest([asdict(axis) for axis in axes])}"
    with progress_bars() as progress:
        outcomes = sweeping.Sweep(recipe, points, runs, folder, jobs).run(progress)
    rows = sweeping.sweep_rows(outcomes)
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    table = sweeping.sweep_markdown(rows)
    write_text(folder / "sweep.md", table + "\n")
    if figure and len(failed) < len(outcomes):
        draw_sweep(rows, sweeping.measure_of(outcomes), folder)
    if as_json:
        plain = {"points": [asdict(o) for o in outcomes], "rows": [asdict(r) for r in rows]}
        print_json({"out": str(folder), **plain})
    else:
        print_lines([table, folder])
    for outcome in failed:
        setting = ", ".join(f"{path}={value}" for path, value in outcome.values.items())
        note(f"failed: {setting}, seed {outcome.seed}: {outcome.error}")
    if failed:
        raise ValueError(f"{len(failed)} of {len(outcomes)} points failed; the same command runs them again")
