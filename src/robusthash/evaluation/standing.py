"""From attacked codes to what a victim is worth: worst cases, lines beside each other, targets, the searched floor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from robusthash.core.runtime import Draws
from robusthash.core.types import Codes
from robusthash.evaluation.attacked import Attacked
from robusthash.evaluation.attempts import LOOKS, Attempt, Attempts, mean_ap
from robusthash.evaluation.bench import Bench
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
from robusthash.evaluation.lines import Line
from robusthash.evaluation.results import Cost, EvalResult
from robusthash.evaluation.robust import (
    completeness,
    flips,
    floor_ap,
    floor_starts,
    success_rate,
    targeted_resistance,
    worst_case,
)
from robusthash.evaluation.stats import intervals

Judges = dict[str, dict[str, Tensor]]
"""By attempt ("clean", "guided/0"), by measure: the (Q,) AP that choose a randomised victim's worst case."""


def standing(bench: Bench, attempts: Attempts, floor_random: int = 0) -> EvalResult:
    """The result of a suite whose lines have been run.

    Args:
        floor_random: random codes that the floor search starts from, beside the complement of the own code and the
            representative.
    """
    headline = bench.protocol.headline
    clean, judges = _clean(bench, attempts)
    untargeted, lean = [line for line in attempts.lines if not line.targeted], ap_alone(bench)
    scored: dict[str, EvalResult] = {}
    for line in untargeted:
        for restart, attempt in enumerate(attempts.found[line.name]):
            scored[f"{line.name}/{restart}"], chosen_by = _scored(lean, line, attempt)
            if judges is not None and chosen_by is not None:
                judges[f"{line.name}/{restart}"] = chosen_by
    result = worst(bench, clean, scored, judges)
    before = clean.per_query[headline]
    floor, notes = _floor(bench, attempts, floor_random)
    targeted = _targeted(bench, attempts)
    lowest = {line.name: _lowest(_restarts(line), scored, judges, headline) for line in untargeted}
    by_row = [
        name for name in ap_names(clean.per_query) if name != headline and bench.protocol.parse(name).ties == "legacy"
    ]
    wins = _unique_wins(untargeted, *((before, lowest) if judges is None else _judged(judges, untargeted, headline)))
    won = _won(bench, attempts, result.winner)
    per_query = {
        **result.per_query,
        "clean": before,
        **{f"{headline} under {name}": values for name, values in lowest.items()},
        **won,
        **({} if floor is None else {"floor": floor}),
        **({} if targeted is None else {n: v for n, v in targeted.per_query.items() if n.startswith(("t-", "gain"))}),
    }
    lines: dict[str, dict[str, float]] = {}
    for line in untargeted:
        lines[line.name] = {
            headline: float(lowest[line.name].mean()),
            **{name: float(_lowest(_restarts(line), scored, judges, name).mean()) for name in by_row},
            "unique wins": float(wins[line.name]),
            **_success(before, lowest[line.name], floor),
            "flips": _flips(bench, attempts.found[line.name]),
            **_spent(attempts.found[line.name]),
        }
    reference = {**result.reference}
    if floor is not None:
        reference["floor"] = float(floor.mean())
    values = {**result.values, "clean": float(before.nan_to_num(0.0).mean())}
    if targeted is not None:
        reference["t-clean"], values = targeted.reference["clean"], {**values, **_targeted_values(targeted, headline)}
        for line in attempts.lines:
            if line.targeted:
                reached, _ = _reached(bench, _looked_at(attempts, [line]), with_clean=False)
                lines[line.name] = {f"t-{headline}": float(reached.mean()), **_spent(attempts.found[line.name])}
    notes = (*result.notes, *attempts.notes, *notes, *(() if targeted is None else targeted.notes))
    if judges is not None:
        said = f"a randomised victim: AP are means over {LOOKS} fresh draws of its noise"
        notes = (*notes, f"{said}; those of eight bits and of targets are of one draw each")
    spans = intervals({n: v for n, v in per_query.items() if n not in result.interval})
    return replace(
        result,
        setting=replace(result.setting, threat="; ".join(sorted({line.threat.name for line in attempts.lines}))),
        values=values,
        per_query=per_query,
        interval={**result.interval, **spans},
        reference=reference,
        attacks=lines,
        notes=notes,
        perceptibility=_perceptibility(won),
        cost=_cost([attempt for found in attempts.found.values() for attempt in found]),
    )


