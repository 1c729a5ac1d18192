"""A run -> what questions to its search service buy: MAP by number of questions, for each thing the service
shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robusthash.apps.experiment import stages
from robusthash.apps.experiment.assess_run import FolderStore
from robusthash.apps.experiment.run_directory import Run
from robusthash.apps.experiment.threat_options import threat_on_data
from robusthash.apps.reports.plots import Line, line_plot, save
from robusthash.core.registry import build
from robusthash.core.runtime import digest
from robusthash.evaluation.context import EvaluationContext
from robusthash.metrics.statistics import intervals
from robusthash.robustness.specs.oracle_attacks import (
    Judge,
    OracleAttack,
    QuestionCurve,
    Shows,
    question_curve,
)

JUDGES: dict[Shows, Judge] = {"codes": "ap", "distances": "ap", "ids": "rank"}
"""The most that can be made of what is shown."""


@dataclass(frozen=True)
class QuestionTable:
    """Curves of one search on the same queries of a run, by what the oracle shows."""

    run: Path
    threat: str
    search: str
    curves: dict[Shows, QuestionCurve]
    chosen: str  # how the queries were chosen

    @property
    def budgets(self) -> tuple[int, ...]:
        return self._first.budgets

    @property
    def clean(self) -> Tensor:
        """(Q,) AP of the clean queries."""
        return self._first.clean

    @property
    def _first(self) -> QuestionCurve:
        return next(iter(self.curves.values()))

    def intervals(self, shows: Shows) -> list[tuple[float, float]]:
        """95 % over queries of the mean at each budget, in their order."""
        found = intervals({str(place): column for place, column in enumerate(self.curves[shows].ap.T)})
        return [found[str(place)] for place in range(len(self.budgets))]

    def plain(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {
            "run": str(self.run),
            "measure": "wMAP over the whole database",
            "threat": self.threat,
            "search": self.search,
            "queries": len(self.clean),
            "chosen": self.chosen,
            "clean": float(self.clean.mean()),
            "budgets": list(self.budgets),
            "shows": {
                shows: {
                    "judge": JUDGES[shows],
                    "wMAP": curve.means.tolist(),
                    "interval": [list(ends) for ends in self.intervals(shows)],
                }
                for shows, curve in self.curves.items()
            },
        }

    def rows(self) -> list[list[Any]]:
        """A row for the clean queries and for each budget: questions, then wMAP by what is shown."""
        columns = [curve.means.tolist() for curve in self.curves.values()]
        clean = ["clean", *[float(self.clean.mean())] * len(columns)]
        return [
            clean,
            *([str(budget), *values] for budget, *values in zip(self.budgets, *columns, strict=True)),
        ]


def question_table(
    run: Run,
    budgets: Sequence[int] = (100, 1000, 5000),
    shows: Sequence[Shows] = ("codes", "distances", "ids"),
    queries: int = 100,
    search: str | None = None,
    threat: str = "img-linf-8",
    direction: str | None = None,
    progress: stages.Progress = stages.silent,
) -> QuestionTable:
    """Ask a run's victim up to the largest budget, once for each thing that its service may show.

    Finished blocks of queries are kept under ``questions/`` in the run directory, so the same call goes on
    from there.

    Args:
        budgets: rising numbers of questions of each query, the clean one among them.
        queries: chosen by content, as in an assessment.
        search: ``square`` or ``nes``, or another question search of the catalogue; by default ``square``, and
            ``greedy-words`` where words are edited.
        direction: ``I2T`` and the like; the hasher's first modality both ways by default.

    Raises:
        RunError: a folder that is no trained run.
        KeyError: an unknown search or threat.
        ValueError: budgets that do not rise, a search that cannot do the threat, a threat on another modality
            than that of the queries, a randomised victim.
    """
    if run.config.runtime.threads:
        torch.set_num_threads(run.config.runtime.threads)
    victim, _ = stages.load_victim(run)
    data = stages.read_data(run.config, progress)
    context = stages.context_of(run, victim, data, progress, direction, whole=True)
    context = context.some(queries)
    aim = threat_on_data(threat, data, "B2")
    name = search or ("greedy-words" if aim.edits else "square")
    asker = build("question-search", name)
    keep = FolderStore(run.path / "questions" / _identity(run, context, budgets))
    curves = {}
    for kind in shows:
        line = OracleAttack(f"{name}, {kind}", asker, aim, kind, JUDGES[kind], budgets[-1])
        curves[kind] = question_curve(context, line, budgets, progress, keep)
    return QuestionTable(run.path, aim.name, name, curves, context.chosen)


def _identity(run: Run, context: EvaluationContext, budgets: Sequence[int]) -> str:
    """Of all that kept codes depend on beside the settings of the search."""
    asked = [context.queries.fingerprint(), context.data.database.fingerprint(), context.direction]
    return digest([run.card()["digest"], *asked, context.batch_size, context.seed, list(budgets)])


def draw_questions(table: QuestionTable, path: Path) -> list[Path]:
    """wMAP over questions, on a logarithmic axis, with intervals over queries; as PDF and PNG beside each
    other.

    Args:
        path: with one of these endings.
    """
    places, lines = [math.log2(budget) for budget in table.budgets], list[Line]()
    for shows, curve in table.curves.items():
        low, high = zip(*table.intervals(shows), strict=True)
        lines.append(Line(f"shows {shows}", places, curve.means.tolist(), low, high))
    clean = {"clean": float(table.clean.mean())}
    asked = f"questions of each query ({table.search})"
    figure = line_plot(lines, asked, "wMAP", references=clean, unit=True, whiskers=True)
    figure.axes[0].set_xticks(places, [f"{budget:,}" for budget in table.budgets])
    return save(figure, path.with_suffix(""))
