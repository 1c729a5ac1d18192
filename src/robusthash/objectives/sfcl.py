"""SFCL's semantic loss: pair likelihoods within each modality and between the two."""

from __future__ import annotations

import torch
from torch import Tensor

from robusthash.core.registry import register
from robusthash.core.types import Batch, LossTerms, Outputs
from robusthash.objectives.memory import CodeMemory
from robusthash.objectives.pairwise import DPSH


@register("objective", "sfcl", paper="SFCL, ICMR 2026", evidence="paper", state="measured")
class SFCLObjective(DPSH):
    """SFCL's L_sem: intra-modal likelihoods (Eq. 11), inter-modal ones (Eq. 12) and quantisation, summed.

    L_sem = intra (L_vv + L_tt) + (L_vt + L_tv) + eta sum_m mean (h^m - sgn h^m)^2, where
    L_ab = mean_ij w_ij [softplus(T_ij) - S_ij T_ij], T_ij = h^a_i . h^b_j / 2, i over the batch and j over the memory
    of all training items, held constant. Over images alone only L_vv is left.

    Args:
        intra: weight of the intra-modal terms, 1 in the paper; 0 leaves Eq. 11 out.
        eta: weight of the quantisation in mean form, 0.1. The paper prints an unnormalised sum next to means, with
            "internal settings as DCMH".
        balance: weight similar pairs, see ``PairLikelihood`` (ours; off as in the paper).

    Raises:
        ValueError: a negative weight.

    Differs: the balance of bits, which is DCMH's, is not in the paper's L_sem and not here. A pair of an item with
    itself stays among the N x M pairs, as printed.
    """

    def __init__(self, intra: float = 1.0, eta: float = 0.1, balance: bool = False) -> None:
        super().__init__(eta, balance)
        if intra < 0.0:
            raise ValueError(f"intra is a weight of at least 0, got {intra:g}")
        self.intra_weight = intra

    def forward(self, outputs: Outputs, batch: Batch, memory: CodeMemory) -> LossTerms:
        """Terms ``intra``, ``inter`` (where there are two modalities) and ``regularisation``."""
        labels, bank_labels = batch.labels, memory.labels
        if labels is None or bank_labels is None:
            raise ValueError("the objective 'sfcl' is supervised, and this batch has no labels")
        within: list[Tensor] = []
        between: list[Tensor] = []
        for modality, output in outputs.items():
            for other, codes in memory.codes.items():
                mean = self.similarity(output, labels, codes, bank_labels).mean()
                (within if other == modality else between).append(mean)
        terms = {"intra": self.intra_weight * torch.stack(within).sum()}
        if between:
            terms["inter"] = torch.stack(between).sum()
        spread = [self.regularisation(output).mean() for output in outputs.values()]
        return {**terms, "regularisation": torch.stack(spread).sum()}
