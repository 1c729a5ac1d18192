"""DSARH's hashing objective over image and text."""

from __future__ import annotations

import torch
from torch import Tensor

from robusthash.core.hamming import sign
from robusthash.core.registry import register
from robusthash.core.types import Batch, HashOutput, LossTerms, Outputs
from robusthash.objectives.code_memory import CodeMemory
from robusthash.objectives.pairwise import DPSH


@register(
    "objective", "dsarh", paper="DSARH, Zhang et al., manuscript 2024", evidence="paper", state="measured"
)
class DSARHObjective(DPSH):
    """DSARH's clean loss: asymmetric pair likelihood within and between modalities, and quantisation.

    L = L_vt + alpha L_vv + L_tv + beta L_tt + eta sum_m mean (h^m - sgn h^m)^2 (Eq 12-13, 15), where
    L_ab = mean_ij w_ij [softplus(T_ij) - S_ij T_ij], T_ij = h^a_i . b^b_j / 2, h relaxed codes of the batch
    and b the sign codes of the memory, held constant. An item is not compared with its own code of the same
    modality.

    Args:
        alpha: weight of image codes among themselves. Given nowhere in the paper; 1 is ours, as all these
            weights.
        beta: of text codes among themselves.
        eta: of the quantisation, 0.1.
        balance: weight similar pairs by #dissimilar / #similar of the training set (ours; off as in the
            paper).

    Differs: L_tv is added (the paper writes the image side only, which leaves the text encoder without a
    gradient from images). Terms are sums over the pairs of modalities, as the paper writes them, not means.
    """

    def __init__(
        self, alpha: float = 1.0, beta: float = 1.0, eta: float = 0.1, balance: bool = False
    ) -> None:
        super().__init__(eta, balance)
        self.alpha = alpha
        self.beta = beta

    def losses(self, output: HashOutput, labels: Tensor, codes: Tensor, code_labels: Tensor) -> Tensor:
        return super().losses(output, labels, sign(codes), code_labels)

    def forward(self, outputs: Outputs, batch: Batch, memory: CodeMemory) -> LossTerms:
        labels, bank_labels = batch.labels, memory.labels
        if labels is None or bank_labels is None:
            raise ValueError("DSARH is supervised, and this batch has no labels")
        intra = {"image": self.alpha, "text": self.beta}
        similarity = []
        for modality, output in outputs.items():
            for other, codes in memory.codes.items():
                pairs = self.losses(output, labels, codes, bank_labels)
                if other != modality:
                    similarity.append(pairs.mean())
                else:
                    pairs = pairs.scatter(
                        1, batch.ids[:, None], 0.0
                    )  # its inner product with itself says nothing
                    similarity.append(intra[modality] * pairs.sum() / max(1, pairs.numel() - len(pairs)))
        regularisation = [self.regularisation(output).mean() for output in outputs.values()]
        return {
            "similarity": torch.stack(similarity).sum(),
            "regularisation": torch.stack(regularisation).sum(),
        }
