"""The result of a suite from its attacked codes: worst cases, targets, the searched floor, cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from robusthash.core.embeddings import Embeddings
from robusthash.core.runtime import Draws
from robusthash.evaluation.attack_block import AttackedBlock
from robusthash.evaluation.attack_spec import AttackSpec, GradientAttack
from robusthash.evaluation.code_measures import ap_alone, ap_names, mean_ap, measure_codes, unmoved_note
from robusthash.evaluation.context import EvaluationContext
from robusthash.evaluation.evaluate import score_clean, score_targeted, setting_of, worst
from robusthash.evaluation.runner import AttackRuns
from robusthash.metrics import robustness_measures as robustness
from robusthash.metrics.measure_key import MeasureKey
from robusthash.metrics.results import Cost, EvalResult
from robusthash.metrics.statistics import intervals


def aggregate(context: EvaluationContext, runs: AttackRuns, floor_random: int = 0) -> EvalResult:
    """The result of a suite whose attacks were run; ``floor_random`` random codes more start the floor
    search.
    """
    headline, untargeted = context.protocol.headline, [spec for spec in runs.specs if not spec.targeted]
    scores = _score(context, runs, untargeted)
    result = worst(context, scores.clean, scores.restarts, scores.selection)
    clean = scores.clean.per_query[headline]
    floor, floor_notes = _floor(context, runs, floor_random)
    lowest = {spec.name: scores.lowest(spec, headline) for spec in untargeted}
    changes = _changes(context, runs, result.winner)
    targeted = _targeted(context, runs)
    attacks = _by_attack(context, runs, untargeted, scores, floor)
    per_query = {
        **result.per_query,
        "clean": clean,
        **{MeasureKey(headline).name(attack=name): values for name, values in lowest.items()},
        **changes,
        **({} if floor is None else {"floor": floor}),
    }
    values = {**result.values, "clean": float(clean.nan_to_num(0.0).mean())}
    reference = {**result.reference, **({} if floor is None else {"floor": float(floor.mean())})}
    notes = (*result.notes, *runs.notes, *floor_notes, *_notes(runs.specs, changes), *_unmoved(context, runs))
    if targeted is not None:
        columns = targeted.per_query.items()
        of_targets = [name for name, _ in columns if MeasureKey.parse(name).role == "targeted"]
        per_query |= {name: targeted.per_query[name] for name in (*of_targets, "gain")}
        values |= _targeted_values(targeted, headline)
        reference["t-clean"] = targeted.reference["clean"]
        attacks |= _by_targeted_attack(context, runs)
        notes = (*notes, *targeted.notes)
    spans = intervals({name: column for name, column in per_query.items() if name not in result.interval})
    threats = "; ".join(sorted({spec.threat.name for spec in runs.specs}))
    return replace(
        result,
        setting=replace(result.setting, threat=threats),
        values=values,
        per_query=per_query,
        interval={**result.interval, **spans},
        reference=reference,
        attacks=attacks,
        notes=notes,
        perceptibility=_perceptibility(changes),
        cost=_cost([attacked for blocks in runs.blocks.values() for attacked in blocks]),
    )


# ---------------------------------------------------------------------------------------------- untargeted


@dataclass(frozen=True)
class _Scores:
    """Scores of the clean queries and of every restart ("guided/0") of the untargeted attacks."""

    clean: EvalResult
    restarts: dict[str, EvalResult] = field(default_factory=dict)
    selection: dict[str, dict[str, Tensor]] | None = None
    """By restart and measure: (Q,) AP that choose a randomised victim's worst case; "clean" among them."""

    def lowest(self, spec: AttackSpec, measure: str) -> Tensor:
        """(Q,) AP of an attack's worst restart; of a randomised victim the one that other draws choose."""
        names = [f"{spec.name}/{restart}" for restart in range(spec.restarts)]
        values = torch.stack([self.restarts[name].per_query[measure] for name in names])
        if self.selection is None:
            return values.amin(0)
        best = torch.stack([self.selection[name][measure] for name in names]).argmin(0, keepdim=True)
        return values.gather(0, best)[0]


