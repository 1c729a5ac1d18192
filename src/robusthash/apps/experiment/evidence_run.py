"""Stages of evidence and of the registry: export and verify bundles of a run, and registry entries."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from robusthash.apps.experiment import assess_run as assessing
from robusthash.apps.experiment import evaluation_stages, model_stages
from robusthash.apps.experiment.config import load_config, settings_of
from robusthash.apps.experiment.run_directory import Run
from robusthash.apps.experiment.run_selection import name_of_recipe, training_command
from robusthash.attacks.base import Attack
from robusthash.core.atomic_files import refuse_full
from robusthash.core.directory_lock import owned
from robusthash.core.registry import build
from robusthash.core.runtime import Progress, silent
from robusthash.data.splits import stable_subset
from robusthash.evaluation.evaluate import attack_all, score_attack, score_clean, setting_of, worst
from robusthash.metrics.results import EvalResult, save_results
from robusthash.robustness.evidence import records
from robusthash.robustness.evidence.bundles import (
    best_known,
    disagreements,
    export,
    on_queries,
    read_bundle,
    verify_bundle,
)  # fmt: skip
from robusthash.robustness.evidence.records import RegistryEntry, Restrictions, Verified
from robusthash.robustness.tiers import OBSERVED
from robusthash.robustness.victim_behaviour import observed

FILE = "evidence.json"
"""Accepted bundles of a run, as results; leaderboards read them next to the run's own."""


def export_evidence(
    run: Run, settings: Mapping[str, Any] | str, out: Path, progress: Progress = silent
) -> EvalResult:
    """Attack the queries of a run, finished blocks taken from it, and write them as an evidence bundle.

    Raises:
        FileExistsError: ``out`` holds something; found before anything is attacked.
        InUse: another process works on the run.
        ValueError: a targeted attack: a bundle lowers the MAP of the original labels.
    """
    refuse_full(out)
    victim, objective = model_stages.load_victim(run)
    ((name, plain),) = evaluation_stages.named_attacks([settings]).items()
    attack: Attack = build("attack", plain, objective=objective)
    if attack.targeted:
        raise ValueError(f"{name} is targeted; bundles hold queries of untargeted attacks")
    (modality, *others) = attack.threat.balls
    home = victim.modalities[0]
    direction = None if others or modality == home else _letters((modality, home))
    context = evaluation_stages.context_of(
        run, victim, model_stages.read_data(run.config, progress), progress, direction
    )
    with owned(run.path, "attack"):
        inputs = evaluation_stages.attacked_queries(run, context, name, plain, attack, progress).inputs
    model = f"{run.config.name}/{run.id}"
    result = export(context, attack.threat, inputs, out, attack=name, budget=attack.budget, model=model)
    return evaluation_stages.described(result, name, run)


def verify_evidence(run: Run, folder: Path, keep: bool = True, progress: Progress = silent) -> EvalResult:
    """Check and score a bundle against the queries and the weights of a run.

    Args:
        keep: write the result among the accepted bundles of the run, in place of an earlier one of the same
            bundle, and with it those on each choice of queries of a suite of this run, to lower these too.
    """
    with owned(run.path, "verification of evidence") if keep else nullcontext():
        return _verify_evidence(run, folder, keep, progress)


def _verify_evidence(run: Run, folder: Path, keep: bool, progress: Progress) -> EvalResult:
    victim, before = model_stages.load_hasher(run), accepted(run)
    ends, home = read_bundle(folder).manifest.direction, victim.modalities[0]
    direction = None if ends == (home, home) else _letters(ends)
    context = evaluation_stages.context_of(
        run, victim, model_stages.read_data(run.config, progress), progress, direction
    )
    whole = verify_bundle(folder, context)
    suites = [r for r in run.assessed().values() if r.setting.direction == setting_of(context).direction]
    counts = sorted({len(suite.per_query["clean"]) for suite in suites})
    subsets = [stable_subset(context.queries, count) for count in counts if count < len(context.queries)]
    results = [whole, *(on_queries(whole, context, positions) for positions in subsets)]
    described = {result.name: evaluation_stages.described(result, result.name, run) for result in results}
    if keep:
        save_results(run.path / FILE, list({**before, **described}.values()))
    return described[whole.name]


def _letters(ends: tuple[str, str]) -> str:
    """``("text", "image")`` -> ``T2I``."""
    return "2".join(end[0].upper() for end in ends)


def accepted(run: Run) -> dict[str, EvalResult]:
    """The accepted bundles of a run, by name; none where none was sent in."""
    return run.stored(FILE)


def lowered(own: EvalResult, bundles: Mapping[str, EvalResult]) -> EvalResult:
    """``best_known`` over those bundles that are about the setting of ``own``."""
    fitting = {name: result for name, result in bundles.items() if not disagreements(own, result)}
    return best_known(own, fitting)


# ---------------------------------------------------------------------------------------------- registry


