"""Gradient searches: PGD, APGD, raw gradient by SGD or Adam; a step is a forward and a backward pass."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from robusthash.attacks.base import Score, Search, SearchResult, Select, Start
from robusthash.attacks.budgets import per_item
from robusthash.attacks.threat_model import Threat
from robusthash.core.registry import register
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, Inputs


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be above 0 and finite, got {value!r}")


def no_gradient(*modalities: str) -> ValueError:
    """The error of an attack by gradients on a model that has none to these inputs."""
    return ValueError(
        f"no gradient reaches the {' and '.join(modalities)} of this victim: a part of it cuts the graph "
        "(no_grad, detach, NumPy); use assess, tier 'standard', which has oracle queries too, or where a "
        "purifier cuts it name the attack in evaluation.identity or evaluation.oblivious"
    )


def ascend(score: Score, inputs: Inputs, progress: float) -> tuple[Tensor, Tensor, Inputs]:
    """Score, logits and the gradient of the score to the inputs alone.

    Raises:
        ValueError: the model cuts the graph between input and score.
        FloatingPointError: where score or gradient is not finite, checked before any sign() could hide it.
    """
    leaves = {name: value.detach().requires_grad_(True) for name, value in inputs.items()}
    value, logits = score(leaves, progress)
    if not value.requires_grad:
        raise no_gradient(*leaves)
    gradients = torch.autograd.grad(value.sum(), list(leaves.values()), allow_unused=True)
    if cut := [name for name, part in zip(leaves, gradients, strict=True) if part is None]:
        raise no_gradient(*cut)
    grads = [part for part in gradients if part is not None]
    if not all(bool(torch.isfinite(part.sum())) for part in (value, *grads)):
        raise FloatingPointError("the attack's score or its gradient is NaN or infinite")
    return value.detach(), logits.detach(), dict(zip(leaves, grads, strict=True))


def starting_point(batch: Batch, threat: Threat, draws: Draws, start: Start, random: bool = False) -> Inputs:
    """``start`` brought into the threat; without it the clean inputs, or random ones."""
    origin = {name: batch.inputs[name] for name in threat.balls}
    if start is not None:
        return threat.project(start, origin)
    return threat.random_start(origin, batch.ids, draws) if random else origin


def rows_where(mask: Tensor, yes: Inputs, no: Inputs) -> Inputs:
    """Per item: ``yes`` where ``mask`` (B,), else ``no``."""
    return {n: torch.where(per_item(mask, v), yes[n], v) for n, v in no.items()}


@dataclass
class Best:
    """Per item, the point of highest value so far."""

    value: Tensor
    inputs: Inputs

    def offer(self, value: Tensor, inputs: Inputs) -> Tensor:
        """Take what is better; returns where it was, (B,) bool."""
        better = value > self.value
        self.value = torch.where(better, value, self.value)
        self.inputs = rows_where(better, inputs, self.inputs)
        return better


class Selection:
    """Per item, the point of best reported metric among those offered; idle where there is no ``select``."""

    def __init__(self, select: Select | None) -> None:
        self.select = select
        self.best: Best | None = None

    def offer(self, logits: Tensor, inputs: Inputs) -> None:
        """Rate a point by the metric of its logits."""
        if self.select is None:
            return
        value = self.select(logits)
        if self.best is None:
            self.best = Best(value, dict(inputs))
        else:
            self.best.offer(value, inputs)

    def conclude(self, score: Score, last: Inputs) -> tuple[Inputs, int]:
        """The point to return, with ``last`` offered as well, and the forward passes that this took."""
        if self.select is None:
            return last, 0
        with torch.no_grad():
            self.offer(score(last, 1.0)[1], last)
        assert self.best is not None
        return self.best.inputs, 1


@register("attack-search", "pgd", paper="Madry et al., ICLR 2018", evidence="paper")
@dataclass(frozen=True)
class PGD(Search):
    """Fixed steps along the norm's steepest direction, each projected; returns its last point.

    Args:
        steps: iterations T.
        step_size: eta, in units of the first modality attacked; others step by as large a share of their
            budget.
        momentum: decay of the L1-normalised gradient (MI-FGSM); 0 is plain PGD.
        random_start: start uniformly in the ball instead of at the clean input.
        select_every: with ``select``, steps between two looks at the metric; the best such point is returned.
    """

    steps: int = 100
    step_size: float = 1 / 255
    momentum: float = 0.0
    random_start: bool = True
    select_every: int = 10

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        _positive(step_size=self.step_size, select_every=self.select_every)
        if not 0 <= self.momentum < math.inf:
            raise ValueError(f"momentum must be at least 0 and finite, got {self.momentum!r}")

    def check(self, threat: Threat, origin: Inputs | None = None) -> None:
        name, ball = next(iter(threat.balls.items()))
        width = ball.bounds[1] - ball.bounds[0]
        if ball.norm == "linf" and self.step_size > width:
            raise ValueError(
                f"step_size {self.step_size:g} is outside (0, {width:g}]; steps are fractions of the range: "
                "write 2/255, not 2"
            )
        if origin is not None and name in origin:
            ball.check_length(self.step_size, "step_size", origin[name])

    def reach(self, threat: Threat) -> float:
        return self.steps * self.step_size

    def __call__(
        self, score: Score, batch: Batch, threat: Threat, draws: Draws, select: Select | None, start: Start
    ) -> SearchResult:
        origin = {name: batch.inputs[name] for name in threat.balls}
        x = starting_point(batch, threat, draws, start, self.random_start)
        trace, selection = [], Selection(select)
        speed = {n: torch.zeros_like(v) for n, v in x.items()}
        for step in range(self.steps):
            value, logits, grad = ascend(score, x, step / self.steps)
            trace.append(value.mean())
            if step % self.select_every == 0:
                selection.offer(logits, x)
            if self.momentum:
                unit = {
                    n: g / per_item(g.abs().flatten(1).sum(1).clamp_min(1e-12), g) for n, g in grad.items()
                }
                grad = speed = {n: self.momentum * speed[n] + g for n, g in unit.items()}
            direction = threat.steepest(grad, x)
            ahead = {n: x[n] + self.step_size * threat.ratio(n) * d for n, d in direction.items()}
            x = threat.project(ahead, origin)
        x, extra = selection.conclude(score, x)
        return SearchResult(x, torch.stack(trace), self.steps + extra, self.steps)


@register("attack-search", "momentum", paper="Dong et al., CVPR 2018", evidence="paper")
@dataclass(frozen=True)
class MomentumSteps(Search):
    """``PGD`` with momentum, from a random start, by steps of a share of the budget.

    Differs: the paper takes the budget over the number of steps, and momentum 1.

    Args:
        share: length of a step, in units of each ball's eps.
    """

    steps: int = 100
    share: float = 0.25
    momentum: float = 0.75

    def __post_init__(self) -> None:
        _positive(share=self.share)
        PGD(self.steps, momentum=self.momentum)  # checks the rest

    def _search(self, threat: Threat) -> PGD:
        eps = next(iter(threat.balls.values())).eps
        return PGD(self.steps, self.share * eps or 1e-9, self.momentum)  # no budget is a budget too

    def reach(self, threat: Threat) -> float:
        return self._search(threat).reach(threat)

    def __call__(
        self, score: Score, batch: Batch, threat: Threat, draws: Draws, select: Select | None, start: Start
    ) -> SearchResult:
        return self._search(threat)(score, batch, threat, draws, select, start)


def apgd_checkpoints(steps: int) -> list[int]:
    """Checkpoints: p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06) of the steps."""
    shares = [0.0, 0.22]
    while shares[-1] + 1e-9 < 1.0:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    return [math.ceil(share * steps - 1e-9) for share in shares if share <= 1.0]


@register("attack-search", "apgd", paper="Croce & Hein, ICML 2020", evidence="paper")
@dataclass(frozen=True)
class APGD(Search):
    """Step-size-free PGD: step, momentum, best point and restart from it go by item.

    Starts with step 2 eps; at a checkpoint a step is halved where fewer than ``rho`` of the steps since the
    last one went up, or where neither step nor best value changed since; the item then goes on from its best
    point. Momentum 0.75 after the first step. The score must not change with progress, so ``slope`` must be
    ``one``.
    """

    steps: int = 100
    rho: float = 0.75
    random_start: bool = False
    select_every: int = 10
    steady = True
    first_step: ClassVar[float] = 2.0  # in units of each ball's eps

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise ValueError(f"APGD needs at least 2 steps, got {self.steps}")
        _positive(select_every=self.select_every)
        if not 0 <= self.rho <= 1:
            raise ValueError(f"rho is a share in [0, 1], got {self.rho!r}")

    def __call__(
        self, score: Score, batch: Batch, threat: Threat, draws: Draws, select: Select | None, start: Start
    ) -> SearchResult:
        origin = {name: batch.inputs[name] for name in threat.balls}
        x = starting_point(batch, threat, draws, start, self.random_start)
        value, logits, grad = ascend(score, x, 1.0)
        trace, selection = [value.mean()], Selection(select)
        selection.offer(logits, x)
        best, best_grad = Best(value, x), grad
        step = torch.full_like(value, self.first_step)
        previous_x, previous_value, best_before = x, value, value
        went_up = torch.zeros_like(value)
        halved_before = torch.ones_like(value, dtype=torch.bool)
        checkpoints, last = apgd_checkpoints(self.steps), 0
        for t in range(1, self.steps):
            weight = 1.0 if t == 1 else 0.75
            direction = threat.steepest(grad, x)
            ahead = {n: x[n] + per_item(step, d) * threat.balls[n].eps * d for n, d in direction.items()}
            ahead = threat.project(ahead, origin)
            mixed = {n: x[n] + weight * (ahead[n] - x[n]) + (1 - weight) * (x[n] - previous_x[n]) for n in x}
            previous_x, x = x, threat.project(mixed, origin)
            value, logits, grad = ascend(score, x, 1.0)
            trace.append(value.mean())
            went_up += value > previous_value
            previous_value = value
            better = best.offer(value, x)
            best_grad = rows_where(better, grad, best_grad)
            if t % self.select_every == 0 or t in checkpoints or t == self.steps - 1:
                selection.offer(logits, x)
            if t in checkpoints:
                stuck = ~halved_before & (best.value <= best_before)
                halve = (went_up < self.rho * (t - last)) | stuck
                step = torch.where(halve, step / 2, step)
                x, grad = rows_where(halve, best.inputs, x), rows_where(halve, best_grad, grad)
                previous_value = torch.where(halve, best.value, previous_value)
                halved_before, best_before, last = halve, best.value, t
                went_up.zero_()
        inputs = best.inputs if selection.best is None else selection.best.inputs
        return SearchResult(inputs, torch.stack(trace), self.steps, self.steps)


@register("attack-search", "polish", evidence="own")
class Polish(APGD):
    """APGD with a first step of a tenth of the budget: from a good point a step of 2 eps leaps away."""

    first_step: ClassVar[float] = 0.1


@register("attack-search", "gradient", paper="HAG and SDHA codes", evidence="paper+code")
@dataclass(frozen=True)
class RawGradient(Search):
    """Ascent along the raw gradient with SGD or Adam, projected after each step; starts at the clean input.

    Args:
        optimiser: ``sgd`` or ``adam``.
        lr: step per item. The score is summed over items, so the batch size does not matter.
        momentum: of SGD; its buffer is not projected, as published.
    """

    steps: int = 100
    optimiser: Literal["sgd", "adam"] = "sgd"
    lr: float = 100 / 128
    momentum: float = 0.9

    def __post_init__(self) -> None:
        if self.optimiser not in ("sgd", "adam"):
            raise ValueError(f"optimiser must be 'sgd' or 'adam', got {self.optimiser!r}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if not 0 < self.lr <= 1e30:  # floats overflow from 1e38
            raise ValueError(f"lr must be above 0 and at most 1e30, got {self.lr!r}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, got {self.momentum!r}")

    def __call__(
        self, score: Score, batch: Batch, threat: Threat, draws: Draws, select: Select | None, start: Start
    ) -> SearchResult:
        origin = {name: batch.inputs[name] for name in threat.balls}
        x = {name: value.clone() for name, value in starting_point(batch, threat, draws, start).items()}
        values = list(x.values())
        stepper: torch.optim.Optimizer
        if self.optimiser == "adam":
            stepper = torch.optim.Adam(values, lr=self.lr, maximize=True)
        else:
            stepper = torch.optim.SGD(values, lr=self.lr, momentum=self.momentum, maximize=True)
        trace, selection = [], Selection(select)
        for step in range(self.steps):
            value, logits, grad = ascend(score, x, step / self.steps)
            trace.append(value.mean())
            if step % 10 == 0:
                selection.offer(logits, {n: v.clone() for n, v in x.items()})
            with torch.no_grad():
                for name, leaf in x.items():
                    leaf.grad = grad[name]
                stepper.step()
                for name, projected in threat.project(x, origin).items():
                    x[name].copy_(projected)
        inputs, extra = selection.conclude(score, {n: v.detach() for n, v in x.items()})
        return SearchResult(inputs, torch.stack(trace), self.steps + extra, self.steps)
