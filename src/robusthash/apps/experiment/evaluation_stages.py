"""The evaluation stages of an experiment: from a trained run to results and attacked queries."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from robusthash.apps.experiment.block_store import AttackFolder
from robusthash.apps.experiment.config import ConfigError, EvaluationSection, settings_of
from robusthash.apps.experiment.model_stages import load_hasher, load_victim, prepare_process, read_data
from robusthash.apps.experiment.run_directory import Run, write_json
from robusthash.attacks.base import Attack
from robusthash.core.atomic_files import write_arrays
from robusthash.core.hamming import pack
from robusthash.core.identity import identity
from robusthash.core.plugins import source_digests, sources
from robusthash.core.processes import owned_together, rank, wait_for_others
from robusthash.core.registry import build, check
from robusthash.core.runtime import Progress, shown_by, silent
from robusthash.data.base import RetrievalData
from robusthash.evaluation.attack_block import AttackedBlock
from robusthash.evaluation.context import EvaluationContext, make_context
from robusthash.evaluation.evaluate import attack_all, is_targeted, score_attack, score_clean, worst
from robusthash.metrics.results import EvalResult, by_direction, save_results
from robusthash.models.hasher import Hasher, View
from robusthash.objectives.base import HashObjective

_MODALITY = {"I": "image", "T": "text"}

NamedAttacks = dict[str, tuple[View, dict[str, Any]]]
"""By the name of the result: the view of the victim that the attack differentiates, and its settings."""


def ends_of(direction: str | None) -> tuple[str, str] | None:
    """Modalities of queries and database in a direction such as ``I2T``; None as it is."""
    return None if direction is None else (_MODALITY[direction[0]], _MODALITY[direction[-1]])


def scored_by(direction: str | None, relevance: str) -> str:
    """Direction and relevance as they stand before the name of a result: ``T2I by class``."""
    return " ".join(filter(None, (direction, "" if relevance == "own" else f"by {relevance}")))


def context_of(
    run: Run,
    victim: Hasher,
    data: RetrievalData,
    progress: Progress,
    direction: str | None = None,
    whole: bool = False,
) -> EvaluationContext:
    """The context of a run's evaluation section, in a direction such as ``I2T``.

    Args:
        whole: with all queries, whatever number of them the section takes.
    """
    section = run.config.evaluation
    ends = ends_of(direction)
    return make_context(
        victim,
        data,
        build("protocol", section.protocol),
        direction=ends,
        database=run.learned_database() if ends is None or ends[1] == "image" else None,
        queries=None if whole else section.queries,
        seed=section.seed,
        batch_size=section.batch_size,
        progress=progress,
    )


def loaded_context(
    run: Run, progress: Progress, direction: str | None = None, queries: int | None = None
) -> EvaluationContext:
    """The context of a run with its hasher and data: all queries, or that number, chosen by content."""
    prepare_process(run.config)
    hasher, data = load_hasher(run), read_data(run.config, progress)
    context = context_of(run, hasher, data, progress, direction, whole=True)
    return context if queries is None else context.some(queries)


def evaluate(
    run: Run, progress: Progress = silent, attacks: Sequence[Mapping[str, Any] | str] | None = None
) -> dict[str, EvalResult]:
    """Evaluate clean, under each attack, and in the worst case per query; goes on from stored blocks.

    Args:
        attacks: added to the results that the run has, where those of the config replace them. One of a name
            that is there replaces it if it is the same attack, and else is called ``pgd #2``, or of another
            threat ``pgd (img-linf-16)``.

    Returns:
        By name: ``clean``, each attack, ``worst`` of the untargeted ones, and where the config has several
        directions or relevances, these before the name (``I2T mainstay``, ``I2T by class worst``). Also
        written to ``metrics.json``.

    Raises:
        InUse: another process works on the run.
        ConfigError: an evaluation section that the model does not fit, or attacks to be added to results of
            other settings.
    """
    from robusthash.apps.reports.run_report import save_branches  # reports load charts

    section = run.config.evaluation
    prepare_process(run.config)
    check_evaluation(run)
    with owned_together(run.path, "evaluation"):
        victim, objective = load_victim(run)
        data, selected = read_data(run.config, progress), selected_attacks(run, attacks)
        if attacks is not None:
            ends = [both[0] for each in section.directions or () if (both := ends_of(each))]
            _check_used(selected, ends or victim.modalities[:1], objective)
        by_relevance = {name: data if name == "own" else data.by(name) for name in section.relevance}
        before = by_direction(run.evaluated()) if attacks is not None and run.was_evaluated else {}
        results: dict[str, EvalResult] = {}
        for relevance, relevant in by_relevance.items():
            for direction in section.directions or (None,):
                context = context_of(run, victim, relevant, progress, direction)
                scored_on = scored_by(direction, relevance)
                held = before.pop(scored_on, {})
                scored = _evaluate_context(run, context, objective, selected, progress, relevance, held)
                for attack, result in scored.items():
                    name = f"{scored_on} {attack}".strip()
                    results[name] = replace(result, name=name, attack=attack, scored_on=scored_on)
        if before:
            raise ConfigError(_not_added(run, f"they hold {', '.join(before)}"))
        if rank() == 0:
            save_results(run.path / "metrics.json", list(results.values()))
            save_branches(run.path, victim, data.query)
    return results


def check_evaluation(run: Run) -> None:
    """Refuse an evaluation section that does not fit the trained model, before anything is computed.

    Raises:
        ConfigError: a direction that it does not encode, or attacks that overlook a purifier it has not.
    """
    section, card = run.config.evaluation, run.card()
    for direction in section.directions or ():
        if missing := [
            modality for modality in ends_of(direction) or () if modality not in card["modalities"]
        ]:
            raise ConfigError(
                f"evaluation.directions holds {direction}, and {run.path} does not encode {missing[0]!r}: "
                f"it has {card['modalities']}"
            )
    for name in ("oblivious", "identity"):
        if getattr(section, name) and not card["hasher"].get("purifiers"):
            raise ConfigError(
                f"evaluation.{name} overlooks a purifier, and {run.path} has none; use evaluation.attacks"
            )


def _check_used(attacks: NamedAttacks, queries: Sequence[str], objective: HashObjective) -> None:
    """Refuse an attack that was asked for and changes no query of the evaluation."""
    for name, (_, settings) in attacks.items():
        changed = build("attack", settings, objective=objective).threat.balls
        if not set(changed) & set(queries):
            does, by = (" and ".join(f"{each}s" for each in dict.fromkeys(of)) for of in (changed, queries))
            raise ConfigError(
                f"{name} changes {does}, and this evaluation searches by {by}; give an attack on {by}, or "
                f"evaluation.directions that search by {does}"
            )


def _evaluate_context(
    run: Run,
    context: EvaluationContext,
    objective: HashObjective,
    attacks: NamedAttacks,
    progress: Progress,
    relevance: str,
    held: Mapping[str, EvalResult],
) -> dict[str, EvalResult]:
    """Clean, each attack that changes the query modality of the context, and the worst case; with pictures.

    Args:
        held: earlier results of this context, to which these are added.
    """
    from robusthash.apps.reports.example_searches import attacked_rows, save_examples

    clean = described(score_clean(context), "clean", run, relevance)
    if held and (other := _differences(held["clean"], clean)):
        raise ConfigError(_not_added(run, f"they differ in {other}"))
    results = {name: result for name, result in held.items() if name not in ("clean", "worst")}
    pictured = {}
    for name, (view, settings) in attacks.items():
        attack: Attack = build("attack", settings, objective=objective)
        if context.direction[0] in attack.threat.balls:
            attacked = attacked_queries(run, context, name, settings, attack, progress, view)
            result = described(score_attack(context, attack, attacked), name, run, relevance)
            free = _free_name(name, result, results)
            results[free], pictured[free] = result, attacked_rows(context, attacked)
    if not results:
        return {"clean": clean}
    if relevance == "own" and rank() == 0:
        save_examples(run.path, context, {"clean": clean, **results}, pictured)
    scored = {"clean": clean, **results}
    if all(map(is_targeted, results.values())):
        return scored  # the worst case is over untargeted attacks, and would be that of clean queries
    return {**scored, "worst": described(worst(context, clean, results), "worst", run, relevance)}


def _differences(before: EvalResult, now: EvalResult) -> str:
    """The settings and digests in which two clean results of a run differ, in words."""
    own = [n for n in ("model", "codes") if before.setting.digests.get(n) != now.setting.digests.get(n)]
    return ", ".join([*before.setting.differs(now.setting), *(f"digests.{name}" for name in own)])


def _free_name(name: str, result: EvalResult, others: Mapping[str, EvalResult]) -> str:
    """The name of an added result: that of the same attack before, or one that is free.

    Of another threat, it says which: ``pgd (img-linf-16)``.
    """
    if name in others and others[name].setting.threat != result.setting.threat:
        name = f"{name} ({result.setting.threat})"
    free, number = name, 2
    while free in others and others[free].setting.differs(result.setting):
        free, number = f"{name.partition(' #')[0]} #{number}", number + 1
    return free


def _not_added(run: Run, reason: str) -> str:
    return (
        f"the results of {run.path} are of another evaluation ({reason}), and nothing is added to them; "
        f"make them again first: robusthash evaluate {run.path}"
    )


def selected_attacks(run: Run, attacks: Sequence[Mapping[str, Any] | str] | None) -> NamedAttacks:
    """The attacks of a run's evaluation section, or those given in their place."""
    if attacks is None:
        return attacks_of(run.config.evaluation)
    return {name: ("white-box", settings) for name, settings in named_attacks(attacks).items()}


