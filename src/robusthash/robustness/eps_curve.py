"""Worst case against budget: each attack also starts from what the smaller budget came to, so curves only
fall."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from robusthash.attacks.threat_model import Threat
from robusthash.core.types import Inputs
from robusthash.evaluation.attack_block import Attacked
from robusthash.evaluation.attack_spec import AttackSpec
from robusthash.evaluation.context import EvaluationContext, Progress, silent
from robusthash.evaluation.evaluate import as_codes, measure_codes, score_clean
from robusthash.evaluation.runner import Attacker, BlockStore, NoStore, randomised
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
    store: BlockStore | None = None,
    progress: Progress = silent,
) -> Curve:
    """The worst case of each query over some lines at rising budgets.

    Every line runs twice at each budget: from its own start, and from the worst input found within the budget
    before, which is feasible. What a smaller budget found counts for a larger one, so no query's value ever
    rises.

    Args:
        lines: untargeted.
        eps: budgets of the threat's first modality, from 0 on; ``SHARES`` of its own by default.
        keep: of this curve alone: what is kept at one budget was started from the one before.

    Raises:
        ValueError: budgets that do not start at 0 and rise, a line that is targeted, or a randomised victim,
            whose lowest AP over budgets would be that of its luckiest noise.
    """
    whole = next(iter(threat.balls.values())).eps
    budgets = tuple(whole * share for share in SHARES) if eps is None else tuple(eps)
    if len(budgets) < 2 or budgets[0] != 0 or any(b <= a for a, b in pairwise(budgets)):
        raise ValueError(f"the budgets of a curve start at 0 and rise, got {list(budgets)}")
    if whole <= 0:
        raise ValueError(f"the threat {threat.name} has a budget of 0, which no curve can be scaled from")
    if not specs or any(spec.targeted for spec in specs):
        raise ValueError(f"a curve needs untargeted lines, got {[spec.name for spec in specs]}")
    if randomised(context):
        raise ValueError("a curve of a randomised victim is not built: assess it at each budget by itself")
    headline = context.protocol.headline
    rows = [score_clean(context).per_query[headline]]
    attacker, best = Attacker(context, store or NoStore()), list[Tensor | None]([None] * context.blocks)
    for place, budget in enumerate(budgets[1:]):
        aimed = [spec.at(threat.scaled(budget / whole)) for spec in specs]
        parts = []
        for block in range(context.blocks):
            found = _block(attacker, aimed, block, best[block])
            scores = torch.stack([_ap(context, block, attacked) for attacked in found])
            lowest = worst_case(
                _rows(context, rows[-1], block), {str(n): row for n, row in enumerate(scores)}
            )
            best[block] = _inputs(context, block, found, lowest.winner, best[block])
            parts.append(lowest.values)
            progress(
                place * context.blocks + block + 1, (len(budgets) - 1) * context.blocks, "curve over budgets"
            )
        rows.append(torch.cat(parts))
    return Curve(budgets, torch.stack(rows))


def _block(
    attacker: Attacker, specs: Sequence[AttackSpec], block: int, before: Tensor | None
) -> list[Attacked]:
    """Each line from its own start and, where there is one, from the solution at the budget before."""
    found = []
    for spec in specs:
        found.append(attacker.block(spec, 0, block))
        if before is not None:
            batch = attacker.context.batch(block, spec.threat.balls)
            start: Inputs = {name: batch.inputs[name] for name in spec.threat.balls}
            start[attacker.context.direction[0]] = before.to(batch.ids.device)
            found.append(attacker.block(spec, 1, block, start))
    return found


def _rows(context: EvaluationContext, values: Tensor, block: int) -> Tensor:
    return values.split(context.batch_size)[block]


def _ap(context: EvaluationContext, block: int, attacked: Attacked) -> Tensor:
    """(B,) the headline AP of a block's attacked codes."""
    labels = _rows(context, context.query_labels, block)
    return measure_codes(context, as_codes(attacked.signs[:, 0]), labels).per_query[context.protocol.headline]


def _inputs(
    context: EvaluationContext,
    block: int,
    found: Sequence[Attacked],
    winner: Sequence[str],
    before: Tensor | None,
) -> Tensor:
    """(B, ...) the inputs of the lowest AP so far: of this budget, of the one before, or the clean ones."""
    held = context.batch(block).inputs[context.direction[0]].cpu() if before is None else before
    chosen = [
        held[row] if name == "clean" else found[int(name)].inputs[row] for row, name in enumerate(winner)
    ]
    return torch.stack(chosen)
