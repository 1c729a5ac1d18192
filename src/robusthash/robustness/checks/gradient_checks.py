"""Checks of the gradient and of a short search of our own, whose whole path is recorded."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from robusthash.attacks.base import Attack, Loss, Probe, Score, Search, SearchResult, Select
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
from robusthash.models.hasher import Hasher
from robusthash.robustness.checks.base import CHECKS, above, flag, not_run
from robusthash.robustness.checks.behaviour_checks import as_double, in_double

_TAIL = 10  # last steps that F12 looks at
_FEWEST = 5  # queries whose AP must have moved for a rank correlation


def gradient(score: Score, inputs: Inputs) -> tuple[Tensor, Tensor, Inputs, bool]:
    """Score, logits, gradients, and whether any graph leads back to the inputs; without one the gradients are
    0."""
    leaves = {name: value.detach().requires_grad_(True) for name, value in inputs.items()}
    value, logits = score(leaves, 1.0)
    grads: list[Tensor | None] = [None] * len(leaves)
    if value.requires_grad:
        grads = list(torch.autograd.grad(value.sum(), list(leaves.values()), allow_unused=True))
    found = {n: torch.zeros_like(leaves[n]) if g is None else g for n, g in zip(leaves, grads, strict=True)}
    return value.detach(), logits.detach(), found, any(g is not None for g in grads)


def _rows(inputs: Inputs) -> Tensor:
    return torch.cat([value.flatten(1) for value in inputs.values()], 1)


@dataclass
class _Start(Search):
    """Looks at the clean inputs alone: the gradient there, and (on norm balls) the step along it against
    luck."""

    edits: bool
    tries: int = 100
    zero: list[Tensor] = field(default_factory=list)
    broken: list[Tensor] = field(default_factory=list)
    luckier: list[Tensor] = field(default_factory=list)
    connected: bool = False

    def __call__(
        self,
        score: Score,
        batch: Batch,
        threat: Threat,
        draws: Draws,
        select: Select | None,
        start: Inputs | None,
    ) -> SearchResult:
        origin = batch.only(threat.balls).inputs
        value, logits, grads, connected = gradient(score, origin)
        rows = _rows(grads)
        self.zero.append((rows == 0).all(1))
        self.broken.append(
            ~(torch.isfinite(rows).all(1) & torch.isfinite(value) & torch.isfinite(logits).all(1))
        )
        self.connected = self.connected or connected
        if not self.edits and self.tries:
            self.luckier.append(self._luck(score, batch, threat, draws, grads))
        return SearchResult(origin, value.mean().reshape(1), 1, 1)

    def _luck(self, score: Score, batch: Batch, threat: Threat, draws: Draws, grads: Inputs) -> Tensor:
        origin = batch.only(threat.balls).inputs

        def stepped(step: Inputs) -> Tensor:
            ahead = {n: origin[n] + threat.balls[n].eps * d for n, d in step.items()}
            with torch.no_grad():
                return score(threat.project(ahead, origin), 1.0)[0]

        steered, best = (
            stepped(threat.steepest(grads)),
            torch.full((len(batch),), -torch.inf, device=batch.ids.device),
        )
        for number in range(self.tries):
            scope = draws.within("random sign", number)
            drawn = {
                n: scope.within(n).uniform(batch.ids, tuple(v.shape[1:])).to(v.dtype)
                for n, v in origin.items()
            }
            best = torch.maximum(best, stepped(threat.corner(drawn)))
        return best > steered


def _signs(draws: Draws, ids: Tensor, like: Tensor) -> Tensor:
    noise = draws.uniform(ids, tuple(like.shape[1:]))
    return torch.where(noise < 0.5, -1.0, 1.0).to(like.dtype)


@dataclass
class _Path(Search):
    """APGD that offers every step to the selection, and keeps what each step showed."""

    steps: int
    values: list[Tensor] = field(default_factory=list)  # (T, B) a block
    metrics: list[Tensor] = field(default_factory=list)
    returned: list[Tensor] = field(default_factory=list)  # (B,)
    broken: bool = False

    def __call__(
        self,
        score: Score,
        batch: Batch,
        threat: Threat,
        draws: Draws,
        select: Select | None,
        start: Inputs | None,
    ) -> SearchResult:
        if select is None:
            raise ValueError("the recorded path needs the metric; hand over bench.select")
        values, metrics = [], []

        def noted(inputs: Inputs, progress: float) -> tuple[Tensor, Tensor]:
            value, logits = score(inputs, progress)
            self.broken = self.broken or not bool(
                torch.isfinite(value).all() and torch.isfinite(logits).all()
            )
            values.append(value.detach())
            metrics.append(select(sign(logits.detach())))
            return value, logits

        found = APGD(self.steps, select_every=1)(noted, batch, threat, draws, select, start)
        self.values.append(torch.stack(values))
        self.metrics.append(torch.stack(metrics))
        with torch.no_grad():
            self.returned.append(select(sign(score(found.inputs, 1.0)[1])))
        return found


@dataclass(frozen=True)
class _Still(Search):
    """A search that uses up its whole budget at once, without a gradient; at eps = 0 nothing moves."""

    edits: bool

    def __call__(
        self,
        score: Score,
        batch: Batch,
        threat: Threat,
        draws: Draws,
        select: Select | None,
        start: Inputs | None,
    ) -> SearchResult:
        origin = batch.only(threat.balls).inputs
        with torch.no_grad():
            value, _ = score(origin, 1.0)
        return SearchResult(threat.random_start(origin, batch.ids, draws), value.mean().reshape(1), 1, 0)


@dataclass(frozen=True)
class _Straight(Loss):
    """mean_k t_k u_k: nothing in it is held constant, so that finite differences see what autograd sees."""

    def __call__(self, probe: Probe, guidance: Guidance) -> Tensor:
        logits = torch.stack([output.logits for output in probe.outputs.values()]).mean(0)
        return (logits * sign(guidance.codes)).mean(1)


@dataclass
class _Differences(Search):
    """Central differences along random sign directions against autograd, relative per query."""

    edits: bool
    directions: int = 20
    size: float = 1e-6  # per entry: few kinks are crossed, and float64 does not mind
    errors: list[Tensor] = field(default_factory=list)

    def __call__(
        self,
        score: Score,
        batch: Batch,
        threat: Threat,
        draws: Draws,
        select: Select | None,
        start: Inputs | None,
    ) -> SearchResult:
        # strictly inside the range, so that a clamp in the model is no kink
        inside = {n: 0.01 + 0.98 * value for n, value in batch.only(threat.balls).inputs.items()}
        value, _, grads, _ = gradient(score, inside)
        seen, said = [], []
        for number in range(self.directions):
            scope = draws.within("direction", number)
            way = {n: _signs(scope.within(n), batch.ids, v) for n, v in inside.items()}
            with torch.no_grad():
                ends = [
                    score({n: v + s * self.size * way[n] for n, v in inside.items()}, 1.0)[0] for s in (1, -1)
                ]
            seen.append((ends[0] - ends[1]) / (2 * self.size))
            said.append((_rows(grads) * _rows(way)).sum(1))
        found, promised = torch.stack(seen, 1), torch.stack(said, 1)
        size = torch.maximum(found.norm(dim=1), promised.norm(dim=1))
        # nothing moves and nothing is said to move: a flat objective has no gradient to trust either
        self.errors.append(
            torch.where(size > 0, (found - promised).norm(dim=1) / size.clamp_min(1e-300), 1.0)
        )
        return SearchResult(inside, value.mean().reshape(1), 1, 1)


def _searched(
    context: EvaluationContext, threat: Threat, loss: Loss, search: object, victim: Hasher | None = None
) -> None:
    """Run a looking search over all blocks of the bench."""
    attack = Attack("checks", Mainstay(), loss, search, threat)  # type: ignore[arg-type]
    for block in range(context.blocks):
        batch = context.batch(block)
        if victim is not None:
            batch = batch.with_inputs(as_double(batch.inputs))
        select = context.select(context.query_labels[batch.ids.cpu()], -1)
        goal, draws = Goal(batch.labels, -1), Draws(context.seed, ("checks",))
        attack.perturb(
            victim or context.victim, batch, goal, context.known(attack), draws=draws, select=select
        )


def gradient_checks(context: EvaluationContext, threat: Threat, loss: Loss) -> tuple[list[Flag], bool]:
    """F2, F3 and F13 at the clean inputs, and whether a search along the gradient can be run at all.

    F13 looks at the victim, not at the objective: on mean t u, since the house objective holds its scale
    constant and so has a gradient that is not its own.
    """
    look = _Start(threat.edits, tries=0)
    _searched(context, threat, loss, look)
    zero, broken = torch.cat(look.zero).double().mean().item(), torch.cat(look.broken).double().mean().item()
    flags = [_saturation(context, threat, zero), above("F3", broken)]
    if threat.edits:
        flags.append(not_run("F13", "an edit budget has no steepest step"))
    else:
        rugged = _Start(threat.edits)
        _searched(context, threat, _Straight(), rugged)
        flags.append(above("F13", torch.cat(rugged.luckier).double().mean().item()))
    return flags, look.connected and broken == 0


def _saturation(context: EvaluationContext, threat: Threat, zero: float) -> Flag:
    """F2; amber where only the published tanh objective is flat, which the house objective does not mind."""
    found = above("F2", zero)
    if found.level == "red":
        return found
    published = _Start(threat.edits, tries=0)
    _searched(context, threat, Agreement(), published)
    flat = torch.cat(published.zero).double().mean().item()
    if flat > CHECKS["F2"].threshold:
        return flag(
            "F2", flat, "amber", remedy="tanh saturates: use the scale-free objective, not a published one"
        )
    return found


def path_checks(
    context: EvaluationContext, threat: Threat, loss: Loss, steps: int, runnable: bool
) -> list[Flag]:
    """F10, F11 and F12 on the recorded path of APGD; F3 anew where it broke off."""
    if threat.edits or not runnable:
        reason = "an edit budget has no path" if threat.edits else "no usable gradient to follow (F2, F3)"
        return [not_run(id, reason) for id in ("F10", "F11", "F12")]
    path = _Path(steps)
    try:
        _searched(context, threat, loss, path)
    except FloatingPointError as error:  # the finding of F3, not a failure of ours
        return [flag("F3", 1.0, "red"), *(not_run(id, str(error)) for id in ("F10", "F11", "F12"))]
    values, metrics, returned = (
        torch.cat(path.values, 1),
        torch.cat(path.metrics, 1),
        torch.cat(path.returned),
    )
    worse = (metrics.amax(0) - returned > 1e-6).double().mean().item()
    return [_alignment(values, metrics), above("F11", worse), _unfinished(values)]


def _alignment(values: Tensor, metrics: Tensor) -> Flag:
    """F10: Spearman's correlation along the path of each query, averaged with the spread of its AP as the
    weight.

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
        return not_run(
            "F10", f"the AP of only {int(moved.sum())} queries moved; take a larger budget or more queries"
        )
    each = torch.from_numpy((centred[0] * centred[1]).sum(0)[moved] / (sizes[0] * sizes[1])[moved])
    weight = metrics.double().std(0).cpu()[torch.from_numpy(moved)]
    high = bootstrap_interval(
        torch.stack([each * weight, weight], 1), lambda means: means[:, 0] / means[:, 1]
    )[1]
    rho, threshold = float((each * weight).sum() / weight.sum()), CHECKS["F10"].threshold
    if rho >= threshold:
        return flag("F10", rho, "pass")
    if high < threshold:
        return flag("F10", rho, "red")
    return flag(
        "F10", rho, "amber", remedy=f"too few queries moved to be sure (up to {high:.2f}): check more of them"
    )