def attacks_of(section: EvaluationSection) -> NamedAttacks:
    """The attacks of an evaluation section, those that overlook a purifier among them."""
    views: tuple[View, ...] = ("oblivious", "identity")
    selected: NamedAttacks = {n: ("white-box", each) for n, each in named_attacks(section.attacks).items()}
    for view in views:
        for name, settings in named_attacks(getattr(section, view)).items():
            selected[f"{name} ({view})"] = view, settings
    return selected


def named_attacks(attacks: Sequence[Mapping[str, Any] | str]) -> dict[str, dict[str, Any]]:
    """Attack settings under names that tell them apart.

    Such as ``mainstay``, ``mainstay (slope one)``, ``mainstay on text``, ``mainstay #2``.
    """
    named: dict[str, dict[str, Any]] = {}
    for settings in attacks:
        card, options = check("attack", settings)
        modality, like = options.get("modality", "image"), options.get("like", "mainstay")
        name = card.name if modality == "image" else f"{card.name} on {modality}"
        name += "" if like == "mainstay" else f" like {like if isinstance(like, str) else like.get('name')}"
        name += " (slope one)" if options.get("slope") == "one" else ""
        name += " transferred" if options.get("transfer") else ""
        number = 2
        while name in named:
            name, number = f"{name.partition(' #')[0]} #{number}", number + 1
        named[name] = {"name": settings_of(settings)["name"], **options}
    return named


