"""Runs -> one table: recipes as rows, seeds averaged, intervals over seeds and queries; or differences to one
row."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robusthash.apps.experiment.config import Config
from robusthash.apps.experiment.run_directory import Run, load_run
from robusthash.core.registry import nearest
from robusthash.metrics.results import EvalResult, by_direction
from robusthash.metrics.statistics import bootstrap_interval, hierarchical_interval


@dataclass(frozen=True)
class Cell:
    """One value of a table: mean over seeds, 95 % interval, number of seeds; ``signed`` is a difference."""

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


@dataclass(frozen=True)
class Column:
    """A column: a result by name, a measure of it or its headline, and what the table calls it.

    With ``minus``, the difference of that measure to another result of the same run, paired by seed and
    query.
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
class Row:
    """One recipe: its cells by the title of their column, training minutes, and what stands still in the
    table.

    ``chance`` is by what was scored on: "" where that is one thing, else ``I2T``, ``T2I by class``, ..., and
    ``scored`` says which of these a cell is about. ``attacked`` has threat, attacks and budget of every cell;
    "" of clean queries.
    """

    name: str
    cells: dict[str, Cell]
    minutes: float
    chance: dict[str, float]
    scored: dict[str, str]
    attacked: dict[str, str]


@dataclass(frozen=True)
class Seed:
    """One evaluated run: its results and those of its suites, read once; its clean ones by what was scored
    on."""

    run: Run
    evaluated: dict[str, EvalResult]
    results: dict[str, EvalResult]
    clean: dict[str, EvalResult]

    @property
    def number(self) -> int:
        """The training seed."""
        return self.run.config.runtime.seed


Seeds = Mapping[str, Sequence[Seed]]
"""Runs by the name of their row."""


def headline_of(result: EvalResult) -> str:
    """The value that stands for a result: wMAP of a worst case, t-MAP of a targeted attack, else MAP."""
    cut = result.setting.headline
    return next(name for name in (f"w{cut}", f"t-{cut}", cut) if name in result.values)


def make_rows(paths: Sequence[Path]) -> list[Row]:
    """``rows_of`` run directories, with all that they were evaluated on."""
    return rows_of(read_seeds(paths))


def read_seeds(paths: Sequence[Path]) -> dict[str, list[Seed]]:
    """Run directories by row, in the order in which recipes first appear; those that differ in the seed share
    one.

    Raises:
        ValueError: runs on different data, splits, directions or protocols, which no table may hold together;
            or a seed given twice.
    """
    rows: dict[str, list[Seed]] = {}
    first: dict[str, EvalResult] = {}
    for name, runs in seeds_by_row(paths).items():
        for run in runs:
            evaluated = run.evaluated()
            clean = {context: group["clean"] for context, group in by_direction(evaluated).items()}
            first = first or clean
            if clean.keys() != first.keys():
                raise ValueError(
                    f"{name} was scored on {_contexts(clean)}, the first recipe on {_contexts(first)}"
                )
            differing = {
                field for context in clean for field in clean[context].setting.differs(first[context].setting)
            }
            if differing:
                raise ValueError(f"{name} was evaluated in another setting ({', '.join(sorted(differing))})")
            rows.setdefault(name, []).append(Seed(run, evaluated, {**run.assessed(), **evaluated}, clean))
    return rows


def rows_of(rows: Seeds, columns: Sequence[Column] | None = None) -> list[Row]:
    """A table of values.

    A result enters a row only where every seed of the recipe has it, and only where all seeds were attacked
    alike, so that no cell mixes settings.

    Args:
        columns: by default all that the first seed of a row was evaluated on; results of suites only by name.
    """
    made = []
    for name, seeds in rows.items():
        wanted = [Column(result) for result in seeds[0].evaluated] if columns is None else columns
        cells = {column: cell for column in wanted if (cell := _cell(seeds, column)) is not None}
        made.append(_row(name, seeds, cells))
    return made


def _cell(seeds: Sequence[Seed], column: Column) -> tuple[Cell, EvalResult] | None:
    """The value of a column and the result that it is of; None where a seed lacks it, or was attacked
    otherwise."""
    found = _of_all(seeds, column)
    if not found:
        return None
    if not column.minus:
        return cell_of(found, column.measure), found[0]
    others = _of_all(seeds, replace(column, result=column.minus))
    measure = column.measure or headline_of(found[0])
    if not others or any(measure not in other.per_query for other in others):
        return None
    return _difference(found, others, measure), found[0]


