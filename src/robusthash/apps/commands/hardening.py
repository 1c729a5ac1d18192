from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from robusthash.apps.commands.options import AsJson, Device, Queries
from robusthash.apps.commands.terminal import progress_bars, reply


def hardening(
    source: Annotated[Path, Argument(help="Run directory, or a file that this verb wrote.")],
    parts: Annotated[
        str, Option(help="What is measured, by commas.")
    ] = "answers,learned,detection,agreement",
    photographs: Annotated[
        Path | None, Option(help="Folder of photographs, of which ordinary traffic is made.")
    ] = None,
    queries: Queries = 50,
    search: Annotated[str | None, Option(help="square (default) or nes, for the part `answers`.")] = None,
    budgets: Annotated[str, Option(help="Oracle queries at which MAP is read.")] = "100,1000,5000",
    out: Annotated[Path, Option(help="JSON file; parts that it has already stay.")] = Path("hardening.json"),
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure the service's parts against attacked queries: answers, query detection, code agreement.

    Of a file, print its tables. Minutes for `--parts agreement --queries 2`, hours for all of it at the
    defaults on a CPU: an attack is thousands of passes. Stopped and called again, it goes on.
    """
    from robusthash.apps.commands.questions import rising
    from robusthash.apps.experiment.hardening_run import measure_hardening
    from robusthash.apps.experiment.hardening_tables import hardening_tables
    from robusthash.apps.experiment.run_directory import load_run
    from robusthash.core.limited_files import read_json

    names = [part.strip() for part in parts.split(",")]
    if source.is_file():
        content = read_json(source)
    else:
        run, numbers = load_run(source), rising(budgets)
        with progress_bars() as progress:
            content = measure_hardening(run, names, out, queries, photographs, search, numbers, progress)
    reply(as_json, content, [hardening_tables(content, names)])
