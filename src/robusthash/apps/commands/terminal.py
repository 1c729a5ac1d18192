"""Output of the verbs: results (tables, lines, JSON) on stdout, bars and messages on stderr."""

from __future__ import annotations

import datetime
import re
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import rich.markup
from rich.cells import cell_len
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from robusthash.core.atomic_files import json_text
from robusthash.core.words import some_names

if TYPE_CHECKING:
    from robusthash.metrics.results import EvalResult

console = Console(stderr=True, emoji=False)
answers = Console(emoji=False)

_STEERING = {
    "Cc": "\n\t",
    "Cs": "",
    "Cf": "\u200c\u200d",
}  # control, lone halves, order of writing; allowed ones


def printable(value: object) -> str:
    """A value, which may come from a stranger's file, as text that cannot steer a terminal.

    Control characters, those that turn the order of writing, and bytes of names that are no UTF-8 are written
    out: ``\\x1b``.
    """
    return "".join(
        character.encode("unicode-escape").decode()
        if character not in _STEERING.get(unicodedata.category(character), character)
        else character
        for character in str(value)
    )


def one_row(value: object) -> str:
    """``printable``, for a name in a line that programs may read: it begins no other line or column."""
    return printable(value).replace("\n", "\\n").replace("\t", "\\t")


def escape(value: object) -> str:
    """``printable``, for a text with markup: brackets of the value are none."""
    return rich.markup.escape(printable(value))


_PIPE = 120  # columns of a table where there is no terminal
_PIPE_MOST = 1000  # of a line there: nothing is cut
_WORD = 40  # letters that a column has room for
_OF_MEASURE = re.compile(r"(\S+?)(?:: k clipped to | is undefined: )")  # notes of a protocol on one measure
SHOWN = 10  # values of a list, such as files that were passed over, on a terminal
_SECONDS = 5.0  # between two lines of progress where no bar can be drawn


@contextmanager
def progress_bars() -> Iterator[Callable[[int, int, str], None]]:
    """A bar per text, drawn on stderr where that is a terminal; elsewhere a line every few seconds.

    Both say how many steps a second are done, and about how long the rest takes.

    Nothing in the processes of ``torchrun`` but the first.
    """
    from robusthash.core.processes import follows

    if follows():
        yield lambda done, total, text: None
        return
    if not console.is_terminal:
        last = time.monotonic()
        began: dict[str, tuple[float, int, int]] = {}  # by text: the time, the steps done by then and now

        def report(done: int, total: int, text: str) -> None:
            nonlocal last
            now = time.monotonic()
            start, before, latest = began.get(text, (now, done, done))
            start, before = (start, before) if done >= latest else (now, done)  # the same work once more
            began[text] = start, before, done
            if now - last >= _SECONDS:
                last = now
                note(f"{text}: {_state_of_work(done, total, (done - before) / max(now - start, 1e-9))}")

        yield report
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        _SpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def progress(done: int, total: int, text: str) -> None:
            text = printable(text)
            key = text.partition(" ")[0] if text.startswith("epoch") else text
            if key not in tasks:
                tasks[key] = bars.add_task(text, total=total or None)  # 0 where nobody knows
            bars.update(tasks[key], completed=done, total=total or None, description=text)

        yield progress


class _SpeedColumn(ProgressColumn):
    """Steps a second, lately."""

    def render(self, task: Task) -> Text:
        return Text(_speed(task.speed) if task.speed else "")


def _speed(rate: float) -> str:
    return f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s"


def _state_of_work(done: int, total: int, rate: float) -> str:
    """Steps done, and of how many, a second, and the time left, as far as they are known."""
    state = f"{done} of {total}" if total else str(done)
    if rate <= 0:
        return state
    left = f", {datetime.timedelta(seconds=round((total - done) / rate))} left" if total else ""
    return f"{state}, {_speed(rate)}{left}"


def print_json(value: Any) -> None:
    """Strict JSON on stdout."""
    sys.stdout.write(json_text(value))


def print_lines(lines: Iterable[object]) -> None:
    """Lines on stdout: the files that were written; as they are for a program, printable on a terminal."""
    text = printable if sys.stdout.isatty() else str
    sys.stdout.write("".join(f"{text(line)}\n" for line in lines))


def reply(as_json: bool, data: Any, lines: Iterable[object]) -> None:
    """The answer of a verb on stdout: as JSON, or as lines."""
    if as_json:
        print_json(data)
    else:
        print_lines(lines)


def print_result_rows(
    title: str, heads: list[str], rows: list[list[Any]], results: Iterable[Mapping[str, Any]], markdown: bool
) -> None:
    """The table of several results: in Markdown, or for reading, with the notes of each on stderr."""
    from robusthash.apps.reports.cell_text import markdown_table

    if markdown:
        print_lines([markdown_table(heads, rows)])
        return
    print_table(title, heads, rows)
    for text in (text for result in results for text in result["notes"]):
        note(text)


def note_some(title: str, values: Sequence[object], rest: str = "--json names all") -> None:
    """A note for each of the first ten values, and one that counts the others and says where they are."""
    for value in values[:SHOWN]:
        note(f"{title}: {value}")
    if len(values) > SHOWN:
        note(f"{title}: and {len(values) - SHOWN} more; {rest}")


