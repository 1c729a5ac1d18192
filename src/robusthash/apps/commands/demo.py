import shlex
from pathlib import Path
from typing import Annotated

from typer import Option

from robusthash.apps.commands.options import AsJson, Device, Seed
from robusthash.apps.commands.terminal import note, print_json, print_table, progress_bars

PLAN = """\
The demo trains a photo search on twenty embedded photographs (no download), attacks it, hardens it by
SAAT, attacks it again, and writes {out}/report.html. It takes a few minutes on two free cores. Stopped and
called again, it goes on where it was."""


def demo(
    out: Annotated[Path, Option(help="Folder of the report and all else.")] = Path("demo"),
    seed: Seed = 0,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """The whole story on real photographs: a search that works, broken, hardened, measured. A few minutes."""
    note(PLAN.format(out=out))
    from robusthash.apps.experiment.demo_run import run_demo, summary_rows

    with progress_bars() as progress:
        summary = run_demo(out, progress, seed=seed)
    if as_json:
        print_json(summary)
        return
    print_table("MAP on photos, attacks at 8/255", *summary_rows(summary))
    note(f"report: {out / 'report.html'}")
    folder = "" if out == Path("demo") else f" {shlex.quote(str(out))}"
    note(f"To search and attack both models in a browser: robusthash serve{folder} --demo")