def _unique_wins(lines: Sequence[Line], before: Tensor, lowest: dict[str, Tensor]) -> dict[str, int]:
    """Queries that a line alone brings lowest; one that refines is held against those before it, and no one's rival."""
    rivals = {line.name: lowest[line.name] for line in lines if line.kind != "refined"}
    wins = dict(worst_case(before, rivals).unique_wins)
    for line in lines:
        if line.kind == "refined":
            rivals[line.name] = lowest[line.name]
            wins[line.name] = worst_case(before, rivals).unique_wins[line.name]
    return wins


def _restarts(line: Line) -> list[str]:
    return [f"{line.name}/{restart}" for restart in range(line.restarts)]


# ---------------------------------------------------------------------------------------------- scores


def _clean(bench: Bench, attempts: Attempts) -> tuple[EvalResult, Judges | None]:
    """The clean result, and of a randomised victim the AP that choose, the clean ones so far."""
    clean = score_clean(bench)
    if attempts.clean is None:
        return clean, None
    choosing, fresh = (mean_ap(bench, looks) for looks in attempts.clean)
    return _with_ap(clean, fresh), {"clean": choosing}


def _with_ap(result: EvalResult, fresh: dict[str, Tensor]) -> EvalResult:
    values = {**result.values, **{name: float(column.mean()) for name, column in fresh.items()}}
    return replace(result, values=values, per_query={**result.per_query, **fresh})


def _scored(bench: Bench, line: Line, attempt: Attempt) -> tuple[EvalResult, dict[str, Tensor] | None]:
    """The AP of one attempt and, of a randomised victim, those that choose."""
    headline = bench.protocol.headline
    measured = measure_codes(bench, as_codes(attempt.attacked.signs[:, 0]), bench.query_labels)
    rounded = measure_codes(bench, as_codes(attempt.attacked.eight_bit[:, 0]), bench.query_labels)
    per_query = {name: measured.per_query[name] for name in ap_names(measured.per_query)}
    per_query[f"{headline}/8bit"] = rounded.per_query[headline]
    result = EvalResult(
        setting=replace(setting_of(bench), threat=line.threat.name, attacks=(line.name,)),
        values={name: float(column.nan_to_num(0.0).mean()) for name, column in per_query.items()},
        per_query=per_query,
        cost=_cost([attempt]),
    )
    if attempt.looks is None:
        return result, None
    choosing, fresh = (mean_ap(bench, looks) for looks in attempt.looks)
    return _with_ap(result, fresh), choosing


def _lowest(names: Sequence[str], scored: dict[str, EvalResult], judges: Judges | None, headline: str) -> Tensor:
    """(Q,) AP of the worst of some attempts, of a randomised victim the one that other draws choose."""
    values = torch.stack([scored[name].per_query[headline] for name in names])
    if judges is None:
        return values.amin(0)
    chosen = torch.stack([judges[name][headline] for name in names]).argmin(0, keepdim=True)
    return values.gather(0, chosen)[0]


def _judged(judges: Judges, lines: Sequence[Line], headline: str) -> tuple[Tensor, dict[str, Tensor]]:
    by_line = {line.name: torch.stack([judges[name][headline] for name in _restarts(line)]).amin(0) for line in lines}
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


def _flips(bench: Bench, found: Sequence[Attempt]) -> float:
    counts = [flips(bench.query, as_codes(attempt.attacked.signs[:, 0])) for attempt in found]
    return float(torch.stack(counts).double().mean())


def _cost(found: Sequence[Attempt]) -> Cost:
    passes = torch.stack([attempt.attacked.passes.sum(0) for attempt in found]).sum(0)
    seconds = float(torch.stack([attempt.attacked.seconds.sum() for attempt in found]).sum())
    return Cost(int(passes[0]), int(passes[1]), int(passes[2:].sum()), seconds)


def _spent(found: Sequence[Attempt]) -> dict[str, float]:
    cost = _cost(found)
    made = {"forward": float(cost.forward), "backward": float(cost.backward), "oracle": float(cost.oracle)}
    fitted = max(int(attempt.attacked.fitted.max()) for attempt in found)
    return made | {"seconds": cost.seconds} | ({"fit steps": float(fitted)} if fitted else {})


