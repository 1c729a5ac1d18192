"""The stage behind ``robusthash assess``: a suite on a trained run, kept block by block, written beside the
metrics."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from robusthash.apps.experiment import stages
from robusthash.apps.experiment.run_directory import Run, write_json
from robusthash.apps.experiment.threat_options import threat_on_data
from robusthash.attacks.threat_model import Threat
from robusthash.core.atomic_files import write_aside
from robusthash.core.identity import describe, identity
from robusthash.core.runtime import digest
from robusthash.data.base import RetrievalData
from robusthash.evaluation.attack_block import Attacked
from robusthash.evaluation.attack_spec import AttackSpec
from robusthash.evaluation.context import EvaluationContext
from robusthash.evaluation.runner import run_attacks
from robusthash.metrics.results import EvalResult, load_results, save_results
from robusthash.robustness.specs.transfer_attacks import Surrogate, make_surrogate
from robusthash.robustness.suite import Suite
from robusthash.robustness.tiers import assess_tier, curve_attacks, prepare_tier


@dataclass(frozen=True)
class FolderStore:
    """Attacked blocks as files, ``<spec>-<identity of its settings>/<restart>/<block>.npz``, complete or not
    there."""

    root: Path

    def within(self, name: str) -> FolderStore:
        """A keep of its own inside this one."""
        return FolderStore(self.root / name)

    def folder(self, spec: AttackSpec) -> Path:
        """Where the blocks of a line are."""
        name = re.sub(r"[^\w.-]+", "_", spec.name)
        return self.root / f"{name}-{identity(spec.settings(), 8)}"

    def _path(self, spec: AttackSpec, restart: int, block: int) -> Path:
        return self.folder(spec) / str(restart) / f"{block}.npz"

    def load(self, spec: AttackSpec, restart: int, block: int) -> Attacked | None:
        """The block that was kept, or None.

        Raises:
            RunError: a file that cannot be read; it is named.
        """
        path = self._path(spec, restart, block)
        return stages.read_block(path) if path.is_file() else None

    def save(self, spec: AttackSpec, restart: int, block: int, attacked: Attacked) -> None:
        """Keep a block."""
        path = self._path(spec, restart, block)
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_aside(path) as aside:
            np.savez(aside, allow_pickle=False, **attacked.arrays())


def assess(
    run: Run,
    tier_name: str = "fast",
    threat: str | Threat = "img-linf-8",
    queries: int | None = None,
    progress: stages.Progress = stages.silent,
    *,
    direction: str | None = None,
    curve: bool = False,
    shard: tuple[int, int] | None = None,
    surrogates: Sequence[Run] = (),
    checked: bool = True,
    kept: bool = True,
    steps: int | None = None,
) -> EvalResult | None:
    """Run a suite on a trained run, or go on where it was stopped, and write ``assess.json``.

    Args:
        tier_name: ``smoke``, ``fast``, ``standard``, ``full``, or ``paper``: the attacks as published, kept
            apart.
        queries: instead of the tier's; chosen by content.
        direction: ``I2T`` and the like; the hasher's first modality both ways by default.
        curve: the worst case at seven budgets too, by the lines ``guided`` and ``soft-ap``.
        shard: (i, n): only these blocks of queries, for several processes; a call without it joins them.
        surrogates: runs on the same data that transfer lines search on; without them F5 says so.
        checked: raise the flags; the tiers smoke and paper never do.
        steps: of the tier paper, the most that an attack takes; the papers' own counts by default.
        kept: go on from kept blocks, and write ``assess.json``; without it everything is attacked afresh.

    Returns:
        The result, named by threat and tier; None of a shard.
    """
    if run.config.runtime.threads:
        torch.set_num_threads(run.config.runtime.threads)
    victim, objective = stages.load_victim(run)
    data = stages.read_data(run.config, progress)
    context = stages.context_of(run, victim, data, progress, direction, whole=True)
    prepared = prepare_tier(
        context,
        tier_name,
        threat_on_data(threat, data, "W2") if isinstance(threat, str) else threat,
        objective=objective,
        surrogates=_surrogates(run, surrogates, data, context),
        queries=queries,
        steps=steps,
    )
    if curve:
        curve_attacks(prepared)  # refused before anything is attacked
    store = FolderStore(_folder(run, prepared.suite, prepared.context)) if kept else None
    if shard is not None:
        if store is None:
            raise ValueError("a shard without what is kept would lose its work")
        run_attacks(prepared.context, prepared.suite.specs, store, progress, shard)
        return None
    result = assess_tier(prepared, curve=curve, checked=checked, store=store, progress=progress)
    prefix = "" if direction is None else f"{direction} "
    result = stages.described(result, f"{prefix}{result.name}", run)
    if kept:
        _write(run.path / "assess.json", result)
    return result


def _surrogates(
    run: Run, others: Sequence[Run], data: RetrievalData, context: EvaluationContext
) -> list[Surrogate]:
    """Runs as stand-ins for the victim, called by their recipes; with their id where two share one.

    Raises:
        ValueError: the victim itself, or weights that are given twice.
    """
    weights = [other.card()["digest"] for other in others]
    for other, digested in zip(others, weights, strict=True):
        if digested == run.card()["digest"]:
            raise ValueError(
                f"the surrogate {other.path} has the weights of the victim; give models of other training"
            )
        if weights.count(digested) > 1:
            raise ValueError(f"the surrogate {other.path} is given twice; give each model once")
    recipes = [other.path.parent.name for other in others]
    names = [r if recipes.count(r) == 1 else f"{r}-{o.id}" for r, o in zip(recipes, others, strict=True)]
    return [
        make_surrogate(name, stages.load_victim(other)[0], data, context.direction, context.batch_size)
        for name, other in zip(names, others, strict=True)
    ]


def _folder(run: Run, suite: Suite, context: EvaluationContext) -> Path:
    """Where the blocks of a suite on these queries are kept; lines keep apart what their own settings
    change."""
    asked = [
        context.queries.fingerprint(),
        context.data.database.fingerprint(),
        context.protocol.settings()["targets"],
    ]
    place = digest([run.card()["digest"], *asked, context.direction, context.batch_size, context.seed])
    folder = run.path / "assess" / f"{suite.name.replace(' ', '-')}-{place}"
    folder.mkdir(parents=True, exist_ok=True)
    specs = {spec.name: {"restarts": spec.restarts, "settings": spec.settings()} for spec in suite.specs}
    (folder / "lines").mkdir(exist_ok=True)
    write_json(folder / "lines" / f"{suite.digest()}.json", describe(specs))
    return folder


def _write(path: Path, result: EvalResult) -> None:
    """Put a result among those of other suites and threats, in place of an older one of its name."""
    others = [other for other in load_results(path) if other.name != result.name] if path.is_file() else []
    save_results(path, [*others, result])
