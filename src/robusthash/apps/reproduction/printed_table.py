"""Tables in the shape of a paper: our cells, and the printed value next to each where data agree in kind."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from robusthash.apps.experiment.tables import Cell, Column, Seed, aims, cell_of, read_seeds
from robusthash.apps.reports.cell_text import csv_cell, latex_table, markdown_cell, markdown_table
from robusthash.apps.reproduction.entry_runs import EntryPlan
from robusthash.apps.reproduction.paper_entries import BlockSpec
from robusthash.metrics.measure_key import MeasureKey
from robusthash.metrics.results import EvalResult, headline_of
from robusthash.metrics.statistics import hierarchical_interval


@dataclass(frozen=True)
class Line:
    """A row: our cells and the printed values by column, and why there are none."""

    name: str
    cells: dict[str, Cell]
    printed: dict[str, float]
    seeds: int
    missing: str = ""


@dataclass(frozen=True)
class TableBlock:
    """The rows on one data set. ``beside`` is the paper's data set of the printed values, "" for none."""

    title: str
    beside: str
    columns: tuple[str, ...]
    lines: tuple[Line, ...]
    shared: tuple[str, ...]  # what all its results have in common: bits, objective, budget
    chance: dict[str, float]


def make_blocks(plan: EntryPlan, unit: float) -> list[TableBlock]:
    """The table of what is stored of a plan.

    Args:
        unit: of the printed values: 0.01 of percent.

    Raises:
        ValueError: runs on different data or protocols in one block.
    """
    return [_block(plan, block, unit) for block in plan.blocks]


def _block(plan: EntryPlan, block: BlockSpec, unit: float) -> TableBlock:
    mine = [run for run in plan.runs if run.block == block.title and run.stored is not None]
    paths = list(dict.fromkeys(run.stored.path for run in mine if run.stored))
    read = [seed for seeds in read_seeds(paths).values() for seed in seeds] if paths else []
    by_path = {seed.run.path: seed for seed in read}
    lines = []
    for row in block.rows:
        own = [run for run in mine if run.row == row]
        seeds = [by_path[run.stored.path] for run in own if run.stored]
        known = {title: cell_for(seeds, column) for run in own[:1] for title, column in run.columns.items()}
        cells = {title: cell for title, cell in known.items() if cell is not None}
        printed = _printed(plan, block.beside, row, unit)
        lines.append(Line(row, cells, printed, len(seeds), plan.missing.get((block.title, row), "")))
    used = {title for line in lines for title in line.cells}
    shown = [column for title, column in plan.columns.items() if column and title in used]
    titles, shared = tuple(plan.columns), _shared(read, shown)
    return TableBlock(block.title, block.beside, titles, tuple(lines), shared, _chance(read, shown))


def _shared(read: Sequence[Seed], columns: Sequence[Column]) -> tuple[str, ...]:
    """Code length, objective and budget, each where all results that are shown have the same."""
    settings = [seed.results[c.result].setting for seed in read for c in columns if c.result in seed.results]
    every = {
        "": {f"{setting.bits} bits" for setting in settings},
        "objective ": {setting.objective for setting in settings},
        "budget ": {setting.threat for setting in settings if setting.threat != "none"},
    }
    return tuple(f"{what}{each}" for what, values in every.items() if len(values) == 1 for each in values)


def _chance(read: Sequence[Seed], columns: Sequence[Column]) -> dict[str, float]:
    """Chance of the columns of MAP, whose it is, by direction and relevance; that of t-MAP apart."""
    chance = {}
    for column in columns:
        seed = next((seed for seed in read if column.result in seed.results), None)
        result = seed.results[column.result] if seed else None
        if result and not _of_headline(column, result):
            continue
        if seed and result and aims(column, result):
            chance[f"{result.scored_on} t-MAP".strip()] = result.reference["chance"]
        elif seed and result and result.scored_on in seed.clean:
            chance[result.scored_on] = seed.clean[result.scored_on].reference["chance"]
    return chance


def _of_headline(column: Column, result: EvalResult) -> bool:
    """True of the headline itself, as attacks change it: "MAP under hag", "wMAP"."""
    if column.measure in (None, "representative"):
        return True
    return MeasureKey.parse(column.measure).base == result.setting.key.base


def _printed(plan: EntryPlan, beside: str, row: str, unit: float) -> dict[str, float]:
    values = plan.entry.printed.get(beside, {}).get(row.partition(", ")[0] if plan.spec.over else row, [])
    named = zip(plan.entry.columns, values, strict=False)
    return {title: value * unit for title, value in named if value is not None}


def cell_for(seeds: Sequence[Seed], column: Column) -> Cell | None:
    """The cell of a column; None where a seed lacks it.

    A measure without values per query (``representative``, ``mse/mean``) has an interval over seeds alone,
    and none of one seed.
    """
    results = [seed.results.get(column.result) for seed in seeds]
    others = [seed.results.get(column.minus) for seed in seeds] if column.minus else []
    first = [result for result in results if result is not None]
    second = [result for result in others if result is not None]
    if len(first) < len(seeds) or len(second) < len(others):
        return None
    return difference_of(first, column.measure, second)


