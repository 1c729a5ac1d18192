"""A2-Net: ADSH whose bits reconstruct the features, and are decorrelated over the batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from robusthash.core.registry import register
from robusthash.core.types import Batch, LossTerms, Outputs
from robusthash.objectives.adsh import ADSH
from robusthash.objectives.base import CodeMemory, TrainFacts


def correlation(codes: Tensor) -> Tensor:
    """Mean over pairs of bits of (U^T U / B - I)^2 for codes U (B, K)."""
    count, bits = codes.shape
    return mse_loss(codes.T @ codes / count, torch.eye(bits, device=codes.device, dtype=codes.dtype))


@register("objective", "a2-net", paper="Wei et al., NeurIPS 2021", evidence="paper+code", state="measured")
class A2Net(ADSH):
    """A2-Net: each bit an attribute of the features, from which a linear decoder gives them back.

    ADSH's loss, with the recipe ``asymmetric``, + reconstruction mean (D v - f)^2 + decorrelation mean ((U^T
    U / B - I))^2, v the logits, U = tanh v, f the features before the head, held constant, D a decoder that
    only training needs. One forward and backward pass an item, and O(D K).

    Args:
        gamma, soft: of ``ADSH``.
        reconstruction, decorrelation: weights, 1 each (ours; published ports have 1, and 1 or 0.1 in other
            scales).

    Differs: the paper's net of attention over regions of the image is not built, the attributes are those of
    the run's own encoder; read in the paper's abstract and in two ports of the loss.
    """

    training_only = ("critics", "decoders")

    def __init__(
        self,
        gamma: float = 200.0,
        soft: bool = True,
        reconstruction: float = 1.0,
        decorrelation: float = 1.0,
    ) -> None:
        super().__init__(gamma, soft)
        self.reconstruction = reconstruction
        self.decorrelation = decorrelation

    def setup(self, facts: TrainFacts) -> None:
        super().setup(facts)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(facts.seed)
            heads = {name: nn.Linear(facts.bits, width) for name, width in facts.widths.items()}
        self.decoders = nn.ModuleDict(heads)

    def forward(self, outputs: Outputs, batch: Batch, memory: CodeMemory) -> LossTerms:
        """The terms of ADSH, ``reconstruction`` and ``decorrelation``."""
        terms = super().forward(outputs, batch, memory)
        again = [
            mse_loss(self.decoders[name](output.logits), output.features.detach())
            for name, output in outputs.items()
        ]
        apart = [correlation(output.code) for output in outputs.values()]
        terms["reconstruction"] = self.reconstruction * torch.stack(again).mean()
        terms["decorrelation"] = self.decorrelation * torch.stack(apart).mean()
        return terms
