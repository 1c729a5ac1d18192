from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from robusthash.apps.commands.options import AsJson
from robusthash.apps.commands.terminal import note, reply


def keep(
    paths: Annotated[list[Path], Argument(help="Evaluated run directories, or folders of them.")],
    out: Annotated[Path, Option(help="Folder of the copies: OUT/RECIPE/ID.")] = Path("results"),
    as_json: AsJson = False,
) -> None:
    """Store the results of runs for a repository: small copies without weights, for `table` and its like.

    Of a folder, runs without results are left out and named; a run that is given itself must have some.
    """
    from robusthash.apps.experiment import results_copy
    from robusthash.apps.experiment.run_selection import runs_with

    runs, waiting = runs_with(results_copy.can_be_kept, paths)
    copies = [results_copy.keep(run, out) for run in runs]
    for run in waiting:
        note(f"{run.path} has no results yet and is left out")
    reply(as_json, {"kept": [str(path) for path in copies]}, copies)
