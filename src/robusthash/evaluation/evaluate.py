"""Scores of a victim: clean, under an attack, and in the worst case per query over several attacks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import astuple, replace
from typing import Any
from typing import Protocol as Shape

import torch
from torch import Tensor

from robusthash.attacks.base import Attack, as_attack
from robusthash.attacks.threat_model import Threat
from robusthash.core.embeddings import Searched
from robusthash.core.identity import marked_identity
from robusthash.core.runtime import Progress, silent
from robusthash.data.base import RetrievalData
from robusthash.evaluation.attack_block import AttackedBlock
from robusthash.evaluation.attack_spec import GradientAttack
from robusthash.evaluation.code_measures import (
    ap_alone,
    ap_names,
    ap_under_noise,
    choosing_ap,
    measure_codes,
    noise_notes,
    unmoved_note,
    with_ap,
)
from robusthash.evaluation.context import EvaluationContext, make_context
from robusthash.evaluation.runner import BlockRunner, BlockStore, NoStore
from robusthash.metrics import robustness_measures as robustness
from robusthash.metrics.measure_key import MeasureKey, Storage
from robusthash.metrics.protocol import Measured, Protocol
from robusthash.metrics.results import Cost, DataSet, EvalResult, Setting
from robusthash.metrics.statistics import bootstrap_interval, group_scores, intervals
from robusthash.models.hasher import Hasher


def evaluate(
    victim: Hasher,
    data: RetrievalData,
    protocol: str | Mapping[str, Any] | Protocol = "house",
    *,
    attack: Attack | str | Mapping[str, Any] | None = None,
    victim_for_gradients: Hasher | None = None,
    progress: Progress = silent,
    **options: Any,
) -> EvalResult:
    """Evaluate a victim clean, or under one attack.

    For several attacks on one victim use ``make_context`` once, then ``score_clean``, ``score_attack`` and
    ``worst``.

    Args:
        attack: made by ``robusthash.attacks``, or a name or mapping as recipes have it, such as ``mainstay``;
            None evaluates clean queries. Untargeted results hold MAP and its kin under attack; targeted
            ones the same names with ``t-`` for the target labels and the plain names for the original labels.
        victim_for_gradients: the model that the attack differentiates, the victim itself by default.
        options: direction, database, queries, seed and batch_size of ``make_context``.
    """
    attack = None if attack is None else as_attack(attack)
    context = make_context(victim, data, protocol, progress=progress, **options)
    if attack is None:
        return score_clean(context)
    return score_attack(context, attack, attack_all(context, attack, victim_for_gradients, progress))


def attack_all(
    context: EvaluationContext,
    attack: Attack,
    gradients: Hasher | None = None,
    progress: Progress = silent,
    store: BlockStore = NoStore(),
    name: str = "",
) -> AttackedBlock:
    """Fit the attack's learning parts, then attack every block of queries.

    Args:
        gradients: the model that the attack differentiates, the victim itself by default.
        store: blocks in it are taken from there, others are put into it.
        name: title of the progress, the attack's name by default.

    Raises:
        MemoryError: one query at a time does not fit.
    """
    spec = GradientAttack(name or attack.name, attack)
    if gradients is not None:
        spec = replace(spec, view=lambda _: gradients, view_name="given")
    return BlockRunner(context, store).queries(spec, progress=progress)


# -------------------------------------------------------------------------------------- clean and attacked


def score_clean(context: EvaluationContext) -> EvalResult:
    """The result of the clean queries."""
    measured = measure_codes(context, context.query, context.query_labels)
    choose, ap = ap_under_noise(context, context.clean_noise) if context.randomised else ({}, {})
    measured = with_ap(measured, ap)
    result = _result(context, measured, measured.values, measured.per_query)
    notes = (*context.notes, *measured.notes, *noise_notes(context))
    return replace(result, attack="clean", notes=notes, selection=choose)


class Described(Shape):
    """The fields of an attack that scoring reads: its name and its budget."""

    @property
    def name(self) -> str: ...

    @property
    def threat(self) -> Threat: ...

    @property
    def budget(self) -> str: ...

    @property
    def targeted(self) -> bool: ...


def score_attack(context: EvaluationContext, attack: Described, attacked: AttackedBlock) -> EvalResult:
    """Score attacked queries against the frozen database."""
    if attack.targeted:
        result = score_targeted(context, attacked)
    else:
        result = score_untargeted(context, attacked, attack.name)
    perceptibility = {}
    for name, values in attacked.pixels.items():
        perceptibility[f"{name}/mean"] = float(values.mean())
        perceptibility[f"{name}/max"] = float(values.max())
    forward, backward, oracle = attacked.passes.sum(0).tolist()
    return replace(
        result,
        setting=setting_of(context, attack),
        attack=attack.name,
        perceptibility=perceptibility,
        cost=Cost(forward, backward, oracle, float(attacked.seconds.sum())),
        notes=(
            *result.notes,
            *attacked.fit_note,
            *((context.scale.note,) if isinstance(attack, Attack) and context.scale.note else ()),
            *((attack.falls_short,) if isinstance(attack, Attack) and attack.falls_short else ()),
            *unmoved_note(context, attack.threat, attacked),
        ),
    )


def score_untargeted(context: EvaluationContext, attacked: AttackedBlock, name: str = "") -> EvalResult:
    """MAP and its kin under attack, the same after rounding to 8-bit or whole words, flips, drop and ASR.

    Args:
        name: of the attack, by which the noise of a randomised victim is drawn.
    """
    headline, labels, lean = context.protocol.headline, context.query_labels, ap_alone(context)
    clean, codes = measure_codes(lean, context.query, labels), context.query.of(attacked.signs[:, 0])
    measured = measure_codes(context, codes, labels)
    stored = {
        MeasureKey(headline).name(storage=storage): measure_codes(lean, context.query.of(signs[:, 0]), labels)
        for storage, signs in attacked.stored.items()
    }
    choose: dict[str, Tensor] = {}
    if context.randomised:
        clean = with_ap(clean, ap_under_noise(context, context.clean_noise)[1])
        choose, ap = ap_under_noise(context, context.noise_of_all(name, attacked.inputs))
        measured = with_ap(measured, ap)
    before, after = clean.per_query[headline], measured.per_query[headline]
    drop, _ = robustness.ap_drop(before, after)
    change, moved = robustness.moved(context.query, codes)
    values = {
        **measured.values,
        **{name: rounded.values[headline] for name, rounded in stored.items()},
        change: float(moved.mean()),
        "drop": float(drop.nanmean()),
        "ASR": robustness.success_rate(before, after).rate,
    }
    per_query = {
        **measured.per_query,
        **{name: rounded.per_query[headline] for name, rounded in stored.items()},
        change: moved,
        "drop": drop,
    }
    known = {name: value for name, value in values.items() if value is not None}
    return replace(
        _result(context, measured, known, per_query),
        reference={**measured.reference, "clean": clean.values[headline]},
        notes=(*measured.notes, *noise_notes(context)),
        representative=_representative(context, attacked.representative[:, 0], labels),
        selection=choose,
    )


def score_targeted(context: EvaluationContext, attacked: AttackedBlock) -> EvalResult:
    """t-MAP over the targets of each query (mean; the best is ``/max``) and the MAP of the original labels.

    Curves are means over all pairs of a query and a target: ``t-PR`` and its kin of the target labels, ``PR``
    of the original ones. A query without a possible target is NaN throughout and counted in ``empty``.
    """
    headline, targets, lean = context.protocol.headline, context.targets, ap_alone(context)
    key = MeasureKey(headline)
    possible = targets.sum((1, 2)) > 0
    if not possible.any():
        remedy = "leave targeted attacks out of evaluation.attacks, or take data of more classes"
        raise ValueError(f"no query has a possible target: every item shares a label with each; {remedy}")
    rows, missing, each = torch.nonzero(possible).flatten(), int((~possible).sum()), targets.shape[1]
    # from here on, a row for each pair of a query and a target
    target_labels = targets[rows].flatten(0, 1)
    query_labels = context.query_labels[rows].repeat_interleave(each, 0)
    codes = context.query.of(attacked.signs[rows].flatten(0, 1))
    unchanged = context.query.take(rows.repeat_interleave(each))
    to_target, to_query = (
        measure_codes(context, codes, target_labels),
        measure_codes(context, codes, query_labels),
    )

    def target_ap(codes: Searched) -> Tensor:
        return measure_codes(lean, codes, target_labels).per_query[headline]

    columns = {
        **{_targeted(name): column for name, column in to_target.per_query.items()},
        **to_query.per_query,
        **{
            key.name("targeted", storage=storage): target_ap(context.query.of(signs[rows].flatten(0, 1)))
            for storage, signs in attacked.stored.items()
        },
        "base": target_ap(unchanged),
    }
    pairs = {name: column.unflatten(0, (len(rows), each)) for name, column in columns.items()}
    means = {name: column.mean(1) for name, column in pairs.items()}
    means[key.name("targeted", option="max")] = pairs[key.name("targeted")].amax(1)
    base = means.pop("base")
    means["gain"] = means[key.name("targeted")] - base
    per_query = {}
    for name, column in means.items():
        per_query[name] = torch.full((len(possible),), float("nan"), dtype=torch.float64)
        per_query[name][rows] = column
    values = {name: float(column.nanmean()) for name, column in means.items() if not column.isnan().all()}
    values[_targeted("ASR")] = robustness.targeted_success_rate(base, means[key.name("targeted")])
    steered = _representative(context, attacked.representative[rows].flatten(0, 1), target_labels)
    return replace(
        _result(context, to_target, values, per_query),
        reference={"chance": to_target.reference["chance"], "clean": float(base.mean())},
        empty=missing,
        curves={**{_targeted(name): curve for name, curve in to_target.curves.items()}, **to_query.curves},
        notes=(f"{missing} queries have no possible target and are left out",) if missing else (),
        representative={_targeted(name): value for name, value in steered.items()},
    )


def _targeted(name: str) -> str:
    """The measure of that name, of the target labels."""
    return MeasureKey.parse(name).name("targeted")


def _result(
    context: EvaluationContext, measured: Measured, values: dict[str, float], per_query: dict[str, Tensor]
) -> EvalResult:
    return EvalResult(
        setting=setting_of(context),
        values=values,
        per_query=per_query,
        interval=intervals(per_query),
        reference=measured.reference,
        empty=measured.empty + context.left_out,
        curves=measured.curves,
        groups=group_scores(per_query, context.queries.groups),
    )


def _representative(context: EvaluationContext, signs: Tensor, labels: Tensor) -> dict[str, float]:
    """The protocol's AP values with the representative codes as queries; not a bound."""
    if signs.shape[1] == 0:
        return {}
    measured = measure_codes(context, context.query.of(signs), labels)
    return {name: value for name, value in measured.values.items() if name.startswith("MAP")}


