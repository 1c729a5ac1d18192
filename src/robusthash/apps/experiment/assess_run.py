"""A tier of attacks on a trained run, stored block by block, and its checks: the verbs assess and check."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from robusthash.apps.experiment.block_store import FolderStore
from robusthash.apps.experiment.config import Component
from robusthash.apps.experiment.evaluation_stages import (
    context_of,
    described,
    named_attacks,
    scored_by,
    use_generator,
)
from robusthash.apps.experiment.model_stages import load_hasher, load_victim, prepare_process, read_data
from robusthash.apps.experiment.run_directory import CHECKED, Run, write_json
from robusthash.apps.experiment.threat_options import attack_under, threat_name, threat_on_data
from robusthash.attacks.base import Attack
from robusthash.attacks.threat_model import Threat
from robusthash.core.directory_lock import owned
from robusthash.core.identity import describe
from robusthash.core.plugins import source_digests
from robusthash.core.processes import owned_together, rank, started_together
from robusthash.core.registry import build
from robusthash.core.runtime import Progress, digest, silent
from robusthash.data.base import RetrievalData
from robusthash.evaluation.attack_spec import OwnAttack
from robusthash.evaluation.context import EvaluationContext
from robusthash.evaluation.runner import BlockStore, NoStore, run_attacks
from robusthash.metrics.results import EvalResult, Flag, save_results
from robusthash.objectives.base import HashObjective
from robusthash.robustness.checks.base import CHECKS
from robusthash.robustness.checks.behaviour_checks import require_usable
from robusthash.robustness.checks.model_checks import model_checks
from robusthash.robustness.specs.transfer_attacks import Surrogate, make_surrogate
from robusthash.robustness.suite import Suite
from robusthash.robustness.tiers import PreparedTier, assess_tier, curve_attacks, prepare_tier


def assess(
    run: Run,
    tier_name: str = "fast",
    threat: str | Threat = "img-linf-8",
    queries: int | None = None,
    progress: Progress = silent,
    *,
    direction: str | None = None,
    curve: bool = False,
    shard: tuple[int, int] | None = None,
    checked: bool = True,
    stored: bool = True,
    **options: Any,
) -> EvalResult | None:
    """Run a tier on a trained run, or go on where it was stopped, and write ``assess.json``.

    Args:
        tier_name, threat, queries: as of ``tiers.prepare_tier``.
        direction: ``I2T`` and the like; the hasher's first modality both ways by default.
        curve: the worst case at seven budgets too, by the attacks ``guided`` and ``soft-ap``.
        shard: (i, n): only these blocks of queries, for several processes; a call without it joins them. The
            processes of ``torchrun`` divide the work by themselves.
        checked: raise the flags; the tiers smoke and paper never do.
        stored: own the run, go on from stored blocks, and write ``assess.json``; without it everything is
            attacked again.
        options: ``surrogates``, runs on the same data that transfer attacks search on (without them F5 says
            so); ``steps`` of the tier paper; ``attacks``, settings of one's own attacks besides those of the
            tier, without a budget: they get that of ``threat``, and the result is named after them too;
            ``relevance``, the label system that attackers and scores go by, by default the data's ``own``.

    Returns:
        The result, named by threat and tier; None of a shard.

    Raises:
        InUse: another process works on the run, or on the same shard.
        RunError: an earlier ``assess.json`` that cannot be read.
    """
    if shard is not None and started_together():
        raise ValueError("torchrun divides the work among its processes by itself; leave --shard out")
    attacks = [attack_under(attack) for attack in options.get("attacks", ())]  # or refused
    with ExitStack() as owning:
        if stored and shard is None:
            owning.enter_context(owned_together(run.path, "assessment"))
        others = run.assessed() if stored else {}  # refused now where the file is damaged
        prepare_process(run.config)
        victim, objective = load_victim(run)
        relevance = options.pop("relevance", "own")
        data = read_data(run.config, progress)
        data = data if relevance == "own" else data.by(relevance)
        context = context_of(run, victim, data, progress, direction, whole=True)
        aim = threat_on_data(threat, data, "W2") if isinstance(threat, str) else threat
        options["surrogates"] = _surrogates(run, options.get("surrogates", ()), data, context)
        options["attacks"] = own = _own_attacks(attacks, aim, objective)
        prepared = prepare_tier(context, tier_name, aim, objective=objective, queries=queries, **options)
        if curve:
            curve_attacks(prepared)  # refused before anything is attacked
        store = _block_store(run, prepared, own, progress) if stored else NoStore()
        if shard is not None:
            if isinstance(store, FolderStore):
                work, lock = "shard {} of {}".format(*shard), "owner-{}-{}.lock".format(*shard)
                owning.enter_context(owned(store.root, work, lock))
            run_attacks(prepared.context, prepared.suite.specs, store, progress, shard)
            return None
        result = assess_tier(prepared, curve=curve, checked=checked, store=store, progress=progress)
        result = _named(result, run, direction, relevance, own)
        if stored and rank() == 0:
            others.pop(result.name, None)
            save_results(run.path / "assess.json", [*others.values(), result])
    return result


def _block_store(
    run: Run, prepared: PreparedTier, own: Sequence[OwnAttack], progress: Progress
) -> BlockStore:
    """The stored blocks of a suite on its queries; generator files are read even where they answer."""
    for spec in own:
        use_generator(prepared.context, spec.attack, progress)
    return FolderStore(_folder(run, prepared.suite, prepared.context))


def _named(
    result: EvalResult, run: Run, direction: str | None, relevance: str, own: Sequence[OwnAttack]
) -> EvalResult:
    """The result named by direction, relevance, budget, tier and the attacks of the user."""
    scored_on = scored_by(direction, relevance)
    added = f" with {', '.join(spec.name for spec in own)}" if own else ""
    result = described(result, f"{scored_on} {result.name}{added}".strip(), run, relevance)
    return replace(result, scored_on=scored_on)


def _own_attacks(attacks: Sequence[Component], aim: Threat, objective: HashObjective) -> list[OwnAttack]:
    """The attacks of the user under the budget of the assessment."""
    under = [attack_under(attack, aim.name) for attack in attacks]
    specs = []
    for name, settings in named_attacks(under).items():
        attack: Attack = build("attack", settings, objective=objective)
        specs.append(OwnAttack(name, attack, source=tuple(source_digests(settings))))
    return specs


def _surrogates(
    run: Run, others: Sequence[Run], data: RetrievalData, context: EvaluationContext
) -> list[Surrogate]:
    """Runs as stand-ins for the victim, called by their recipes; with their id where two share one."""
    weights = [other.card()["digest"] for other in others]
    for other, digested in zip(others, weights, strict=True):
        if digested == run.card()["digest"]:
            raise ValueError(f"the surrogate {other.path} has the weights of the victim; give other models")
        if weights.count(digested) > 1:
            raise ValueError(f"the surrogate {other.path} is given twice; give each model once")
    recipes = [other.path.parent.name for other in others]
    names = [r if recipes.count(r) == 1 else f"{r}-{o.id}" for r, o in zip(recipes, others, strict=True)]
    return [
        make_surrogate(name, load_hasher(other), data, context.direction, context.batch_size)
        for name, other in zip(names, others, strict=True)
    ]


def _folder(run: Run, suite: Suite, context: EvaluationContext) -> Path:
    """The folder of a suite's blocks on these queries; specs keep apart what their own settings change."""
    splits = context.queries.fingerprint(), context.data.database.fingerprint()
    targets = context.protocol.settings()["targets"]
    key = [run.card()["digest"], *splits, targets, context.direction, context.batch_size, context.seed]
    folder = run.path / "assess" / f"{suite.name.replace(' ', '-')}-{digest(key)}"
    specs = {spec.name: {"restarts": spec.restarts, "settings": spec.settings()} for spec in suite.specs}
    (folder / "lines").mkdir(parents=True, exist_ok=True)
    write_json(folder / "lines" / f"{suite.digest()}.json", describe(specs))
    return folder


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
    write_json(run.path / CHECKED, plain_flags(flags))
    return flags


def plain_flags(flags: tuple[Flag, ...]) -> list[dict[str, Any]]:
    """Flags as plain_flags data, with the titles of the values."""
    return [{**asdict(flag), "title": CHECKS[flag.id].title} for flag in flags]
