"""The verbs of analyses: ``attribute``, ``cost``, ``curves`` and ``transfer``."""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, Option

from robusthash.apps.commands.options import (
    AnyQueries,
    AsJson,
    BudgetOptions,
    Device,
    Figure,
    FiguresFolder,
    Queries,
    RunPaths,
    Seed,
    with_option_groups,
)
from robusthash.apps.commands.terminal import print_json, print_lines, print_table, progress_bars, reply


def attribute(
    runs: RunPaths,
    queries: Annotated[int, Option("--queries", "--images", min=1, help="Number, chosen by content.")] = 32,
    permutations: Annotated[int, Option(min=4, help="Even; 63 passes an image each.")] = 64,
    worth: Annotated[
        Literal["tau", "ap"], Option(help="Kendall's tau-b to the clean ranking, or AP.")
    ] = "tau",
    top: Annotated[int, Option(min=2, help="Ranks that tau-b looks at.")] = 100,
    seed: Seed = 0,
    out: Annotated[Path | None, Option(help="Folder of the files; by default the run, if it is one.")] = None,
    figure: Figure = True,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Frequencies that a model searches by: Shapley values of the 64 bands of the 8x8 DCT, with standard
    errors."""
    from robusthash.apps.experiment.attribution_run import ATTRIBUTION, attribute_runs
    from robusthash.apps.reports.charts import require_matplotlib
    from robusthash.apps.reports.figures import draw_bands

    if out is None and len(runs) > 1:
        raise ValueError("several runs need --out, the folder for what they have in common")
    if figure:
        require_matplotlib()
    folder = runs[0] if out is None else out
    options = {"permutations": permutations, "worth": worth, "top": top, "seed": seed}
    with progress_bars() as progress:
        attributions = attribute_runs(runs, folder, queries, progress, **options)
    figures = draw_bands(attributions, folder) if figure else []
    answer, rows = {}, []
    for label, bands in attributions.items():
        defined, (share, error) = int(bands.defined.sum()), bands.by_order()
        answer[label] = {
            "mean": bands.mean.tolist(),
            "error": bands.mean_error.tolist(),
            "share_by_order": share.tolist(),
            "share_error": error.tolist(),
            "defined": defined,
            "images": len(bands.defined),
            **{name: getattr(bands, name) for name in ("chosen", "worth", "permutations", "seed")},
        }
        cells = [f"{share[order]:.3f} ± {error[order]:.3f}" for order in _ORDERS]
        rows.append([label, f"{defined} of {len(bands.defined)}", *cells])
    if as_json:
        print_json(answer)
        return
    columns = ["model", "images", *(f"u + v ≤ {order}" for order in _ORDERS)]
    print_table("share of the attribution in the lowest bands (± standard error over images)", columns, rows)
    print_lines([folder / ATTRIBUTION, *figures])


_ORDERS = (0, 1, 2, 4, 7)  # u + v of the bands of the table


def cost(
    runs: RunPaths,
    against: Annotated[Path | None, Option(help="Undefended run; the first one by default.")] = None,
    repeats: Annotated[
        int, Option(min=1, max=1_000_000, help="Timed queries of each, after 10 to warm up.")
    ] = 100,
    rounds: Annotated[
        int,
        Option(
            min=0, max=10_000, help="Also time training steps, in turn for so many rounds; needs the data."
        ),
    ] = 0,
    threads: Annotated[int, Option(min=1, max=1024, help="Threads of all that is timed.")] = 1,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Parameters, multiply-adds, time of one query as a ratio to the undefended net, minutes of an epoch."""
    from dataclasses import asdict

    import torch

    from robusthash.apps.experiment.cost_run import cost_markdown, cost_rows

    torch.set_num_threads(threads)
    reference, rows = cost_rows(runs, against, repeats, rounds)
    reply(
        as_json,
        {"reference": reference, "rows": [asdict(row) for row in rows]},
        [cost_markdown(reference, rows)],
    )


@with_option_groups
def curves(
    runs: RunPaths,
    robust: Annotated[str | None, Option(help="Attack: MAP of the epochs of runtime.keep_epochs.")] = None,
    queries: AnyQueries = None,
    budget: BudgetOptions = BudgetOptions(),
    out: FiguresFolder = Path("figures"),
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Convergence of training: loss terms and seconds by epoch, and clean and attacked MAP by stored epoch.

    Budget and number of queries are those of --robust.
    """
    from robusthash.apps.experiment.epoch_curves import log_curves, robust_curves, values_of
    from robusthash.apps.experiment.run_selection import labelled
    from robusthash.apps.reports.charts import require_matplotlib
    from robusthash.apps.reports.figures import draw_log, draw_robust

    require_matplotlib()
    by_label = labelled(runs)
    out.mkdir(parents=True, exist_ok=True)
    files = [path for label, run in by_label.items() for path in draw_log(label, run, out)]
    answer: dict[str, Any] = {label: {"log": log_curves(run)} for label, run in by_label.items()}
    if robust is not None:
        attack = budget.attack(robust)
        with progress_bars() as progress:
            results = {
                label: robust_curves(run, attack, queries, progress) for label, run in by_label.items()
            }
        files += draw_robust(results, out)
        for label, named in results.items():
            answer[label]["robust"] = {name: values_of(by_epoch) for name, by_epoch in named.items()}
    reply(as_json, answer, files)


@with_option_groups
def transfer(
    runs: Annotated[list[Path], Argument(help="Two or more runs of one data set.")],
    queries: Queries = 200,
    steps: Annotated[int, Option(min=1, help="Steps of the search.")] = 20,
    budget: BudgetOptions = BudgetOptions(),
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Transfer of attacks between models: a table of surrogates (rows) and victims (columns)."""
    from robusthash.apps.experiment.transfer_run import transfer_table

    with progress_bars() as progress:
        table = transfer_table(runs, queries, steps, budget.name(), progress)
    if as_json:
        print_json(table.plain())
    else:
        sys.stdout.write(table.markdown())
