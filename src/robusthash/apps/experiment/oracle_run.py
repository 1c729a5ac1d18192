"""The price of oracle queries: MAP of a run by their number, for each kind of answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from robusthash.apps.experiment.block_store import FolderStore
from robusthash.apps.experiment.evaluation_stages import loaded_context
from robusthash.apps.experiment.run_directory import Run
from robusthash.apps.experiment.threat_options import threat_on_data
from robusthash.core.registry import build
from robusthash.core.runtime import Progress, digest, silent
from robusthash.evaluation.context import EvaluationContext
from robusthash.metrics.statistics import intervals
from robusthash.robustness.specs.oracle_attacks import Judge, OracleAttack, OracleCurve, Shows, oracle_curve

JUDGES: dict[Shows, Judge] = {"codes": "ap", "distances": "ap", "coarse": "ap", "ids": "rank"}
"""The most that can be made of what is shown."""


@dataclass(frozen=True)
class OracleTable:
    """Curves of one search on the same queries of a run, by what the oracle shows."""

    run: Path
    threat: str
    search: str
    budgets: tuple[int, ...]
    clean: Tensor  # (Q,) AP of the clean queries
    curves: dict[Shows, OracleCurve]
    chosen: str  # how the queries were chosen

    def intervals(self, shows: Shows) -> list[tuple[float, float]]:
        """95 % over queries of the mean at each budget, in their order."""
        spans = intervals({str(place): column for place, column in enumerate(self.curves[shows].ap.T)})
        return [spans[str(place)] for place in range(len(self.budgets))]

    def plain(self) -> dict[str, Any]:
        """The table as plain data for JSON."""
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
        """A row for the clean queries and for each budget: oracle queries, then wMAP by what is shown."""
        columns = [curve.means.tolist() for curve in self.curves.values()]
        clean = ["clean", *[float(self.clean.mean())] * len(columns)]
        return [clean, *([str(budget), *row] for budget, *row in zip(self.budgets, *columns, strict=True))]


def oracle_table(
    run: Run,
    budgets: Sequence[int] = (100, 1000, 5000),
    shows: Sequence[Shows] = ("codes", "distances", "ids"),
    queries: int = 100,
    search: str | None = None,
    threat: str = "img-linf-8",
    direction: str | None = None,
    progress: Progress = silent,
    step: int = 4,
) -> OracleTable:
    """Search by oracle queries to a run's victim up to the largest budget, once for each kind of answer.

    Finished blocks are stored under ``questions/`` in the run directory, so the same call goes on from there.

    Args:
        budgets: rising numbers of oracle queries of each query, the clean one among them.
        queries: chosen by content, as in an assessment.
        search: ``square``, ``nes`` or another registered one; by default ``square``, of words
            ``greedy-words``.
        direction: ``I2T`` and the like; the hasher's first modality both ways by default.
        step: of coarse distances, in bits.

    Raises:
        RunError: a folder that is no trained run.
        KeyError: an unknown search or threat.
        ValueError: budgets that do not rise, a search that cannot do the threat, a threat on another modality
            than that of the queries, a randomised victim.
    """
    context = loaded_context(run, progress, direction, queries)
    aim = threat_on_data(threat, context.data, "B2")
    name = search or ("greedy-words" if aim.edits else "square")
    built = build("question-search", name)
    store = FolderStore(run.path / "questions" / _identity(run, context, budgets))
    curves = {}
    for kind in shows:
        spec = OracleAttack(f"{name}, {kind}", built, aim, kind, JUDGES[kind], budgets[-1])
        spec = replace(spec, step=step) if kind == "coarse" else spec
        curves[kind] = oracle_curve(context, spec, budgets, progress, store)
    clean = next(iter(curves.values())).clean
    return OracleTable(run.path, aim.name, name, tuple(budgets), clean, curves, context.chosen)


def _identity(run: Run, context: EvaluationContext, budgets: Sequence[int]) -> str:
    """Digest of all that stored codes depend on besides the settings of the search."""
    splits = context.queries.fingerprint(), context.data.database.fingerprint()
    fixed = context.direction, context.batch_size, context.seed
    return digest([run.card()["digest"], *splits, *fixed, list(budgets)])


def draw_oracle_table(table: OracleTable, path: Path) -> list[Path]:
    """wMAP over oracle queries, on a logarithmic axis, with intervals over queries, as PDF and PNG."""
    from robusthash.apps.reports.charts import ChartAxis, LineChart, Series, save

    places = [math.log2(budget) for budget in table.budgets]
    names = [f"{budget:,}" for budget in table.budgets]
    series = []
    for shows, curve in table.curves.items():
        low, high = zip(*table.intervals(shows), strict=True)
        series.append(Series(f"shows {shows}", places, curve.means.tolist(), low=low, high=high))
    chart = LineChart(
        series=series,
        x=ChartAxis(f"oracle queries of each query ({table.search})", places, names),
        y=ChartAxis("wMAP", from_zero=True),
        reference=("clean", float(table.clean.mean())),
        whiskers=True,
    )
    return save(chart, path.with_suffix(""))
