"""The verbs of analyses: attribute, cost, sweep, curves, figures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from robusthash.apps.commands.terminal import AsJson, console, print_json, print_table, progress_bars

RunPaths = Annotated[list[Path], typer.Argument(help="Run directories.")]
Figures = Annotated[
    bool, typer.Option("--figure/--no-figure", help="Draw it too (needs the extra `figures`).")
]


def attribute(
    runs: RunPaths,
    images: Annotated[int, typer.Option(min=1, help="Queries, chosen by content.")] = 32,
    permutations: Annotated[int, typer.Option(min=4, help="Even; 63 passes an image each.")] = 64,
    worth: Annotated[
        Literal["tau", "ap"], typer.Option(help="Agreement with the clean ranking (Kendall's tau-b), or AP.")
    ] = "tau",
    top: Annotated[int, typer.Option(min=2, help="Ranks that tau-b looks at.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the permutations.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the files; by default the run, if it is one.")
    ] = None,
    figure: Figures = True,
    as_json: AsJson = False,
) -> None:
    """Which frequencies a model searches by: Shapley values of the 64 bands of the 8x8 DCT, with standard
    errors."""
    from robusthash.apps.experiment.attribution_run import ATTRIBUTION, attribute_runs
    from robusthash.apps.reports.charts import require_matplotlib

    if out is None and len(runs) > 1:
        raise ValueError("several runs need --out, the folder for what they have in common")
    if figure:
        require_matplotlib()
    folder = runs[0] if out is None else out
    with progress_bars() as progress:
        found = attribute_runs(
            runs,
            folder,
            images=images,
            permutations=permutations,
            worth=worth,
            top=top,
            seed=seed,
            progress=progress,
        )
    drawn = []
    if figure:
        from robusthash.apps.reports.figures import draw_bands

        drawn = draw_bands(found, folder)
    orders = {label: one.by_order() for label, one in found.items()}
    if as_json:
        print_json(
            {
                label: {
                    "mean": one.mean.tolist(),
                    "error": one.mean_error.tolist(),
                    "share_by_order": orders[label][0].tolist(),
                    "share_error": orders[label][1].tolist(),
                    "defined": int(one.defined.sum()),
                    "images": len(one.defined),
                    "chosen": one.chosen,
                    "worth": one.worth,
                    "permutations": one.permutations,
                    "seed": one.seed,
                }
                for label, one in found.items()
            }
        )
        return
    counted = [0, 1, 2, 4, 7]
    rows: list[list[Any]] = []
    for label, one in found.items():
        share, error = orders[label]
        cells = [f"{share[order]:.3f} ± {error[order]:.3f}" for order in counted]
        rows.append([label, f"{int(one.defined.sum())} of {len(one.defined)}", *cells])
    columns = ["model", "images", *(f"u + v ≤ {order}" for order in counted)]
    print_table("share of the attribution in the lowest bands (± standard error over images)", columns, rows)
    for path in [folder / ATTRIBUTION, *drawn]:
        sys.stdout.write(f"{path}\n")


def cost(
    runs: RunPaths,
    against: Annotated[
        Path | None, typer.Option(help="The undefended run; by default the first one named.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed queries of each, after 10 to warm up.")] = 100,
    threads: Annotated[int, typer.Option(min=1, help="Threads of every query.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Parameters, multiply-adds, time of one query as a ratio to the undefended net, minutes of an epoch."""
    from dataclasses import asdict

    import torch

    from robusthash.apps.experiment.cost_run import cost_markdown, cost_rows

    torch.set_num_threads(threads)
    reference, rows = cost_rows(runs, against, repeats)
    if as_json:
        print_json({"reference": reference, "rows": [asdict(row) for row in rows]})
        return
    sys.stdout.write(cost_markdown(reference, rows) + "\n")


