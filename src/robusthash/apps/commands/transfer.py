import sys
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from robusthash.apps.commands.options import AsJson, Device, Eps, Norm, Queries, Threat
from robusthash.apps.commands.terminal import print_json, progress_bars


def transfer(
    runs: Annotated[list[Path], Argument(help="Two or more runs of one data set.")],
    queries: Queries = 200,
    steps: Annotated[int, Option(min=1, help="Steps of the search.")] = 20,
    threat: Threat = None,
    eps: Eps = None,
    norm: Norm = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Transfer of attacks between models: a table of surrogates (rows) and victims (columns)."""
    from robusthash.apps.experiment.threat_options import threat_name
    from robusthash.apps.experiment.transfer_run import transfer_table

    with progress_bars() as progress:
        table = transfer_table(runs, queries, steps, threat_name(threat, eps, norm), progress)
    if as_json:
        print_json(table.plain())
    else:
        sys.stdout.write(table.markdown())