def verify_entry(entry: RegistryEntry, run: Run, progress: Progress = silent) -> Verified:
    """Run the evaluation of a registry entry again on a trained run, with nothing stored taken, and compare.

    Raises:
        ValueError: the run is not one of the entry's recipe and seed.
    """
    recipe, seed = name_of_recipe(entry.source), entry.source.seed
    if run.config.name != recipe or run.config.runtime.seed != seed:
        raise ValueError(
            f"{run.path} is {run.config.name!r} with seed {run.config.runtime.seed}, and the entry "
            f"{entry.id} is "
            f"of {recipe!r} with seed {seed}; train that one: {training_command(entry.source)}"
        )
    claimed = entry.claimed
    if claimed.tier == "recipe":
        return records.verify(entry, _evaluated_again(run, progress))
    result = assessing.assess(run, claimed.tier, claimed.threat, claimed.queries, progress, stored=False)
    assert result is not None  # no shard was requested
    clean = replace(result, values={result.setting.headline: result["clean"]})
    return records.verify(entry, {"clean": clean, "worst": result})


def _evaluated_again(run: Run, progress: Progress) -> dict[str, EvalResult]:
    """Clean and the worst case over the attacks of the run's config, with no block taken from the run."""
    victim, objective = model_stages.load_victim(run)
    context = evaluation_stages.context_of(
        run, victim, model_stages.read_data(run.config, progress), progress
    )
    clean, results = score_clean(context), dict[str, EvalResult]()
    for name, (view, settings) in evaluation_stages.selected_attacks(run, None).items():
        attack: Attack = build("attack", settings, objective=objective)
        if context.direction[0] in attack.threat.balls:
            attacked = attack_all(context, attack, context.victim.as_seen_from(view), progress)
            results[name] = score_attack(context, attack, attacked)
    return {
        "clean": clean,
        "worst": evaluation_stages.described(worst(context, clean, results), "worst", run),
    }


def entry_of(run: Run, recipe: str, overrides: Sequence[str] = (), suite: str | None = None) -> RegistryEntry:
    """A registry entry of an evaluated run: its card, and its own numbers as the claim.

    Args:
        recipe: file below recipes/.
        suite: name of a result of ``assess`` to claim, such as ``img-linf-8 standard``; by default the worst
            case over the attacks of the recipe.

    Raises:
        ValueError: a run that has no such result, one that ``verify`` could not make again; or a recipe of
            another model.
    """
    source = _source(run, recipe, overrides)
    results = run.evaluated() if suite is None else run.assessed()
    if missing := [n for n in (("clean", "worst") if suite is None else (suite,)) if n not in results]:
        listed = ", ".join(results) or "none"
        raise ValueError(f"{run.path} has no result {missing[0]!r} for the entry to claim; it has {listed}")
    own = results[suite or "worst"]
    if own.scored_on:
        raise ValueError(
            f"{suite!r} is of one direction alone, and entries are from the first modality to itself"
        )
    config, card, training, setting = run.config, run.card(), run.config.training, own.setting
    best, low = lowered(own, accepted(run)), setting.key.name("worst")
    red = {flag.id for flag in (*best.flags, *run.checked()) if flag.level == "red"}
    parts = training.objective, training.outer or "no defense"
    attack = training.attack and build(
        "attack", training.attack, objective=build("objective", training.objective)
    )
    return RegistryEntry(
        id=f"{config.name}-seed{config.runtime.seed}",
        title=f"{card['bits']} bits, {', '.join(settings_of(part)['name'] for part in parts)}",
        source=source,
        data=setting.data.name,
        input_size=tuple(card["image_size"]),
        bits=card["bits"],
        training_threat=attack.threat.name if attack else "",
        training_attack=json.dumps(training.attack, sort_keys=True) if attack else "",
        defense=card["declared"],
        restrictions=_restrictions(run),
        claimed=records.Claimed(
            tier=setting.tier or "recipe",
            threat=setting.threat,
            queries=len(own.per_query[low]),
            measure=setting.headline,
            clean=round(own.reference["clean"], 4),
            worst=round(own[low], 4),
        ),
        best_known=records.BestKnown(
            value=round(best[low], 4), source="own" if best[low] == own[low] else best.notes[-1]
        ),
        unreliable=", ".join(sorted(red)),
    )


def _source(run: Run, recipe: str, overrides: Sequence[str]) -> records.ModelSource:
    """The recipe as the source of a run. Raises ValueError for one that makes another model."""
    seed = run.config.runtime.seed
    source = records.ModelSource(recipe=recipe, set=tuple(overrides), seed=seed, digest=run.card()["digest"])
    if not Path(recipe).is_file():
        if Path(recipe).stem != run.config.name:
            raise ValueError(f"the recipe {recipe} is not here, and {run.path} is of {run.config.name!r}")
    elif (
        own := replace(run, config=load_config(recipe, (f"runtime.seed={seed}", *overrides)))
    ).recipe != run.recipe:
        raise ValueError(
            f"the recipe {recipe} makes another model than {run.path}: {own.recipe}, not {run.recipe}; give "
            f"the recipe that it was trained by with the same --set, such as {run.path / 'config.yaml'}"
        )
    return source


def _restrictions(run: Run) -> Restrictions:
    """The behaviour of the run's victim on a few queries."""
    victim = model_stages.load_hasher(run)
    query = model_stages.read_data(run.config).query
    few = query.batch(torch.arange(min(OBSERVED, len(query)))).only(victim.modalities)
    behaviour = observed(victim, few.to(victim.device).inputs)
    return Restrictions(
        gradients=behaviour.gradient_reaches_input,
        deterministic=not behaviour.randomised,
        no_inner_optimisation=not behaviour.inner_gradients,
        static_database=True,  # no victim of this package encodes its database again for a query
    )
