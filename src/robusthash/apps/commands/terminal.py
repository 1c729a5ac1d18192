"""What the verbs show: bars and tables on stderr, JSON on stdout."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from robusthash.core.atomic_files import json_text

console = Console(stderr=True)

RunPath = Annotated[Path, typer.Argument(help="Run directory, as `train` and `run` print it.")]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout.")]


def escape(text: str) -> str:
    """Text whose brackets are no markup."""
    return text.replace("[", r"\[")


@contextmanager
def progress_bars() -> Iterator[Callable[[int, int, str], None]]:
    """A bar per text; drawn on stderr, and only where someone looks."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def progress(done: int, total: int, text: str) -> None:
            key = text.partition(" ")[0] if text.startswith("epoch") else text
            if key not in tasks:
                tasks[key] = bars.add_task(text, total=total)
            bars.update(tasks[key], completed=done, total=total, description=text)

        yield progress


def print_json(value: Any) -> None:
    """Strict JSON on stdout."""
    sys.stdout.write(json_text(value))


def print_table(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    """A table on stderr; floats with four digits."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*(f"{value:.4f}" if isinstance(value, float) else escape(str(value)) for value in row))
    console.print(table)
