"""The verb ``robusthash transfer``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from robusthash.apps.verbs.terminal import AsJson, print_json, progress_bars


def transfer(
    runs: Annotated[list[Path], typer.Argument(help="Run directories, two or more, of one data set.")],
    queries: Annotated[int, typer.Option(min=1, help="Only the first this many queries.")] = 200,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the search.")] = 20,
    eps: Annotated[
        str | None,
        typer.Option(help="Budget in units of the range; by default 8/255, and with l2 0.5 at 32 x 32 pixels."),
    ] = None,
    norm: Annotated[str, typer.Option(help="linf or l2.")] = "linf",
    as_json: AsJson = False,
) -> None:
    """How attacks carry over between models: a table of surrogates (rows) and victims (columns)."""
    import yaml

    from robusthash.apps.config import numbers
    from robusthash.apps.studies.transferring import transfer_table

    radius = None if eps is None else numbers(yaml.safe_load(eps))
    if radius is not None and not isinstance(radius, int | float):
        raise ValueError(f"--eps takes a number such as 8/255, got {eps!r}")
    if norm not in ("linf", "l2"):
        raise ValueError(f"--norm takes linf or l2, got {norm!r}")
    with progress_bars() as shown:
        table = transfer_table(runs, queries, steps, radius, "l2" if norm == "l2" else "linf", shown)
    if as_json:
        print_json(table.plain())
        return
    sys.stdout.write(table.markdown())
