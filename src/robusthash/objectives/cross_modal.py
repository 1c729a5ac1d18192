"""Objectives between two modalities with one joint code an item: what they share, and DCMH."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from robusthash.core.registry import register
from robusthash.core.types import Batch, HashOutput, LossTerms, Outputs
from robusthash.objectives.base import HashObjective, quantisation
from robusthash.objectives.code_memory import CodeMemory
from robusthash.objectives.pairwise import PairLikelihood


class CrossModalObjective(HashObjective):
    """Each code is compared with the memory of the *other* modality, and pulled to the code both share.

    Over one modality alone (an image-only hasher) there is no other: the memory is its own one's, the shared
    code is the sign of its own, and what needs two modalities (discriminators) is not made.

    Args:
        gamma: weight of the quantisation term, mean_k (B_k - h_k)^2.
    """

    intra: ClassVar[bool] = False

    def __init__(self, gamma: float, **pairs: Any) -> None:
        super().__init__(**pairs)  # of the class beside it, where an objective has two
        self.gamma = gamma

    def joint(self, memory: CodeMemory, batch: Batch) -> Tensor:
        """(B, K) shared codes of the batch's items, B = sign(F + G), held constant."""
        return memory.joint(batch)

    def regularisation(self, output: HashOutput) -> Tensor:
        return self.gamma * quantisation(output)

    def forward(self, outputs: Outputs, batch: Batch, memory: CodeMemory) -> LossTerms:
        """Terms ``similarity`` and ``regularisation``, the latter towards the joint codes instead of the own
        signs."""
        joint = self.joint(memory, batch)
        distances = [(output.code - joint).square().mean() for output in outputs.values()]
        return {
            **super().forward(outputs, batch, memory),
            "regularisation": self.gamma * torch.stack(distances).mean(),
        }


class CrossLikelihood(CrossModalObjective, PairLikelihood):
    """The pair likelihood across modalities."""

    def __init__(self, gamma: float, balance: bool) -> None:
        super().__init__(gamma, balance=balance)


@register("objective", "dcmh", paper="Jiang & Li, CVPR 2017", evidence="paper+code", state="measured")
class DCMH(CrossLikelihood):
    """DCMH: maximum likelihood of similarity between image codes F and text codes G, with one joint code B.

    L = mean_ij [softplus(Theta_ij) - S_ij Theta_ij] + gamma mean (B - h)^2 + eta mean_k (mean_i h_ik)^2,
    Theta_ij = F_i . G_j / 2 and B = sign(F + G). The paper's head is ``linear`` (h are the logits); ``tanh``
    works as well.

    Args:
        gamma: weight of the quantisation term, a mean over items and bits (ours: 0.1; the paper's 1 is K / N
            by this measure, 0.003 for 32 bits and 10 000 items).
        eta: weight of the balance term (ours: 0.1; the paper's 1 is K by this measure). At the start, while
            all codes of a modality are nearly the same, it is the larger part of the loss and holds back the
            first.
        balance: weight similar pairs, see ``WeightedPairs``. Off in the paper.

    Differs: every term is the published one divided by the pairs of a step, b N, except gamma's and eta's,
    which have their own scale, so that learning rates are of ordinary size. The paper trains the image net
    for an epoch, then the text net, then sets B; here one step trains both against the memory, which holds
    the other side constant: the same gradients, by turns of a step. B follows the memory at every step, not
    once an epoch. The mean of the balance term is the batch's; the published one is over the whole training
    set with only the batch's rows live, whose gradient answers for codes up to an epoch old, and at ordinary
    learning rates with momentum swings ever wider.
    """

    def __init__(self, gamma: float = 0.1, eta: float = 0.1, balance: bool = False) -> None:
        super().__init__(gamma, balance)
        self.eta = eta

    def forward(self, outputs: Outputs, batch: Batch, memory: CodeMemory) -> LossTerms:
        """The terms of every cross-modal objective, and ``balance``."""
        means = [output.code.mean(0).square().mean() for output in outputs.values()]
        return {**super().forward(outputs, batch, memory), "balance": self.eta * torch.stack(means).mean()}
