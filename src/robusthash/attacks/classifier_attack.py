"""Examples made against a classifier, and shown to a hashing model that took no part (DSARH, Table V)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from robusthash.attacks.base import Attack, Loss, Probe
from robusthash.attacks.pgd import PGD
from robusthash.attacks.substitute import Substituted
from robusthash.attacks.threat_model import image_threat
from robusthash.core.registry import register
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, Goal, Guidance, Outputs, Reference
from robusthash.data.base import RetrievalData
from robusthash.models.hasher import Hasher

_PAPER = "DSARH, Zhang et al., manuscript 2024"


@dataclass(frozen=True)
class Classified(Guidance):
    """No code, and whether the classifier chooses one label or decides on each."""

    exclusive: bool = False


def classification(logits: Tensor, labels: Tensor, exclusive: bool) -> Tensor:
    """(B,) cross-entropy of (B, C) logits; of label sets, not ``exclusive``, the mean binary one."""
    if exclusive:
        return cross_entropy(logits, labels.argmax(1), reduction="none")
    return binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1)


@register("attack-guide", "classifier", paper=_PAPER, evidence="paper")
@dataclass(frozen=True)
class ClassifierGuide(Substituted):
    """A classifier of the data's labels, trained on the training images; it gives no code."""

    exclusive: bool = field(default=False, compare=False)  # every training item has one label

    def fitted(
        self, victim: Hasher, data: RetrievalData, reference: Reference | None, draws: Draws
    ) -> ClassifierGuide:
        if data.train.labels is None:
            raise ValueError(f"{data.name} has no training labels, which a classifier learns")
        exclusive = bool((data.train.labels.sum(1) == 1).all())
        model = self.new_model(victim, data, data.train.labels.shape[1], draws)

        def loss(outputs: Outputs, batch: Batch, scope: Draws) -> Tensor:
            assert batch.labels is not None
            return classification(outputs["image"].logits, batch.labels, exclusive).mean()

        steps = self.train_substitute(model, data.train, draws, loss)
        learned = replace(self, model=model, exclusive=exclusive)
        return replace(learned, fit_steps=steps, fit_items=len(data.train))

    def __call__(
        self, victim: Hasher, batch: Batch, goal: Goal, reference: Reference | None, draws: Draws
    ) -> Classified:
        if goal.labels is None:
            raise ValueError("examples against a classifier need labels: use labelled data")
        return Classified(torch.empty(0, victim.bits, device=victim.device), exclusive=self.exclusive)


@register("attack-loss", "classification", paper=_PAPER, evidence="paper")
@dataclass(frozen=True)
class Classification(Loss):
    """Minus the cross-entropy of the labels: cross-entropy of one label, binary ones of several."""

    def __call__(self, probe: Probe, guidance: Guidance) -> Tensor:
        if probe.goal.labels is None or not isinstance(guidance, Classified):
            raise ValueError("the loss 'classification' needs labels and the guide 'classifier'")
        return -classification(probe.outputs["image"].logits, probe.goal.labels, guidance.exclusive)


@register(
    "attack",
    "classifier",
    paper=_PAPER,
    evidence="paper",
    modality="image",
    state="measured",
    published={"steps": 10},
)
def classifier(
    eps: float | None = None,
    steps: int = 10,
    step_size: float = 2 / 255,
    encoder: str | dict[str, Any] = "small",
    epochs: int = 20,
    rate: float = 1e-3,
) -> Attack:
    """PGD on a classifier by the true labels; the hashing model sees the result alone (T).

    The paper's is a ResNet-50: ``encoder: {name: resnet50, weights: FILE}``. Steps, step size and the loss of
    several labels are ours, since the paper names none. The classifier is trained on the training images.
    """
    threat = image_threat(8 / 255 if eps is None else eps, knowledge="T")
    guide = ClassifierGuide(encoder, epochs, rate)
    return Attack("classifier", guide, Classification(), PGD(steps, step_size), threat)
