"""The stage of the checks: a run -> its flags."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from robusthash.apps.experiment.evaluation_stages import context_of
from robusthash.apps.experiment.model_stages import load_hasher, read_data
from robusthash.apps.experiment.run_directory import CHECKED, Run, write_json
from robusthash.apps.experiment.threat_options import threat_name, threat_on_data
from robusthash.core.runtime import Progress, silent
from robusthash.metrics.results import Flag
from robusthash.robustness.checks.base import CHECKS
from robusthash.robustness.checks.behaviour_checks import require_usable
from robusthash.robustness.checks.model_checks import model_checks


def check_run(
    run: Run,
    progress: Progress = silent,
    *,
    threat: str | None = None,
    queries: int = 128,
    steps: int = 100,
    direction: str | None = None,
) -> tuple[Flag, ...]:
    """Run all checks of the victim of a run, and write them to its ``checks.json``.

    Args:
        threat: budget by name; the usual one of the query modality by default.
        queries: N of the run's, chosen by content.
        direction: such as ``T2I``; the first of the run's by default.
    """
    victim = load_hasher(run)
    data = read_data(run.config, progress)
    few = data.query.batch(torch.arange(min(8, len(data.query)))).only(victim.modalities)
    require_usable(victim, few.to(victim.device))
    direction = direction or (run.config.evaluation.directions or (None,))[0]
    context = context_of(run, victim, data, progress, direction)
    name = threat or threat_name(modality=context.direction[0])
    flags = model_checks(context, threat_on_data(name, data, "W2"), queries=queries, steps=steps)
    write_json(run.path / CHECKED, plain(flags))
    return flags


def plain(flags: tuple[Flag, ...]) -> list[dict[str, Any]]:
    """Flags as plain data, with the titles of the values."""
    return [{**asdict(flag), "title": CHECKS[flag.id].title} for flag in flags]