def differences_of(rows: Seeds, columns: Sequence[Column], baseline: str) -> list[Row]:
    """A table of paired differences to the row ``baseline``, which is left out: same seed, same queries.

    A pair of seeds shares its start where a defense goes on from the undefended model of its seed. Over
    several common seeds the interval is that of the method (seeds and queries resampled), of a single one
    that of the checkpoint.

    Raises:
        ValueError: no row of that name, no other row, or one that has no training seed in common with it; or
            a column that is a difference already.
    """
    if doubled := [column.title for column in columns if column.minus]:
        raise ValueError(f"{doubled[0]!r} is a difference already; leave --against out for it")
    if baseline not in rows:
        raise ValueError(f"no row is named {baseline!r}{nearest(baseline, rows)}")
    if len(rows) < 2:
        raise ValueError(f"{baseline} is the only row; give the runs that are to be held against it too")
    against = {seed.number: seed for seed in rows[baseline]}
    made = []
    for name in [name for name in rows if name != baseline]:
        common = [seed for seed in rows[name] if seed.number in against]
        if not common:
            own = [seed.number for seed in rows[name]]
            raise ValueError(
                f"{name} (seeds {own}) and {baseline} (seeds {list(against)}) have no seed in common"
            )
        others = [against[seed.number] for seed in common]
        found = {column: _of_all([*common, *others], column) for column in columns}
        count = len(common)
        cells = {c: (_difference(r[:count], r[count:], c.measure), r[0]) for c, r in found.items() if r}
        made.append(_row(name, rows[name], cells))
    return made


def _row(name: str, seeds: Sequence[Seed], cells: Mapping[Column, tuple[Cell, EvalResult]]) -> Row:
    chance = {context: clean.reference["chance"] for context, clean in seeds[0].clean.items()}
    return Row(
        name,
        {column.title: cell for column, (cell, _) in cells.items()},
        sum(seed.run.card()["seconds"] for seed in seeds) / len(seeds) / 60,
        chance,
        {column.title: context_of(column.result, chance) for column in cells},
        {column.title: _attack_of(result) for column, (_, result) in cells.items()},
    )


def _of_all(seeds: Sequence[Seed], column: Column) -> list[EvalResult]:
    """The result of a column by seed; empty where one lacks it, or was attacked otherwise."""
    found = [result for seed in seeds if (result := seed.results.get(column.result)) is not None]
    alike = len(found) == len(seeds) and len({_attack_of(result) for result in found}) == 1
    measured = column.measure is None or all(column.measure in result.per_query for result in found)
    return found if alike and measured else []


def _difference(own: Sequence[EvalResult], other: Sequence[EvalResult], measure: str | None) -> Cell:
    values = _values(own, measure) - _values(other, measure)
    kept = values[:, ~values.isnan().any(0)]
    return Cell(float(kept.mean()), _interval(kept), len(own), signed=True)


def seeds_by_row(paths: Sequence[Path]) -> dict[str, list[Run]]:
    """Runs by the name of their row, by seed: the recipe's name, with the settings that tell it from its
    namesakes.

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
        runs.sort(key=lambda run: run.config.runtime.seed)
    configs = [runs[0].config for runs in recipes.values()]
    named = {}
    for runs in recipes.values():
        own = runs[0].config
        named[", ".join([own.name, *_apart(own, [c for c in configs if c.name == own.name])])] = runs
    return named


def of_seeds(paths: Sequence[Path], seeds: Collection[int]) -> list[Path]:
    """The runs of these training seeds.

    Raises:
        ValueError: no run has one of them.
    """
    found = [path for path in paths if load_run(path).config.runtime.seed in seeds]
    if not found:
        raise ValueError(f"no run has the training seed {' or '.join(map(str, seeds))}")
    return found


def _apart(own: Config, namesakes: Sequence[Config]) -> list[str]:
    """The settings of the model in which configs of one name differ, as ``--set`` takes them."""
    settings = [_settings(config) for config in namesakes]
    mine = settings[namesakes.index(own)]
    keys = dict.fromkeys(key for each in settings for key in each)
    return [f"{key}={mine.get(key)}" for key in keys if len({str(each.get(key)) for each in settings}) > 1]


def _settings(config: Config) -> dict[str, Any]:
    training = config.training.model_dump(exclude={"init_from"})
    settings = _flat({"data": config.data, "hasher": config.hasher.plain(), "training": training})
    return {
        key: value for key, value in settings.items() if key != "data.root"
    }  # where the data lies is no setting


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Nested settings by their dotted path."""
    if not isinstance(value, dict):
        return {path: value}
    return {
        key: leaf for name in value for key, leaf in _flat(value[name], f"{path}.{name}".strip(".")).items()
    }


