"""SFCL's semantic loss: pair likelihoods within each modality and between the two."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from robusthash.core.registry import register
from robusthash.core.types import Batch, LossTerms, Outputs
from robusthash.objectives.code_memory import CodeMemory
from robusthash.objectives.pairwise import DPSH


@register("objective", "sfcl", paper="SFCL, ICMR 2026", evidence="paper", state="measured")
class SFCLObjective(DPSH):
    """SFCL's L_sem: intra-modal likelihoods (Eq. 11), inter-modal ones (Eq. 12) and quantisation, summed.

    L_sem = intra (L_vv + L_tt) + (L_vt + L_tv) + eta sum_m mean (h^m - sgn h^m)^2, where
    L_ab = mean_ij w_ij [softplus(T_ij) - S_ij T_ij], T_ij = h^a_i . h^b_j / 2, i over the batch and j over
    the memory of all training items, held constant. Over images alone only L_vv is left.

    The paper also says "internal settings as DCMH". ``settings: dcmh`` reads that as DCMH's two further
    terms: the quantisation goes to the code that both modalities share, eta mean (B - h)^2, and bits are
    balanced, eta mean_k (mean_i h_ik)^2, both averaged over the modalities.

    Args:
        intra: weight of the intra-modal terms, 1 in the paper; 0 leaves Eq. 11 out.
        eta: weight of the quantisation in mean form, 0.1. The paper prints an unnormalised sum next to means,
            with no weight.
        settings: ``printed``, or ``dcmh`` as above.
        balance: weight similar pairs, see ``PairLikelihood`` (ours; off as in the paper).

    Raises:
        ValueError: a negative weight, or unknown settings.

    A pair of an item with itself stays among the N x M pairs, as printed.
    """

    def __init__(
        self,
        intra: float = 1.0,
        eta: float = 0.1,
        settings: Literal["printed", "dcmh"] = "printed",
        balance: bool = False,
    ) -> None:
        super().__init__(eta, balance)
        for name, weight in (("intra", intra), ("eta", eta)):
            if weight < 0.0:
                raise ValueError(f"{name} is a weight of at least 0, got {weight:g}")
        if settings not in ("printed", "dcmh"):
            raise ValueError(f"settings must be 'printed' or 'dcmh', got {settings!r}")
        self.intra_weight = intra
        self.settings = settings

    def forward(self, outputs: Outputs, batch: Batch, memory: CodeMemory) -> LossTerms:
        """Terms ``intra``, ``inter`` (where there are two modalities), ``regularisation`` and, of DCMH,
        ``balance``."""
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
        if self.settings == "dcmh":
            return {**terms, **self._of_dcmh(outputs, memory.joint(batch))}
        spread = [self.regularisation(output).mean() for output in outputs.values()]
        return {**terms, "regularisation": torch.stack(spread).sum()}

    def _of_dcmh(self, outputs: Outputs, joint: Tensor) -> LossTerms:
        distances = [(output.code - joint).square().mean() for output in outputs.values()]
        means = [output.code.mean(0).square().mean() for output in outputs.values()]
        return {
            "regularisation": self.eta * torch.stack(distances).mean(),
            "balance": self.eta * torch.stack(means).mean(),
        }
