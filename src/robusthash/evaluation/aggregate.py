"""From attacked codes to what a victim is worth: worst cases, lines beside each other, targets, the searched
floor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from robusthash.core.runtime import Draws
from robusthash.core.types import Codes
from robusthash.evaluation.attack_block import Attacked
from robusthash.evaluation.attack_spec import AttackSpec
from robusthash.evaluation.context import EvaluationContext
from robusthash.evaluation.evaluate import (
    ap_alone,
    ap_names,
    as_codes,
    measure_codes,
    score_clean,
    score_targeted,
    setting_of,
    worst,
)
from robusthash.evaluation.runner import LOOKS, AttackRuns, RestartResult, mean_ap
from robusthash.metrics.measure_key import MeasureKey
from robusthash.metrics.results import Cost, EvalResult
from robusthash.metrics.robustness_measures import (
    completeness,
    flips,
    floor_ap,
    floor_starts,
    success_rate,
    targeted_resistance,
    worst_case,
)
from robusthash.metrics.statistics import intervals

Judges = dict[str, dict[str, Tensor]]
"""By attempt ("clean", "guided/0"), by measure: the (Q,) AP that choose a randomised victim's worst case."""


def aggregate(context: EvaluationContext, attack_runs: AttackRuns, floor_random: int = 0) -> EvalResult:
    """The result of a suite whose lines have been run.

    Args:
        floor_random: random codes that the floor search starts from, beside the complement of the own code
            and the representative.
    """
    headline, key = context.protocol.headline, MeasureKey(context.protocol.headline)
    clean, judges = _clean(context, attack_runs)
    untargeted, lean = [spec for spec in attack_runs.specs if not spec.targeted], ap_alone(context)
    scored: dict[str, EvalResult] = {}
    for spec in untargeted:
        for restart, restart_result in enumerate(attack_runs.found[spec.name]):
            scored[f"{spec.name}/{restart}"], chosen_by = _scored(lean, spec, restart_result)
            if judges is not None and chosen_by is not None:
                judges[f"{spec.name}/{restart}"] = chosen_by
    result = worst(context, clean, scored, judges)
    before = clean.per_query[headline]
    floor, notes = _floor(context, attack_runs, floor_random)
    targeted = _targeted(context, attack_runs)
    lowest = {spec.name: _lowest(_restarts(spec), scored, judges, headline) for spec in untargeted}
    by_row = [
        name
        for name in ap_names(clean.per_query)
        if name != headline and context.protocol.parse(name).ties == "legacy"
    ]
    wins = _unique_wins(
        untargeted, *((before, lowest) if judges is None else _judged(judges, untargeted, headline))
    )
    won = _won(context, attack_runs, result.winner)
    per_query = {
        **result.per_query,
        "clean": before,
        **{key.name(attack=name): values for name, values in lowest.items()},
        **won,
        **({} if floor is None else {"floor": floor}),
        **(
            {}
            if targeted is None
            else {
                n: v
                for n, v in targeted.per_query.items()
                if n == "gain" or MeasureKey.parse(n).role == "targeted"
            }
        ),
    }
    specs: dict[str, dict[str, float]] = {}
    for spec in untargeted:
        specs[spec.name] = {
            headline: float(lowest[spec.name].mean()),
            **{name: float(_lowest(_restarts(spec), scored, judges, name).mean()) for name in by_row},
            "unique wins": float(wins[spec.name]),
            **_success(before, lowest[spec.name], floor),
            "flips": _flips(context, attack_runs.found[spec.name]),
            **_spent(attack_runs.found[spec.name]),
        }
    reference = {**result.reference}
    if floor is not None:
        reference["floor"] = float(floor.mean())
    values = {**result.values, "clean": float(before.nan_to_num(0.0).mean())}
    if targeted is not None:
        reference["t-clean"], values = (
            targeted.reference["clean"],
            {**values, **_targeted_values(targeted, headline)},
        )
        for spec in attack_runs.specs:
            if spec.targeted:
                reached, _ = _reached(context, _looked_at(attack_runs, [spec]), with_clean=False)
                specs[spec.name] = {
                    key.name("targeted"): float(reached.mean()),
                    **_spent(attack_runs.found[spec.name]),
                }
    notes = (*result.notes, *attack_runs.notes, *notes, *(() if targeted is None else targeted.notes))
    if judges is not None:
        said = f"a randomised victim: AP are means over {LOOKS} fresh draws of its noise"
        notes = (*notes, f"{said}; those of eight bits, whole words and targets are of one draw each")
    spans = intervals({n: v for n, v in per_query.items() if n not in result.interval})
    return replace(
        result,
        setting=replace(
            result.setting, threat="; ".join(sorted({spec.threat.name for spec in attack_runs.specs}))
        ),
        values=values,
        per_query=per_query,
        interval={**result.interval, **spans},
        reference=reference,
        attacks=specs,
        notes=notes,
        perceptibility=_perceptibility(won),
        cost=_cost([restart_result for found in attack_runs.found.values() for restart_result in found]),
    )


