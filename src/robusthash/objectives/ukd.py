"""UKD's student: the pair likelihood of a supervised objective on the neighbours that a teacher found."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from robusthash.core.registry import register
from robusthash.core.types import Batch, LossTerms, Outputs
from robusthash.objectives.base import CodeMemory, TrainFacts
from robusthash.objectives.cross_modal import CrossLikelihood


def nearest(features: Tensor, count: int, block: int = 1024) -> Tensor:
    """(N, count) the nearest rows of (N, D) features to each by Euclidean distance, itself among them."""
    distances = (torch.cdist(rows, features) for rows in features.split(block))
    return torch.cat([rows.topk(count, 1, largest=False).indices for rows in distances])


@register(
    "objective",
    "ukd",
    paper="Hu et al., CVPR 2020",
    evidence="paper+code",
    supervised=False,
    state="measured",
)
class UKD(CrossLikelihood):
    """UKD: the student of unsupervised knowledge distillation; the recipe ``ukd`` trains its teacher first.

    S_ij = 1 where j is among the nearest neighbours of i by the teacher's image or text features. L = mean_ij
    w [softplus(T_ij) - S_ij T_ij] across modalities + gamma mean (B - h)^2, as DCMH's. Labels are never seen;
    ``similarity``, which an attack on the objective ascends, is that of the attacker's labels.

    Args:
        neighbours: of each modality, as a share of the training items.
        gamma: weight of the quantisation.
        balance: weight similar pairs by #others / #similar (ours; on, since neighbours are few).

    Cost: the teacher's training, N^2 * D operations once for the neighbours, then as DCMH. Differs: the
    teacher is any unsupervised objective of ours (``djsrh``), UGACH in the paper; the student has DCMH's
    terms, where the paper's is SSAH-like; S is 1 where the code has 0.999. The code's number of neighbours
    gives a tenth to a third of all pairs by its data set; here it is a share.
    """

    supervised = False
    near: Tensor

    def __init__(self, neighbours: float = 0.05, gamma: float = 0.1, balance: bool = True) -> None:
        if not 0.0 < neighbours < 1.0:
            raise ValueError(f"neighbours is a share of training items between 0 and 1, got {neighbours:g}")
        super().__init__(gamma, balance)
        self.neighbours = neighbours
        self.register_buffer("near", torch.empty(0, dtype=torch.int64))  # (N, neighbours of all modalities)

    def setup(self, facts: TrainFacts) -> None:
        if set(facts.widths) != {"image", "text"}:
            raise ValueError(f"UKD learns from pairs of an image and its text, not {[*facts.widths]}")
        if facts.items < 2:
            raise ValueError(f"UKD learns which items are near, and needs at least 2, got {facts.items}")
        count = max(1, round(self.neighbours * facts.items))
        self.near = torch.zeros(facts.items, 2 * count, dtype=torch.int64, device=self.near.device)

    def teach(self, features: Mapping[str, Tensor]) -> None:
        """Set the neighbours by the features (N, D) of every training item in each modality."""
        count = self.near.shape[1] // 2
        self.near.copy_(torch.cat([nearest(rows, count) for rows in features.values()], 1))
        if self.balance:
            rows = (self.similar(ids).mean() * len(ids) for ids in torch.arange(len(self.near)).split(1024))
            share = float(torch.stack(list(rows)).sum()) / len(self.near)
            self.similar_weight.fill_((1.0 - share) / share)

    def similar(self, ids: Tensor) -> Tensor:
        """(B, N) 1 for the neighbours of these training items by either modality."""
        rows = torch.zeros(len(ids), len(self.near), device=self.near.device)
        return rows.scatter(1, self.near[ids], 1.0)

    def forward(self, outputs: Outputs, batch: Batch, memory: CodeMemory) -> LossTerms:
        if not self.near.any():
            raise ValueError("ukd learns from a teacher, and has none; set training.recipe: ukd")
        similar = self.similar(batch.ids)
        weight = 1.0 + (self.similar_weight - 1.0) * similar
        losses = [
            (weight * self.pair_losses(o, similar, codes)).mean() for o, codes in self.pairs(outputs, memory)
        ]
        joint = self.joint(memory, batch)
        distances = [(output.code - joint).square().mean() for output in outputs.values()]
        regularisation = self.gamma * torch.stack(distances).mean()
        return {"similarity": torch.stack(losses).mean(), "regularisation": regularisation}