def attacked_queries(
    run: Run,
    context: EvaluationContext,
    name: str,
    settings: Mapping[str, Any],
    attack: Attack,
    progress: Progress,
    view: View = "white-box",
) -> AttackedBlock:
    """The attacked queries, block by block; finished blocks are read from the run directory."""
    searched = [context.queries.fingerprint(), context.data.database.fingerprint()]
    key = [attack.settings(), *searched, run.config.evaluation.batch_size, context.seed]
    usual = context.direction == (context.victim.modalities[0],) * 2 and view == "white-box"
    key += [] if usual else [context.direction, view]
    key += [context.protocol.settings()["targets"]] if attack.targeted else []
    key += source_digests(settings)
    weights = run.card()["digest"]
    folder = run.path / "attacks" / f"{attack.name}-{identity([*key, weights])}"
    earlier = run.path / "attacks" / f"{attack.name}-{identity(key)}"  # versions that left the weights out
    if rank() == 0:
        if earlier.is_dir() and not folder.exists() and _evaluated_of(run) == weights:
            earlier.rename(folder)
        folder.mkdir(parents=True, exist_ok=True)
        described = {"settings": dict(settings), "threat": attack.threat.name, "budget": attack.budget}
        described |= {"plugins": used} if (used := sources(settings)) else {}
        write_json(folder / "config.json", described)
    wait_for_others()
    use_generator(context, attack, progress)
    return attack_all(
        context, attack, context.victim.as_seen_from(view), progress, AttackFolder(folder), name
    )


def use_generator(context: EvaluationContext, attack: Attack, progress: Progress) -> None:
    """Read or write the generator file of an attack that has one, which stored blocks alone would not do."""
    if attack.guide.file is not None:
        with shown_by(progress):
            context.fitted(attack)


def _evaluated_of(run: Run) -> str:
    """The digest of the weights that the results of a run are of; "" without results."""
    results = run.stored("metrics.json")  # of other weights, maybe
    return next((result.setting.digests.get("model", "") for result in results.values()), "")


def attack_to_file(
    run: Run, settings: Mapping[str, Any] | str, out: Path, progress: Progress = silent
) -> EvalResult:
    """Attack the queries and write the attacked ``inputs`` (float32), ``codes``, ``bits`` and ``labels``.

    A joint attack writes the image under these names, and the text of each pair as ``inputs_text`` and
    ``codes_text``.
    """
    with owned_together(run.path, "attack"):
        victim, objective = load_victim(run)
        ((name, plain),) = named_attacks([settings]).items()
        attack: Attack = build("attack", plain, objective=objective)
        data, home = read_data(run.config, progress), victim.modalities[0]
        arrays: dict[str, Any] = {"bits": victim.bits}
        results: list[EvalResult] = []
        for modality in attack.threat.balls:
            direction = None if modality == home else f"{modality[0].upper()}2{home[0].upper()}"
            context = context_of(run, victim, data, progress, direction)
            attacked = attacked_queries(run, context, name, plain, attack, progress)
            ending = f"_{modality}" if results else ""
            arrays[f"inputs{ending}"] = attacked.inputs.numpy()
            arrays[f"codes{ending}"] = pack(attacked.signs[:, 0]).numpy()
            arrays["labels"] = context.query_labels.to(torch.uint8).numpy()
            results.append(score_attack(context, attack, attacked))
        if rank() == 0:
            write_arrays(out, **arrays)
    return described(results[0], name, run)


def described(result: EvalResult, name: str, run: Run, relevance: str = "own") -> EvalResult:
    """The result under its name, with the fields of its setting that describe the model."""
    training, card = run.config.training, run.card()
    setting = replace(
        result.setting,
        model=f"{card['name']}/{card['id']}",
        objective=settings_of(training.objective)["name"],
        training_attack="" if training.attack is None else json.dumps(training.attack, sort_keys=True),
        digests={**result.setting.digests, "model": card["digest"]},
        relevance=relevance,
    )
    return replace(result, name=name, setting=setting)