def _contexts(cleans: Mapping[str, EvalResult]) -> str:
    return ", ".join(context or clean.setting.direction for context, clean in cleans.items())


def context_of(column: str, contexts: Iterable[str]) -> str:
    """What the result of this name was scored on."""
    return max(
        (context for context in contexts if not context or column.startswith(f"{context} ")),
        key=len,
        default="",
    )


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
    values = _values(results, measure)
    kept = values[:, ~values.isnan().any(0)]
    stored = results[0].interval.get(measure) if len(kept) == 1 else None
    return Cell(float(kept.mean()), stored or _interval(kept), len(results))


def _values(results: Sequence[EvalResult], measure: str | None) -> Tensor:
    """(S, Q) values of S seeds."""
    measure = measure or headline_of(results[0])
    return torch.stack([result.per_query[measure].to(torch.float64) for result in results])


def _interval(values: Tensor) -> tuple[float, float]:
    return hierarchical_interval(values) if len(values) > 1 else bootstrap_interval(values[0])


# ---------------------------------------------------------------------------------------------- columns, rows
# by name


def all_columns(rows: Seeds) -> list[Column]:
    """All that the first run was evaluated on."""
    return [Column(result) for result in next(iter(rows.values()))[0].evaluated]


def named_columns(texts: Sequence[str], rows: Seeds) -> list[Column]:
    """Columns as ``parse_column`` reads them, of results and measures that some run has.

    Raises:
        ValueError: no run has the result, or the measure of it per query; the nearest is offered.
    """
    held: dict[str, dict[str, None]] = {}  # measures by result
    for seed in (seed for seeds in rows.values() for seed in seeds):
        for name, result in seed.results.items():
            held.setdefault(name, {}).update(dict.fromkeys(result.per_query))
    columns = [parse_column(text, held) for text in texts]
    for column in columns:
        for source in filter(None, (column.result, column.minus)):
            if column.measure is not None and column.measure not in held[source]:
                near = nearest(column.measure, held[source])
                raise ValueError(f"{source!r} has no values per query of {column.measure!r}{near}")
    return columns


def parse_column(text: str, names: Collection[str]) -> Column:
    """``[MEASURE of ]RESULT[ minus RESULT][ as LABEL]``: ``worst``, ``nDCG@100 of clean as nDCG``,
    ``hag minus sdha``.

    Args:
        names: the results that there are; the longest text that is one of them is never taken apart.

    Raises:
        ValueError: no such result; the nearest is offered.
    """
    for wanted, label in _labelled(text):
        if wanted in names:
            return Column(wanted, None, label)
        measure, _, result = wanted.partition(" of ")
        if result in names:
            return Column(result, measure, label)
        first, _, minus = wanted.rpartition(" minus ")
        if minus in names:
            return replace(parse_column(first, names), label=label, minus=minus)
    wanted = text.partition(" as ")[0]
    result = wanted.partition(" of ")[2] or wanted
    raise ValueError(f"no run has a result {result!r}{nearest(result, names)}")


def _labelled(text: str) -> list[tuple[str, str]]:
    """Every way to read a text as ``NAME as LABEL``, longest name first; without a label in the beginning."""
    words = text.split(" as ")
    return [(" as ".join(words[:end]), " as ".join(words[end:])) for end in range(len(words), 0, -1)]


def chosen_rows(rows: Sequence[Row], wanted: Sequence[str]) -> list[Row]:
    """Rows by name in the order asked for, ``NAME[ as LABEL]``, under their labels.

    Raises:
        ValueError: no such row; the nearest is offered.
    """
    by_name = {row.name: row for row in rows}
    made = []
    for text in wanted:
        name, label = next((read for read in _labelled(text) if read[0] in by_name), _labelled(text)[-1])
        if name not in by_name:
            raise ValueError(f"no row is named {name!r}{nearest(name, by_name)}")
        made.append(replace(by_name[name], name=label or name))
    return made
