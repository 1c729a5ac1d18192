from pathlib import Path
from typing import Annotated

from typer import Option

from robusthash.apps.commands.options import AsJson, FiguresFolder, RunPaths
from robusthash.apps.commands.terminal import note, reply


def figures(
    runs: RunPaths,
    out: FiguresFolder = Path("figures"),
    transfer: Annotated[Path | None, Option(help="Matrix of `robusthash transfer --json`.")] = None,
    as_json: AsJson = False,
) -> None:
    """Figures for papers (PDF and PNG) of everything that these runs have measured."""
    from robusthash.apps.reports.figures import draw_runs, draw_transfer_file

    files, notes = draw_runs(runs, out)
    if transfer is not None:
        files += draw_transfer_file(transfer, out)
    for text in notes:
        note(text)
    reply(as_json, {"figures": [str(path) for path in files], "notes": notes}, files)