def sweep(
    recipe: Annotated[Path, typer.Argument(help="Recipe file (YAML).")],
    over: Annotated[
        list[str], typer.Option(help="Setting and its values: training.outer.lam=0.1,0.5. Repeatable.")
    ],
    seeds: Annotated[str, typer.Option(help="Training seeds, each a run of every point.")] = "0",
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, one thread each.")] = 1,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="Override of all points. Repeatable.")
    ] = None,
    runs: Annotated[Path, typer.Option("--runs", help="Folder of all runs.")] = Path("runs"),
    out: Annotated[Path | None, typer.Option(help="Folder of table, figure and logs.")] = None,
    figure: Figures = True,
    as_json: AsJson = False,
) -> None:
    """Run a recipe over values of its settings and over seeds; goes on where it was stopped."""
    from dataclasses import asdict

    from robusthash.apps.experiment.parameter_sweep import (
        Sweep,
        measure_of,
        points_of,
        read_axis,
        sweep_markdown,
        sweep_rows,
        whole_numbers,
    )
    from robusthash.apps.reports.charts import require_matplotlib
    from robusthash.core.atomic_files import write_aside
    from robusthash.core.runtime import digest

    if figure:
        require_matplotlib()
    axes = [read_axis(text) for text in over]
    points = points_of(recipe, axes, whole_numbers(seeds), sets or ())
    folder = out or runs / "sweeps" / f"{recipe.stem}-{digest([asdict(axis) for axis in axes])}"
    with progress_bars() as progress:
        outcomes = Sweep(recipe, points, runs, folder, jobs).run(progress)
    rows = sweep_rows(outcomes)
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    table = sweep_markdown(rows)
    with write_aside(folder / "sweep.md") as aside:
        aside.write_text(table + "\n", encoding="utf-8")
    if figure and len(failed) < len(outcomes):
        from robusthash.apps.reports.figures import draw_sweep

        draw_sweep(rows, measure_of(outcomes), folder)
    if as_json:
        print_json(
            {"out": str(folder), "points": [asdict(o) for o in outcomes], "rows": [asdict(r) for r in rows]}
        )
    else:
        sys.stdout.write(f"{table}\n{folder}\n")
    for outcome in failed:
        setting = ", ".join(f"{path}={value}" for path, value in outcome.values.items())
        console.print(
            f"failed: {setting}, seed {outcome.seed}: {outcome.error}", markup=False, soft_wrap=True
        )
    if failed:
        raise ValueError(f"{len(failed)} of {len(outcomes)} points failed; the same command runs them again")


def curves(
    runs: RunPaths,
    robust: Annotated[
        str | None,
        typer.Option(help="Attack, as YAML or by name: MAP of the epochs kept by runtime.keep_epochs."),
    ] = None,
    queries: Annotated[
        int | None, typer.Option(min=1, help="Only so many, chosen by content, for --robust.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the figures.")] = Path("figures"),
    as_json: AsJson = False,
) -> None:
    """Convergence of training: loss terms and seconds by epoch, and clean and attacked MAP by kept epoch."""
    from robusthash.apps.experiment.attribution_run import labelled
    from robusthash.apps.experiment.config import value_of
    from robusthash.apps.experiment.epoch_curves import log_curves, robust_curves, values_of
    from robusthash.apps.reports.charts import require_matplotlib
    from robusthash.apps.reports.figures import draw_log, draw_robust

    require_matplotlib()
    opened = labelled(runs)
    out.mkdir(parents=True, exist_ok=True)
    drawn = [path for label, run in opened.items() for path in draw_log(label, run, out)]
    plain: dict[str, Any] = {label: {"log": log_curves(run)} for label, run in opened.items()}
    if robust is not None:
        attack = value_of(robust)
        with progress_bars() as progress:
            found = {label: robust_curves(run, attack, queries, progress) for label, run in opened.items()}
        drawn += draw_robust(found, out)
        for label, results in found.items():
            plain[label]["robust"] = {name: values_of(by_epoch) for name, by_epoch in results.items()}
    if as_json:
        print_json(plain)
        return
    for path in drawn:
        sys.stdout.write(f"{path}\n")


def figures(
    runs: RunPaths,
    out: Annotated[Path, typer.Option(help="Folder of the figures.")] = Path("figures"),
    transfer: Annotated[
        Path | None, typer.Option(help="Transfer matrix, as `robusthash transfer --json` prints it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Figures for papers (PDF and PNG) of everything that these runs have measured."""
    from robusthash.apps.reports.figures import draw_runs, draw_transfer_file

    drawn, notes = draw_runs(runs, out)
    if transfer is not None:
        drawn += draw_transfer_file(transfer, out)
    for note in notes:
        console.print(note, markup=False, soft_wrap=True)
    if as_json:
        print_json({"figures": [str(path) for path in drawn], "notes": notes})
        return
    for path in drawn:
        sys.stdout.write(f"{path}\n")
