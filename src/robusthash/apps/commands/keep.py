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

    What an earlier copy has and the run lacks (analyses, say) stays where both are of the same model; it is
    named. Of a folder, runs without results are left out and named; a run that is given itself must have
    some.
    """
    from robusthash.apps.experiment import results_copy
    from robusthash.apps.experiment.run_selection import runs_with

    runs, waiting = runs_with(results_copy.can_be_kept, paths)
    copies = [results_copy.keep(run, out) for run in runs]
    for run in waiting:
        note(f"{run.path} has no results yet and is left out")
    for copy in copies:
        if copy.stayed:
            note(f"{copy.path}: kept of the earlier copy, as the run lacks it: {', '.join(copy.stayed)}")
        if copy.removed:
            note(f"{copy.path}: removed, as it was of another model: {', '.join(copy.removed)}")
    kept = [str(copy.path) for copy in copies]
    more = {str(copy.path): {"stayed": copy.stayed, "removed": copy.removed} for copy in copies}
    reply(as_json, {"kept": kept, "earlier copies": more}, kept)
