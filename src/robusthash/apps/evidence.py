"""Stages of evidence and of the registry: runs in, bundles and verdicts out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from robusthash.apps import assessing, stages
from robusthash.apps.lineup import LOOKED_AT
from robusthash.apps.runs import Run
from robusthash.attacks.base import Attack
from robusthash.core.registry import build
from robusthash.evaluation.bundles import read_bundle
from robusthash.evaluation.entries import BestKnown, Claimed, Entry, Restrictions, Source, Verified, verify
from robusthash.evaluation.evaluate import attack_all, score_attack, score_clean, worst
from robusthash.evaluation.evidence import best_known, export, verify_bundle
from robusthash.evaluation.observed import Observed, observed
from robusthash.evaluation.results import EvalResult, load_results, save_results

FILE = "evidence.json"
"""Accepted bundles of a run, as results; the leaderboard reads them beside the run's own."""


def export_evidence(
    run: Run, settings: Mapping[str, Any] | str, out: Path, shown: stages.Shown = stages.silent
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
    bench = stages.bench_of(run, victim, stages.read_data(run.config, shown), shown, direction)
    attacked = stages.attacked_queries(run, bench, name, plain, attack, shown)
    made = f"{run.config.name}/{run.id}"
    result = export(bench, attack.threat, attacked.inputs, out, attack=name, budget=attack.budget, model=made)
    return stages.described(result, name, run)


def verify_evidence(run: Run, folder: Path, keep: bool = True, shown: stages.Shown = stages.silent) -> EvalResult:
    """Check and score a bundle against the queries and the weights of a run.

    Args:
        keep: write the result among the accepted bundles of the run, in place of an earlier one of the same bundle.
    """
    victim, _ = stages.load_victim(run)
    ends = read_bundle(folder).manifest.direction
    home = victim.modalities[0]
    direction = None if ends == (home, home) else "2".join(end[0].upper() for end in ends)
    bench = stages.bench_of(run, victim, stages.read_data(run.config, shown), shown, direction)
    found = verify_bundle(folder, bench)
    result = stages.described(found, found.name, run)
    if keep:
        save_results(run.path / FILE, list({**accepted(run), result.name: result}.values()))
    return result


def accepted(run: Run) -> dict[str, EvalResult]:
    """The accepted bundles of a run, by name; none where none was sent in."""
    path = run.path / FILE
    return {result.name: result for result in load_results(path)} if path.is_file() else {}


def lowered(own: EvalResult, bundles: Mapping[str, EvalResult]) -> EvalResult:
    """``best_known`` over those bundles that are about the setting of ``own``; the others say nothing of it."""
    fitting = {
        name: result
        for name, result in bundles.items()
        if not set(own.setting.differs(result.setting)) - {"attacks", "budget", "seeds"}
    }
    return best_known(own, fitting)


# ---------------------------------------------------------------------------------------------- registry


def evaluate_afresh(run: Run, shown: stages.Shown = stages.silent) -> dict[str, EvalResult]:
    """Clean, the attacks of the run's config, and the worst case, with nothing taken from an earlier evaluation."""
    victim, objective = stages.load_victim(run)
    bench = stages.bench_of(run, victim, stages.read_data(run.config, shown), shown)
    results = {"clean": score_clean(bench)}
    for name, (view, settings) in stages.chosen_attacks(run, None).items():
        attack: Attack = build("attack", settings, objective=objective)
        if bench.direction[0] in attack.threat.balls:
            attacked = attack_all(bench, attack, bench.victim.seen_by(view), shown)
            results[name] = score_attack(bench, attack, attacked)
    results["worst"] = worst(bench, results["clean"], {n: r for n, r in results.items() if n != "clean"})
    return {name: stages.described(result, name, run) for name, result in results.items()}


def assess_afresh(run: Run, tier: str, threat: str, queries: int) -> dict[str, EvalResult]:
    """A tier of the suite without anything that was kept, as the results ``clean`` and ``worst``."""
    result = assessing.assess(run, tier, threat, queries, kept=False)
    assert result is not None  # no shard was asked for
    headline = result.setting.headline
    return {"clean": replace(result, values={headline: result["clean"]}), "worst": result}


def verify_entry(entry: Entry, run: Run, shown: stages.Shown = stages.silent) -> Verified:
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
        return verify(entry, lambda _: evaluate_afresh(run, shown))
    return verify(entry, lambda _: assess_afresh(run, claimed.tier, claimed.threat, claimed.queries))


def entry_of(run: Run, results: Mapping[str, EvalResult], recipe: str, overrides: Sequence[str] = ()) -> Entry:
    """A registry entry of an evaluated run: its card, and its own numbers as the claim.

    Args:
        results: by name, with ``clean`` and ``worst``.
        recipe: file below recipes/.

    Raises:
        ValueError: a run that was not evaluated and attacked from its first modality to itself.
    """
    if missing := [name for name in ("clean", "worst") if name not in results]:
        raise ValueError(
            f"{run.path} has no result {missing[0]!r}, which an entry claims (it has {', '.join(results) or 'none'}); "
            "evaluate it from its first modality to itself"
        )
    config, card, training = run.config, run.card(), run.config.training
    seen = _seen(run)
    clean, lowest = results["clean"], lowered(results["worst"], accepted(run))
    measure = clean.setting.headline
    value, own = lowest[f"w{measure}"], results["worst"][f"w{measure}"]
    threat = ""
    if training.attack is not None:
        attack: Attack = build("attack", training.attack, objective=build("objective", training.objective))
        threat = attack.threat.name
    return Entry(
        id=f"{config.name}-seed{config.runtime.seed}",
        title=f"{card['bits']} bits, {_name(training.objective)}, {_name(training.outer or 'no defense')}",
        source=Source(recipe=recipe, set=tuple(overrides), seed=config.runtime.seed, digest=card["digest"]),
        data=clean.setting.database.partition(":")[0],
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
            threat=lowest.setting.threat,
            queries=len(clean.per_query[measure]),
            measure=measure,
            clean=round(clean[measure], 4),
            worst=round(own, 4),
        ),
        best_known=BestKnown(value=round(value, 4), source="own" if value == own else lowest.notes[-1]),
        unreliable=", ".join(flag.id for flag in lowest.flags if flag.level == "red"),
    )


def _seen(run: Run) -> Observed:
    """How the run's victim behaves on a few queries."""
    victim, _ = stages.load_victim(run)
    data = stages.read_data(run.config, stages.silent)
    few = data.query.batch(torch.arange(min(LOOKED_AT, len(data.query)))).only(victim.modalities)
    return observed(victim, few.to(victim.device).inputs)


def _name(component: Mapping[str, Any] | str) -> str:
    return component if isinstance(component, str) else str(component["name"])
