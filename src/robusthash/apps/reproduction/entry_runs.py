"""Runs of an entry: the config of every row and seed, and which of them have results, or a model, already."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

import robusthash
from robusthash.apps.experiment.config import (
    Config,
    EvaluationSection,
    make_config,
    read_recipe,
    settings_of,
)
from robusthash.apps.experiment.evaluation_stages import attacks_of, ends_of
from robusthash.apps.experiment.run_directory import Run, RunError, accept, load_run, write_json
from robusthash.apps.experiment.run_files import CONFIG, sealed, without_config
from robusthash.apps.experiment.stored_analyses import Analysis, analysis_values, has_analysis
from robusthash.apps.experiment.tables import Column, parse_column
from robusthash.apps.reproduction.paper_entries import BlockSpec, PaperEntry, ScaleSpec
from robusthash.attacks.base import Attack
from robusthash.core.atomic_files import write_aside
from robusthash.core.limited_files import read_json
from robusthash.core.plugins import module_folders
from robusthash.core.registry import build

_PLACES = ("root", "npz")  # of data: where they lie makes no other model


class Recipes:
    """A folder of recipes; each file is read once, for rows have recipes in common.

    Raises:
        FileNotFoundError: a folder without the recipes of the papers.
    """

    def __init__(self, folder: Path | None = None) -> None:
        clone = Path(robusthash.__file__).resolve().parents[2] / "recipes"
        folders = [folder] if folder is not None else [Path("recipes"), clone]
        found = next((each for each in folders if (each / "papers").is_dir()), None)
        if found is None:
            remedy = "clone the repository and give its folder: --recipes PATH/recipes"
            raise FileNotFoundError(f"{folders[0]} does not hold the recipes of the papers; {remedy}")
        self.folder = found
        self._read = cache(read_recipe)
        self._configs: dict[tuple[Path, tuple[str, ...]], Config] = {}

    def config(self, recipe: str, overrides: tuple[str, ...] = ()) -> tuple[Path, Config]:
        """The file of a recipe, named without ending, and its config. Errors as of ``load_config``."""
        path = self.folder / f"{recipe}.yaml"
        if (path, overrides) not in self._configs:
            raw, folders = self._read(path)
            with module_folders(folders):
                self._configs[path, overrides] = make_config(raw, overrides, where=str(path))
        return path, self._configs[path, overrides]


def identity_of(config: Config) -> str:
    """Name and digest of all that makes the model, but seed, ancestor and the place of the data."""
    runtime = config.runtime.model_copy(update={"seed": 0})
    placeless = {key: value for key, value in settings_of(config.data).items() if key not in _PLACES}
    return f"{config.name} {config.model_copy(update={'data': placeless, 'runtime': runtime}).model_id()}"


class Stored:
    """Evaluated runs of several folders by what makes the model; what cannot be read is passed over.

    Attributes:
        unreadable: one line each.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        self.unreadable: list[str] = []
        self._runs: dict[tuple[str, int], list[Run]] = {}
        self._results: dict[Path, dict[str, Any]] = {}
        for folder in dict.fromkeys(folders):
            for path in sorted(folder.glob("*/*")):
                if fault := without_config(path):
                    self.unreadable.append(fault)
                if not (path / CONFIG).is_file():
                    continue
                try:
                    run = load_run(path)
                    if run.trained or run.results_only:
                        run.card()  # it says whether the config is that of its own
                except (RunError, ValueError, KeyError) as error:
                    self.unreadable.append(str(error))
                    continue
                key = identity_of(run.config), run.config.runtime.seed
                self._runs.setdefault(key, []).append(run)

    def find(self, config: Config, names: Iterable[str], analysis: Analysis | None = None) -> Run | None:
        """The first run of the model and seed that has the analysis, or all results of these names."""
        for run in self._runs.get((identity_of(config), config.runtime.seed), []):
            if has_analysis(run, analysis) if analysis else {*names} <= self.results(run).keys():
                return run
        return None

    def of_model(self, config: Config) -> list[Run]:
        """Every run of the config's model, by seed, then in the order of the folders."""
        identity = identity_of(config)
        return [run for key in sorted(self._runs) if key[0] == identity for run in self._runs[key]]

    def analysis(self, run: Run, kind: Analysis) -> dict[str, Tensor]:
        """Numbers of an analysis by name; none where it was not made or cannot be read."""
        try:
            return analysis_values(run, kind)
        except (RunError, ValueError) as error:
            self.unreadable.append(str(error))
            return {}

    def results(self, run: Run) -> dict[str, Any]:
        """Results of ``evaluate`` and ``assess`` by name; none where they cannot be read."""
        if run.path not in self._results:
            try:
                self._results[run.path] = {**run.assessed(), **(run.evaluated() if run.was_evaluated else {})}
            except (RunError, ValueError) as error:
                self.unreadable.append(str(error))
                self._results[run.path] = {}
        return self._results[run.path]


