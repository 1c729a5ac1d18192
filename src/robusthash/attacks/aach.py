"""AACH: a substitute learned from the codes that a search service answers, and steps on it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from robusthash.attacks.base import Attack
from robusthash.attacks.losses import Agreement
from robusthash.attacks.oracle import QueryOracle
from robusthash.attacks.pgd import PGD
from robusthash.attacks.substitute import Substituted, answered_modalities, sample
from robusthash.attacks.threat_model import image_threat
from robusthash.core.hamming import pack, sign
from robusthash.core.registry import register
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, Codes, Goal, Guidance, Outputs, Reference
from robusthash.data.base import RetrievalData
from robusthash.models.hasher import Hasher

_PAPER = "Li et al., ICCV 2021"
NEAR, FAR = 0.05, 0.5
"""Shares of the known codes that count as nearest (positives) and farthest (negatives)."""


def near_and_far(codes: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """(B, M) bool: the nearest 5 % and the farthest 50 % of the known codes, at least one of each."""
    order = (codes @ known.T).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)
    count = len(known)
    return rank < max(1, round(NEAR * count)), rank >= count - max(1, round(FAR * count))


def triplet_loss(anchor: Tensor, positive: Tensor, negative: Tensor, margin: float = 0.25) -> Tensor:
    """Mean max(0, d(a, p) - d(a, n) + margin) over rows, d the relaxed Hamming distance over K, in [0, 1]."""
    bits = anchor.shape[1]
    near, far = ((1 - (anchor * other).sum(1) / bits) / 2 for other in (positive, negative))
    return (near - far + margin).clamp_min(0).mean()


@register("attack-guide", "substitute-codes", paper=_PAPER, evidence="reconstruction", supervised=False)
@dataclass(frozen=True)
class AnsweredCodes(Substituted):
    """The mean of the nearest answered codes minus that of the farthest, as the substitute sees the query.

    Args:
        questions: training items that are sent to the victim, one oracle query in each modality.
    """

    questions: int = 2000
    known: Tensor | None = field(default=None, compare=False)

    def fit_size(self, items: int) -> int:
        return self.epochs * min(self.questions, items)

    def fitted(
        self, victim: Hasher, data: RetrievalData, reference: Reference | None, draws: Draws
    ) -> AnsweredCodes:
        """Ask, and train the substitute on the answers: triplets across modalities, and the codes."""
        modalities, rows = answered_modalities(victim, data), sample(data, self.questions, draws)
        split = data.train.take(rows)
        answers = {name: answered_codes(victim, split, name) for name in modalities}
        other = modalities[-1]  # text where there is any
        model = self.new_model(victim, data, victim.bits, draws)

        def loss(outputs: Outputs, batch: Batch, scope: Draws) -> Tensor:
            total = torch.zeros((), device=victim.device)
            for name, output in outputs.items():
                own, across = answers[name][batch.ids], answers[other if name == "image" else "image"]
                near, far = near_and_far(own, across)
                chance = scope.within(name).uniform(batch.ids, (2, len(across)))
                pick = [(chance[:, i] * mask).argmax(1) for i, mask in enumerate((near, far))]
                total = total + triplet_loss(output.relaxed(), across[pick[0]], across[pick[1]])
                total = total + mse_loss(output.relaxed(), own)
            return total

        steps = self.train_substitute(model, split, draws, loss)
        oracle_queries = len(rows) * len(modalities)
        learned = replace(self, fit_steps=steps, fit_queries=oracle_queries, fit_items=len(rows))
        return replace(learned, model=model, known=answers[other])

    def __call__(
        self, victim: Hasher, batch: Batch, goal: Goal, reference: Reference | None, draws: Draws
    ) -> Guidance:
        model = self.required
        assert self.known is not None
        with torch.no_grad():
            codes = sign(model({"image": batch.inputs["image"]})["image"].logits)
        near, far = (mask.float() for mask in near_and_far(codes, self.known))
        towards, away = (m @ self.known / m.sum(1, keepdim=True) for m in (near, far))
        return Guidance((towards - away).to(batch.inputs["image"]) / 2)


def answered_codes(victim: Hasher, split: Any, modality: str, size: int = 128) -> Tensor:
    """(M, K) codes that the victim's service answers, one counted oracle query for each item."""
    nothing = Codes(pack(torch.ones(1, victim.bits)), victim.bits, torch.arange(1))
    oracle, codes = QueryOracle(victim, nothing, 1), []
    for rows in torch.arange(len(split)).split(size):
        batch = split.batch(rows).only({modality}).to(victim.device)
        codes.append(oracle.codes(batch).rows().float())
    return torch.cat(codes).to(victim.device)


@register(
    "attack",
    "aach",
    paper=_PAPER,
    evidence="reconstruction",
    modality="image",
    supervised=False,
    state="measured",
    published={"steps": 20},
)
def aach(
    eps: float | None = None,
    steps: int = 20,
    step_size: float = 1 / 255,
    questions: int = 2000,
    encoder: str | dict[str, Any] = "small",
    epochs: int = 20,
    rate: float = 1e-3,
) -> Attack:
    """AACH: away from what is near and towards what is far, on a substitute learned from ``questions`` codes.

    No gradient of the victim, no labels, and no oracle query per attacked item: all come before the first.
    Only the abstract was read: triplets of pairs by Hamming distance; their numbers (5 % nearest, 50 %
    farthest, margin 0.25), the regression on the codes, steps and nets are ours. Of images
    alone the triplets are of images.
    """
    threat = image_threat(8 / 255 if eps is None else eps, knowledge="B2")
    guide = AnsweredCodes(encoder, epochs, rate, questions=questions)
    return Attack("aach", guide, Agreement(), PGD(steps, step_size), threat)
