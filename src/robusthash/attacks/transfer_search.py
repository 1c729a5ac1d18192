"""Transfer: search on surrogates with known weights, with the steps that carry over best to unknown models.

``TransferSteps`` joins the published tricks, each an option; ``transfer`` ascends the mean over several
surrogates.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from robusthash.attacks.base import Attack, Score, Search, SearchResult, Select, Start
from robusthash.attacks.budgets import per_item
from robusthash.attacks.pgd import Selection, ascend, starting_point
from robusthash.attacks.threat_model import Threat
from robusthash.core.registry import register
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, Goal, Inputs, Reference
from robusthash.models.hasher import Hasher, frozen

_PAPERS = (
    "Dong et al., CVPR 2018 and 2019; Xie et al., CVPR 2019; Lin et al., ICLR 2020; Wang & He, CVPR 2021"
)


@register("attack-search", "transfer", paper=_PAPERS, evidence="paper")
@dataclass(frozen=True)
class TransferSteps(Search):
    """Iterated steps with momentum (MI-FGSM) and the tricks that carry over to unknown models.

    Args:
        steps: iterations.
        step_size: as a share of eps, the same for every modality.
        momentum: decay of the accumulated gradient, whose parts have mean |g| = 1 in each item.
        diversity: chance that an image is shrunk and padded before a pass (input diversity); 0 is off, 0.5
            published.
        shrink: the smallest such size, as a share of the side.
        nesterov: differentiate ahead, where the momentum carries to.
        scales: m passes at x / 2^i, i < m, averaged (scale invariance); 1 is off, 5 published.
        variance: n neighbours, uniform within ``radius`` eps of the point, whose mean gradient less that of
            the point is added in the next step (variance tuning); 0 is off, 20 published.
        radius: of the neighbourhood, in eps.
        smoothing: odd width of the Gaussian, of 3 sigma to each side, that blurs the gradient of an image
            (translation invariance); 0 is off, 7 to 15 published for 299 pixels.
        select_every: with ``select``, steps between two looks at the metric, each with a pass of its own.

    Differs: shrinking and padding is one bilinear map for each item, keyed by it (the papers draw one size
    for a batch and take the nearest pixel).
    """

    steps: int = 20
    step_size: float = 0.125
    momentum: float = 1.0
    diversity: float = 0.0
    shrink: float = 0.8
    nesterov: bool = False
    scales: int = 1
    variance: int = 0
    radius: float = 1.5
    smoothing: int = 0
    select_every: int = 10

    def __post_init__(self) -> None:
        for name, value, least in (
            ("steps", self.steps, 1),
            ("scales", self.scales, 1),
            ("variance", self.variance, 0),
            ("smoothing", self.smoothing, 0),
            ("select_every", self.select_every, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not 0.0 <= self.diversity <= 1.0 or not 0.0 < self.shrink <= 1.0:
            raise ValueError(f"diversity lies in [0, 1], shrink in (0, 1]: {self.diversity}, {self.shrink}")
        if not self.step_size > 0 or not self.radius > 0:
            raise ValueError(f"shares of eps above 0 are needed, got {self.step_size}, {self.radius}")
        if self.smoothing and self.smoothing % 2 == 0:
            raise ValueError(f"smoothing is an odd width, got {self.smoothing}")

    def __call__(
        self, score: Score, batch: Batch, threat: Threat, draws: Draws, select: Select | None, start: Start
    ) -> SearchResult:
        origin = {name: batch.inputs[name] for name in threat.balls}
        if (self.diversity or self.smoothing) and not any(value.dim() == 4 for value in origin.values()):
            raise ValueError(f"diversity and smoothing need images, not {threat.name}; set both to 0")
        eps = {name: ball.eps for name, ball in threat.balls.items()}
        x, trace, selection = starting_point(batch, threat, draws, start), [], Selection(select)
        speed, variance = _zeros(x), _zeros(x)
        for step in range(self.steps):
            progress, scope = step / self.steps, draws.within("transfer", step)
            if select is not None and step % self.select_every == 0:
                with torch.no_grad():
                    selection.offer(score(x, progress)[1], x)
            at = x
            if self.nesterov:
                reach = self.momentum * self.step_size
                at = {n: x[n] + reach * eps[n] * _unit(threat, n, speed[n]) for n in x}
            value, grad = self._gradient(score, at, batch.ids, progress, scope)
            trace.append(value.mean())
            total = {n: grad[n] + variance[n] for n in x}
            if self.variance:
                around = self._around(score, at, batch.ids, progress, scope, eps)
                variance = {n: around[n] - grad[n] for n in x}
            smooth = {n: _blurred(v, self.smoothing) for n, v in total.items()}
            speed = {n: self.momentum * speed[n] + _mean_one(smooth[n]) for n in x}
            direction = threat.steepest(speed, x)
            x = threat.project({n: x[n] + self.step_size * eps[n] * direction[n] for n in x}, origin)
        passes = self.steps * self.scales * (1 + self.variance)
        inputs, extra = selection.conclude(score, x)
        extra += -(-self.steps // self.select_every) if select is not None else 0
        return SearchResult(inputs, torch.stack(trace), passes + extra, passes)

    def _gradient(
        self, score: Score, x: Inputs, ids: Tensor, progress: float, draws: Draws
    ) -> tuple[Tensor, Inputs]:
        """(B,) score and its gradient, averaged over the scales, each seen through its own transform."""
        values, grads = [], _zeros(x)
        for scale in range(self.scales):
            scope = draws.within("scale", scale)

            def transformed(
                inputs: Inputs, progress: float, scale: int = scale, scope: Draws = scope
            ) -> tuple[Tensor, Tensor]:
                scaled = {n: self._transform(v / 2**scale, ids, scope) for n, v in inputs.items()}
                return score(scaled, progress)

            value, _, grad = ascend(transformed, x, progress)
            values.append(value)
            grads = {n: grads[n] + grad[n] / self.scales for n in x}
        return torch.stack(values).mean(0), grads

    def _around(
        self, score: Score, x: Inputs, ids: Tensor, progress: float, draws: Draws, eps: dict[str, float]
    ) -> Inputs:
        """Mean gradient over the neighbours of ``x``; they may leave the range, as published."""
        mean = _zeros(x)
        for number in range(self.variance):
            scope = draws.within("neighbour", number)
            moved = {}
            for name, value in x.items():
                noise = 2.0 * scope.within(name).uniform(ids, value.shape[1:]).to(value.dtype) - 1.0
                moved[name] = value + self.radius * eps[name] * noise
            grad = self._gradient(score, moved, ids, progress, scope)[1]
            mean = {n: mean[n] + grad[n] / self.variance for n in x}
        return mean

    def _transform(self, x: Tensor, ids: Tensor, draws: Draws) -> Tensor:
        """Each image, by chance, shrunk to a random size and put at a random place on black."""
        if x.dim() != 4 or not self.diversity:
            return x
        numbers = draws.within("diversity").uniform(ids, (4,)).to(x.dtype)
        shrunk = numbers[:, 0] < self.diversity
        size = torch.where(shrunk, self.shrink + (1.0 - self.shrink) * numbers[:, 1], 1.0)
        # an output place p in [-1, 1] samples (p - offset) / size: outside [-1, 1] it is padding
        offset = (1.0 - size)[:, None] * (2.0 * numbers[:, 2:] - 1.0)
        zoom = torch.diag_embed((1.0 / size)[:, None].expand(-1, 2))
        shift = (-offset / size[:, None])[:, :, None]
        grid = functional.affine_grid(torch.cat([zoom, shift], 2), list(x.shape), False)
        return functional.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _zeros(x: Inputs) -> Inputs:
    return {name: torch.zeros_like(value) for name, value in x.items()}


def _mean_one(grad: Tensor) -> Tensor:
    """The gradient of each item divided by its mean |g|."""
    return grad / per_item(grad.abs().flatten(1).mean(1).clamp_min(1e-12), grad)


def _unit(threat: Threat, name: str, speed: Tensor) -> Tensor:
    """``speed`` as a step of about the size of eps: of ``linf`` its parts have mean 1 already."""
    ball = threat.balls[name]
    return speed if ball.norm == "linf" else ball.steepest(speed)


def _blurred(grad: Tensor, width: int) -> Tensor:
    """The gradient of images blurred by a depthwise Gaussian; anything else as it is."""
    if not width or grad.dim() != 4:
        return grad
    steps = torch.linspace(-3.0, 3.0, width, dtype=grad.dtype, device=grad.device)
    line = torch.exp(-0.5 * steps.square())
    kernel = torch.outer(line, line) / line.sum().square()
    channels = grad.shape[1]
    weights = kernel.expand(channels, 1, width, width).contiguous()
    return functional.conv2d(grad, weights, padding=width // 2, groups=channels)


@dataclass(frozen=True)
class Surrogate:
    """A model that the attacker holds in place of the victim, with reference codes of its own.

    ``digest`` identifies weights and reference codes in the settings of an attack.
    """

    name: str
    hasher: Hasher
    reference: Reference | None
    digest: str


def transfer(
    attack: Attack,
    surrogates: Sequence[Surrogate],
    batch: Batch,
    goal: Goal,
    *,
    draws: Draws,
    start: Start = None,
) -> SearchResult:
    """Search on surrogates alone: ascend the mean of their scores, each guided by its own codes.

    With the scale-free loss every score lies in [-1, 1], so none dominates and code lengths may differ.
    Passes are counted once for each surrogate.

    Args:
        attack: its threat knows ``T``; a guide that learns is refused, since it would have to be fitted to
            each.
        batch: clean queries.
    """
    if not surrogates:
        raise ValueError("a transfer attack needs at least one surrogate")
    if attack.threat.knowledge != "T":
        raise ValueError(f"a transfer attack knows surrogates alone (T), not {attack.threat.knowledge}")
    if attack.guide.learns:
        raise ValueError(f"{type(attack.guide).__name__} learns on one model; take another, such as mainstay")
    with contextlib.ExitStack() as stack, torch.enable_grad():
        scores = []
        for surrogate in surrogates:
            stack.enter_context(frozen(surrogate.hasher))
            scores.append(attack.aim(surrogate.hasher, batch, goal, surrogate.reference, draws)[0])

        def together(inputs: Inputs, progress: float) -> tuple[Tensor, Tensor]:
            parts = [score(inputs, progress) for score in scores]
            return torch.stack([value for value, _ in parts]).mean(0), parts[0][1]

        result = attack.search(together, batch, attack.threat, draws.within(attack.name, 0), None, start)
    count = len(surrogates)
    return replace(result, forward=result.forward * count, backward=result.backward * count)


def customary_smoothing(images: Tensor) -> int:
    """Width of the Gaussian for (B, C, H, W): 15 of 299 pixels as published, odd, at least 3; else 0."""
    return max(3, 2 * math.floor(15 / 299 * images.shape[-1] / 2) + 1) if images.dim() == 4 else 0