def result_names(config: Config) -> list[str]:
    """Names of the results that the evaluation of a config gives."""
    section, objective = config.evaluation, build("objective", config.training.objective)
    attacks: dict[str, Attack] = {
        name: build("attack", settings, objective=objective)
        for name, (_, settings) in attacks_of(section).items()
    }
    home = "image" if config.hasher.image is not None else "text"
    names = []
    for relevance in section.relevance:
        for direction in section.directions or (None,):
            modality = (ends_of(direction) or (home,))[0]
            fitting = [name for name, attack in attacks.items() if modality in attack.threat.balls]
            scored_on = [direction or "", "" if relevance == "own" else f"by {relevance}"]
            untargeted = [name for name in fitting if not attacks[name].targeted]
            all_names = ["clean", *fitting, *(["worst"] if untargeted else [])]
            names += [" ".join(filter(None, [*scored_on, name])) for name in all_names]
    return names


@dataclass(frozen=True)
class Planned:
    """One run of an entry: a row of a block at a training seed.

    ``columns`` are those that its evaluation gives, by title, and ``needs`` the results that they take;
    ``stored`` is the run that has them.
    """

    block: str
    row: str
    seed: int
    recipe: Path
    sets: tuple[str, ...]
    config: Config
    columns: dict[str, Column]
    needs: tuple[str, ...]
    stored: Run | None

    @property
    def command(self) -> str:
        """The line that makes the run."""
        sets = "".join(f" --set '{text}'" for text in self.sets)
        return f"robusthash run {self.recipe}{sets}"


@dataclass(frozen=True)
class EntryPlan:
    """All runs of an entry at a scale.

    Attributes:
        columns: by title; None where nothing here is measured for it.
        missing: by block and row, the reason why a row has no run.
    """

    entry: PaperEntry
    spec: ScaleSpec
    blocks: list[BlockSpec]
    columns: dict[str, Column | None]
    runs: list[Planned]
    missing: dict[tuple[str, str], str] = field(default_factory=dict)

    @property
    def stored(self) -> int:
        """Runs that have their results."""
        return sum(run.stored is not None for run in self.runs)

    @property
    def state(self) -> str:
        """``done``, ``not run``, or how many runs are stored."""
        if self.stored in (0, len(self.runs)):
            return "done" if self.stored else "not run"
        return f"{self.stored} of {len(self.runs)} runs stored"

    def minutes(self) -> tuple[float | None, bool]:
        """Minutes of one seed of all rows, and whether they were measured.

        Then they are those of the quickest stored seed of each row, training and attacks, on the machine that
        made it; else as the entry estimates.
        """
        by_row: dict[tuple[str, str], list[float]] = {(run.block, run.row): [] for run in self.runs}
        for run in self.runs:
            if run.stored is not None:
                by_row[run.block, run.row].append(_seconds(run.stored, run.config.evaluation) / 60)
        if not all(by_row.values()):
            return self.spec.minutes, False
        return sum(map(min, by_row.values())), True


def _seconds(run: Run, section: EvaluationSection) -> float:
    """Training and the attacks of the section; a stored run may hold more of them.

    The worst case has the costs of the attacks that it is taken over, once more.
    """
    results = run.evaluated().values() if run.was_evaluated else ()
    relevances = ["" if name == "own" else f"by {name}" for name in section.relevance]
    contexts = {" ".join(filter(None, (d, r))) for d in section.directions or ("",) for r in relevances}
    asked = {"clean", *attacks_of(section)}
    costs = (each.cost.seconds for each in results if each.attack in asked and each.scored_on in contexts)
    return float(run.card()["seconds"]) + sum(costs)


def make_plan(
    entry: PaperEntry,
    spec: ScaleSpec,
    recipes: Recipes,
    stored: Stored,
    seeds: int | None = None,
    sets: Sequence[str] = (),
) -> EntryPlan:
    """The runs of an entry, every config checked.

    Raises:
        ConfigError: a recipe that is missing, or an override that it does not take.
        ValueError: a column of a result that no row has, two rows that are one model, or another evaluation
            without a name of its own.
    """
    named = any(text.startswith("name=") for text in sets)
    if any(text.startswith("evaluation") for text in sets) and not named:
        raise ValueError(
            "stored runs are found by name and model: with --set evaluation... give --set name=..."
        )
    blocks, titles = spec.expanded(), spec.columns or entry.columns
    numbers = range(spec.seeds if seeds is None else seeds)
    runs: list[Planned] = []
    missing = {(b.title, n): row.missing for b in blocks for n, row in b.rows.items() if row.missing}
    configs = {}
    for block in blocks:
        for name, row in block.rows.items():
            if not row.missing:
                overrides = (*row.set, *sets)
                configs[block.title, name] = (*recipes.config(row.recipe, overrides), overrides)
    has = {key: result_names(config) for key, (_, config, _) in configs.items()}
    known = [*dict.fromkeys(name for names in has.values() for name in names)]
    columns = {
        title: _column(text, known, entry) for title, text in titles.items() if entry.shows == "values"
    }
    views = {(block.title, name): row.view for block in blocks for name, row in block.rows.items()}
    for key, (recipe, config, overrides) in configs.items():
        own = _own_columns(columns, has[key], views[key])
        needs = _needed(own.values(), has[key])
        for seed in numbers:
            runtime = config.runtime.model_copy(update={"seed": seed})
            seeded = config.model_copy(update={"runtime": runtime})
            found, taken = stored.find(seeded, needs, entry.analysis), (*overrides, f"runtime.seed={seed}")
            runs.append(Planned(*key, seed, recipe, taken, seeded, own, needs, found))
    _require_distinct(runs)
    return EntryPlan(entry, spec, blocks, columns, runs, missing)


