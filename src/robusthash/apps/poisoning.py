"""The stage that attacks the database of a trained run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from robusthash.apps import stages
from robusthash.apps.runs import Run
from robusthash.attacks.base import Attack
from robusthash.attacks.threats import named_threat
from robusthash.core.registry import build
from robusthash.evaluation.database_side import insert_items, perturb_database
from robusthash.evaluation.results import EvalResult, save_results


def poison(
    run: Run,
    threat: str,
    *,
    count: int = 10,
    k: int = 10,
    share: float = 0.1,
    steps: int = 100,
    direction: str | None = None,
    out: Path | None = None,
    shown: stages.Shown = stages.silent,
) -> tuple[EvalResult, Path]:
    """Attack the database of a run by ``guided-apgd`` and keep the result beside the run.

    Args:
        threat: ``db-insert`` or ``db-perturb``, or with another bound ``db-insert-img-linf-4``.
        count, k: items inserted and the ranks that count, of ``db-insert``.
        share: of the database items, of ``db-perturb``.
        direction: ``T2I``, ``I2I``; the hasher's first modality both ways by default.
        out: where the result is written; ``poison-THREAT.json`` in the run by default.

    Raises:
        ValueError: a threat of queries, or numbers outside their range; see ``evaluation.database_side``.
    """
    named = named_threat(threat)
    if named.side != "database":
        raise ValueError(f"{threat!r} changes queries; the threats of the database are db-insert and db-perturb")
    if run.config.runtime.threads:
        torch.set_num_threads(run.config.runtime.threads)
    victim, objective = stages.load_victim(run)
    attack: Attack = build("attack", {"name": "guided-apgd", "steps": steps}, objective=objective)
    attack = replace(attack, threat=named)
    bench = stages.bench_of(run, victim, stages.read_data(run.config, shown), shown, direction)
    if named.name.startswith("db-insert"):
        result = insert_items(bench, attack, count, k, progress=shown)
    else:
        result = perturb_database(bench, attack, share, progress=shown)
    result = stages.described(result, f"poison {named.name}", run)
    path = run.path / f"poison-{named.name}.json" if out is None else out
    save_results(path, [result])
    return result, path
