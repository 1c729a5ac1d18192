"""OrthoHash: one cosine softmax towards fixed random codes of the classes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, normalize

from robusthash.core.registry import register
from robusthash.core.runtime import Draws
from robusthash.core.types import HashOutput
from robusthash.objectives.base import TrainFacts
from robusthash.objectives.centers import CSQ


@register("objective", "orthohash", paper="Hoe et al., NeurIPS 2021", evidence="paper+code", state="measured")
class OrthoHash(CSQ):
    """OrthoHash: softmax over classes of the cosine between logits and the class's fixed random code.

    L = -sum_c (y_c / |y|) log softmax_c(s (cos(z, O_c) - m y_c)), z the logits. Its head is ``batchnorm``,
    which balances each bit; quantisation needs no term of its own, since a cosine of 1 is a code. The loss
    does not change with the size of z. One forward and backward pass an item, and O(C K).

    Args:
        scale: s, 8 in the authors' code.
        margin: m on the own classes' cosine, 0.2 there.

    Differs: batch normalisation is in the head, so that retrieval has the thresholds of training (SAAT's
    code has it inside of the loss alone). Class codes are drawn bit by bit, as by the authors; their search
    for distant codes is left out. An item without labels has no loss.
    """

    def __init__(self, scale: float = 8.0, margin: float = 0.2) -> None:
        if scale <= 0:
            raise ValueError(f"scale must be above 0, got {scale:g}")
        super().__init__(quantisation=0.0)
        self.scale = scale
        self.margin = margin

    def setup(self, facts: TrainFacts) -> None:
        super().setup(facts)  # the filler of ``targets``
        generator = Draws(facts.seed, ("orthohash",)).within("codes").generator()
        numbers = torch.rand(facts.classes, facts.bits, generator=generator)
        self.centers = torch.where(numbers < 0.5, -1.0, 1.0).to(self.filler.device)

    def similarity(self, output: HashOutput, labels: Tensor, codes: Tensor, code_labels: Tensor) -> Tensor:
        cosine = normalize(output.logits, eps=1e-8) @ normalize(self.centers).T
        share = labels / labels.sum(1, keepdim=True).clamp_min(1.0)
        return -(share * log_softmax(self.scale * (cosine - self.margin * labels), 1)).sum(1)