def _unfinished(values: Tensor) -> Flag:
    """F12: queries whose best objective rose in the last 10 steps by over 5 % of all that it rose."""
    if len(values) <= 2 * _TAIL:
        return not_run("F12", f"needs over {2 * _TAIL} steps, and {len(values)} were asked for")
    best = values.cummax(0).values
    rise = best[-1] - best[0]
    if not bool((rise > 0).any()):
        return not_run("F12", "the objective never rose")
    return above("F12", ((best[-1] - best[-1 - _TAIL] > 0.05 * rise) & (rise > 0)).double().mean().item())


def f14_differences(context: EvaluationContext, threat: Threat) -> Flag:
    """Autograd through the whole victim against finite differences, in float64."""
    look = _Differences(threat.edits)
    try:
        with default_dtype(torch.float64):
            _searched(context, threat, _Straight(), look, in_double(context.victim))
    except RuntimeError as error:
        return not_run("F14", f"the model does not run in float64 ({str(error).splitlines()[0]})")
    errors = torch.cat(look.errors)
    return above("F14", ((errors > 0.05) | errors.isnan()).double().mean().item())


def f22_no_budget(context: EvaluationContext, threat: Threat) -> Flag:
    """The attacked pipeline at eps = 0 against the clean codes of the bench; single queries that differ are
    amber."""
    nothing = threat.scaled(0.0)
    attack = Attack("checks", Mainstay(), ScaleFree(), _Still(threat.edits), nothing)
    signs = torch.cat([attack_block(context, attack, block).signs[:, 0] for block in range(context.blocks)])
    metric = context.select(context.query_labels, +1)
    differ = ((metric(signs) - metric(context.query.signs())).abs() > 1e-6).double().mean().item()
    found = above("F22", differ)
    if found.level == "pass" and differ > 0:
        return flag(
            "F22", differ, "amber", remedy="a few codes change with the batch size: bits near 0 (see F16)"
        )
    return found
