"""Runs -> one table: recipes as rows, seeds averaged, intervals over seeds and queries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from robusthash.apps.config import Config
from robusthash.apps.runs import Run, load_run
from robusthash.evaluation.results import EvalResult, by_bench
from robusthash.evaluation.stats import bootstrap_interval, hierarchical_interval


@dataclass(frozen=True)
class Cell:
    """One value of a table: mean over seeds, 95 % interval, number of seeds."""

    value: float
    interval: tuple[float, float]
    seeds: int

    def text(self, digits: int = 3) -> str:
        """``0.472 (0.455-0.490)``."""
        low, high = self.interval
        return f"{self.value:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


@dataclass(frozen=True)
class Row:
    """One recipe: its cells by result name, training minutes, and what stands still in the table.

    ``chance`` is by what was scored on: "" where that is one thing, else ``I2T``, ``T2I by class``, ... ``attacked``
    has threat, attacks and budget of every cell; "" of clean queries.
    """

    name: str
    cells: dict[str, Cell]
    minutes: float
    chance: dict[str, float]
    attacked: dict[str, str]


def headline_of(result: EvalResult) -> str:
    """The value that stands for a result: wMAP of a worst case, t-MAP of a targeted attack, else MAP."""
    cut = result.setting.headline
    return next(name for name in (f"w{cut}", f"t-{cut}", cut) if name in result.values)


def make_rows(paths: Sequence[Path]) -> list[Row]:
    """Rows in the order in which recipes first appear among ``paths``; runs that differ in the seed alone share one.

    A result enters a row only where every seed of the recipe has it, and only where all seeds were attacked alike, so
    that no cell mixes settings.

    Raises:
        ValueError: runs on different data, splits, directions or protocols, which no table may hold together; or a
            seed given twice.
    """
    rows: list[Row] = []
    first: dict[str, EvalResult] = {}
    for name, seeds in seeds_by_row(paths).items():
        found = [run.evaluated() for run in seeds]
        cleans = [{bench: group["clean"] for bench, group in by_bench(results).items()} for results in found]
        first = first or cleans[0]
        for clean in cleans:
            if clean.keys() != first.keys():
                raise ValueError(f"{name} was scored on {_benches(clean)}, the first recipe on {_benches(first)}")
            differing = {field for bench in clean for field in clean[bench].setting.differs(first[bench].setting)}
            if differing:
                raise ValueError(f"{name} was evaluated in another setting ({', '.join(sorted(differing))})")
        cells, attacked = {}, {}
        for result in found[0]:
            if all(result in results and _alike(results[result], found[0][result]) for results in found):
                cells[result] = cell_of([results[result] for results in found])
                attacked[result] = _attack_of(found[0][result])
        minutes = sum(run.card()["seconds"] for run in seeds) / len(seeds) / 60
        chance = {bench: clean.reference["chance"] for bench, clean in cleans[0].items()}
        rows.append(Row(name, cells, minutes, chance, attacked))
    return rows


def seeds_by_row(paths: Sequence[Path]) -> dict[str, list[Run]]:
    """Runs by the name of their row: the recipe's, with the settings that tell it from others of that name.

    Raises:
        ValueError: two runs of one recipe with the same training seed, which would count twice.
    """
    recipes: dict[str, list[Run]] = {}
    for path in paths:
        run = load_run(path)
        recipes.setdefault(run.recipe, []).append(run)
    for runs in recipes.values():
        trained = [run.config.runtime.seed for run in runs]
        if len(set(trained)) < len(trained):
            where = ", ".join(str(run.path) for run in runs)
            raise ValueError(f"training seeds {trained} of one recipe repeat ({where}); give each seed once")
    configs = [runs[0].config for runs in recipes.values()]
    named = {}
    for runs in recipes.values():
        own = runs[0].config
        named[", ".join([own.name, *_apart(own, [c for c in configs if c.name == own.name])])] = runs
    return named


def _apart(own: Config, namesakes: Sequence[Config]) -> list[str]:
    """The settings of the model in which configs of one name differ, as ``--set`` takes them."""
    settings = [_settings(config) for config in namesakes]
    mine = settings[namesakes.index(own)]
    keys = dict.fromkeys(key for each in settings for key in each)
    return [f"{key}={mine.get(key)}" for key in keys if len({str(each.get(key)) for each in settings}) > 1]


def _settings(config: Config) -> dict[str, Any]:
    training = config.training.model_dump(exclude={"init_from"})
    return _flat({"data": config.data, "hasher": config.hasher.plain(), "training": training})


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Nested settings by their dotted path."""
    if not isinstance(value, dict):
        return {path: value}
    return {key: leaf for name in value for key, leaf in _flat(value[name], f"{path}.{name}".strip(".")).items()}


