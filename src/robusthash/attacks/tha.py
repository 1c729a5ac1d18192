"""THA: a net that learns the code of every label set from the victim's codes, and the attack towards it."""

from __future__ import annotations

from itertools import pairwise
from typing import Self

import torch
from torch import Tensor, nn

from robusthash.attacks.base import Attack, Guide
from robusthash.attacks.guides import known
from robusthash.attacks.losses import Agreement
from robusthash.attacks.published import CODE, Slope, steps_on
from robusthash.attacks.threat_model import Attacked, threat_on
from robusthash.core.hamming import sign
from robusthash.core.labels import relevant
from robusthash.core.registry import register
from robusthash.core.runtime import Draws, show_progress
from robusthash.core.types import Batch, Goal, Guidance, LossTerms, Reference
from robusthash.data.base import RetrievalData
from robusthash.models.hasher import Hasher
from robusthash.objectives.base import TrainFacts


def prototype_terms(prototypes: Tensor, label_sets: Tensor, codes: Tensor, labels: Tensor) -> LossTerms:
    """THA's loss: prototypes near the codes that share a label with them, far from the others.

    With s_ij = (1/K) p_i . b_j, weights a_p = max(0, 2 - s), a_n = max(0, 2 + s) held constant, and the
    log-sum-exp over all such pairs of the batch jointly: [LSE_n(a_n s) + LSE_p(-a_p s)] / B + (1e-4 / B)
    ||sgn p - p||^2.

    Differs: all pairs count (the published codes use the upper triangle of this B x N matrix, which means
    nothing); no softplus around the sum, as in the authors' code; a batch without similar, or without
    dissimilar, pairs leaves that part out.

    Args:
        prototypes, label_sets: (B, K) relaxed codes and the (B, C) label sets that they stand for.
        codes, labels: (N, K) in {-1, +1} and (N, C).
    """
    similarity = prototypes @ codes.T / codes.shape[1]
    near = relevant(label_sets, labels)
    pull = (2.0 - similarity.detach()).clamp_min(0.0)
    push = (2.0 + similarity.detach()).clamp_min(0.0)
    parts = [(push * similarity)[~near], (-pull * similarity)[near]]
    pairs = torch.stack([part.logsumexp(0) if len(part) else prototypes.sum() * 0.0 for part in parts]).sum()
    spread = (sign(prototypes.detach()) - prototypes).square().sum()
    return {"prototype": pairs / len(label_sets), "prototype/quantisation": 1e-4 * spread / len(label_sets)}


