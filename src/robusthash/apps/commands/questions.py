from pathlib import Path
from typing import Annotated, Literal

from typer import Option

from robusthash.apps.commands.options import AsJson, Device, Direction, Eps, Norm, Queries, RunPath, Threat
from robusthash.apps.commands.terminal import print_json, print_lines, print_table, progress_bars


def questions(
    run: RunPath,
    budgets: Annotated[str, Option(help="Oracle queries per query at which MAP is read.")] = "100,1000,5000",
    shows: Annotated[
        Literal["codes", "distances", "coarse", "ids", "all"], Option(help="What the service shows.")
    ] = "all",
    step: Annotated[int, Option(min=1, help="Bits between the distances that `coarse` tells apart.")] = 4,
    queries: Queries = 100,
    search: Annotated[
        str | None, Option(help="square (images), nes, or greedy-words (bags of words).")
    ] = None,
    threat: Threat = None,
    eps: Eps = None,
    norm: Norm = None,
    direction: Direction = None,
    figure: Annotated[Path | None, Option(help="Draw it as .pdf and .png (extra `figures`).")] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """MAP by number of oracle queries to a run's search service, for what the service shows.

    Goes on where it was stopped.
    """
    from robusthash.apps.experiment.oracle_run import JUDGES, draw_oracle_table, oracle_table
    from robusthash.apps.experiment.run_directory import load_run
    from robusthash.apps.experiment.threat_options import query_modality, threat_name
    from robusthash.apps.reports.charts import require_matplotlib

    numbers, victim = rising(budgets), load_run(run)
    if figure is not None:
        require_matplotlib()
        if figure.suffix not in (".pdf", ".png"):
            raise ValueError(f"--figure takes a path that ends in .pdf or .png, got {str(figure)!r}")
        figure.parent.mkdir(parents=True, exist_ok=True)
    answers = list(JUDGES) if shows == "all" else [shows]
    budget = threat_name(threat, eps, norm, query_modality(victim, direction))
    with progress_bars() as progress:
        table = oracle_table(victim, numbers, answers, queries, search, budget, direction, progress, step)
    figures = [] if figure is None else draw_oracle_table(table, figure)
    if as_json:
        print_json({**table.plain(), "figures": [str(path) for path in figures]})
        return
    subject = f"{table.search} under {table.threat}, {len(table.clean)} queries ({table.chosen})"
    print_table(f"wMAP by oracle queries, {subject}", ["oracle queries", *table.curves], table.rows())
    print_lines(figures)


def rising(text: str) -> list[int]:
    """Numbers of oracle queries, as an option gives them."""
    parts = [part.strip() for part in text.split(",")]
    numbers = [int(part) for part in parts if part.isdigit()]
    if len(numbers) < len(parts) or numbers[0] < 1 or sorted(set(numbers)) != numbers:
        raise ValueError(f"--budgets takes rising whole numbers from 1 on, as 100,1000,5000; got {text!r}")
    return numbers