def _benches(cleans: Mapping[str, EvalResult]) -> str:
    return ", ".join(bench or clean.setting.direction for bench, clean in cleans.items())


def bench_of(column: str, benches: Iterable[str]) -> str:
    """What the result of this name was scored on."""
    return max((bench for bench in benches if not bench or column.startswith(f"{bench} ")), key=len, default="")


def _alike(one: EvalResult, other: EvalResult) -> bool:
    return _attack_of(one) == _attack_of(other)


def _attack_of(result: EvalResult) -> str:
    """What an attacked result is a statement about; "" for clean queries."""
    setting = result.setting
    if not setting.attacks:
        return ""
    worst = headline_of(result).startswith("w")
    lowest = f", the lowest AP of each query under {', '.join(setting.attacks)}" if worst else ""
    return f"{setting.threat}{lowest}; budget: {setting.budget}"


def cell_of(results: Sequence[EvalResult], measure: str | None = None) -> Cell:
    """The mean of a per-query measure over training seeds, on the queries that all have a value for.

    Args:
        results: one a seed.
        measure: the headline of the result by default.
    """
    measure = measure or headline_of(results[0])
    values = torch.stack([result.per_query[measure] for result in results])
    kept = values[:, ~values.isnan().any(0)]
    if len(kept) > 1:
        interval = hierarchical_interval(kept)
    elif measure in results[0].interval:
        interval = results[0].interval[measure]
    else:
        interval = bootstrap_interval(kept[0])
    return Cell(float(kept.mean()), interval, len(results))


def markdown(rows: Sequence[Row], results: Sequence[str] | None = None) -> str:
    """A Markdown table; ``results`` chooses and orders the columns, by default all that the first row has."""
    columns = list(rows[0].cells) if results is None else list(results)
    shown = {bench_of(column, rows[0].chance) for column in columns}
    benches = [bench for bench in rows[0].chance if bench in shown]
    chances = [f"chance {bench}".strip() for bench in benches]
    lines = [f"| {' | '.join(['recipe', *columns, *chances, 'training minutes', 'seeds'])} |"]
    lines.append("|" + " --- |" * (len(columns) + len(chances) + 3))
    for row in rows:
        cells = [row.cells[column].text() if column in row.cells else "-" for column in columns]
        cells += [f"{row.chance[bench]:.3f}" for bench in benches]
        seeds = max(cell.seeds for cell in row.cells.values())
        lines.append(f"| {' | '.join([row.name, *cells, f'{row.minutes:.1f}', str(seeds)])} |")
    return "\n".join(lines)


def captions(rows: Sequence[Row], results: Sequence[str] | None = None) -> list[str]:
    """Lines below the table of ``markdown``: threat, attacks and budget of the attacked columns.

    Columns of the same words share a line. A column whose rows were attacked differently has a line for each, and is
    said not to compare.
    """
    columns = list(rows[0].cells) if results is None else list(results)
    subjects: dict[str, list[str]] = {}
    mixed = []
    for column in columns:
        said: dict[str, list[str]] = {}
        for row in rows:
            if row.attacked.get(column):
                said.setdefault(row.attacked[column], []).append(row.name)
        for text, names in said.items():
            subjects.setdefault(text, []).append(column if len(said) == 1 else f"{column} of {' and '.join(names)}")
        mixed += [column] * (len(said) > 1)
    lines = [f"{', '.join(named)}: {text}." for text, named in subjects.items()]
    if mixed:
        lines.append(f"Columns whose rows do not compare, since they were attacked differently: {', '.join(mixed)}.")
    if any(column not in row.cells for row in rows for column in columns):
        lines.append("-: not evaluated in every seed, or the seeds of the recipe were attacked differently.")
    return lines