def _won(bench: Bench, attempts: Attempts, winner: Sequence[str]) -> dict[str, Tensor]:
    """Of each query's worst input: bits flipped and what was changed; NaN where the clean input is the worst."""
    found = {f"{n}/{r}": a.attacked for n, line in attempts.found.items() for r, a in enumerate(line)}
    changed = {name: flips(bench.query, as_codes(a.signs[:, 0])).double() for name, a in found.items()}
    names = [n for n in next(iter(found.values())).pixels if all(n in a.pixels for a in found.values())]
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


# ---------------------------------------------------------------------------------------------- floor and targets


def _floor(bench: Bench, attempts: Attempts, random: int) -> tuple[Tensor | None, tuple[str, ...]]:
    """(Q,) the lowest AP that a search over codes finds."""
    protocol = bench.protocol
    if protocol.ap == "first-k-relevant":
        return None, (f"no floor AP and no completeness: {protocol.name} counts only the first relevant items",)
    steered = [a.attacked.representative[:, 0] for found in attempts.found.values() for a in found]
    representative = next((codes for codes in steered if codes.shape[1]), None)
    ids = torch.arange(len(bench.queries))
    starts = floor_starts(bench.query.signs(), representative, ids, Draws(bench.seed), random)
    floor, _ = floor_ap(starts, bench.query_labels, bench.database, bench.database_labels, protocol.k, protocol.ap)
    return floor, ()


def _reached(bench: Bench, found: Sequence[Attempt], with_clean: bool) -> tuple[Tensor, Attacked]:
    """(Q', T) the highest t-AP of the attempts, of queries that have a target, and its codes for all queries."""
    targets = bench.targets
    asked, goals = torch.nonzero(targets.sum((1, 2)) > 0).flatten(), targets.shape[1]
    candidates = [attempt.attacked for attempt in found]
    if with_clean:
        signs = bench.query.signs()[:, None].expand(-1, goals, -1)
        candidates.append(replace(candidates[0], signs=signs, eight_bit=signs))
    scores = torch.stack(
        [
            torch.stack([_target_ap(bench, as_codes(a.signs[asked, t]), targets[asked, t]) for t in range(goals)], 1)
            for a in candidates
        ]
    )
    best = torch.zeros(len(targets), goals, dtype=torch.int64)
    best[asked] = scores.argmax(0)
    return scores.amax(0), replace(
        candidates[0],
        signs=_picked([a.signs for a in candidates], best),
        eight_bit=_picked([a.eight_bit for a in candidates], best),
        representative=candidates[0].representative[..., :0],
        pixels={},
    )


def _target_ap(bench: Bench, codes: Codes, wanted: Tensor) -> Tensor:
    return measure_codes(bench, codes, wanted).per_query[bench.protocol.headline]


def _picked(tensors: Sequence[Tensor], best: Tensor) -> Tensor:
    """(R) x (Q, T, K), (Q, T) -> (Q, T, K)."""
    stacked = torch.stack(list(tensors))
    return stacked.gather(0, best[None, :, :, None].expand(1, *stacked.shape[1:]))[0]


def _targeted(bench: Bench, attempts: Attempts) -> EvalResult | None:
    """The worst case towards each target over all targeted lines, restarts and the clean input; None without any."""
    lines = [line for line in attempts.lines if line.targeted]
    if not lines:
        return None
    random = attempts.clean is not None
    return score_targeted(bench, _reached(bench, _looked_at(attempts, lines), with_clean=not random)[1])


def _looked_at(attempts: Attempts, lines: Sequence[Line]) -> list[Attempt]:
    """The attempts that the best is taken over; of a randomised victim one: the best of noisy codes is no measure."""
    found = [attempt for line in lines for attempt in attempts.found[line.name]]
    return found if attempts.clean is None else found[:1]


def _targeted_values(targeted: EvalResult, headline: str) -> dict[str, float]:
    kept = {n: v for n, v in targeted.values.items() if n in (f"t-{headline}", f"t-{headline}/max", "gain", "t-ASR")}
    kept[f"t-{headline}/8bit"] = targeted.values[f"t-{headline}/8bit"]
    kept[f"collateral {headline}"] = targeted.values[headline]
    if targeted.reference["clean"] < 1:
        kept["TR"] = targeted_resistance(targeted.values[f"t-{headline}"], targeted.reference["clean"])
    return kept