def _score(context: EvaluationContext, runs: AttackRuns, specs: Sequence[AttackSpec]) -> _Scores:
    clean = score_clean(context)
    selection = {"clean": clean.selection} if context.randomised else None
    scores, lean = _Scores(clean, {}, selection), ap_alone(context)
    for spec in specs:
        for restart, attacked in enumerate(runs.blocks[spec.name]):
            name = f"{spec.name}/{restart}"
            scores.restarts[name] = _restart_score(lean, spec, attacked)
            if selection is not None:
                choose, score = (mean_ap(context, codes) for codes in runs.noise[name])
                scores.restarts[name], selection[name] = _with_ap(scores.restarts[name], score), choose
    return scores


def _with_ap(result: EvalResult, ap: dict[str, Tensor]) -> EvalResult:
    values = {**result.values, **{name: float(column.mean()) for name, column in ap.items()}}
    return replace(result, values=values, per_query={**result.per_query, **ap})


def _restart_score(context: EvaluationContext, spec: AttackSpec, attacked: AttackedBlock) -> EvalResult:
    """The AP of one restart, also of its inputs as files hold them."""
    headline, labels = context.protocol.headline, context.query_labels
    measured = measure_codes(context, context.query.of(attacked.signs[:, 0]), labels)
    per_query = {name: measured.per_query[name] for name in ap_names(measured.per_query)}
    for storage, signs in attacked.stored.items():
        rounded = measure_codes(context, context.query.of(signs[:, 0]), labels)
        per_query[MeasureKey(headline).name(storage=storage)] = rounded.per_query[headline]
    return EvalResult(
        setting=replace(setting_of(context), threat=spec.threat.name, attacks=(spec.name,)),
        values={name: float(column.nan_to_num(0.0).mean()) for name, column in per_query.items()},
        per_query=per_query,
        cost=_cost([attacked]),
    )


def _by_attack(
    context: EvaluationContext,
    runs: AttackRuns,
    specs: Sequence[AttackSpec],
    scores: _Scores,
    floor: Tensor | None,
) -> dict[str, dict[str, float]]:
    """The row of each untargeted attack: AP, unique wins, success, flips and cost."""
    headline, clean = context.protocol.headline, scores.clean.per_query
    in_row_order = [
        name for name in ap_names(clean) if name != headline and context.protocol.parse(name).ties == "legacy"
    ]
    wins, rows = _unique_wins(specs, scores, headline), {}
    for spec in specs:
        lowest, blocks = scores.lowest(spec, headline), runs.blocks[spec.name]
        moved = [_moved(context, attacked) for attacked in blocks]
        rows[spec.name] = {
            headline: float(lowest.mean()),
            **{name: float(scores.lowest(spec, name).mean()) for name in in_row_order},
            "unique wins": float(wins[spec.name]),
            **_success(clean[headline], lowest, floor),
            moved[0][0]: float(torch.stack([apart for _, apart in moved]).mean()),
            **_spent(blocks),
        }
    return rows


def _unique_wins(specs: Sequence[AttackSpec], scores: _Scores, headline: str) -> dict[str, int]:
    """Queries that an attack alone brings lowest; one that refines competes with those before it alone."""
    clean, lowest = scores.clean.per_query[headline], {s.name: scores.lowest(s, headline) for s in specs}
    if scores.selection is not None:
        clean, lowest = scores.selection["clean"][headline], {}
        for spec in specs:
            by = [scores.selection[f"{spec.name}/{restart}"][headline] for restart in range(spec.restarts)]
            lowest[spec.name] = torch.stack(by).amin(0)
    rivals = {spec.name: lowest[spec.name] for spec in specs if spec.kind != "refined"}
    wins = dict(robustness.worst_case(clean, rivals).unique_wins)
    for spec in specs:
        if spec.kind == "refined":
            rivals[spec.name] = lowest[spec.name]
            wins[spec.name] = robustness.worst_case(clean, rivals).unique_wins[spec.name]
    return wins


def _success(clean: Tensor, attacked: Tensor, floor: Tensor | None) -> dict[str, float]:
    values = {}
    rate = robustness.success_rate(clean, attacked).rate
    if rate is not None:
        values["ASR"] = rate
    if floor is not None:
        share = robustness.completeness(clean, attacked, floor)
        if not share.isnan().all():
            values["completeness"] = float(share.nanmean())
    return values


