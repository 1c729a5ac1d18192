"""Entries that show an analysis of trained nets: bands, cost, transfer, MAP of epochs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from robusthash.apps.experiment.run_directory import Run
from robusthash.apps.experiment.stored_analyses import has_analysis
from robusthash.apps.reports.cell_text import markdown_table
from robusthash.apps.reproduction.entry_runs import EntryPlan, Planned, Stored, distinct
from robusthash.core.atomic_files import write_text
from robusthash.core.runtime import Progress

ATTACK = {"name": "cgat", "steps": 10, "step_size": 2 / 255}
"""The attack on every epoch of an entry, on ``QUERIES`` queries."""

QUERIES = 200

ROUNDS = 9
"""Of training steps that are timed in turn."""

PERMUTATIONS = 16
"""Of the bands; images differ far more than permutations do."""

_SHOWN = {"bands": ("share at 0", "share at 2", "share at 7")}  # of the many numbers of an analysis


def analyse(runs: Sequence[Run], plan: EntryPlan, progress: Progress) -> None:
    """Make the analysis of an entry on the trained runs of one seed; each stores its own numbers.

    Raises:
        RunError: runs without weights, or of epochs that were not kept.
    """
    from robusthash.apps.experiment.attribution_run import attribute_runs
    from robusthash.apps.experiment.cost_run import cost_rows
    from robusthash.apps.experiment.epoch_curves import robust_curves
    from robusthash.apps.experiment.transfer_run import transfer_table

    kind, paths = plan.entry.analysis, [run.path for run in runs]
    if kind == "cost":
        cost_rows(paths, rounds=ROUNDS)
    elif kind == "transfer":
        transfer_table(paths, progress=progress)
    for run in runs:
        if kind == "bands" and not has_analysis(run, kind):
            attribute_runs([run.path], run.path, progress=progress, permutations=PERMUTATIONS)
        elif kind == "epochs":
            robust_curves(run, ATTACK, QUERIES, progress)


def analysis_markdown(plan: EntryPlan, stored: Stored) -> str:
    """A Markdown table of the stored numbers, the mean over queries and seeds; "" where there are none."""
    kind = plan.entry.analysis
    rows: dict[str, list[Mapping[str, Tensor]]] = {}
    for run in distinct(plan.runs):
        if kind is not None and run.stored is not None:
            rows.setdefault(run.row, []).append(stored.analysis(run.stored, kind))
    found = list(dict.fromkeys(name for seeds in rows.values() for values in seeds for name in values))
    names = [name for name in found if name in _SHOWN.get(str(kind), found)]
    if not names:
        return ""
    lines = []
    for row, seeds in rows.items():
        cells = [_cell([values[name] for values in seeds if name in values]) for name in names]
        lines.append([row, *cells, len(seeds)])
    return markdown_table(["", *names, "seeds"], lines)


def _cell(of_seeds: Sequence[Tensor]) -> str:
    if not of_seeds:
        return "-"
    value = float(torch.stack([values.nanmean() for values in of_seeds]).mean())
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3f}"


def draw_analysis(plan: EntryPlan, stored: Stored, out: Path) -> list[Path]:
    """Figures as far as runs hold what they show: bands and epochs of the first seed, transfer the mean."""
    from robusthash.apps.experiment.attribution_run import ATTRIBUTION, load_attributions
    from robusthash.apps.reports.figures import draw_bands, draw_log, draw_transfer_file

    first = {run.row: run.stored for run in _of_seed(plan, plan.runs[0].seed) if run.stored is not None}
    out.mkdir(parents=True, exist_ok=True)
    if plan.entry.analysis == "epochs":
        return [path for row, run in first.items() for path in draw_log(row.replace(" ", "-"), run, out)]
    if plan.entry.analysis == "bands":
        files = {row: run.path / ATTRIBUTION for row, run in first.items()}
        maps = {row: next(iter(load_attributions(f).values())) for row, f in files.items() if f.is_file()}
        return draw_bands(maps, out) if maps else []
    if plan.entry.analysis == "transfer" and first:
        write_text(out / "transfer.json", json.dumps(_matrix(plan, stored)))
        return draw_transfer_file(out / "transfer.json", out)
    return []


def _matrix(plan: EntryPlan, stored: Stored) -> dict[str, object]:
    """The transfer matrix of the rows, the mean over seeds, as the figure takes it."""
    columns: dict[str, list[Mapping[str, Tensor]]] = {}
    for run in distinct(plan.runs):
        if run.stored is not None:
            columns.setdefault(run.row, []).append(stored.analysis(run.stored, "transfer"))
    every = [values for seeds in columns.values() for values in seeds]
    sources = list(dict.fromkeys(name for values in every for name in values if name.startswith("from ")))
    attacked = [[_mean(seeds, name) for seeds in columns.values()] for name in sources]
    names = [name.removeprefix("from ") for name in sources]
    return {"surrogates": names, "victims": [*columns], "attacked": attacked, "measure": "MAP"}


def _mean(seeds: Sequence[Mapping[str, Tensor]], name: str) -> float | None:
    found = [float(values[name].nanmean()) for values in seeds if name in values]
    return sum(found) / len(found) if found else None


def seeds_to_analyse(plan: EntryPlan) -> list[list[Planned]]:
    """The runs of every seed at which one lacks the analysis."""
    seeds = dict.fromkeys(run.seed for run in plan.runs)
    groups = [_of_seed(plan, seed) for seed in seeds]
    return [group for group in groups if any(run.stored is None for run in group)]


def _of_seed(plan: EntryPlan, seed: int) -> list[Planned]:
    return distinct(run for run in plan.runs if run.seed == seed)