def difference_of(
    first: Sequence[EvalResult], measure: str | None, minus: Sequence[EvalResult] = ()
) -> Cell | None:
    """The mean over seeds, of a difference with ``minus``; None where a result lacks the measure."""
    every = [*first, *minus]
    if measure is None or all(measure in result.per_query for result in every):
        return cell_of(first, measure, minus)
    numbers = [number_of(result, measure) for result in every]
    known = [number for number in numbers if number is not None]
    if len(known) < len(every):
        return None
    values = torch.tensor(known[: len(first)], dtype=torch.float64)
    values = values - torch.tensor(known[len(first) :], dtype=torch.float64) if minus else values
    several = len(values) > 1
    interval = hierarchical_interval(values[:, None]) if several else (float("nan"), float("nan"))
    return Cell(float(values.mean()), interval, len(values), signed=bool(minus))


def number_of(result: EvalResult, measure: str) -> float | None:
    """A measure of a result that has no values per query; None where it lacks it."""
    if measure == "representative":
        return result.representative.get(headline_of(result))
    return {**result.perceptibility, **result.values}.get(measure)


def markdown_blocks(blocks: Sequence[TableBlock]) -> str:
    """A Markdown table a block, below its title."""
    texts = []
    for block in blocks:
        head, *lines = _texts(block)
        title = f"**{markdown_cell(block.title)}**{_below(block)}"
        texts.append(f"{title}\n\n{markdown_table(head, lines)}")
    return "\n\n".join(texts)


def latex_blocks(blocks: Sequence[TableBlock], title: str, facts: Sequence[str], label: str) -> str:
    """A LaTeX ``table*`` a block, with the rules of the package ``booktabs``; ``facts`` end its caption."""
    texts = []
    for number, block in enumerate(blocks, 1):
        head, *lines = _texts(block)
        caption = [f"{title}. {block.title}{_below(block)}.", *facts]
        texts.append(latex_table(head, lines, caption, label if number == 1 else f"{label}-{number}"))
    return "\n\n".join(texts)


def csv_blocks(blocks: Sequence[TableBlock]) -> str:
    """One line a cell, with six digits; printed values too where nothing was measured."""
    text = io.StringIO()
    names = ("data", "row", "column", "value", "low", "high", "seeds", "printed", "printed data")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    for line in plain_cells(blocks):
        writer.writerow([csv_cell(_six(line[name])) for name in names])
    return text.getvalue()


def plain_cells(blocks: Sequence[TableBlock]) -> list[dict[str, str | float | int | None]]:
    """Every cell as plain data; null where nothing was measured or printed."""
    cells: list[dict[str, str | float | int | None]] = []
    for block in blocks:
        for line in block.lines:
            for column in block.columns:
                cell, printed = line.cells.get(column), line.printed.get(column)
                numbers = (None,) * 3 if cell is None else (cell.value, *map(_finite, cell.interval))
                named = dict(zip(("value", "low", "high"), numbers, strict=True))
                where = {"data": block.title, "row": line.name, "column": column}
                seeds = 0 if cell is None else cell.seeds
                paper = {"printed": printed, "printed data": block.beside if printed is not None else ""}
                cells.append({**where, **named, "seeds": seeds, **paper})
    return cells


def _texts(block: TableBlock) -> list[list[str]]:
    table = [["", *block.columns, "seeds"]]
    for line in block.lines:
        cells = [cell_text(line.cells.get(c), line.printed.get(c)) for c in block.columns]
        name = f"{line.name} ({line.missing})" if line.missing else line.name
        table.append([name, *cells, str(line.seeds)])
    return table


def cell_text(cell: Cell | None, printed: float | None = None) -> str:
    """``0.825 (0.804-0.845) [0.735]``: ours, its interval, and the printed value."""
    if cell is None:
        ours = "-"
    elif cell.interval[0] != cell.interval[0]:
        ours = _short(cell.value)
    else:
        ours = cell.text() if cell.signed or cell.value >= _SMALL else _fine(cell)
    return ours if printed is None else f"{ours} [{_short(printed)}]"


_SMALL = 0.01  # below it three digits say too little


def _short(value: float) -> str:
    return f"{value:.3f}" if abs(value) >= _SMALL or value == 0 else f"{value:.2e}"


def _fine(cell: Cell) -> str:
    low, high = cell.interval
    return f"{_short(cell.value)} ({_short(low)}-{_short(high)})"


def _below(block: TableBlock) -> str:
    chance = (f"chance {on} {value:.3f}".replace("  ", " ") for on, value in block.chance.items())
    parts = [*block.shared, *chance]
    parts += [f"in brackets the paper's values on {block.beside}"] if block.beside else []
    return f": {'; '.join(parts)}" if parts else ""


def _six(value: str | float | int | None) -> str:
    return f"{value:.6g}" if isinstance(value, float) else "" if value is None else str(value)


def _finite(value: float) -> float | None:
    return value if value == value else None
