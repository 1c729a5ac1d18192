from pathlib import Path
from typing import Annotated

from typer import Option

from robusthash.apps.commands.options import AsJson, Seed
from robusthash.apps.commands.terminal import note, print_json, print_table, progress_bars


def demo(
    out: Annotated[Path, Option(help="Folder of the report and all else.")] = Path("demo"),
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """The whole story on real photographs: a search that works, broken, hardened, measured. A few minutes."""
    from robusthash.apps.experiment.demo_run import run_demo, summary_rows

    with progress_bars() as progress:
        summary = run_demo(out, progress, seed=seed)
    if as_json:
        print_json(summary)
        return
    print_table("MAP on photos, attacks at 8/255", *summary_rows(summary))
    note(f"report: {out / 'report.html'}")
