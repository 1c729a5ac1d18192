"""DGCPN: similarity by the shared neighbours of items in a graph of fixed features. Unsupervised."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from robusthash.core.hamming import sign
from robusthash.core.registry import register
from robusthash.core.types import Batch, LossTerms, Outputs
from robusthash.objectives.base import CodeMemory, TrainFacts
from robusthash.objectives.dadh import unit
from robusthash.objectives.similarity_matrices import squared
from robusthash.objectives.unsupervised import Features, FixedSimilarity


@register(
    "objective",
    "dgcpn",
    paper="Yu et al., AAAI 2021",
    evidence="paper+code",
    supervised=False,
    state="measured",
)
class DGCPN(FixedSimilarity):
    """DGCPN: coherence of graph neighbours, within and across modalities. Unsupervised.

    C = text cos_T + (1 - text) cos_I over the N training items; P keeps the n largest entries of each row of
    C but the item's own, divided by their sum; D = 2 n P P^T; S = 2 [(1 - graph) C + graph D] - 1. L =
    MSE(diag IT, 1.5) + similarity * sum over II, TT, IT of the mean off-diagonal (. - S)^2 + coherence
    [MSE(IT, II) + MSE(IT, TT) + MSE(II, TT) + MSE(IT, IT^T)], for the relaxed codes of both, and with the
    sign, held constant, of either one ("half-real, half-binary").

    Args:
        text: share of the text cosines, 0.01 in the code.
        graph: share of the neighbours' part, 0.3.
        neighbours: n as a share of the training items; 0.4 in the paper (2,000 of 5,000). Take about the
            share of items that a class has.
        similarity, coherence: weights, 1 and 1.
        image_features, text_features: see ``FixedSimilarity``.

    Cost: as DJSRH, and B * N * D operations a step for the rows of C that the batch needs; no N x N matrix is
    kept (the code keeps several). Differs: the three updates of a batch are one, of the mean of their losses;
    the code's factor 4,000 before P P^T is 2 n for its n = 2,000, and follows n here; its ``knn_number`` is
    the number of items dropped. Negative entries of C are 0 in P.
    """

    def __init__(
        self,
        text: float = 0.01,
        graph: float = 0.3,
        neighbours: float = 0.4,
        similarity: float = 1.0,
        coherence: float = 1.0,
        image_features: Features = "efficientnet-lite0",
        text_features: Features = "raw",
    ) -> None:
        if not 0.0 < neighbours < 1.0:
            raise ValueError(f"neighbours is a share of training items between 0 and 1, got {neighbours:g}")
        super().__init__(image_features, text_features)
        self.text = text
        self.graph = graph
        self.neighbours = neighbours
        self.similarity_weight = similarity
        self.coherence = coherence

    def setup(self, facts: TrainFacts) -> None:
        super().setup(facts)
        self.neighbour_count = max(1, min(facts.items - 1, round(self.neighbours * facts.items)))

    def target(self, ids: Tensor) -> Tensor:
        """(B, B) S of these training items."""
        image, text = self.fixed_image, self.fixed_text
        rows = self.text * text[ids] @ text.T + (1 - self.text) * image[ids] @ image.T  # (B, N)
        others = rows.scatter(1, ids[:, None], -torch.inf)
        near = others.topk(self.neighbour_count, 1)
        shares = torch.zeros_like(rows).scatter(1, near.indices, near.values.clamp_min(0.0))
        shares = shares / shares.sum(1, keepdim=True).clamp_min(1e-8)
        graph = 2.0 * self.neighbour_count * shares @ shares.T
        return 2.0 * ((1 - self.graph) * rows[:, ids] + self.graph * graph) - 1.0

    def forward(self, outputs: Outputs, batch: Batch, memory: CodeMemory) -> LossTerms:
        """Terms ``similarity`` and, where both modalities are known, ``pairs`` and ``coherence``."""
        target = self.target(batch.ids)
        total: LossTerms = {}
        views = list(_half_binary(self.directions(outputs, batch, memory)))
        for codes in views:
            for name, value in self._terms(codes, target).items():
                total[name] = total.get(name, 0.0) + value / len(views)
        return total

    def _terms(self, codes: dict[str, Tensor], target: Tensor) -> LossTerms:
        cosines = [code @ code.T for code in codes.values()]
        apart = ~torch.eye(len(target), dtype=torch.bool, device=target.device)
        if len(codes) < 2:
            return {"similarity": self.similarity_weight * _off(cosines[0] - target, apart)}
        images, texts = cosines
        crossed = codes["image"] @ codes["text"].T
        similar = torch.stack([_off(matrix - target, apart) for matrix in (images, texts, crossed)]).sum()
        pairs = [(crossed, images), (crossed, texts), (images, texts), (crossed, crossed.T)]
        coherent = torch.stack([squared(left, right) for left, right in pairs]).sum()
        return {
            "similarity": self.similarity_weight * similar,
            "pairs": squared(crossed.diagonal(), 1.5),
            "coherence": self.coherence * coherent,
        }


def _off(difference: Tensor, apart: Tensor) -> Tensor:
    """Mean square off the diagonal; 0 for a batch of one item."""
    return (difference.square() * apart).sum() / apart.sum().clamp_min(1)


def _half_binary(codes: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The codes as they are, and with the sign of one modality, held constant, instead of its code."""
    yield codes
    if len(codes) == 2:
        for name in codes:
            yield {**codes, name: unit(sign(codes[name].detach()))}