def _unique_wins(specs: Sequence[AttackSpec], before: Tensor, lowest: dict[str, Tensor]) -> dict[str, int]:
    """Queries that a line alone brings lowest; one that refines is held against those before it, and no one's
    rival."""
    rivals = {spec.name: lowest[spec.name] for spec in specs if spec.kind != "refined"}
    wins = dict(worst_case(before, rivals).unique_wins)
    for spec in specs:
        if spec.kind == "refined":
            rivals[spec.name] = lowest[spec.name]
            wins[spec.name] = worst_case(before, rivals).unique_wins[spec.name]
    return wins


def _restarts(spec: AttackSpec) -> list[str]:
    return [f"{spec.name}/{restart}" for restart in range(spec.restarts)]


# ---------------------------------------------------------------------------------------------- scores


def _clean(context: EvaluationContext, attack_runs: AttackRuns) -> tuple[EvalResult, Judges | None]:
    """The clean result, and of a randomised victim the AP that choose, the clean ones so far."""
    clean = score_clean(context)
    if attack_runs.clean is None:
        return clean, None
    choosing, fresh = (mean_ap(context, looks) for looks in attack_runs.clean)
    return _with_ap(clean, fresh), {"clean": choosing}


def _with_ap(result: EvalResult, fresh: dict[str, Tensor]) -> EvalResult:
    values = {**result.values, **{name: float(column.mean()) for name, column in fresh.items()}}
    return replace(result, values=values, per_query={**result.per_query, **fresh})


def _scored(
    context: EvaluationContext, spec: AttackSpec, restart_result: RestartResult
) -> tuple[EvalResult, dict[str, Tensor] | None]:
    """The AP of one attempt and, of a randomised victim, those that choose."""
    headline = context.protocol.headline
    measured = measure_codes(context, as_codes(restart_result.attacked.signs[:, 0]), context.query_labels)
    per_query = {name: measured.per_query[name] for name in ap_names(measured.per_query)}
    for storage, signs in restart_result.attacked.stored.items():
        rounded = measure_codes(context, as_codes(signs[:, 0]), context.query_labels)
        per_query[MeasureKey(headline).name(storage=storage)] = rounded.per_query[headline]
    result = EvalResult(
        setting=replace(setting_of(context), threat=spec.threat.name, attacks=(spec.name,)),
        values={name: float(column.nan_to_num(0.0).mean()) for name, column in per_query.items()},
        per_query=per_query,
        cost=_cost([restart_result]),
    )
    if restart_result.looks is None:
        return result, None
    choosing, fresh = (mean_ap(context, looks) for looks in restart_result.looks)
    return _with_ap(result, fresh), choosing


def _lowest(
    names: Sequence[str], scored: dict[str, EvalResult], judges: Judges | None, headline: str
) -> Tensor:
    """(Q,) AP of the worst of some attempts, of a randomised victim the one that other draws choose."""
    values = torch.stack([scored[name].per_query[headline] for name in names])
    if judges is None:
        return values.amin(0)
    chosen = torch.stack([judges[name][headline] for name in names]).argmin(0, keepdim=True)
    return values.gather(0, chosen)[0]


def _judged(judges: Judges, specs: Sequence[AttackSpec], headline: str) -> tuple[Tensor, dict[str, Tensor]]:
    by_line = {
        spec.name: torch.stack([judges[name][headline] for name in _restarts(spec)]).amin(0) for spec in specs
    }
    return judges["clean"][headline], by_line


def _success(clean: Tensor, attacked: Tensor, floor: Tensor | None) -> dict[str, float]:
    made = {}
    rate = success_rate(clean, attacked).rate
    if rate is not None:
        made["ASR"] = rate
    if floor is not None:
        share = completeness(clean, attacked, floor)
        if not share.isnan().all():
            made["completeness"] = float(share.nanmean())
    return made


def _flips(context: EvaluationContext, found: Sequence[RestartResult]) -> float:
    counts = [flips(context.query, as_codes(restart_result.attacked.signs[:, 0])) for restart_result in found]
    return float(torch.stack(counts).double().mean())


def _cost(found: Sequence[RestartResult]) -> Cost:
    passes = torch.stack([restart_result.attacked.passes.sum(0) for restart_result in found]).sum(0)
    seconds = float(torch.stack([restart_result.attacked.seconds.sum() for restart_result in found]).sum())
    return Cost(int(passes[0]), int(passes[1]), int(passes[2:].sum()), seconds)


def _spent(found: Sequence[RestartResult]) -> dict[str, float]:
    cost = _cost(found)
    made = {"forward": float(cost.forward), "backward": float(cost.backward), "oracle": float(cost.oracle)}
    fitted = max(int(restart_result.attacked.fitted.max()) for restart_result in found)
    return made | {"seconds": cost.seconds} | ({"fit steps": float(fitted)} if fitted else {})