# ---------------------------------------------------------------------------------------------- worst case


def worst(
    context: EvaluationContext,
    clean: EvalResult,
    results: Mapping[str, EvalResult],
    by: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> EvalResult:
    """The worst case of each query over the clean input and every untargeted result, for each AP.

    ``wMAP`` is the mean over queries of the lowest AP, not the lowest of the attacks' means. ``HRS`` sums up
    clean and worst value above chance.

    Args:
        results: by attack name; targeted results are listed but take no part.
        by: of a randomised victim, the per-query AP that choose the worst, for "clean" and by attack; see
            ``robustness_measures.worst_case``. By default those that the results carry.

    Raises:
        ValueError: a randomised victim, and a result that does not carry them.
    """
    headline, key = context.protocol.headline, MeasureKey(context.protocol.headline)
    untargeted = {name: result for name, result in results.items() if not is_targeted(result)}
    if context.randomised and by is None:
        by = choosing_ap({"clean": clean, **untargeted})

    def lowest(name: str, storage: Storage = "") -> robustness.WorstCase:
        stored = MeasureKey.parse(name).name(storage=storage)
        scores = None if by is None else {attack: by[attack][name] for attack in ("clean", *untargeted)}
        under = {attack: result.per_query[stored] for attack, result in untargeted.items()}
        return robustness.worst_case(clean.per_query[name], under, by=scores)

    cases = {name: lowest(name) for name in ap_names(clean.per_query)}
    words = untargeted and all(key.name(storage="rounded") in r.per_query for r in untargeted.values())
    storages: tuple[Storage, ...] = ("8bit", "rounded") if words else ("8bit",)
    for storage in storages:
        cases[key.name(storage=storage)] = lowest(headline, storage)
    names = {name: str(replace(MeasureKey.parse(name), role="worst")) for name in cases}
    values = {names[name]: case.mean for name, case in cases.items()}
    per_query = {names[name]: case.values for name, case in cases.items()}
    lowest_case = cases[headline]
    chance = torch.full_like(lowest_case.values, clean.reference["chance"])
    columns = torch.stack([clean.per_query[headline], lowest_case.values, chance], 1).nan_to_num(0.0)
    values["HRS"] = float(robustness.hrs(*(column.mean().reshape(1) for column in columns.T))[0])
    spans = intervals(per_query)
    spans["HRS"] = bootstrap_interval(columns, lambda means: robustness.hrs(*means.T))
    return EvalResult(
        setting=_setting_of_worst(clean, untargeted),
        values=values,
        per_query=per_query,
        interval=spans,
        reference={**clean.reference, "clean": clean.values[headline]},
        empty=clean.empty,
        winner=lowest_case.winner,
        groups=group_scores(per_query, context.queries.groups),
        attacks={
            name: {
                headline: result.values[headline],
                "unique wins": float(lowest_case.unique_wins.get(name, 0)),
                **{n: value for n, value in result.values.items() if n == key.name("targeted")},
            }
            for name, result in results.items()
        },
        cost=_sum_of_costs(results.values()),
        attack="worst",
        notes=noise_notes(context),
    )


def _sum_of_costs(results: Iterable[EvalResult]) -> Cost:
    columns = zip(*(astuple(result.cost) for result in results), strict=True)
    return Cost(*map(sum, columns))


def is_targeted(result: EvalResult) -> bool:
    """True of the result of a targeted attack, which has t-MAP."""
    return any(MeasureKey.parse(name).role == "targeted" for name in result.values)


def _setting_of_worst(clean: EvalResult, results: Mapping[str, EvalResult]) -> Setting:
    """The setting of all these attacks together."""
    settings = [result.setting for result in results.values()]
    budgets = sorted({setting.digests.get("budget", "") for setting in settings})
    digests = {"budget": marked_identity(budgets)} if budgets and all(budgets) else {}
    return replace(
        clean.setting,
        threat="; ".join(sorted({setting.threat for setting in settings})) or "none",
        attacks=tuple(results),
        budget="; ".join(sorted({setting.budget for setting in settings})),
        digests={**clean.setting.digests, **digests},
    )


# ---------------------------------------------------------------------------------------------- parts


def setting_of(context: EvaluationContext, attack: Described | None = None) -> Setting:
    """The fields that the context and the attack know; the run adds the model's."""
    letters = {"image": "I", "text": "T"}
    data = DataSet(context.data.name, context.data.note, len(context.data.database), len(context.queries))
    digests = {"database": context.data.database.fingerprint(), "queries": context.queries.fingerprint()}
    if isinstance(attack, Attack):
        digests["budget"] = marked_identity(attack.budget_settings())
    return Setting(
        model="",
        database=data.texts[0],
        queries=data.texts[1],
        data=data,
        protocol=context.protocol.settings(),
        direction="2".join(letters[modality] for modality in context.direction),
        bits=context.victim.bits,
        distance=context.victim.distance,
        threat=attack.threat.name if attack else "none",
        attacks=(attack.name,) if attack else (),
        budget=attack.budget if attack else "",
        seeds=(context.seed,),
        digests=digests,
        defense=context.victim.declared,
        chosen=context.chosen,
    )
