"""The stage that attacks the database of a trained run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from robusthash.apps.experiment.evaluation_stages import context_of, described
from robusthash.apps.experiment.model_stages import load_victim, prepare_process, read_data
from robusthash.apps.experiment.run_directory import Run
from robusthash.attacks.base import Attack
from robusthash.attacks.threat_model import Threat, named_threat
from robusthash.core.registry import build
from robusthash.core.runtime import Progress, silent
from robusthash.metrics.results import EvalResult, save_results
from robusthash.objectives.base import HashObjective
from robusthash.robustness.database_attacks import insert_items, perturb_database


def poison(
    run: Run,
    threat: str,
    *,
    attack: Mapping[str, Any] | str | None = None,
    count: int = 10,
    k: int = 10,
    share: float = 0.1,
    steps: int | None = None,
    direction: str | None = None,
    out: Path | None = None,
    progress: Progress = silent,
) -> tuple[EvalResult, Path]:
    """Attack the database of a run and write the result into the run.

    Args:
        threat: ``db-insert`` or ``db-perturb``, or with another bound ``db-insert-img-linf-4``.
        attack: of ``db-perturb``, any registered one on images, by name or settings; with its own knowledge,
            and where the threat names no bound its own budget. By default ``guided-apgd``, which knows the
            database codes.
        steps: of ``guided-apgd``, 100.
        count, k: items inserted and the ranks that count, of ``db-insert``.
        share: of the database items, of ``db-perturb``.
        direction: ``T2I``, ``I2I``; the hasher's first modality both ways by default.
        out: file of the result; by default ``poison-THREAT.json`` in the run, with the attack and the
            direction in its name where they were given.

    Raises:
        ValueError: a threat of queries, an attack that the threat does not take, or numbers outside their
            range; see ``robustness.database_attacks``.
    """
    named = named_threat(threat)
    if named.side != "database":
        raise ValueError(f"{threat!r} changes queries; those of the database are db-insert and db-perturb")
    prepare_process(run.config)
    victim, objective = load_victim(run)
    selected = _attack(threat, named, attack, steps, objective)
    context = context_of(run, victim, read_data(run.config, progress), progress, direction)
    if named.name.startswith("db-insert"):
        result = insert_items(context, selected, count, k, progress=progress)
    else:
        result = perturb_database(context, selected, share, progress=progress)
    parts = selected.threat.name, "" if attack is None else selected.name, direction
    title = " ".join(part for part in parts if part)
    result = described(result, f"poison {title}", run)
    path = run.path / f"poison-{title.replace(' ', '-')}.json" if out is None else out
    save_results(path, [result])
    return result, path


def _attack(
    threat: str,
    named: Threat,
    settings: Mapping[str, Any] | str | None,
    steps: int | None,
    objective: HashObjective,
) -> Attack:
    """The attack that carries out a threat of the database, with that threat."""
    if settings is None:
        guided: Attack = build("attack", {"name": "guided-apgd", "steps": steps or 100}, objective=objective)
        return replace(guided, threat=named)
    if not threat.startswith("db-perturb"):
        raise ValueError(f"{threat!r} steers items by guided-apgd; an attack can be chosen for db-perturb")
    if steps is not None:
        raise ValueError(
            f"steps are those of guided-apgd; give them with the attack: '{{name: ..., steps: {steps}}}'"
        )
    attack: Attack = build("attack", settings, objective=objective)
    if threat == "db-perturb":
        bound = replace(attack.threat, side="database", name=f"db-perturb-{attack.threat.name}")
        return replace(attack, threat=bound)
    if not isinstance(settings, str) and "eps" in settings:
        raise ValueError(f"{threat!r} names a bound and the attack an eps; give one of them")
    return replace(attack, threat=replace(named, knowledge=attack.threat.knowledge))
