"""Stages of evidence and of the registry: runs in, bundles and verdicts out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from robusthash.apps.experiment import assess_run as assessing
from robusthash.apps.experiment import stages
from robusthash.apps.experiment.run_directory import Run
from robusthash.attacks.base import Attack
from robusthash.core.registry import build
from robusthash.data.splits import stable_subset
from robusthash.evaluation.evaluate import attack_all, score_attack, score_clean, setting_of, worst
from robusthash.metrics.results import EvalResult, load_results, save_results
from robusthash.robustness.evidence.bundles import read_bundle
from robusthash.robustness.evidence.registry_entries import (
    BestKnown,
    Claimed,
    Entry,
    Restrictions,
    Source,
    Verified,
    verify,
)
from robusthash.robustness.evidence.verification import (
    best_known,
    disagreements,
    export,
    on_queries,
    verify_bundle,
)
from robusthash.robustness.tiers import OBSERVED
from robusthash.robustness.victim_behaviour import Observed, observed

FILE = "evidence.json"
"""Accepted bundles of a run, as results; the leaderboard reads them beside the run's own."""


def export_evidence(
    run: Run, settings: Mapping[str, Any] | str, out: Path, progress: stages.Progress = stages.silent
) -> EvalResult:
    """Attack the queries of a run, finished blocks taken from it, and write them as an evidence bundle.

    Raises:
        ValueError: a targeted attack: a bundle lowers the MAP of the original labels.
    """
    victim, objective = stages.load_victim(run)
    ((name, plain),) = stages.named_attacks([settings]).items()
    attack: Attack = build("attack", plain, objective=objective)
    if attack.targeted:
        raise ValueError(f"{name} is targeted; bundles hold queries of untargeted attacks")
    (modality, *others) = attack.threat.balls
    home = victim.modalities[0]
    direction = None if others or modality == home else f"{modality[0].upper()}2{home[0].upper()}"
    context = stages.context_of(run, victim, stages.read_data(run.config, progress), progress, direction)
    attacked = stages.attacked_queries(run, context, name, plain, attack, progress)
    made = f"{run.config.name}/{run.id}"
    result = export(
        context, attack.threat, attacked.inputs, out, attack=name, budget=attack.budget, model=made
    )
    return stages.described(result, name, run)


def verify_evidence(
    run: Run, folder: Path, keep: bool = True, progress: stages.Progress = stages.silent
) -> EvalResult:
    """Check and score a bundle against the queries and the weights of a run.

    Args:
        keep: write the result among the accepted bundles of the run, in place of an earlier one of the same
            bundle; and beside it that on each choice of queries which a suite of this run was asked, so that
            it lowers those too.
    """
    victim, _ = stages.load_victim(run)
    ends = read_bundle(folder).manifest.direction
    home = victim.modalities[0]
    direction = None if ends == (home, home) else "2".join(end[0].upper() for end in ends)
    context = stages.context_of(run, victim, stages.read_data(run.config, progress), progress, direction)
    found = verify_bundle(folder, context)
    letters = setting_of(context).direction
    counts = {
        len(own.per_query["clean"]) for own in run.assessed().values() if own.setting.direction == letters
    }
    chosen = [
        stable_subset(context.queries, count) for count in sorted(counts) if count < len(context.queries)
    ]
    made = [found, *(on_queries(found, context, positions) for positions in chosen)]
    described = {result.name: stages.described(result, result.name, run) for result in made}
    if keep:
        save_results(run.path / FILE, list({**accepted(run), **described}.values()))
    return described[found.name]


def accepted(run: Run) -> dict[str, EvalResult]:
    """The accepted bundles of a run, by name; none where none was sent in."""
    path = run.path / FILE
    return {result.name: result for result in load_results(path)} if path.is_file() else {}


def lowered(own: EvalResult, bundles: Mapping[str, EvalResult]) -> EvalResult:
    """``best_known`` over those bundles that are about the setting of ``own``; the others say nothing of
    it."""
    fitting = {name: result for name, result in bundles.items() if not disagreements(own, result)}
    return best_known(own, fitting)


# ---------------------------------------------------------------------------------------------- registry


def evaluate_afresh(run: Run, progress: stages.Progress = stages.silent) -> dict[str, EvalResult]:
    """Clean, the attacks of the run's config, and the worst case, with nothing taken from an earlier
    evaluation."""
    victim, objective = stages.load_victim(run)
    context = stages.context_of(run, victim, stages.read_data(run.config, progress), progress)
    results = {"clean": score_clean(context)}
    for name, (view, settings) in stages.chosen_attacks(run, None).items():
        attack: Attack = build("attack", settings, objective=objective)
        if context.direction[0] in attack.threat.balls:
            attacked = attack_all(context, attack, context.victim.seen_by(view), progress)
            results[name] = score_attack(context, attack, attacked)
    results["worst"] = worst(context, results["clean"], {n: r for n, r in results.items() if n != "clean"})
    return {name: stages.described(result, name, run) for name, result in results.items()}