def _column(text: str | None, known: Sequence[str], entry: PaperEntry) -> Column | None:
    if text is None:
        return None
    try:
        return parse_column(text, [*known, *_viewless(known)])
    except ValueError as error:
        raise ValueError(f"{entry.id}: {error}") from None


def _viewless(known: Iterable[str]) -> list[str]:
    """Names of attacks that overlook a purifier, without saying so."""
    endings = (" (oblivious)", " (identity)")
    return [name.removesuffix(ending) for name in known for ending in endings if name.endswith(ending)]


def _own_columns(columns: Mapping[str, Column | None], has: Collection[str], view: str) -> dict[str, Column]:
    """The columns that a row has, each in the row's view of its model where there is such a result."""
    own = {}
    for title, column in columns.items():
        if column is None:
            continue
        viewed = f"{column.result} ({view})"
        column = replace(column, result=viewed) if viewed in has else column
        if column.result in has:
            own[title] = column
    return own


def _needed(columns: Iterable[Column], has: Sequence[str]) -> tuple[str, ...]:
    """Results that the columns take, and the first of a row, which is of clean queries."""
    named = [name for column in columns for name in (column.result, column.minus) if name]
    return tuple(dict.fromkeys([has[0], *named]))


def _require_distinct(runs: Sequence[Planned]) -> None:
    models: dict[tuple[str, str, int], Planned] = {}
    for run in runs:
        key = (run.block, identity_of(run.config), run.seed)
        if key in models:
            raise ValueError(f"the rows {models[key].row!r} and {run.row!r} are the same model")
        models[key] = run


def distinct(runs: Iterable[Planned]) -> list[Planned]:
    """Runs without those whose model and seed came before."""
    found: dict[tuple[str, int], Planned] = {}
    for run in runs:
        found.setdefault((identity_of(run.config), run.seed), run)
    return list(found.values())


_WEIGHTS = ("hasher.safetensors", "objective.safetensors", "database.npz")
_FACTS = ("data.json", "environment.json", "texts.json", "log.jsonl")


def take_over_model(config: Config, runs: Path) -> Run | None:
    """Copy the trained model of a config that lies in ``runs`` under another name, if one does.

    The id of a run holds data, hasher, training, seed and ancestor, not the name: a copy under the id of the
    other is the run that training would make, with the weights of its epochs where the config keeps them. It
    has no results.
    """
    for folder in sorted(runs.glob("*/*")):
        target = runs / config.name / folder.name
        if not (folder / "model.json").is_file() or target.exists():
            continue
        try:
            other = load_run(folder)
            if other.results_only or not _same(config, other.config):
                continue
            if config.runtime.keep_epochs and not other.stored_epochs():
                continue
            other.check_weights()
        except (RunError, ValueError):  # a damaged run: training makes another
            continue
        return _copied(other, Run(target, config))
    return None


def _same(config: Config, other: Config) -> bool:
    """True for one model under two names, of the same data in the same place."""
    named = other.model_copy(update={"name": config.name})
    same_seed = config.runtime.seed == other.runtime.seed
    return same_seed and config.data == other.data and identity_of(config) == identity_of(named)


def _copied(other: Run, run: Run) -> Run:
    """The model of ``other`` as a run of its own; the model card comes last, as in training."""
    (run.path / "checkpoint").mkdir(parents=True)
    files = [f"checkpoint/{name}" for name in _WEIGHTS] + list(_FACTS)
    if run.config.runtime.keep_epochs:
        (run.path / "epochs").mkdir()
        files += [f"epochs/{epoch}.safetensors" for epoch in other.stored_epochs()]
    for name in files:
        if (other.path / name).is_file():
            with write_aside(run.path / name) as aside:
                shutil.copyfile(other.path / name, aside)
    accept(run)
    card = {**read_json(other.path / "model.json"), "name": run.config.name}
    write_json(run.path / "model.json", sealed(card))
    return run