def note(text: object) -> None:
    """A message on stderr, without markup."""
    console.print(printable(text), markup=False, highlight=False, soft_wrap=True)


def warn(head: str, text: object) -> None:
    """A message on stderr below a head in red."""
    console.print(f"[bold red]{head}:[/] {escape(text)}", highlight=False, soft_wrap=True)


def print_table(
    title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]], right: bool = True
) -> None:
    """A table on stdout; floats with four digits, tiny ones as 1.2e-05.

    ``right`` aligns all columns but the first to the right.
    """

    heads = [printable(column) for column in columns]
    cells = [[_cell(value) for value in row] for row in rows]
    columned = [[row[number] for row in cells] for number in range(len(heads))]
    widths = _widths(heads, columned, answers.width if answers.is_terminal else max(answers.width, _PIPE))
    for group, numbers in enumerate(widths):
        table = Table(title=escape(title if group == 0 else f"{title}, continued"), title_justify="left")
        for number, width in numbers.items():
            justify: Literal["right", "left"] = "right" if right and number else "left"
            table.add_column(escape(heads[number]), justify=justify, overflow="fold", width=width)
        for row in cells:
            table.add_row(*(row[number] for number in numbers))
        out = answers if answers.is_terminal else Console(emoji=False, width=_PIPE_MOST)
        out.print(table, soft_wrap=True)


def _cell(value: Any) -> Text:
    if isinstance(value, Text):
        return value
    if not isinstance(value, float):
        return Text(printable(value))
    return Text(f"{value:.1e}" if 0 < abs(value) < 5e-5 else f"{value:.4f}")


def _widths(heads: list[str], cells: list[list[Text]], room: int) -> list[dict[int, int]]:
    """Widths of the columns by their number, in tables of at most ``room``: what does not fit goes on in
    another one with the first column. No number is cut, nor a word of less than ``_WORD`` letters.
    """

    def least(number: int) -> int:
        words = heads[number].split()
        for each in cells[number]:
            text = each.plain
            words += text.split() if any(map(str.isalpha, text)) else [text]
        return min(_WORD, max(map(cell_len, words), default=0))

    def whole(number: int) -> int:
        lines = [heads[number], *(line for each in cells[number] for line in each.plain.splitlines())]
        return max(map(cell_len, lines))

    narrow = [max(1, least(number)) for number in range(len(heads))]
    groups: list[list[int]] = [[0]] if heads else []
    for number in range(1, len(heads)):
        if len(groups[-1]) > 1 and sum(narrow[each] + 3 for each in (*groups[-1], number)) + 1 > room:
            groups.append([0])
        groups[-1].append(number)
    group_widths = []
    for group in groups:
        widths = {number: narrow[number] for number in group}
        left = room - 1 - sum(width + 3 for width in widths.values())
        for number in sorted(group, key=lambda each: whole(each) - narrow[each]):
            more = max(0, min(left, whole(number) - narrow[number]))
            widths[number] += more
            left -= more
        group_widths.append(widths)
    return group_widths


def interval_text(result: EvalResult, measure: str) -> str:
    """The 95 % interval of a measure; empty where it has none."""
    low, high = result.interval.get(measure, (float("nan"),) * 2)
    return f"{low:.4f} .. {high:.4f}" if low == low else ""


def print_values(title: str, result: EvalResult) -> None:
    """Values of a result with their intervals, and its reference."""
    rows = [[name, value, interval_text(result, name)] for name, value in result.values.items()]
    print_table(title, ["measure", "value", "95 % interval"], rows)
    print_table("reference", ["", "value"], result.reference.items())


def print_headlines(results: Mapping[str, EvalResult]) -> None:
    """The headline of each result, next to clean and chance, and each note once."""
    from robusthash.metrics.result_words import empty_notes, result_notes
    from robusthash.metrics.results import headline_of

    rows: list[list[Any]] = []
    for name, result in results.items():
        headline = headline_of(result)
        value, reference = result.values[headline], result.reference
        references = [f"{reference[key]:.4f}" if key in reference else "" for key in ("clean", "chance")]
        rows.append([name, headline, value, interval_text(result, headline), *references])
    subset = next(iter(results.values())).setting.chosen
    title = "results" if subset in ("", "all") else f"results, queries: {subset}"
    print_table(title, ["queries", "measure", "value", "95 % interval", "clean", "chance"], rows)
    measures = {row[1] for row in rows}
    notes = result_notes(results)
    of = {text: found[1] for text in notes if (found := _OF_MEASURE.match(text))}
    others = {text: measure for text, measure in of.items() if measure not in measures}
    for text in (*empty_notes(results), *(shown for text, shown in notes.items() if text not in others)):
        note(text)
    if others:
        measured = some_names(list(dict.fromkeys(others.values())))
        note(f"notes on {measured}: in --json, and in the report of a run")


def plain(result: EvalResult) -> dict[str, Any]:
    """A result as plain data, without its arrays."""
    from dataclasses import asdict

    sections = (
        "values",
        "reference",
        "representative",
        "perceptibility",
        "interval",
        "empty",
        "notes",
        "attacks",
    )
    parts = {name: getattr(result, name) for name in sections}
    if result.groups:
        parts["groups"] = {name: asdict(scores) for name, scores in result.groups.items()}
    return {"setting": asdict(result.setting), "cost": asdict(result.cost), **parts}
