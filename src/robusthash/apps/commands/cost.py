from pathlib import Path
from typing import Annotated

from typer import Option

from robusthash.apps.commands.options import AsJson, Device, RunPaths
from robusthash.apps.commands.terminal import reply


def cost(
    runs: RunPaths,
    against: Annotated[Path | None, Option(help="Undefended run; the first one by default.")] = None,
    repeats: Annotated[int, Option(min=1, help="Timed queries of each, after 10 to warm up.")] = 100,
    threads: Annotated[int, Option(min=1, help="Threads of every query.")] = 1,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Parameters, multiply-adds, time of one query as a ratio to the undefended net, minutes of an epoch."""
    from dataclasses import asdict

    import torch

    from robusthash.apps.experiment.cost_run import cost_markdown, cost_rows

    torch.set_num_threads(threads)
    reference, rows = cost_rows(runs, against, repeats)
    reply(
        as_json,
        {"reference": reference, "rows": [asdict(row) for row in rows]},
        [cost_markdown(reference, rows)],
    )
