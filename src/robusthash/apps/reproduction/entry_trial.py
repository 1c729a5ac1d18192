"""Dry runs of an entry: one step of every part of each of its models, and the time of what is not stored."""

from __future__ import annotations

from dataclasses import dataclass

from robusthash.apps.experiment.dry_run import DryRun, dry_run
from robusthash.apps.reproduction.entry_runs import EntryPlan, distinct
from robusthash.core.runtime import Progress, silent


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
