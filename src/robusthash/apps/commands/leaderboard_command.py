import sys
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from robusthash.apps.commands.terminal import note, print_lines


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
    from robusthash.apps.experiment.run_selection import runs_with
    from robusthash.apps.reports.leaderboard_page import leaderboard_page
    from robusthash.core.atomic_files import json_text, write_aside

    runs, waiting = runs_with(has_results, paths)
    for run in waiting:
        note(f"{run.path} has no results yet and is left out")
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
            with write_aside(path) as aside:
                aside.write_text(text, encoding="utf-8")
    print_lines(filter(None, (out, markdown, data)))