def _changes(context: EvaluationContext, runs: AttackRuns, winner: Sequence[str]) -> dict[str, Tensor]:
    """Flips (or distance) and perceptibility of each query's worst input; NaN where that is the clean one."""
    restarts = {f"{name}/{n}": a for name, blocks in runs.blocks.items() for n, a in enumerate(blocks)}
    moved = {name: _moved(context, attacked) for name, attacked in restarts.items()}
    first, (change, _) = next(iter(restarts.values())), next(iter(moved.values()))
    measures = [name for name in first.pixels if all(name in each.pixels for each in restarts.values())]
    columns = {n: torch.full((len(winner),), torch.nan, dtype=torch.float64) for n in (change, *measures)}
    for row, name in enumerate(winner):
        if name != "clean":
            columns[change][row] = moved[name][1][row]
            for measure in measures:
                columns[measure][row] = restarts[name].pixels[measure][row, 0]
    return columns


def _moved(context: EvaluationContext, attacked: AttackedBlock) -> tuple[str, Tensor]:
    """The name of the measure by which queries moved, and its (Q,) values for the first goal."""
    return robustness.moved(context.query, context.query.of(attacked.signs[:, 0]))


def _notes(specs: Sequence[AttackSpec], changes: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Attacks whose steps fall short, and worst inputs that are as the clean ones."""
    attacks = [spec.attack for spec in specs if isinstance(spec, GradientAttack)]
    short = dict.fromkeys(attack.falls_short for attack in attacks if attack.falls_short)
    unchanged = sum(int(changes[name].isinf().sum()) for name in ("psnr",) if name in changes)
    count = (
        f"{unchanged} worst inputs are as the clean ones: their PSNR is infinite, its interval of the others"
    )
    return (*short, *[count] * bool(unchanged))


def _unmoved(context: EvaluationContext, runs: AttackRuns) -> list[str]:
    """Notes of the attacks by gradients of which no restart moved a code."""
    notes: list[str] = []
    for spec in runs.specs:
        if isinstance(spec, GradientAttack) and spec.kind != "refined":
            each = [unmoved_note(context, spec.threat, a, spec.name) for a in runs.blocks[spec.name]]
            notes += each[0] if all(each) else ()
    return notes


def _perceptibility(changes: Mapping[str, Tensor]) -> dict[str, float]:
    values = {}
    for name, column in changes.items():
        known = column[~column.isnan()]
        if name not in ("flips", "distance") and len(known):
            values[f"{name}/mean"] = float(known.mean())
            values[f"{name}/max"] = float(known.max())
    return values


# ------------------------------------------------------------------------------------------------ targeted


def _targeted(context: EvaluationContext, runs: AttackRuns) -> EvalResult | None:
    """The worst case towards each target over all targeted attacks, restarts and the clean input.

    Of a randomised victim the first restart alone: the best of noisy codes is no measure.
    """
    candidates = [attacked for s in runs.specs if s.targeted for attacked in runs.blocks[s.name]]
    if not candidates:
        return None
    if runs.noise:
        return score_targeted(context, _nearest_to_target(context, candidates[:1])[1])
    signs = context.query.rows()[:, None].expand(-1, context.targets.shape[1], -1)
    clean = replace(candidates[0], signs=signs, codes_8bit=signs, whole_words=signs)
    return score_targeted(context, _nearest_to_target(context, [*candidates, clean])[1])


def _nearest_to_target(
    context: EvaluationContext, candidates: Sequence[AttackedBlock]
) -> tuple[Tensor, AttackedBlock]:
    """(Q', T) the highest t-AP of queries that have a target, and its codes for all queries."""
    targets, headline = context.targets, context.protocol.headline
    rows = torch.nonzero(targets.sum((1, 2)) > 0).flatten()

    def target_ap(attacked: AttackedBlock, target: int) -> Tensor:
        codes = context.query.of(attacked.signs[rows, target])
        return measure_codes(context, codes, targets[rows, target]).per_query[headline]

    by_target = [[target_ap(a, target) for target in range(targets.shape[1])] for a in candidates]
    scores = torch.stack([torch.stack(columns, 1) for columns in by_target])
    best = torch.zeros(targets.shape[:2], dtype=torch.int64)
    best[rows] = scores.argmax(0)

    def codes_of_best(tensors: Sequence[Tensor]) -> Tensor:
        stacked = torch.stack(list(tensors))  # (candidates, Q, T, K)
        return stacked.gather(0, best[None, :, :, None].expand(1, *stacked.shape[1:]))[0]

    bits = min(attacked.whole_words.shape[2] for attacked in candidates)
    return scores.amax(0), replace(
        candidates[0],
        signs=codes_of_best([a.signs for a in candidates]),
        codes_8bit=codes_of_best([a.codes_8bit for a in candidates]),
        whole_words=codes_of_best([a.whole_words[..., :bits] for a in candidates]),
        representative=candidates[0].representative[..., :0],
        pixels={},
    )


def _by_targeted_attack(context: EvaluationContext, runs: AttackRuns) -> dict[str, dict[str, float]]:
    """The row of each targeted attack."""
    rows = {}
    for spec in runs.specs:
        if spec.targeted:
            blocks = runs.blocks[spec.name]
            t_ap, _ = _nearest_to_target(context, blocks[:1] if runs.noise else blocks)
            reached = MeasureKey(context.protocol.headline).name("targeted")
            rows[spec.name] = {reached: float(t_ap.mean()), **_spent(blocks)}
    return rows


def _targeted_values(targeted: EvalResult, headline: str) -> dict[str, float]:
    key = MeasureKey(headline)
    reached, best = key.name("targeted"), key.name("targeted", option="max")
    stored = [key.name("targeted", storage=storage) for storage in ("8bit", "rounded")]
    names = [reached, best, *stored, "gain", "t-ASR"]
    values = {name: targeted.values[name] for name in names if name in targeted.values}
    values[key.name("collateral")] = targeted.values[headline]
    clean = targeted.reference["clean"]
    if clean < 1:
        values["TR"] = robustness.targeted_resistance(targeted.values[reached], clean)
    return values


# ---------------------------------------------------------------------------------------------- floor, cost


def _floor(
    context: EvaluationContext, runs: AttackRuns, random: int
) -> tuple[Tensor | None, tuple[str, ...]]:
    """(Q,) the lowest AP that a search over codes finds."""
    protocol = context.protocol
    if isinstance(context.query, Embeddings) or isinstance(context.database, Embeddings):
        return None, ("no floor AP and no completeness: the search for it flips bits, and vectors have none",)
    if protocol.ap == "first-k-relevant":
        note = f"no floor AP and no completeness: {protocol.name} counts only the first relevant items"
        return None, (note,)
    steered = [attacked.representative[:, 0] for blocks in runs.blocks.values() for attacked in blocks]
    representative = next((codes for codes in steered if codes.shape[1]), None)
    own, labels, draws = context.query.signs(), context.query_labels, Draws(context.seed)
    starts = robustness.floor_starts(own, representative, labels, draws, random)
    database = context.database, context.database_labels
    floor, _ = robustness.floor_ap(starts, context.query_labels, *database, protocol.k, protocol.ap)
    return floor, ()


def _cost(blocks: Sequence[AttackedBlock]) -> Cost:
    forward, backward, oracle = torch.stack([attacked.passes.sum(0) for attacked in blocks]).sum(0).tolist()
    seconds = float(torch.stack([attacked.seconds.sum() for attacked in blocks]).sum())
    return Cost(forward, backward, oracle, seconds)


def _spent(blocks: Sequence[AttackedBlock]) -> dict[str, float]:
    cost = _cost(blocks)
    names = ("fit steps", "fit oracle queries", "fit items")
    fits = torch.stack([torch.cat([a.fitted[:, None], a.learned], 1).amax(0) for a in blocks]).amax(0)
    fitted = {name: float(count) for name, count in zip(names, fits.tolist(), strict=True) if count}
    passes = {"forward": float(cost.forward), "backward": float(cost.backward), "oracle": float(cost.oracle)}
    return {**passes, "seconds": cost.seconds, **fitted}
