"""The verbs of oracle queries to a service: ``questions`` and ``hardening``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from robusthash.apps.commands.options import (
    AsJson,
    BudgetOptions,
    Device,
    Direction,
    Queries,
    RunPath,
    with_option_groups,
)
from robusthash.apps.commands.terminal import print_json, print_lines, print_table, progress_bars, reply


@dataclass(frozen=True)
class AnswerOptions:
    """Options of the answers that an attacker sees."""

    shows: Annotated[
        Literal["codes", "distances", "coarse", "ids", "all"], Option(help="What the service shows.")
    ] = "all"
    step: Annotated[int, Option(min=1, help="Bits between the distances that `coarse` tells apart.")] = 4


@with_option_groups
def questions(
    run: RunPath,
    budgets: Annotated[str, Option(help="Oracle queries per query at which MAP is read.")] = "100,1000,5000",
    answers: AnswerOptions = AnswerOptions(),
    queries: Queries = 100,
    search: Annotated[
        str | None, Option(help="square (images), nes, or greedy-words (bags of words).")
    ] = None,
    budget: BudgetOptions = BudgetOptions(),
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
    from robusthash.apps.reports.charts import require_matplotlib

    numbers, victim = rising(budgets), load_run(run)
    if figure is not None:
        require_matplotlib()
        if figure.suffix not in (".pdf", ".png"):
            raise ValueError(f"--figure takes a path that ends in .pdf or .png, got {str(figure)!r}")
        figure.parent.mkdir(parents=True, exist_ok=True)
    shows = list(JUDGES) if answers.shows == "all" else [answers.shows]
    threat, step = budget.name_for(victim, direction), answers.step
    with progress_bars() as progress:
        table = oracle_table(victim, numbers, shows, queries, search, threat, direction, progress, step)
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
    from robusthash.apps.experiment.hardening_run import hardening_tables, measure_hardening
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