@register("attack-guide", "prototype", paper="THA, SIGIR 2021", evidence="paper+code", targeted=True)
class Prototype(nn.Module, Guide):
    """PrototypeNet: goal labels (C) -> Linear -> ReLU -> Linear -> Linear K -> tanh; its sign is the code.

    It must know the codes of the victim: ``fitted`` trains one on a reference, and adversarial training makes
    it with ``setup`` and trains it along by ``terms``.

    Args:
        hidden, middle: widths, 4096 and 512 in the paper.
        steps: of ``fitted``, 32 label sets each, Adam with betas (0.5, 0.999) from a rate of 1e-4, a tenth of
            it at half and at three quarters of the steps. 30,000 in the paper. By default ("until settled")
            the codes of all label sets are compared every 500 steps: where at most 0.5 % of their bits
            changed, the rate falls to a tenth, and where none changed, or after 30,000 steps, the fit ends.
    """

    BATCH = 32
    RATE = 1e-4
    MOST = 30_000
    EVERY = 500
    SETTLED = 0.005
    label_codes = True
    learns = True

    def __init__(self, hidden: int = 4096, middle: int = 512, steps: int | None = None) -> None:
        super().__init__()
        if min(hidden, middle, 1 if steps is None else steps) < 1:
            raise ValueError(f"hidden, middle, steps must be at least 1, got {hidden}, {middle}, {steps}")
        self.widths = (hidden, middle)
        self.steps = steps
        self.fit_steps = 0  # that the last fit took
        self.net = nn.Sequential()

    def __repr__(self) -> str:
        """The options alone; the net depends on the victim."""
        hidden, middle = self.widths
        return f"Prototype(hidden={hidden}, middle={middle}, steps={self.steps or 'until settled'})"

    def identity_options(self) -> dict[str, int | None]:
        """Everything that a fit depends on, other than the victim."""
        hidden, middle = self.widths
        return {"hidden": hidden, "middle": middle, "steps": self.steps}

    def fit_size(self, items: int) -> int:
        return self.BATCH * (self.steps or self.MOST)

    def setup(self, facts: TrainFacts) -> None:
        """Draw the weights, uniform within 1 / sqrt(inputs) as ``nn.Linear`` does, from the seed alone."""
        sizes = self._layers(facts.classes, facts.bits)
        generator = Draws(facts.seed, ("prototype",)).generator()
        layers = [nn.utils.skip_init(nn.Linear, *ends) for ends in pairwise(sizes)]
        with torch.no_grad():
            for layer in layers:
                bound = layer.in_features**-0.5
                for parameter in layer.parameters():
                    parameter.uniform_(-bound, bound, generator=generator)
        self.net = nn.Sequential(layers[0], nn.ReLU(), *layers[1:], nn.Tanh())

    def _layers(self, classes: int, bits: int) -> tuple[int, ...]:
        """Widths from label set to code."""
        return classes, *self.widths, bits

    def prototypes(self, labels: Tensor) -> Tensor:
        """(B, C) label sets -> (B, K) relaxed codes; refused before ``setup`` or ``fitted``."""
        if not len(self.net):
            raise ValueError("these prototypes are not learned yet: call attack.fit(...) on the victim")
        with torch.autocast(labels.device.type, enabled=False):  # rounding to bf16 would decide bits
            return self.net(labels.float())

    def terms(self, goal_labels: Tensor | None, reference: Reference | None, draws: Draws) -> LossTerms:
        """The loss on one batch of label sets; see ``prototype_terms``."""
        codes, labels, label_sets = known(reference, Goal(goal_labels, +1))
        return prototype_terms(self.prototypes(label_sets), label_sets, codes, labels)

    def forward(
        self, victim: Hasher, batch: Batch, goal: Goal, reference: Reference | None, draws: Draws
    ) -> Guidance:
        if goal.labels is None:
            raise ValueError("the guide 'prototype' needs goal labels: use labelled data")
        return Guidance(self._codes(goal.labels))

    def fitted(self, victim: Hasher, data: RetrievalData, reference: Reference | None, draws: Draws) -> Self:
        """A net of the same widths, trained on the reference; batches are drawn from its label sets."""
        labels = None if reference is None else reference.labels
        if reference is None or labels is None:
            raise ValueError("THA learns from labelled reference codes: use a W1 or W2 threat and labels")
        guide = type(self)(*self.widths, self.steps)
        guide.setup(TrainFacts(len(labels), victim.bits, labels, draws.key(), 0.0))
        guide.to(victim.device)
        sets = torch.unique(labels.cpu(), dim=0)
        sets = sets[sets.sum(1) > 0].to(victim.device)
        optimiser = torch.optim.Adam(guide.parameters(), self.RATE, betas=(0.5, 0.999), fused=True)
        rows, codes = torch.arange(self.BATCH), None
        for step in range(self.steps or self.MOST):
            if self.steps is None and step % self.EVERY == 0:
                before, codes = codes, guide._codes(sets)
                changed = 1.0 if before is None else float((codes != before).float().mean())
                if changed == 0.0:
                    break
                slower = changed <= self.SETTLED
            else:
                slower = (
                    self.steps is not None and step in (self.steps // 2, self.steps * 3 // 4) and step > 0
                )
            if slower:
                optimiser.param_groups[0]["lr"] *= 0.1
            sample = (draws.within(step).uniform(rows, ()) * len(sets)).long().to(sets.device)
            with torch.enable_grad():
                loss = torch.stack(list(guide.terms(sets[sample], reference, draws).values())).sum()
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            guide.fit_steps = step + 1
            show_progress(step + 1, self.steps or self.MOST, "steps of the target codes, at most")
        return guide.requires_grad_(False)

    def _codes(self, sets: Tensor) -> Tensor:
        """(S, K) signs of the prototypes of these label sets."""
        with torch.no_grad():
            return sign(self.prototypes(sets))


@register("attack", "tha", paper="Wang et al., SIGIR 2021", targeted=True, **CODE)
def tha(
    eps: float | None = None,
    steps: int = 100,
    step_size: float | None = None,
    slope: Slope = "one",
    random_start: bool = False,
    fit_steps: int | None = None,
    hidden: int = 4096,
    modality: Attacked = "image",
) -> Attack:
    """THA: towards the code of the target labels by a prototype net fitted to the victim's training codes.

    100 steps in the paper, alpha = 1 as in the authors' code (SAAT's copy schedules it). ``random_start`` is
    off in evaluation and on inside ATRDH. Differs: the net is fitted until its codes settle, see
    ``Prototype``, and at most the paper's 30,000 steps (``fit_steps``: exactly this number); results note the
    steps taken.
    """
    search = steps_on(modality, steps, step_size, random_start)
    guide = Prototype(hidden, steps=fit_steps)
    return Attack("tha", guide, Agreement(), search, threat_on(modality, eps), slope, targeted=True)
