from pathlib import Path
from typing import Annotated, Literal

from typer import Option

from robusthash.apps.commands.options import AsJson, Device, Figure, RunPaths, Seed
from robusthash.apps.commands.terminal import print_json, print_lines, print_table, progress_bars


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
