"""A table or figure of a paper: missing runs are made or tried, then table, printed values and drawings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from robusthash.apps.experiment.dry_run import DryRun, dry_run
from robusthash.apps.experiment.run_directory import Run
from robusthash.apps.experiment.training_stages import run_all
from robusthash.apps.reproduction.entry_analyses import (
    analyse,
    analysis_markdown,
    draw_analysis,
    seeds_to_analyse,
)
from robusthash.apps.reproduction.entry_runs import (
    EntryPlan,
    Recipes,
    Stored,
    distinct,
    make_plan,
    take_over_model,
)
from robusthash.apps.reproduction.paper_entries import SCALES, Paper, PaperEntry, Scale, paper, papers
from robusthash.apps.reproduction.printed_table import (
    TableBlock,
    csv_blocks,
    latex_blocks,
    make_blocks,
    markdown_blocks,
    plain_cells,
)  # fmt: skip
from robusthash.core.out_of_memory import DoesNotFit
from robusthash.core.runtime import Progress, silent

_FAILURES = (ValueError, KeyError, OSError, ImportError, FloatingPointError, RuntimeError, DoesNotFit)


@dataclass(frozen=True)
class Folders:
    """Folders of a reproduction: recipes, stored results, runs, and files that are written."""

    recipes: Recipes
    results: Path
    runs: Path
    out: Path | None = None

    @classmethod
    def of(cls, recipes: Path | None, runs: Path = Path("runs"), out: Path | None = None) -> Folders:
        """Those of a clone: ``results`` lies next to ``recipes``."""
        found = Recipes(recipes)
        return cls(found, found.folder.parent / "results", runs, out)

    def stored(self) -> Stored:
        """Runs of both folders."""
        return Stored([self.results, self.runs])


@dataclass(frozen=True)
class Reproduction:
    """A table or figure as far as its runs are there.

    Attributes:
        state: ``done``, ``not run``, or how many of its runs are stored.
        blocks: the table, a block for each data set; empty for figures of other analyses.
        analysis: the Markdown text of such an analysis.
        drawn: files of figures.
        failed: what failed, by the command that makes the run.
        notes: stored runs that cannot be read.
    """

    paper: Paper
    entry: PaperEntry
    scale: Scale
    state: str
    blocks: list[TableBlock] = field(default_factory=list)
    analysis: str = ""
    drawn: list[Path] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def facts(self) -> list[str]:
        """Lines below the table: what differs from the paper, and what is left out."""
        spec = self.entry.at(self.scale)
        lines = [f"Differs from the paper: {spec.differs}"] if spec.differs else []
        return [*lines, *([f"Left out: {self.entry.left_out}"] if self.entry.left_out else [])]

    def markdown(self) -> str:
        """Tables, with what differs below them."""
        parts = [markdown_blocks(self.blocks), self.analysis, *self.facts]
        return "\n\n".join(filter(None, parts))

    def latex(self) -> str:
        """Tables of LaTeX, with captions that say what differs."""
        title = f"{self.paper.name}, {self.entry.title}, with 95 % intervals"
        label = f"{self.paper.name.lower()}-{self.entry.id}"
        return latex_blocks(self.blocks, title, [f"{line}." for line in self.facts], label)

    def csv(self) -> str:
        """One line a cell."""
        return csv_blocks(self.blocks)

    def plain(self) -> dict[str, Any]:
        """As JSON takes it."""
        names = {"paper": self.paper.name, "entry": self.entry.id, "scale": self.scale}
        more = {"differs": self.facts, "analysis": self.analysis, "drawn": [str(path) for path in self.drawn]}
        return {
            **names,
            "state": self.state,
            "cells": plain_cells(self.blocks),
            **more,
            "failed": self.failed,
        }


@dataclass(frozen=True)
class ListedEntry:
    """The state of an entry at one scale; ``seed_minutes`` of all its rows, on one core."""

    paper: str
    entry: str
    kind: str
    title: str
    scale: str
    state: str
    seed_minutes: float | None
    measured: bool
    seeds: int


def list_entries(folders: Folders, only: str | None = None) -> list[ListedEntry]:
    """Every entry at every scale that it has, with its state; those that cannot be run say why.

    Args:
        only: one paper, by name.
    """
    chosen = papers().values() if only is None else [paper(only)]
    stored = folders.stored()
    listed = []
    for each in chosen:
        for entry in each.entries:
            common = (each.name, entry.id, entry.kind, entry.title)
            if entry.unavailable:
                reason = f"cannot be run: {entry.unavailable}"
                listed.append(ListedEntry(*common, "-", reason, None, False, 0))
            for scale in (scale for scale in SCALES if getattr(entry, scale) is not None):
                plan = make_plan(entry, entry.at(scale), folders.recipes, stored)
                minutes, measured = plan.minutes()
                listed.append(ListedEntry(*common, scale, plan.state, minutes, measured, plan.spec.seeds))
    return listed


def plan_of(
    name: str,
    entry: str,
    folders: Folders,
    *,
    scale: Scale = "small",
    seeds: int | None = None,
    sets: Sequence[str] = (),
) -> tuple[EntryPlan, Stored]:
    """The runs of an entry, and the stored ones among which they were looked for.

    Raises:
        ValueError: no such paper or entry, the nearest is offered; or the reason why it cannot be run.
    """
    found = paper(name).entry(entry)
    stored = folders.stored()
    spec = found.at(scale)
    return make_plan(found, spec, folders.recipes, stored, seeds, sets), stored


def reproduce(
    name: str,
    entry: str,
    *,
    scale: Scale = "small",
    seeds: int | None = None,
    recipes: str | Path | None = None,
    runs: str | Path = "runs",
    out: str | Path | None = None,
    sets: Sequence[str] = (),
    stored_only: bool = False,
    progress: Progress = silent,
) -> Reproduction:
    """Reproduce a table or figure of a paper.

    Runs with results in ``results`` next to the recipes, or in ``runs``, are not made again; a call that was
    killed goes on where it stopped, to the same table. A run that fails is named, and the others go on.

    Args:
        name: of the paper: ``saat``, ``saah``, ``sfcl``, ``drfgd``, ``dsarh``.
        entry: id of the table or figure, as ``robusthash reproduce --list`` shows it.
        scale: ``small`` for a machine without a GPU, ``paper`` for the papers' data and nets.
        seeds: training seeds 0 to ``seeds - 1``; by default as the entry says.
        recipes: folder of the recipes, by default that of the clone.
        out: folder of the figures, which go into ``out/PAPER-ENTRY``; none are drawn without it.
        sets: overrides of every recipe, ``data.root=PATH`` for the folder of the data sets.
        stored_only: train nothing, and show what there is.

    Raises:
        ValueError: no such paper or entry; or the reason why it cannot be run.
        FileNotFoundError: a data set that is missing.
    """
    where = Folders.of(
        None if recipes is None else Path(recipes), Path(runs), None if out is None else Path(out)
    )
    options: dict[str, Any] = {"scale": scale, "seeds": seeds, "sets": sets}
    plan, stored = plan_of(name, entry, where, **options)
    failed = {} if stored_only else _run_missing(name, plan, where, progress)
    if plan.stored < len(plan.runs) and not stored_only:
        plan, stored = plan_of(name, entry, where, **options)
    found = paper(name)
    folder = None if where.out is None else where.out / f"{found.name.lower()}-{plan.entry.id}"
    unit = 0.01 if (plan.entry.unit or found.unit) == "percent" else 1.0
    if plan.entry.shows == "values":
        blocks, analysis, drawn = make_blocks(plan, unit), "", list[Path]()
        if folder is not None and plan.stored:
            drawn = _draw_values(plan, blocks, folder)
    else:
        blocks, analysis = [], analysis_markdown(plan, stored)
        drawn = [] if folder is None else draw_analysis(plan, stored, folder)
    return Reproduction(
        found, plan.entry, scale, plan.state, blocks, analysis, drawn, failed, stored.unreadable
    )


def _run_missing(paper_name: str, plan: EntryPlan, folders: Folders, progress: Progress) -> dict[str, str]:
    """Make the runs that are not stored; the errors of those that failed, by command.

    Raises:
        FileNotFoundError: the first run finds no data.
    """
    groups = seeds_to_analyse(plan) if plan.entry.analysis else []
    missing = [run for run in distinct(plan.runs) if run.stored is None]
    missing = [run for group in groups for run in group] if plan.entry.analysis else missing
    made: dict[str, Run] = {}
    failed: dict[str, str] = {}
    for number, run in enumerate(missing):
        progress(number, len(missing), "runs of the entry")
        try:
            take_over_model(run.config, folders.runs)
            made[run.command] = run_all(run.config, folders.runs, progress, run.recipe.parent)
        except FileNotFoundError as error:
            if number == 0:
                raise
            failed[run.command] = str(error)
        except _FAILURES as error:
            failed[run.command] = " ".join(str(error).split())
        progress(number + 1, len(missing), "runs of the entry")
    for group in groups:
        try:
            analyse([made[run.command] for run in group if run.command in made], plan, progress)
        except _FAILURES as error:
            failed[f"robusthash reproduce {paper_name} {plan.entry.id}"] = " ".join(str(error).split())
    return failed


def _draw_values(plan: EntryPlan, blocks: Sequence[TableBlock], out: Path) -> list[Path]:
    """The figure of a sweep over one setting; of other tables all that their runs allow."""
    from robusthash.apps.experiment.parameter_sweep import SweepRow
    from robusthash.apps.reports.figures import draw_runs, draw_sweep

    axis, drawn = plan.spec.over, list[Path]()
    for number, block in enumerate(blocks):
        folder = out if len(blocks) == 1 else out / f"{number + 1}"
        folder.mkdir(parents=True, exist_ok=True)
        if axis is None:
            rows = {run.stored.path: run.row for run in plan.runs if run.block == block.title and run.stored}
            drawn += draw_runs(list(rows), folder, called=rows)[0] if rows else []
            continue
        named = [(line, *line.name.rpartition(", ")[::2]) for line in block.lines]
        several = len({of for _, of, _ in named}) > 1
        points = []
        for line, of, at in named:
            values = {axis.setting: at.rpartition(" ")[2], **({"of": of} if several else {})}
            points.append(SweepRow(values, line.cells, tuple(range(line.seeds)), 0))
        measures = dict.fromkeys(column.measure or "MAP" for column in plan.columns.values() if column)
        chance = set(block.chance.values())
        drawn += draw_sweep(points, ", ".join(measures), folder, chance.pop() if len(chance) == 1 else None)
    return drawn


@dataclass(frozen=True)
class EntryTrial:
    """Dry runs by row, and seconds of one seed of all rows and of the runs that are not stored."""

    runs: dict[str, DryRun]
    seed_seconds: float
    seconds: float


def try_entry(
    plan: EntryPlan, *, miniature: bool = False, batch: int | None = None, progress: Progress = silent
) -> EntryTrial:
    """Build every model of an entry at its true size, and take one step of each part; nothing is written.

    A model from which several rows start is trained once, and counts once.

    Args:
        miniature, batch: as of ``dry_run``.

    Raises:
        FileNotFoundError: data that are not there.
    """
    tried: dict[str, DryRun] = {}
    trained: set[str] = set()
    seed_seconds = seconds = 0.0
    first = [run for run in distinct(plan.runs) if run.seed == plan.runs[0].seed]
    for number, run in enumerate(first):
        progress(number, len(first), "rows")
        label = f"{run.block}: {run.row}" if len(plan.blocks) > 1 else run.row
        tried[label] = dry_run(
            run.config, run.recipe.parent, miniature=miniature, batch=batch, progress=progress
        )
        own = sum(part.whole for part in tried[label].parts if part.name not in trained)
        trained |= {part.name for part in tried[label].parts if " of " in part.name}
        rest = [each for each in plan.runs if (each.block, each.row) == (run.block, run.row)]
        seed_seconds += own
        seconds += own * sum(each.stored is None for each in rest)
    progress(len(first), len(first), "rows")
    return EntryTrial(tried, seed_seconds, seconds)
