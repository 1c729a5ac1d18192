"""Checks of the gradient, and of a short search of our own whose whole path is recorded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from robusthash.attacks.base import Attack, Loss, Probe, Score, Search, SearchResult, Select
from robusthash.attacks.embedding_attacks import Closeness, MeanAnchor
from robusthash.attacks.guides import Mainstay
from robusthash.attacks.losses import Agreement, ScaleFree
from robusthash.attacks.pgd import APGD
from robusthash.attacks.threat_model import Threat
from robusthash.core.hamming import sign
from robusthash.core.runtime import Draws, default_dtype
from robusthash.core.types import Batch, Goal, Guidance, Inputs
from robusthash.evaluation.attack_block import attack_block
from robusthash.evaluation.context import EvaluationContext
from robusthash.metrics.results import Flag
from robusthash.metrics.statistics import bootstrap_interval
from robusthash.models.external.wrapper import Broken
from robusthash.models.hasher import Hasher
from robusthash.robustness.checks.base import CHECKS, above, flag, not_run
from robusthash.robustness.checks.behaviour_checks import as_double, in_double

_TAIL = 10  # last steps that F12 looks at
_FEWEST = 5  # queries whose AP must have moved for a rank correlation
_TRIES = 100  # random sign steps of F13
_DIRECTIONS = 20  # of F14's finite differences
_STEP = 1e-6  # of finite differences, per entry: few kinks are crossed, and float64 does not mind

Recorded = Callable[[Score, Batch, Threat, Draws, Select | None], SearchResult]


class _Search(Search):
    """A function as a search from the clean inputs, on norm balls as on edits."""

    def __init__(self, function: Recorded, edits: bool) -> None:
        self.function = function
        self.edits = edits

    def __call__(
        self,
        score: Score,
        batch: Batch,
        threat: Threat,
        draws: Draws,
        select: Select | None,
        _: Inputs | None,
    ) -> SearchResult:
        return self.function(score, batch, threat, draws, select)


class _MeanLogit(Loss):
    """mean_k t_k u_k: nothing in it is held constant, so that finite differences see what autograd sees."""

    def __call__(self, probe: Probe, guidance: Guidance) -> Tensor:
        logits = torch.stack([output.logits for output in probe.outputs.values()]).mean(0)
        return (logits * sign(guidance.codes)).mean(1)


def _run(
    context: EvaluationContext, threat: Threat, loss: Loss, function: Recorded, victim: Hasher | None = None
) -> None:
    """Run a recorded search over all blocks of the context; of vectors the loss is their closeness."""
    by_bits = context.victim.distance == "hamming"
    guide, loss = (Mainstay(), loss) if by_bits else (MeanAnchor(), Closeness())
    attack = Attack("checks", guide, loss, _Search(function, threat.edits), threat)
    for block in range(context.blocks):
        batch = context.batch(block)
        if victim is not None:
            batch = batch.with_inputs(as_double(batch.inputs))
        select = context.select(context.query_labels[batch.ids.cpu()], -1)
        goal, known, draws = Goal(batch.labels, -1), context.known(attack), Draws(context.seed, ("checks",))
        attack.perturb(victim or context.differentiated, batch, goal, known, draws=draws, select=select)


def gradient(score: Score, inputs: Inputs) -> tuple[Tensor, Tensor, Inputs, bool]:
    """Score, logits, gradients (0 without a graph), and whether any graph leads back to the inputs."""
    leaves = {name: value.detach().requires_grad_(True) for name, value in inputs.items()}
    value, logits = score(leaves, 1.0)
    grads: list[Tensor | None] = [None] * len(leaves)
    if value.requires_grad:
        grads = list(torch.autograd.grad(value.sum(), list(leaves.values()), allow_unused=True))
    slopes = {n: torch.zeros_like(leaves[n]) if g is None else g for n, g in zip(leaves, grads, strict=True)}
    return value.detach(), logits.detach(), slopes, any(g is not None for g in grads)


def _rows(inputs: Inputs) -> Tensor:
    return torch.cat([value.flatten(1) for value in inputs.values()], 1)


def _share(parts: list[Tensor]) -> float:
    return torch.cat(parts).double().mean().item()


# ---------------------------------------------------------------------------------------------- clean inputs


def gradient_checks(context: EvaluationContext, threat: Threat, loss: Loss) -> tuple[list[Flag], bool]:
    """F2, F3 and F13 at the clean inputs, and whether a search along the gradient can be run at all.

    F13 looks at the victim, not at the objective: on mean t u, since the default objective holds its scale
    constant and so has a gradient that is not its own.
    """
    zero, broken, connected = _at_start(context, threat, loss)
    f2 = above("F2", zero)
    if f2.level == "pass":  # where only the published tanh objective is flat, the default one does not mind
        flat, _, _ = _at_start(context, threat, Agreement())
        if flat > CHECKS["F2"].threshold:
            remedy = "tanh saturates: use the scale-free objective, not a published one"
            f2 = flag("F2", flat, "amber", remedy=remedy)
    if f2.level == "pass" and context.scale.note:  # a layer that only hides the victim from other attacks
        remedy = f"{context.scale.note}; rescale its last layer, or other attacks find it robust"
        f2 = flag("F2", zero, "amber", remedy=remedy)
    return [f2, above("F3", broken), _f13_rugged(context, threat)], connected and broken == 0


def _at_start(context: EvaluationContext, threat: Threat, loss: Loss) -> tuple[float, float, bool]:
    """Shares of queries with a zero gradient, and with a number that is not finite; and if there is a
    graph."""
    zero, broken, connected = list[Tensor](), list[Tensor](), list[bool]()

    def record(
        score: Score, batch: Batch, threat: Threat, draws: Draws, select: Select | None
    ) -> SearchResult:
        origin = batch.only(threat.balls).inputs
        value, logits, slopes, graph = gradient(score, origin)
        rows = _rows(slopes)
        zero.append((rows == 0).all(1))
        finite = [torch.isfinite(rows).all(1), torch.isfinite(value), torch.isfinite(logits).all(1)]
        broken.append(~torch.stack(finite).all(0))
        connected.append(graph)
        return SearchResult(origin, value.mean().reshape(1), 1, 1)

    _run(context, threat, loss, record)
    return _share(zero), _share(broken), any(connected)


def _f13_rugged(context: EvaluationContext, threat: Threat) -> Flag:
    """The step of eps along the gradient against the best of random sign steps."""
    if threat.edits:
        return not_run("F13", "an edit budget has no steepest step")
    luckier: list[Tensor] = []

    def record(
        score: Score, batch: Batch, threat: Threat, draws: Draws, select: Select | None
    ) -> SearchResult:
        origin = batch.only(threat.balls).inputs
        value, _, slopes, _ = gradient(score, origin)

        def stepped(step: Inputs) -> Tensor:
            ahead = {n: origin[n] + threat.balls[n].eps * way for n, way in step.items()}
            with torch.no_grad():
                return score(threat.project(ahead, origin), 1.0)[0]

        steered, best = stepped(threat.steepest(slopes)), torch.full_like(value, -torch.inf)
        for number in range(_TRIES):
            scope = draws.within("random sign", number)
            noise = {
                n: scope.within(n).uniform(batch.ids, tuple(v.shape[1:])).to(v.dtype)
                for n, v in origin.items()
            }
            best = torch.maximum(best, stepped(threat.corner(noise)))
        luckier.append(best > steered)
        return SearchResult(origin, value.mean().reshape(1), 1, 1)

    _run(context, threat, _MeanLogit(), record)
    return above("F13", _share(luckier))


def f14_differences(context: EvaluationContext, threat: Threat) -> Flag:
    """Autograd through the whole victim against central differences along random signs, in float64."""
    errors: list[Tensor] = []

    def record(
        score: Score, batch: Batch, threat: Threat, draws: Draws, select: Select | None
    ) -> SearchResult:
        inside = _off_kinks(draws, batch.ids, batch.only(threat.balls).inputs)
        value, _, slopes, _ = gradient(score, inside)
        columns = []
        for number in range(_DIRECTIONS):
            scope = draws.within("direction", number)
            way = {n: _signs(scope.within(n), batch.ids, v) for n, v in inside.items()}
            with torch.no_grad():
                ahead, behind = (
                    score({n: v + s * _STEP * way[n] for n, v in inside.items()}, 1.0)[0] for s in (1, -1)
                )
            columns.append(torch.stack([(ahead - behind) / (2 * _STEP), (_rows(slopes) * _rows(way)).sum(1)]))
        measured, promised = torch.stack(columns, 2)  # (B, directions) each
        size = torch.maximum(measured.norm(dim=1), promised.norm(dim=1))
        # nothing moves and nothing is said to move: a flat objective has no gradient to trust either
        error = (measured - promised).norm(dim=1) / size.clamp_min(1e-300)
        errors.append(torch.where(size > 0, error, 1.0))
        return SearchResult(inside, value.mean().reshape(1), 1, 1)

    try:
        with default_dtype(torch.float64):
            _run(context, threat, _MeanLogit(), record, in_double(context.victim))
    except (RuntimeError, Broken) as error:
        return not_run("F14", f"the model does not run in float64 ({str(error).splitlines()[0]})")
    return above("F14", _share([(part > 0.05) | part.isnan() for part in errors]))


def _off_kinks(draws: Draws, ids: Tensor, clean: Inputs) -> Inputs:
    """The inputs moved a little, to where a model with a true gradient is smooth.

    Strictly inside the range, for a clamp; and uneven, for a pooling layer: the pixels of a plain background
    tie, and at a tie neither side of a difference is the gradient.
    """
    noise = {n: 2 * draws.within("uneven", n).uniform(ids, tuple(v.shape[1:])) - 1 for n, v in clean.items()}
    return {n: 0.01 + 0.98 * v + 0.005 * noise[n].to(v.dtype) for n, v in clean.items()}


def _signs(draws: Draws, ids: Tensor, like: Tensor) -> Tensor:
    return torch.where(draws.uniform(ids, tuple(like.shape[1:])) < 0.5, -1.0, 1.0).to(like.dtype)


def f22_no_budget(context: EvaluationContext, threat: Threat) -> Flag:
    """The attacked pipeline at eps = 0 against the clean codes; a few queries that differ are amber."""

    def random_point(
        score: Score, batch: Batch, threat: Threat, draws: Draws, select: Select | None
    ) -> SearchResult:
        origin = batch.only(threat.balls).inputs
        with torch.no_grad():
            value, _ = score(origin, 1.0)
        return SearchResult(threat.random_start(origin, batch.ids, draws), value.mean().reshape(1), 1, 0)

    nothing = threat.scaled(0.0)
    attack = Attack("checks", Mainstay(), ScaleFree(), _Search(random_point, threat.edits), nothing)
    if context.victim.distance != "hamming":
        attack = replace(attack, guide=MeanAnchor(), loss=Closeness())
    signs = torch.cat([attack_block(context, attack, block).signs[:, 0] for block in range(context.blocks)])
    metric = context.select(context.query_labels, +1)
    differ = ((metric(signs) - metric(context.query.rows())).abs() > 1e-6).double().mean().item()
    result = above("F22", differ)
    if result.level == "pass" and differ > 0:
        return flag(
            "F22", differ, "amber", remedy="a few codes change with the batch size: bits near 0 (see F16)"
        )
    return result


# ---------------------------------------------------------------------------------------------- the path


def path_checks(
    context: EvaluationContext, threat: Threat, loss: Loss, steps: int, runnable: bool
) -> list[Flag]:
    """F10, F11 and F12 on the recorded path of APGD; F3 again where it broke off."""
    ids = ("F10", "F11", "F12")
    if threat.edits or not runnable:
        reason = "an edit budget has no path" if threat.edits else "no usable gradient to follow (F2, F3)"
        return [not_run(id, reason) for id in ids]
    values, metrics, returned = list[Tensor](), list[Tensor](), list[Tensor]()  # (T, B), (T, B), (B,) a block

    def record(
        score: Score, batch: Batch, threat: Threat, draws: Draws, select: Select | None
    ) -> SearchResult:
        assert select is not None  # ``_run`` hands the metric over
        path: list[tuple[Tensor, Tensor]] = []

        def recorded(inputs: Inputs, progress: float) -> tuple[Tensor, Tensor]:
            value, logits = score(inputs, progress)
            path.append((value.detach(), select(logits.detach())))
            return value, logits

        result = APGD(steps, select_every=1)(recorded, batch, threat, draws, select, None)
        values.append(torch.stack([value for value, _ in path]))
        metrics.append(torch.stack([metric for _, metric in path]))
        with torch.no_grad():
            returned.append(select(score(result.inputs, 1.0)[1]))
        return result

    try:
        _run(context, threat, loss, record)
    except FloatingPointError as error:  # the finding of F3, not a failure of ours
        return [flag("F3", 1.0, "red"), *(not_run(id, str(error)) for id in ids)]
    objective, metric = torch.cat(values, 1), torch.cat(metrics, 1)
    worse = (metric.amax(0) - torch.cat(returned) > 1e-6).double().mean().item()
    return [_f10_alignment(objective, metric), above("F11", worse), _f12_unfinished(objective)]


def _f10_alignment(values: Tensor, metrics: Tensor) -> Flag:
    """F10: Spearman's correlation along the path of each query, averaged with the spread of its AP as weight.

    Red where the 95 % bootstrap interval over queries lies below the threshold, amber where only the value
    does.

    Differs: unweighted, queries whose AP hardly moved add the noise of small steps around the best point.
    """
    from scipy.stats import rankdata  # a second to import, and only this check needs it

    ranks = [rankdata(part.double().cpu().numpy(), axis=0) for part in (values, metrics)]
    centred = [part - part.mean(0) for part in ranks]
    sizes = [np.sqrt((part**2).sum(0)) for part in centred]
    moved = (sizes[0] > 0) & (sizes[1] > 0)
    if moved.sum() < _FEWEST:
        reason = f"the AP of only {int(moved.sum())} queries moved; take a larger budget or more queries"
        return not_run("F10", reason)
    each = torch.from_numpy((centred[0] * centred[1]).sum(0)[moved] / (sizes[0] * sizes[1])[moved])
    weight = metrics.double().std(0).cpu()[torch.from_numpy(moved)]
    columns = torch.stack([each * weight, weight], 1)
    high = bootstrap_interval(columns, lambda means: means[:, 0] / means[:, 1])[1]
    rho, threshold = float((each * weight).sum() / weight.sum()), CHECKS["F10"].threshold
    if rho >= threshold:
        return flag("F10", rho, "pass")
    if high < threshold:
        return flag("F10", rho, "red")
    remedy = f"too few queries moved to be sure (up to {high:.2f}): check more of them"
    return flag("F10", rho, "amber", remedy=remedy)


def _f12_unfinished(values: Tensor) -> Flag:
    """F12: queries whose best objective rose in the last 10 steps by over 5 % of all that it rose."""
    if len(values) <= 2 * _TAIL:
        return not_run("F12", f"needs over {2 * _TAIL} steps, and the search took {len(values)}")
    best = values.cummax(0).values
    rise = best[-1] - best[0]
    if not bool((rise > 0).any()):
        return not_run("F12", "the objective never rose")
    return above("F12", ((best[-1] - best[-1 - _TAIL] > 0.05 * rise) & (rise > 0)).double().mean().item())