def assess_afresh(run: Run, tier: str, threat: str, queries: int) -> dict[str, EvalResult]:
    """A tier of the suite without anything that was kept, as the results ``clean`` and ``worst``."""
    result = assessing.assess(run, tier, threat, queries, kept=False)
    assert result is not None  # no shard was asked for
    headline = result.setting.headline
    return {"clean": replace(result, values={headline: result["clean"]}), "worst": result}


def verify_entry(entry: Entry, run: Run, progress: stages.Progress = stages.silent) -> Verified:
    """Run the evaluation of a registry entry again on a trained run, from scratch, and compare.

    Raises:
        ValueError: the run is not one of the entry's recipe and seed.
    """
    recipe, seed = Path(entry.source.recipe).stem, entry.source.seed
    if run.config.name != recipe or run.config.runtime.seed != seed:
        raise ValueError(
            f"{run.path} is {run.config.name!r} with seed {run.config.runtime.seed}, and the entry {entry.id} is of "
            f"{recipe!r} with seed {seed}; train that one: robusthash train {entry.source.recipe}"
        )
    claimed = entry.claimed
    if claimed.tier == "recipe":
        return verify(entry, lambda _: evaluate_afresh(run, progress))
    return verify(entry, lambda _: assess_afresh(run, claimed.tier, claimed.threat, claimed.queries))


def entry_of(run: Run, recipe: str, overrides: Sequence[str] = (), suite: str | None = None) -> Entry:
    """A registry entry of an evaluated run: its card, and its own numbers as the claim.

    Args:
        recipe: file below recipes/.
        suite: name of a result of ``assess`` to claim, such as ``img-linf-8 standard``; by default the worst
            case over the attacks of the recipe.

    Raises:
        ValueError: a run that has no such result, or one that ``verify`` could not make again.
    """
    results = run.evaluated() if suite is None else run.assessed()
    if missing := [
        name for name in (("clean", "worst") if suite is None else (suite,)) if name not in results
    ]:
        raise ValueError(
            f"{run.path} has no result {missing[0]!r} for the entry to claim; it has {', '.join(results) or 'none'}"
        )
    own = results[suite or "worst"]
    tier = "recipe" if suite is None else own.setting.budget.removeprefix("suite ").partition(",")[0]
    if suite is not None and suite != f"{own.setting.threat} {tier}":
        raise ValueError(
            f"{suite!r} is of one direction alone, and entries are from the first modality to itself"
        )
    config, card, training = run.config, run.card(), run.config.training
    seen = _seen(run)
    lowest, measure = lowered(own, accepted(run)), own.setting.headline
    value, claimed = lowest[f"w{measure}"], own[f"w{measure}"]
    threat = ""
    if training.attack is not None:
        attack: Attack = build("attack", training.attack, objective=build("objective", training.objective))
        threat = attack.threat.name
    return Entry(
        id=f"{config.name}-seed{config.runtime.seed}",
        title=f"{card['bits']} bits, {_name(training.objective)}, {_name(training.outer or 'no defense')}",
        source=Source(recipe=recipe, set=tuple(overrides), seed=config.runtime.seed, digest=card["digest"]),
        data=own.setting.database.partition(":")[0],
        input_size=tuple(card["image_size"]),
        bits=card["bits"],
        training_threat=threat,
        training_attack="" if training.attack is None else json.dumps(training.attack, sort_keys=True),
        defense=card["declared"],
        restrictions=Restrictions(
            gradients=seen.gradient_reaches_input,
            deterministic=not seen.randomised,
            no_inner_optimisation=not seen.inner_gradients,
            static_database=True,  # no victim of this package encodes its database anew for a query
        ),
        claimed=Claimed(
            tier=tier,
            threat=own.setting.threat,
            queries=len(own.per_query[f"w{measure}"]),
            measure=measure,
            clean=round(own.reference["clean"], 4),
            worst=round(claimed, 4),
        ),
        best_known=BestKnown(value=round(value, 4), source="own" if value == claimed else lowest.notes[-1]),
        unreliable=", ".join(
            sorted({flag.id for flag in (*lowest.flags, *run.checked()) if flag.level == "red"})
        ),
    )


def _seen(run: Run) -> Observed:
    """How the run's victim behaves on a few queries."""
    victim, _ = stages.load_victim(run)
    data = stages.read_data(run.config, stages.silent)
    few = data.query.batch(torch.arange(min(OBSERVED, len(data.query)))).only(victim.modalities)
    return observed(victim, few.to(victim.device).inputs)


def _name(component: Mapping[str, Any] | str) -> str:
    return component if isinstance(component, str) else str(component["name"])
