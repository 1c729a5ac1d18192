"""The verbs that present stored results: ``keep``, ``report``, ``figures`` and ``leaderboard``."""

import sys
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from robusthash.apps.commands.options import AsJson, FiguresFolder, RunPath, RunPaths, runs_with_results
from robusthash.apps.commands.terminal import note, print_lines, reply


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

    runs = runs_with_results(results_copy.can_be_kept, paths)
    copies = [results_copy.keep(run, out) for run in runs]
    for copy in copies:
        if copy.stayed:
            note(f"{copy.path}: kept of the earlier copy, as the run lacks it: {', '.join(copy.stayed)}")
        if copy.removed:
            note(f"{copy.path}: removed, as it was of another model: {', '.join(copy.removed)}")
    kept = [str(copy.path) for copy in copies]
    more = {str(copy.path): {"stayed": copy.stayed, "removed": copy.removed} for copy in copies}
    reply(as_json, {"kept": kept, "earlier copies": more}, kept)


def report(run: RunPath, as_json: AsJson = False) -> None:
    """Write report.html of an evaluated run."""
    from robusthash.apps.experiment.run_directory import load_run
    from robusthash.apps.reports.run_report import write_report

    path = write_report(load_run(run))
    reply(as_json, {"report": str(path)}, [path])


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


def leaderboard(
    paths: Annotated[
        list[Path], Argument(help="Evaluated runs, and folders of them; those of one recipe are its seeds.")
    ],
    out: Annotated[Path | None, Option(help="Write the page here (.html).")] = None,
    markdown: Annotated[Path | None, Option(help="Write Markdown tables here.")] = None,
    data: Annotated[Path | None, Option("--json", help="Write everything as JSON here.")] = None,
) -> None:
    """Ranked tables of runs by setting, with intervals, flags and best-known values: one page, Markdown,
    JSON.

    Without an option, Markdown goes to stdout.
    """
    from robusthash.apps.experiment.leaderboard import as_markdown, as_plain, make_leaderboards
    from robusthash.apps.experiment.results_copy import has_results
    from robusthash.apps.reports.leaderboard_page import leaderboard_page
    from robusthash.core.atomic_files import json_text, write_text

    runs = runs_with_results(has_results, paths)
    boards = make_leaderboards([run.path for run in runs])
    if not any((out, markdown, data)):
        sys.stdout.write(as_markdown(boards))
        return
    formats = (
        (out, leaderboard_page),
        (markdown, as_markdown),
        (data, lambda boards: json_text(as_plain(boards))),
    )
    for path, write in formats:
        if path is not None:
            text = write(boards)
            write_text(path, text)
    print_lines(filter(None, (out, markdown, data)))
