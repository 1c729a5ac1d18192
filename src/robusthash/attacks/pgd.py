"""The search engine: PGD with momentum, APGD, raw gradient (SGD or Adam). One step is one forward and one
backward."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from robusthash.attacks.base import Found, Score, Select
from robusthash.attacks.threat_model import Threat, per_item
from robusthash.core.hamming import sign
from robusthash.core.registry import register
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, Inputs


def _ascend(score: Score, inputs: Inputs, progress: float) -> tuple[Tensor, Tensor, Inputs]:
    """Score, logits and the gradient of the score to the inputs alone.

    Raises:
        FloatingPointError: where score or gradient is not finite, checked before any sign() could hide it.
    """
    leaves = {name: value.detach().requires_grad_(True) for name, value in inputs.items()}
    value, logits = score(leaves, progress)
    grads = torch.autograd.grad(value.sum(), list(leaves.values()))
    if not all(bool(torch.isfinite(part.sum())) for part in (value, *grads)):
        raise FloatingPointError("the attack's score or its gradient is NaN or infinite")
    return value.detach(), logits.detach(), dict(zip(leaves, grads, strict=True))


def _start(batch: Batch, threat: Threat, draws: Draws, random: bool, start: Inputs | None) -> Inputs:
    origin = {name: batch.inputs[name] for name in threat.balls}
    if start is not None:
        return threat.project(start, origin)
    return threat.random_start(origin, batch.ids, draws) if random else dict(origin)


def _rows(mask: Tensor, yes: Inputs, no: Inputs) -> Inputs:
    """Per item: ``yes`` where ``mask`` (B,), else ``no``."""
    return {n: torch.where(per_item(mask, v), yes[n], v) for n, v in no.items()}


@dataclass
class _Best:
    """Per item, the point of highest value seen."""

    value: Tensor
    inputs: Inputs

    def offer(self, value: Tensor, inputs: Inputs) -> Tensor:
        """Keep what is better; returns where it was, (B,) bool."""
        better = value > self.value
        self.value = torch.where(better, value, self.value)
        self.inputs = _rows(better, inputs, self.inputs)
        return better


@register("attack-search", "pgd", paper="Madry et al., ICLR 2018", evidence="paper")
@dataclass(frozen=True)
class PGD:
    """Fixed steps along the norm's steepest direction, each projected; returns its last point.

    Args:
        steps: iterations T.
        step_size: eta, in units of the first modality attacked; others step by as large a share of their
            budget.
        momentum: decay of the L1-normalised gradient (MI-FGSM); 0 is plain PGD.
        random_start: start uniformly in the ball instead of at the clean input.
        select_every: with ``select``, how often the metric is looked at; the best such point is returned.
    """

    steps: int = 100
    step_size: float = 1 / 255
    momentum: float = 0.0
    random_start: bool = True
    select_every: int = 10

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")

    def __call__(
        self,
        score: Score,
        batch: Batch,
        threat: Threat,
        draws: Draws,
        select: Select | None,
        start: Inputs | None,
    ) -> Found:
        origin = {name: batch.inputs[name] for name in threat.balls}
        x = _start(batch, threat, draws, self.random_start, start)
        trace, speed, best = [], None, None
        for step in range(self.steps):
            value, logits, grad = _ascend(score, x, step / self.steps)
            trace.append(value.mean())
            if select is not None and step % self.select_every == 0:
                best = _offered(best, select(sign(logits)), x)
            if self.momentum:
                unit = {
                    n: g / per_item(g.abs().flatten(1).sum(1).clamp_min(1e-12), g) for n, g in grad.items()
                }
                speed = unit if speed is None else {n: self.momentum * speed[n] + g for n, g in unit.items()}
                grad = speed
            direction = threat.steepest(grad, x)
            x = threat.project(
                {n: x[n] + self.step_size * threat.ratio(n) * d for n, d in direction.items()}, origin
            )
        forward = self.steps
        if select is not None:
            with torch.no_grad():
                best = _offered(best, select(sign(score(x, 1.0)[1])), x)
            x, forward = best.inputs, forward + 1
        return Found(x, torch.stack(trace), forward, self.steps)


def _offered(best: _Best | None, value: Tensor, inputs: Inputs) -> _Best:
    if best is None:
        return _Best(value, dict(inputs))
    best.offer(value, inputs)
    return best


def apgd_checkpoints(steps: int) -> list[int]:
    """Steps at which APGD looks back: p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03,
    0.06)."""
    shares = [0.0, 0.22]
    while shares[-1] + 1e-9 < 1.0:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    return [math.ceil(share * steps - 1e-9) for share in shares if share <= 1.0]


@register("attack-search", "apgd", paper="Croce & Hein, ICML 2020", evidence="paper")
@dataclass(frozen=True)
class APGD:
    """Step-size-free PGD: step, momentum, best point and restart from it are kept per item.

    Starts with step 2 eps; at a checkpoint a step is halved where fewer than ``rho`` of the steps since the
    last one went up, or where neither step nor best value changed since; the item then goes on from its best
    point. Momentum 0.75 after the first step. Needs a score that does not change with progress, so ``slope``
    must be ``one``.
    """

    steps: int = 100
    rho: float = 0.75
    random_start: bool = False
    select_every: int = 10
    steady: ClassVar[bool] = True
    first_step: ClassVar[float] = 2.0  # in units of each ball's eps

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise ValueError(f"APGD needs at least 2 steps, got {self.steps}")

    def __call__(
        self,
        score: Score,
        batch: Batch,
        threat: Threat,
        draws: Draws,
        select: Select | None,
        start: Inputs | None,
    ) -> Found:
        origin = {name: batch.inputs[name] for name in threat.balls}
        x = _start(batch, threat, draws, self.random_start, start)
        value, logits, grad = _ascend(score, x, 1.0)
        trace = [value.mean()]
        best, best_grad = _Best(value, x), grad
        chosen = _Best(select(sign(logits)), x) if select is not None else None
        step = torch.full_like(value, self.first_step)
        previous_x, previous_value = x, value
        went_up = torch.zeros_like(value)
        halved_before = torch.ones_like(value, dtype=torch.bool)
        value_before = best.value.clone()
        checkpoints = apgd_checkpoints(self.steps)
        last = 0
        for t in range(1, self.steps):
            weight = 1.0 if t == 1 else 0.75
            direction = threat.steepest(grad, x)
            ahead = {n: x[n] + per_item(step, d) * threat.balls[n].eps * d for n, d in direction.items()}
            ahead = threat.project(ahead, origin)
            mixed = {n: x[n] + weight * (ahead[n] - x[n]) + (1 - weight) * (x[n] - previous_x[n]) for n in x}
            previous_x, x = x, threat.project(mixed, origin)
            value, logits, grad = _ascend(score, x, 1.0)
            trace.append(value.mean())
            went_up += value > previous_value
            previous_value = value
            better = best.offer(value, x)
            best_grad = _rows(better, grad, best_grad)
            if (
                chosen is not None
                and select is not None
                and (t % self.select_every == 0 or t in checkpoints or t == self.steps - 1)
            ):
                chosen.offer(select(sign(logits)), x)
            if t in checkpoints:
                stuck = ~halved_before & (best.value <= value_before)
                halve = (went_up < self.rho * (t - last)) | stuck
                step = torch.where(halve, step / 2, step)
                x, grad = _rows(halve, best.inputs, x), _rows(halve, best_grad, grad)
                previous_value = torch.where(halve, best.value, previous_value)
                halved_before, value_before, last = halve, best.value.clone(), t
                went_up.zero_()
        found = best.inputs if chosen is None else chosen.inputs
        return Found(found, torch.stack(trace), self.steps, self.steps)


@register("attack-search", "polish", evidence="own")
class Polish(APGD):
    """APGD whose first step is a tenth of the budget: from a point that is good already, a step of 2 eps
    leaps away."""

    first_step: ClassVar[float] = 0.1


@register("attack-search", "gradient", paper="HAG and SDHA codes", evidence="paper+code")
@dataclass(frozen=True)
class RawGradient:
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

    def __call__(
        self,
        score: Score,
        batch: Batch,
        threat: Threat,
        draws: Draws,
        select: Select | None,
        start: Inputs | None,
    ) -> Found:
        origin = {name: batch.inputs[name] for name in threat.balls}
        x = {name: value.clone() for name, value in _start(batch, threat, draws, False, start).items()}
        values = list(x.values())
        if self.optimiser == "adam":
            stepper: torch.optim.Optimizer = torch.optim.Adam(values, lr=self.lr, maximize=True)
        else:
            stepper = torch.optim.SGD(values, lr=self.lr, momentum=self.momentum, maximize=True)
        trace, best = [], None
        for step in range(self.steps):
            value, logits, grad = _ascend(score, x, step / self.steps)
            trace.append(value.mean())
            if select is not None and step % 10 == 0:
                best = _offered(best, select(sign(logits)), {n: v.clone() for n, v in x.items()})
            with torch.no_grad():
                for name, leaf in x.items():
                    leaf.grad = grad[name]
                stepper.step()
                for name, projected in threat.project(x, origin).items():
                    x[name].copy_(projected)
        found, forward = {n: v.detach() for n, v in x.items()}, self.steps
        if select is not None:
            with torch.no_grad():
                best = _offered(best, select(sign(score(found, 1.0)[1])), found)
            found, forward = best.inputs, forward + 1
        return Found(found, torch.stack(trace), forward, self.steps)
