"""Runs -> one table: recipes as rows, seeds averaged, intervals over seeds and queries."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robusthash.apps.experiment.config import Config
from robusthash.apps.experiment.run_directory import Run, load_run
from robusthash.core.registry import nearest
from robusthash.metrics.result_words import budget_words, empty_note
from robusthash.metrics.results import EvalResult, by_direction, headline_of
from robusthash.metrics.statistics import bootstrap_interval, hierarchical_interval


@dataclass(frozen=True)
class Cell:
    """One value of a table: mean over seeds and its 95 % interval; ``signed`` is a difference."""

    value: float
    interval: tuple[float, float]
    seeds: int
    signed: bool = False

    def text(self, digits: int = 3) -> str:
        """``0.472 (0.455-0.490)``; of a difference ``+0.010 (-0.002 to +0.022)``."""
        low, high = self.interval
        if self.signed:
            return f"{self.value:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"
        return f"{self.value:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"

    def numbers(self) -> list[str]:
        """Value, ends of the interval and seeds."""
        return [*(f"{value:.6f}" for value in (self.value, *self.interval)), str(self.seeds)]


@dataclass(frozen=True)
class Column:
    """A column: a result by name, a measure of it (by default its headline), and the title in the table.

    With ``minus``, the difference to another result of the same run, paired by seed and query.
    """

    result: str
    measure: str | None = None
    label: str = ""
    minus: str = ""

    @property
    def title(self) -> str:
        result = f"{self.result} minus {self.minus}" if self.minus else self.result
        return self.label or (f"{self.measure} of {result}" if self.measure else result)


@dataclass(frozen=True)
class TableRow:
    """One recipe: its cells by the title of their column, and training minutes.

    ``chance`` is by direction and relevance ("" where a run has one alone), ``scored`` gives them by cell;
    ``target_chance`` is that of t-MAP, by the columns of targeted attacks.
    ``attacked`` has threat, attacks and budget of every cell; "" of clean queries. ``empty`` says, by
    direction and relevance, how many queries have no relevant item, where there are any. ``not_run`` are
    columns of results that none of its runs has. ``queries`` is their number by column.
    """

    name: str
    cells: dict[str, Cell]
    minutes: float
    chance: dict[str, float]
    target_chance: dict[str, float]
    scored: dict[str, str]
    attacked: dict[str, str]
    empty: dict[str, str]
    not_run: tuple[str, ...] = ()
    queries: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Seed:
    """One evaluated run: its results, those of its suites, and its clean ones by direction and relevance."""

    run: Run
    evaluated: dict[str, EvalResult]
    results: dict[str, EvalResult]
    clean: dict[str, EvalResult]

    @property
    def number(self) -> int:
        """The training seed."""
        return self.run.config.runtime.seed


Seeds = Mapping[str, Sequence[Seed]]  # by the name of the row


def make_rows(paths: Sequence[Path]) -> list[TableRow]:
    """``rows_of`` run directories, with all that they were evaluated on."""
    return rows_of(read_seeds(paths))


def read_seeds(paths: Sequence[Path], only: Collection[int] = ()) -> dict[str, list[Seed]]:
    """Run directories by row, in the order of the recipes; runs that differ in the seed share one.

    Args:
        only: these training seeds; all by default.

    Raises:
        ValueError: runs on different data, splits or protocols, or without a direction in common, which no
            table may hold together; a seed given twice; or none of ``only``.
    """
    paths = [path for path in paths if not only or load_run(path).config.runtime.seed in only]
    if not paths:
        raise ValueError(f"no run has the training seed {' or '.join(map(str, only))}")
    rows: dict[str, list[Seed]] = {}
    first: dict[str, EvalResult] = {}
    for name, run in [(name, run) for name, runs in seeds_by_row(paths).items() for run in runs]:
        evaluated = run.evaluated()
        clean = {scored_on: group["clean"] for scored_on, group in by_direction(evaluated).items()}
        first = first or clean
        common = clean.keys() & first.keys()
        if not common:
            ours, theirs = (", ".join(k or r.setting.direction for k, r in c.items()) for c in (clean, first))
            raise ValueError(f"{name} was scored on {ours}, the first recipe on {theirs}")
        if differing := {field for key in common for field in clean[key].setting.differs(first[key].setting)}:
            raise ValueError(f"{name} was evaluated in another setting ({', '.join(sorted(differing))})")
        rows.setdefault(name, []).append(Seed(run, evaluated, {**run.assessed(), **evaluated}, clean))
    return rows


def rows_of(rows: Seeds, columns: Sequence[Column] | None = None) -> list[TableRow]:
    """A table of values, by default of all that the first seed of a row was evaluated on.

    A result enters a row only where every seed of the recipe has it and all were attacked alike, so that no
    cell mixes settings.
    """
    table = []
    for name, seeds in rows.items():
        cells = {column: _cell(seeds, column) for column in columns or _evaluated(seeds)}
        known = {column: cell for column, cell in cells.items() if cell is not None}
        table.append(_row(name, seeds, known, _not_run(seeds, cells)))
    return table


def _evaluated(seeds: Sequence[Seed]) -> list[Column]:
    return [Column(result) for result in seeds[0].evaluated]


def _not_run(seeds: Sequence[Seed], columns: Iterable[Column]) -> tuple[str, ...]:
    """Titles of columns with a result that no seed has."""
    sources = {column.title: {column.result, column.minus} - {""} for column in columns}
    return tuple(
        title
        for title, names in sources.items()
        if any(all(name not in seed.results for seed in seeds) for name in names)
    )


def _cell(seeds: Sequence[Seed], column: Column) -> tuple[Cell, EvalResult] | None:
    """The value of a column, and a result of it; None where a seed lacks it, or was attacked otherwise.

    A difference without a measure is that of the headlines, which a worst case names otherwise.
    """
    results = _of_all(seeds, column)
    others = _of_all(seeds, Column(column.minus, column.measure)) if column.minus else []
    if not results or (column.minus and not others):
        return None
    return cell_of(results, column.measure, others), results[0]


def differences_of(rows: Seeds, columns: Sequence[Column] | None, baseline: str) -> list[TableRow]:
    """A table of paired differences to the row ``baseline``, which is left out: same seed, same queries.

    A pair of seeds shares its start where a defense goes on from the undefended model of its seed. Over
    several common seeds the interval is that of the method (seeds and queries resampled), of a single one
    that of the checkpoint.

    Args:
        columns: by default all that the first run was evaluated on.

    Raises:
        ValueError: no row of that name, no other row, or one that has no training seed in common with it; or
            a column that is a difference already.
    """
    columns = columns or _evaluated(next(iter(rows.values())))
    if doubled := [column.title for column in columns if column.minus]:
        raise ValueError(f"{doubled[0]!r} is a difference already; leave --against out for it")
    if baseline not in rows:
        raise ValueError(f"no row is named {baseline!r}{nearest(baseline, rows)}")
    if len(rows) < 2:
        raise ValueError(f"{baseline} is the only row; give the runs to compare it with too")
    against = {seed.number: seed for seed in rows[baseline]}
    table = []
    for name in [name for name in rows if name != baseline]:
        common = [seed for seed in rows[name] if seed.number in against]
        if not common:
            ours = f"{name} (seeds {[seed.number for seed in rows[name]]})"
            raise ValueError(f"{ours} and {baseline} (seeds {list(against)}) have no seed in common")
        pairs, count = [*common, *(against[seed.number] for seed in common)], len(common)
        results = {column: _of_all(pairs, column) for column in columns}
        cells = {c: (cell_of(r[:count], c.measure, r[count:]), r[0]) for c, r in results.items() if r}
        lacking = (title for side in (common, pairs[count:]) for title in _not_run(side, columns))
        table.append(_row(name, rows[name], cells, tuple(dict.fromkeys(lacking))))
    return table


def _row(
    name: str,
    seeds: Sequence[Seed],
    cells: Mapping[Column, tuple[Cell, EvalResult]],
    not_run: tuple[str, ...],
) -> TableRow:
    return TableRow(
        name,
        {column.title: cell for column, (cell, _) in cells.items()},
        sum(seed.run.card()["seconds"] for seed in seeds) / len(seeds) / 60,
        {scored_on: clean.reference["chance"] for scored_on, clean in seeds[0].clean.items()},
        {c.title: result.reference["chance"] for c, (_, result) in cells.items() if aims(c, result)},
        {column.title: result.scored_on for column, (_, result) in cells.items()},
        {column.title: _attack_of(result) for column, (_, result) in cells.items()},
        {on: text for on, clean in seeds[0].clean.items() if (text := empty_note(clean))},
        not_run,
        {
            c.title: len(result.per_query[c.measure or headline_of(result)])
            for c, (_, result) in cells.items()
        },
    )


def aims(column: Column, result: EvalResult) -> bool:
    """True where a column shows what a targeted attack reached: its chance is that of the target labels."""
    target = result.setting.key.name("targeted")
    return headline_of(result) == target and (column.measure or target).startswith("t-")


def _of_all(seeds: Sequence[Seed], column: Column) -> list[EvalResult]:
    """The result of a column by seed; empty where one lacks it, or was attacked otherwise."""
    results = [result for seed in seeds if (result := seed.results.get(column.result)) is not None]
    alike = len(results) == len(seeds) and len({_attack_of(result) for result in results}) == 1
    measured = column.measure is None or all(column.measure in result.per_query for result in results)
    return results if alike and measured else []


def _attack_of(result: EvalResult) -> str:
    """Threat, attacks and budget in words; "" of clean queries."""
    setting, lowest = result.setting, ""
    if headline_of(result) == setting.key.name("worst"):
        lowest = f", the lowest AP of each query under {', '.join(setting.attacks)}"
    return f"{setting.threat}{lowest}; budget: {budget_words(setting.budget)}" if setting.attacks else ""


def cell_of(
    results: Sequence[EvalResult], measure: str | None = None, minus: Sequence[EvalResult] = ()
) -> Cell:
    """The mean of a per-query measure over training seeds, on the queries that all have a finite value for.

    Args:
        results: one a seed.
        measure: the headline by default, of both sides its own.
        minus: results of the same seeds and queries, for the mean of the differences.
    """
    own = measure or headline_of(results[0])
    values = _stacked(results, own) - (_stacked(minus, measure or headline_of(minus[0])) if minus else 0.0)
    values = values[:, values.isfinite().all(0)]
    if not values.numel():
        raise ValueError(f"no query has a finite value of {own} in every seed")
    interval = results[0].interval.get(own) if len(values) == 1 and not minus else None
    if interval is None:
        interval = hierarchical_interval(values) if len(values) > 1 else bootstrap_interval(values[0])
    return Cell(float(values.mean()), interval, len(results), signed=bool(minus))


def _stacked(results: Sequence[EvalResult], measure: str) -> Tensor:
    return torch.stack([result.per_query[measure].to(torch.float64) for result in results])


def seeds_by_row(paths: Sequence[Path]) -> dict[str, list[Run]]:
    """Runs by row, ordered by seed. A row is named by its recipe, with the settings that namesakes differ
    in."""
    recipes: dict[str, list[Run]] = {}
    for path in paths:
        run = load_run(path)
        recipes.setdefault(run.recipe, []).append(run)
    for runs in recipes.values():
        require_distinct_seeds(runs)
        runs.sort(key=lambda run: run.config.runtime.seed)
    configs = [runs[0].config for runs in recipes.values()]
    rows = {}
    for config, runs in zip(configs, recipes.values(), strict=True):
        namesakes = [_settings(other) for other in configs if other.name == config.name]
        keys = dict.fromkeys(key for settings in namesakes for key in settings)
        apart = [key for key in keys if len({str(settings.get(key)) for settings in namesakes}) > 1]
        rows[", ".join([config.name, *(f"{key}={_settings(config).get(key)}" for key in apart)])] = runs
    return rows


def require_distinct_seeds(runs: Sequence[Run]) -> None:
    """Raise ValueError where two runs of one recipe have the same training seed: they would count twice."""
    seeds = [run.config.runtime.seed for run in runs]
    if len(set(seeds)) < len(seeds):
        where = ", ".join(str(run.path) for run in runs)
        raise ValueError(f"training seeds {seeds} of one recipe repeat ({where}); give each seed once")


def _settings(config: Config) -> dict[str, Any]:
    """The settings of the model by dotted path, as ``--set`` takes them; without the place of the data."""
    training = config.training.model_dump(exclude={"init_from"})
    settings = _flat({"data": config.data, "hasher": config.hasher.plain(), "training": training})
    return {key: value for key, value in settings.items() if key != "data.root"}


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {path: value}
    parts = [_flat(item, f"{path}.{name}".strip(".")) for name, item in value.items()]
    return {key: leaf for part in parts for key, leaf in part.items()}


def named_columns(texts: Sequence[str], rows: Seeds) -> list[Column]:
    """Columns as ``parse_column`` reads them, of results and measures that some run has; else ValueError."""
    measures: dict[str, dict[str, None]] = {}  # by result
    for seed in (seed for seeds in rows.values() for seed in seeds):
        for name, result in seed.results.items():
            measures.setdefault(name, {}).update(dict.fromkeys(result.per_query))
    columns = [parse_column(text, measures) for text in texts]
    for column in columns:
        for source in filter(None, (column.result, column.minus)):
            if column.measure is not None and column.measure not in measures[source]:
                near = nearest(column.measure, measures[source])
                raise ValueError(f"{source!r} has no values per query of {column.measure!r}{near}")
    return columns


def parse_column(text: str, names: Collection[str]) -> Column:
    """Parse ``[MEASURE of ]RESULT[ minus RESULT][ as LABEL]``, as ``nDCG@100 of clean as nDCG``.

    Args:
        names: the results that there are; the longest text that is one of them is never taken apart.

    Raises:
        ValueError: no such result; the nearest is offered.
    """
    for name, label in _labelled(text):
        if name in names:
            return Column(name, None, label)
        measure, _, result = name.partition(" of ")
        if result in names:
            return Column(result, measure, label)
        first, _, minus = name.rpartition(" minus ")
        if minus in names:
            return replace(parse_column(first, names), label=label, minus=minus)
    name = text.partition(" as ")[0]
    result = name.partition(" of ")[2] or name
    raise ValueError(f"no run has a result {result!r}{nearest(result, names)}")


def _labelled(text: str) -> list[tuple[str, str]]:
    """Every way to read a text as ``NAME as LABEL``, longest name first; without a label at the beginning."""
    words = text.split(" as ")
    return [(" as ".join(words[:end]), " as ".join(words[end:])) for end in range(len(words), 0, -1)]


def selected_rows(rows: Sequence[TableRow], texts: Sequence[str]) -> list[TableRow]:
    """Rows by ``NAME[ as LABEL]`` in this order, under their labels; ValueError for another name."""
    by_name = {row.name: row for row in rows}
    selected = []
    for text in texts:
        name, label = next((read for read in _labelled(text) if read[0] in by_name), _labelled(text)[-1])
        if name not in by_name:
            raise ValueError(f"no row is named {name!r}{nearest(name, by_name)}")
        selected.append(replace(by_name[name], name=label or name))
    return selected