def _won(context: EvaluationContext, attack_runs: AttackRuns, winner: Sequence[str]) -> dict[str, Tensor]:
    """Of each query's worst input: bits flipped and what was changed; NaN where the clean input is the
    worst."""
    found = {f"{n}/{r}": a.attacked for n, spec in attack_runs.found.items() for r, a in enumerate(spec)}
    changed = {name: flips(context.query, as_codes(a.signs[:, 0])).double() for name, a in found.items()}
    names = [n for n in next(iter(found.values())).pixels if all(n in each.pixels for each in found.values())]
    columns = {name: torch.full((len(winner),), torch.nan, dtype=torch.float64) for name in ("flips", *names)}
    for row, name in enumerate(winner):
        if name == "clean":
            continue
        columns["flips"][row] = changed[name][row]
        for measure in names:
            columns[measure][row] = found[name].pixels[measure][row, 0]
    return columns


def _perceptibility(won: dict[str, Tensor]) -> dict[str, float]:
    made = {}
    for name, column in won.items():
        known = column[~column.isnan()]
        if name != "flips" and len(known):
            made[f"{name}/mean"], made[f"{name}/max"] = float(known.mean()), float(known.max())
    return made


# ---------------------------------------------------------------------------------------------- floor and
# targets


def _floor(
    context: EvaluationContext, attack_runs: AttackRuns, random: int
) -> tuple[Tensor | None, tuple[str, ...]]:
    """(Q,) the lowest AP that a search over codes finds."""
    protocol = context.protocol
    if protocol.ap == "first-k-relevant":
        return None, (
            f"no floor AP and no completeness: {protocol.name} counts only the first relevant items",
        )
    steered = [a.attacked.representative[:, 0] for found in attack_runs.found.values() for a in found]
    representative = next((codes for codes in steered if codes.shape[1]), None)
    ids = torch.arange(len(context.queries))
    starts = floor_starts(context.query.signs(), representative, ids, Draws(context.seed), random)
    floor, _ = floor_ap(
        starts, context.query_labels, context.database, context.database_labels, protocol.k, protocol.ap
    )
    return floor, ()


def _reached(
    context: EvaluationContext, found: Sequence[RestartResult], with_clean: bool
) -> tuple[Tensor, Attacked]:
    """(Q', T) the highest t-AP of the attempts, of queries that have a target, and its codes for all
    queries."""
    targets = context.targets
    asked, goals = torch.nonzero(targets.sum((1, 2)) > 0).flatten(), targets.shape[1]
    candidates = [restart_result.attacked for restart_result in found]
    bits = min(attacked.whole_words.shape[2] for attacked in candidates)
    if with_clean:
        signs = context.query.signs()[:, None].expand(-1, goals, -1)
        candidates.append(replace(candidates[0], signs=signs, codes_8bit=signs, whole_words=signs))
    scores = torch.stack(
        [
            torch.stack(
                [_target_ap(context, as_codes(a.signs[asked, t]), targets[asked, t]) for t in range(goals)], 1
            )
            for a in candidates
        ]
    )
    best = torch.zeros(len(targets), goals, dtype=torch.int64)
    best[asked] = scores.argmax(0)
    return scores.amax(0), replace(
        candidates[0],
        signs=_picked([a.signs for a in candidates], best),
        codes_8bit=_picked([a.codes_8bit for a in candidates], best),
        whole_words=_picked([a.whole_words[..., :bits] for a in candidates], best),
        representative=candidates[0].representative[..., :0],
        pixels={},
    )


def _target_ap(context: EvaluationContext, codes: Codes, wanted: Tensor) -> Tensor:
    return measure_codes(context, codes, wanted).per_query[context.protocol.headline]


def _picked(tensors: Sequence[Tensor], best: Tensor) -> Tensor:
    """(R) x (Q, T, K), (Q, T) -> (Q, T, K)."""
    stacked = torch.stack(list(tensors))
    return stacked.gather(0, best[None, :, :, None].expand(1, *stacked.shape[1:]))[0]


def _targeted(context: EvaluationContext, attack_runs: AttackRuns) -> EvalResult | None:
    """The worst case towards each target over all targeted lines, restarts and the clean input; None without
    any."""
    specs = [spec for spec in attack_runs.specs if spec.targeted]
    if not specs:
        return None
    random = attack_runs.clean is not None
    return score_targeted(
        context, _reached(context, _looked_at(attack_runs, specs), with_clean=not random)[1]
    )


def _looked_at(attack_runs: AttackRuns, specs: Sequence[AttackSpec]) -> list[RestartResult]:
    """The attempts that the best is taken over; of a randomised victim one: the best of noisy codes is no
    measure."""
    found = [restart_result for spec in specs for restart_result in attack_runs.found[spec.name]]
    return found if attack_runs.clean is None else found[:1]


def _targeted_values(targeted: EvalResult, headline: str) -> dict[str, float]:
    key = MeasureKey(headline)
    reached, best = key.name("targeted"), key.name("targeted", option="max")
    kept = {n: v for n, v in targeted.values.items() if n in (reached, best, "gain", "t-ASR")}
    stored = (key.name("targeted", storage="8bit"), key.name("targeted", storage="rounded"))
    kept |= {name: targeted.values[name] for name in stored if name in targeted.values}
    kept[key.name("collateral")] = targeted.values[headline]
    if targeted.reference["clean"] < 1:
        kept["TR"] = targeted_resistance(targeted.values[reached], targeted.reference["clean"])
    return kept
