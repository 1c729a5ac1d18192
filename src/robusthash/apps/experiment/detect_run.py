"""The stage that evaluates a detector of adversarial queries on a trained run."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from robusthash.apps.experiment.evaluation_stages import attacks_of, context_of, named_attacks
from robusthash.apps.experiment.model_stages import load_victim, prepare_process, read_data
from robusthash.apps.experiment.run_directory import Run, RunError, write_json
from robusthash.attacks.base import Attack
from robusthash.core.limited_files import read_json
from robusthash.core.processes import owned_together
from robusthash.core.registry import build
from robusthash.core.runtime import Progress, silent
from robusthash.robustness.detection import WEIGHTS, check_numbers, detect


def file_of(run: Run, direction: str | None) -> Path:
    """The result of a direction: ``detection.json``, or ``detection-I2T.json`` where it is named."""
    return run.path / f"detection{f'-{direction}' if direction else ''}.json"


def detection(
    run: Run,
    attacks: Sequence[Mapping[str, Any] | str] | None = None,
    false_alarms: float = 0.05,
    weights: Sequence[float] = WEIGHTS,
    queries: int | None = None,
    direction: str | None = None,
    progress: Progress = silent,
) -> tuple[dict[str, Any], Path]:
    """Evaluate the detector on a run and write the result into it; of a kept copy, read what it holds.

    Args:
        attacks: by name or settings; by default the white-box ones of the run's evaluation section.
        queries: number of them, chosen by content; all of the section by default.
        direction: such as ``T2I``; the hasher's first modality both ways by default.

    Raises:
        RunError: a kept copy without a result.
        ValueError: as of ``robustness.detection.detect``.
    """
    path = file_of(run, direction)
    if run.results_only:
        if not path.is_file():
            raise RunError(f"{run.path} is a kept copy without {path.name}; give the run that it was made of")
        return read_json(path), path
    check_numbers(false_alarms, weights)
    if attacks is None:
        views = attacks_of(run.config.evaluation).items()
        plain = {name: settings for name, (view, settings) in views if view == "white-box"}
    else:
        plain = named_attacks(attacks)
    prepare_process(run.config)
    with owned_together(run.path, "detection"):
        victim, objective = load_victim(run)
        data, whole = read_data(run.config, progress), queries is not None
        context = context_of(run, victim, data, progress, direction, whole)
        if queries is not None:
            context = context.some(queries)
        named: dict[str, Attack] = {}
        for name, settings in plain.items():
            attack: Attack = build("attack", settings, objective=objective)
            if context.direction[0] in attack.threat.balls:
                named[name] = attack
        if not named:
            raise ValueError(_not_changed(context.direction, plain))
        result = detect(context, list(named.items()), false_alarms, weights, progress).plain()
        result |= {"recipe": run.config.name, "model": run.card()["digest"]}
        result["settings"] = {name: attack.settings() for name, attack in named.items()}
        write_json(path, result)
    return result, path


def _not_changed(direction: tuple[str, str], attacks: Collection[str]) -> str:
    """The line on queries that none of these attacks changes."""
    queries, other = ("texts", "images") if direction[0] == "text" else ("images", "texts")
    ways = "2".join(part[0].upper() for part in direction)
    example = "mainstay" if direction[0] == "image" else "'{name: mainstay, modality: text}'"
    if not attacks:
        return f"the recipe of the run names no attack; give one, as --attack {example}"
    verb = "changes" if len(attacks) == 1 else "change"
    return (
        f"{' and '.join(attacks)} {verb} {other}, and the queries of {ways} are {queries}: "
        f"give an attack on {queries}, as --attack {example}"
    )
