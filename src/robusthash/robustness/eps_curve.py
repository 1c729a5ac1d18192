"""Worst case against budget: each attack also starts from the smaller budget's result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from robusthash.attacks.threat_model import Threat
from robusthash.core.runtime import Progress, silent
from robusthash.core.types import Inputs
from robusthash.evaluation.attack_block import AttackedBlock
from robusthash.evaluation.attack_spec import AttackSpec
from robusthash.evaluation.code_measures import measure_codes
from robusthash.evaluation.context import EvaluationContext
from robusthash.evaluation.evaluate import score_clean
from robusthash.evaluation.runner import BlockRunner, BlockStore, NoStore
from robusthash.metrics.results import EvalResult
from robusthash.metrics.robustness_measures import curve_score, worst_case
from robusthash.metrics.statistics import intervals

SHARES = (0.0, 1 / 8, 1 / 4, 1 / 2, 1.0, 1.5, 2.0)
"""Of the threat's budget; of 8/255 these are 0, 1, 2, 4, 8, 12 and 16/255."""


@dataclass(frozen=True)
class Curve:
    """The lowest AP of each query that was found within each budget."""

    eps: tuple[float, ...]
    worst: Tensor  # (E, Q) float64, falling along E

    @property
    def means(self) -> Tensor:
        """(E,) wMAP."""
        return self.worst.mean(1)

    @property
    def score(self) -> float:
        """Area under wMAP(eps), divided by the largest eps."""
        return curve_score(self.eps, self.means.tolist())

    def onto(self, result: EvalResult) -> EvalResult:
        """``result`` with the curve ``w<headline>/eps``, its score, and each query's value at each budget."""
        key = result.setting.key
        name = key.name("worst")
        columns = {key.name("worst", eps=eps): row for eps, row in zip(self.eps, self.worst, strict=True)}
        curve = {"eps": torch.tensor(self.eps, dtype=torch.float64), name: self.means}
        return replace(
            result,
            values={**result.values, "curve score": self.score},
            per_query={**result.per_query, **columns},
            interval={**result.interval, **intervals(columns)},
            curves={**result.curves, key.name("worst", option="eps"): curve},
        )


def eps_curve(
    context: EvaluationContext,
    specs: Sequence[AttackSpec],
    threat: Threat,
    eps: Sequence[float] | None = None,
    *,
    store: BlockStore = NoStore(),
    progress: Progress = silent,
) -> Curve:
    """The worst case of each query over some attacks at rising budgets.

    Every attack runs twice at each budget: from its own start, and from the worst input found within the
    budget before, which is feasible. The result of a smaller budget counts for a larger one, so no query's
    value ever rises.

    Args:
        specs: untargeted.
        eps: budgets of the threat's first modality, from 0 on; ``SHARES`` of its own by default.
        store: of this curve alone: blocks at one budget were started from those at the one before.

    Raises:
        ValueError: budgets that do not start at 0 and rise, a targeted attack, or a randomised victim, whose
            lowest AP over budgets would be that of its luckiest noise.
    """
    whole = next(iter(threat.balls.values())).eps
    budgets = tuple(whole * share for share in SHARES) if eps is None else tuple(eps)
    if len(budgets) < 2 or budgets[0] != 0 or any(b <= a for a, b in pairwise(budgets)):
        raise ValueError(f"the budgets of a curve start at 0 and rise, got {list(budgets)}")
    if whole <= 0:
        raise ValueError(f"the threat {threat.name} has a budget of 0, which no curve can be scaled from")
    if not specs or any(spec.targeted for spec in specs):
        raise ValueError(f"a curve needs untargeted attacks, got {[spec.name for spec in specs]}")
    if context.randomised:
        raise ValueError("a curve of a randomised victim is not built: assess it at each budget by itself")
    headline, runner = context.protocol.headline, BlockRunner(context, store)
    rows = [score_clean(context).per_query[headline]]
    best: list[Tensor | None] = [None] * context.blocks
    total = (len(budgets) - 1) * context.blocks
    for place, budget in enumerate(budgets[1:]):
        scaled = [spec.at(threat.scaled(budget / whole)) for spec in specs]
        _attack_together(runner, scaled, best, progress)
        parts = []
        for block in range(context.blocks):
            held = best[block]
            results = _attacked(runner, scaled, block, held)
            labels = context.query_labels.split(context.batch_size)[block]
            before = rows[-1].split(context.batch_size)[block]
            codes = [context.query.of(attacked.signs[:, 0]) for attacked in results]
            scores = [measure_codes(context, each, labels).per_query[headline] for each in codes]
            lowest = worst_case(before, {str(number): row for number, row in enumerate(scores)})
            clean = context.batch(block).inputs[context.direction[0]].cpu()
            best[block] = _worst_inputs(clean if held is None else held, results, lowest.winner)
            parts.append(lowest.values)
            progress(place * context.blocks + block + 1, total, "curve over budgets")
        rows.append(torch.cat(parts))
    return Curve(budgets, torch.stack(rows))


def _attack_together(
    runner: BlockRunner, specs: Sequence[AttackSpec], before: Sequence[Tensor | None], progress: Progress
) -> None:
    """Every block as ``_attacked`` does it, divided among the processes of ``torchrun``."""
    title = specs[0].threat.name
    runner.divided(lambda block: _attacked(runner, specs, block, before[block]), progress, title)


def _attacked(
    runner: BlockRunner, specs: Sequence[AttackSpec], block: int, before: Tensor | None
) -> list[AttackedBlock]:
    """A block under each attack from its own start and, if any, from the result at the budget before."""
    results = []
    for spec in specs:
        results.append(runner.block(spec, 0, block))
        if before is not None:
            batch = runner.context.batch(block, spec.threat.balls)
            start: Inputs = {name: batch.inputs[name] for name in spec.threat.balls}
            start[runner.context.direction[0]] = before.to(batch.ids.device)
            results.append(runner.block(spec, 1, block, start))
    return results


def _worst_inputs(held: Tensor, results: Sequence[AttackedBlock], winner: Sequence[str]) -> Tensor:
    """(B, ...) the inputs of the lowest AP so far: ``held`` where no result of this budget is lower."""
    inputs = {"clean": held, **{str(number): result.inputs for number, result in enumerate(results)}}
    return torch.stack([inputs[name][row] for row, name in enumerate(winner)])
