"""Score a victim clean, under an attack, and in the worst case per query over several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Protocol as Shape

import torch
from torch import Tensor

from robusthash.attacks.base import Attack
from robusthash.attacks.threat_model import Threat
from robusthash.core.hamming import pack
from robusthash.core.identity import marked_identity
from robusthash.core.out_of_memory import warn
from robusthash.core.types import Codes
from robusthash.data.base import RetrievalData
from robusthash.evaluation.attack_block import Attacked, attack_block
from robusthash.evaluation.context import EvaluationContext, Progress, in_parts, make_context, silent
from robusthash.metrics.distance_histogram import prepared_profile
from robusthash.metrics.measure_key import MeasureKey, Storage
from robusthash.metrics.protocol import Measured, Protocol, measure
from robusthash.metrics.results import Cost, DataSet, EvalResult, Setting
from robusthash.metrics.robustness_measures import (
    WorstCase,
    ap_drop,
    flips,
    hrs_of,
    success_rate,
    targeted_success_rate,
    worst_case,
)
from robusthash.metrics.statistics import bootstrap_interval, intervals
from robusthash.models.hasher import Hasher


def evaluate(
    victim: Hasher,
    data: RetrievalData,
    protocol: str | Protocol = "house",
    *,
    direction: tuple[str, str] | None = None,
    attack: Attack | None = None,
    victim_for_gradients: Hasher | None = None,
    database: Codes | None = None,
    queries: int | None = None,
    seed: int = 0,
    batch_size: int = 250,
    progress: Progress = silent,
) -> EvalResult:
    """Evaluate a victim clean, or under one attack.

    Args:
        queries: so many of the queries, chosen by content as everywhere; all by default.
        attack: None evaluates clean queries. Untargeted results hold MAP and its kin under attack; targeted
            ones hold the same names with ``t-`` for the target labels and the plain names for the original
            labels.
        victim_for_gradients: what the attack differentiates, the victim itself by default.

    For several attacks on one victim use ``make_context`` once, then ``score_clean``, ``score_attack`` and
    ``worst``.
    """
    context = make_context(
        victim,
        data,
        protocol,
        direction=direction,
        database=database,
        queries=queries,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
    )
    if attack is None:
        return score_clean(context)
    return score_attack(context, attack, attack_all(context, attack, victim_for_gradients, progress))


def attack_all(
    context: EvaluationContext, attack: Attack, gradients: Hasher | None = None, progress: Progress = silent
) -> Attacked:
    """Fit what the attack has to learn, then attack every block of queries.

    Blocks that do not fit into memory are attacked in parts, and a warning says so.

    Raises:
        MemoryError: one query at a time does not fit.
    """
    attack, parts, found = context.fitted(attack), context, list[Attacked]()

    def attacked(context: EvaluationContext, block: int, _: slice) -> Attacked:
        return attack_block(context, attack, block, gradients)

    for block in range(context.blocks):
        done, parts = in_parts(context, parts, block, attacked, warn)
        found += done
        progress(block + 1, context.blocks, attack.name)
    return Attacked.join(found)


def score_clean(context: EvaluationContext) -> EvalResult:
    """The clean queries."""
    measured = measure_codes(context, context.query, context.query_labels)
    return EvalResult(
        setting=setting_of(context),
        values=measured.values,
        per_query=measured.per_query,
        interval=intervals(measured.per_query),
        reference=measured.reference,
        empty=measured.empty,
        curves=measured.curves,
        notes=(*context.notes, *measured.notes),
        attack="clean",
    )


class Described(Shape):
    """What scoring has to know of an attack: what it is called, and what it was allowed."""

    @property
    def name(self) -> str: ...

    @property
    def threat(self) -> Threat: ...

    @property
    def budget(self) -> str: ...

    @property
    def targeted(self) -> bool: ...


def score_attack(context: EvaluationContext, attack: Described, attacked: Attacked) -> EvalResult:
    """Score attacked queries against the frozen database."""
    cost = Cost(
        forward=int(attacked.passes[:, 0].sum()),
        backward=int(attacked.passes[:, 1].sum()),
        oracle=int(attacked.passes[:, 2:].sum()),
        seconds=float(attacked.seconds.sum()),
    )
    result = score_targeted(context, attacked) if attack.targeted else score_untargeted(context, attacked)
    perceptibility = {}
    for name, values in attacked.pixels.items():
        perceptibility[f"{name}/mean"], perceptibility[f"{name}/max"] = (
            float(values.mean()),
            float(values.max()),
        )
    steps = int(attacked.fitted.max())
    notes = (*result.notes, *((f"fitted to the victim in {steps} steps",) if steps else ()))
    setting = setting_of(context, attack)
    return replace(
        result, setting=setting, perceptibility=perceptibility, cost=cost, notes=notes, attack=attack.name
    )


def worst(
    context: EvaluationContext,
    clean: EvalResult,
    results: Mapping[str, EvalResult],
    by: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> EvalResult:
    """The worst case of each query over the clean input and every untargeted result, for each AP of the
    protocol.

    ``wMAP`` is the mean over queries of the lowest AP, not the lowest of the attacks' means. ``HRS`` sums up
    clean and worst value above chance.

    Args:
        results: by attack name; targeted results are listed but take no part.
        by: of a randomised victim, the per-query AP that choose the worst, for "clean" and by attack; see
            ``robust.worst_case``.
    """
    headline, key = context.protocol.headline, MeasureKey(context.protocol.headline)
    target = key.name("targeted")
    untargeted = {name: r for name, r in results.items() if not _is_targeted(r)}
    values: dict[str, float] = {}
    per_query: dict[str, Tensor] = {}

    def lowest(name: str, storage: Storage = "") -> WorstCase:
        stored = MeasureKey.parse(name).name(storage=storage)
        judges = None if by is None else {attack: by[attack][name] for attack in ("clean", *untargeted)}
        under = {attack: result.per_query[stored] for attack, result in untargeted.items()}
        return worst_case(clean.per_query[name], under, by=judges)

    for name in ap_names(clean.per_query):
        found, low = lowest(name), MeasureKey.parse(name).name("worst")
        values[low], per_query[low] = found.mean, found.values
    words = untargeted and all(key.name(storage="rounded") in r.per_query for r in untargeted.values())
    storages: tuple[Storage, ...] = ("8bit", "rounded") if words else ("8bit",)
    for storage in storages:
        found, low = lowest(headline, storage), key.name("worst", storage=storage)
        values[low], per_query[low] = found.mean, found.values

    found = lowest(headline)
    chance = torch.full_like(found.values, clean.reference["chance"])
    columns = torch.stack([clean.per_query[headline], found.values, chance], 1).nan_to_num(0.0)
    values["HRS"] = float(hrs_of(*(column.mean().reshape(1) for column in columns.T))[0])
    spans = intervals(per_query)
    spans["HRS"] = bootstrap_interval(columns, lambda means: hrs_of(means[:, 0], means[:, 1], means[:, 2]))
    budgets = [result.setting.digests.get("budget", "") for result in untargeted.values()]
    digests = {"budget": marked_identity(sorted({*budgets}))} if budgets and all(budgets) else {}
    return EvalResult(
        setting=replace(
            clean.setting,
            threat="; ".join(sorted({r.setting.threat for r in untargeted.values()})) or "none",
            attacks=tuple(untargeted),
            budget="; ".join(sorted({r.setting.budget for r in untargeted.values()})),
            digests={**clean.setting.digests, **digests},
        ),
        values=values,
        per_query=per_query,
        interval=spans,
        reference={**clean.reference, "clean": clean.values[headline]},
        empty=clean.empty,
        winner=found.winner,
        attacks={
            name: {
                headline: r.values[headline],
                "unique wins": float(found.unique_wins.get(name, 0)),
                **({target: r.values[target]} if target in r.values else {}),
            }
            for name, r in results.items()
        },
        cost=Cost(
            forward=sum(r.cost.forward for r in results.values()),
            backward=sum(r.cost.backward for r in results.values()),
            oracle=sum(r.cost.oracle for r in results.values()),
            seconds=sum(r.cost.seconds for r in results.values()),
        ),
        attack="worst",
    )


def _is_targeted(result: EvalResult) -> bool:
    return any(MeasureKey.parse(name).role == "targeted" for name in result.values)


def ap_names(names: Iterable[str]) -> list[str]:
    """Of measure names, those of an AP that has a worst case: not the optimistic and pessimistic ones."""
    keys = [MeasureKey.parse(name) for name in names]
    return [str(k) for k in keys if k.is_ap and not k.role and k.ties not in ("optimistic", "pessimistic")]


def ap_alone(context: EvaluationContext) -> EvaluationContext:
    """The bench under a protocol of these AP alone, for scores that are made many times."""
    return replace(
        context, protocol=replace(context.protocol, measures=tuple(ap_names(context.protocol.measures)))
    )


def score_untargeted(context: EvaluationContext, attacked: Attacked) -> EvalResult:
    """MAP and its kin under attack, what rounding to eight bits or whole words leaves of it, flips, drop and
    ASR."""
    headline, lean = context.protocol.headline, ap_alone(context)
    clean = measure_codes(lean, context.query, context.query_labels)
    codes = as_codes(attacked.signs[:, 0])
    measured = measure_codes(context, codes, context.query_labels)
    stored = {
        MeasureKey(headline).name(storage=storage): measure_codes(
            lean, as_codes(signs[:, 0]), context.query_labels
        )
        for storage, signs in attacked.stored.items()
    }
    before, after = clean.per_query[headline], measured.per_query[headline]
    drop, _ = ap_drop(before, after)
    success = success_rate(before, after)
    per_query = {
        **measured.per_query,
        **{name: rounded.per_query[headline] for name, rounded in stored.items()},
        "flips": flips(context.query, codes).to(torch.float64),
        "drop": drop,
    }
    values = {
        **measured.values,
        **{name: rounded.values[headline] for name, rounded in stored.items()},
        "flips": float(per_query["flips"].mean()),
        "drop": float(drop.nanmean()),
        "ASR": success.rate,
    }
    return EvalResult(
        setting=setting_of(context),
        values={name: value for name, value in values.items() if value is not None},
        per_query=per_query,
        interval=intervals(per_query),
        reference={**measured.reference, "clean": clean.values[headline]},
        empty=measured.empty,
        curves=measured.curves,
        notes=measured.notes,
        representative=_representative(context, attacked.representative[:, 0], context.query_labels),
    )


def score_targeted(context: EvaluationContext, attacked: Attacked) -> EvalResult:
    """t-MAP over the targets of each query (mean; the best is ``/max``) and the MAP of the original labels.

    Curves are means over all pairs of a query and a target: ``t-PR`` and its kin of the target labels, ``PR``
    of the original ones. A query without a possible target is NaN throughout and counted in ``empty``.
    """
    headline, targets, lean = context.protocol.headline, context.targets, ap_alone(context)
    key = MeasureKey(headline)
    possible = targets.sum((1, 2)) > 0
    if not possible.any():
        raise ValueError(
            "no query has a possible target: every label set of the database shares a label with each"
        )
    asked, missing, each = torch.nonzero(possible).flatten(), int((~possible).sum()), targets.shape[1]
    wanted = targets[asked].flatten(0, 1)  # a row for each pair of a query and a target
    own = context.query_labels[asked].repeat_interleave(each, 0)
    codes = as_codes(attacked.signs[asked].flatten(0, 1))
    unchanged = Codes(context.query.packed[asked.repeat_interleave(each)], codes.bits, codes.ids)
    reached, left = measure_codes(context, codes, wanted), measure_codes(context, codes, own)
    stored = {
        key.name("targeted", storage=storage): measure_codes(
            lean, as_codes(signs[asked].flatten(0, 1)), wanted
        ).per_query[headline]
        for storage, signs in attacked.stored.items()
    }
    columns = {
        **{_targeted(name): column for name, column in reached.per_query.items()},
        **left.per_query,
        **stored,
        "base": measure_codes(lean, unchanged, wanted).per_query[headline],
    }
    pairs = {name: column.unflatten(0, (len(asked), each)) for name, column in columns.items()}
    whole = {name: column.mean(1) for name, column in pairs.items()}
    whole[key.name("targeted", option="max")] = pairs[key.name("targeted")].amax(1)
    whole["gain"] = whole[key.name("targeted")] - whole["base"]
    per_query = {}
    for name, column in whole.items():
        per_query[name] = torch.full((len(possible),), float("nan"), dtype=torch.float64)
        per_query[name][asked] = column
    base = per_query.pop("base")
    values = {
        name: float(column[asked].nanmean()) for name, column in per_query.items() if not column.isnan().all()
    }
    values[_targeted("ASR")] = targeted_success_rate(base[asked], per_query[key.name("targeted")][asked])
    steered = _representative(context, attacked.representative[asked].flatten(0, 1), wanted)
    return EvalResult(
        setting=setting_of(context),
        values=values,
        per_query=per_query,
        interval=intervals(per_query),
        reference={"chance": reached.reference["chance"], "clean": float(base[asked].mean())},
        empty=missing,
        curves={**{_targeted(name): curve for name, curve in reached.curves.items()}, **left.curves},
        notes=(f"{missing} queries have no possible target and are left out",) if missing else (),
        representative={_targeted(name): value for name, value in steered.items()},
    )


def _targeted(name: str) -> str:
    """The measure of that name, of the target labels."""
    return MeasureKey.parse(name).name("targeted")


def _representative(context: EvaluationContext, signs: Tensor, labels: Tensor) -> dict[str, float]:
    """The protocol's AP values with the representative codes as queries; not a bound."""
    if signs.shape[1] == 0:
        return {}
    measured = measure_codes(context, as_codes(signs), labels)
    return {name: value for name, value in measured.values.items() if name.startswith("MAP")}


def measure_codes(context: EvaluationContext, query: Codes, labels: Tensor) -> Measured:
    """Any codes in place of the queries, under the protocol of the bench."""
    profile = prepared_profile(query, labels, context.prepared)
    return measure(
        context.protocol, query, labels, context.database, context.database_labels, profile=profile
    )


def setting_of(context: EvaluationContext, attack: Described | None = None) -> Setting:
    """The fields that the bench and the attack know; the run adds the model's."""
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
        threat=attack.threat.name if attack else "none",
        attacks=(attack.name,) if attack else (),
        budget=attack.budget if attack else "",
        seeds=(context.seed,),
        digests=digests,
        defense=context.victim.declared,
        chosen=context.chosen,
    )


def as_codes(signs: Tensor) -> Codes:
    """(Q, K) signs -> packed codes with positions as ids."""
    return Codes(pack(signs), signs.shape[1], torch.arange(len(signs)))
