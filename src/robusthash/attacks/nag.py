"""NAG: towards the code of a target item, by the gradients at the image and at a noisy copy of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robusthash.attacks.base import Attack, Loss, Probe, Score, Search, SearchResult, Select, Start
from robusthash.attacks.guides import Anchor
from robusthash.attacks.pgd import Selection, ascend, starting_point
from robusthash.attacks.threat_model import Threat, image_threat
from robusthash.core.registry import register
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, Guidance

_PAPER = "Xiao & Wang, CVPR 2021"


@register("attack-loss", "l1", paper=_PAPER, evidence="paper+code")
@dataclass(frozen=True)
class L1Closeness(Loss):
    """-(1/K) sum_k |h'_k - b_k|."""

    def __call__(self, probe: Probe, guidance: Guidance) -> Tensor:
        return -(probe.relaxed() - guidance.codes).abs().mean(1)


@register("attack-search", "noise-induced", paper=_PAPER, evidence="paper+code")
@dataclass(frozen=True)
class NoiseInduced(Search):
    """Sign steps up score(x') + weight * score(x' + n), n fresh in every step and uniform within ``radius``.

    The noisy copy is not clipped, as published. Starts at the clean input; two forward and two backward
    passes a step.
    """

    steps: int = 32
    step_size: float = 1 / 255
    radius: float = 32 / 255
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.step_size > 0 or self.radius < 0 or self.weight < 0:
            raise ValueError(
                f"steps from 1, step_size above 0, radius and weight from 0; got {self.steps}, "
                f"{self.step_size}, {self.radius}, {self.weight}"
            )

    def reach(self, threat: Threat) -> float:
        return self.steps * self.step_size

    def __call__(
        self, score: Score, batch: Batch, threat: Threat, draws: Draws, select: Select | None, start: Start
    ) -> SearchResult:
        origin = {name: batch.inputs[name] for name in threat.balls}
        x, trace, selection = starting_point(batch, threat, draws, start), [], Selection(select)
        for step in range(self.steps):
            scope = draws.within("noise", step)
            noise = {n: 2 * scope.uniform(batch.ids, v.shape[1:]).to(v) - 1 for n, v in x.items()}
            value, logits, plain = ascend(score, x, step / self.steps)
            noisy = {n: v + self.radius * noise[n] for n, v in x.items()}
            _, _, induced = ascend(score, noisy, step / self.steps)
            trace.append(value.mean())
            if step % 10 == 0:
                selection.offer(logits, x)
            grad = {n: plain[n] + self.weight * induced[n] for n in x}
            direction = threat.steepest(grad, x)
            x = threat.project({n: v + self.step_size * direction[n] for n, v in x.items()}, origin)
        x, extra = selection.conclude(score, x)
        return SearchResult(x, torch.stack(trace), 2 * self.steps + extra, 2 * self.steps)


@register(
    "attack", "nag", paper=_PAPER, evidence="paper+code", modality="image", targeted=True, state="measured"
)
def nag(
    eps: float | None = None, steps: int = 32, step_size: float = 1 / 255, radius: float = 32 / 255
) -> Attack:
    """NAG: towards the code of one database item with the target labels, also from a noisy copy. 32 steps.

    It is no generator: "generation" in its name is that of the attacked image, step by step. Made to carry
    over to other models: ``robusthash.attacks.transfer_search.transfer`` runs it on surrogates.

    Differs: projected to eps, where the paper's 32 steps of 1/255 are the budget themselves; the targets are
    those of the other targeted attacks (there picked by code distance, 12 to 18 of 48 bits); of the code's
    variants only the fixed weight of the noisy copy, without momentum or input diversity.
    """
    search = NoiseInduced(steps, step_size, radius)
    threat = image_threat(8 / 255 if eps is None else eps, knowledge="W2")
    return Attack("nag", Anchor(1), L1Closeness(), search, threat, targeted=True)
