"""Objectives between two modalities with one joint code an item: what they share, and DCMH."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from robusthash.core.hamming import sign
from robusthash.core.labels import relevant
from robusthash.core.registry import register
from robusthash.core.types import Batch, HashOutput, LossTerms, Outputs
from robusthash.objectives.base import HashObjective, TrainFacts, quantisation
from robusthash.objectives.memory import CodeMemory


class CrossModalObjective(HashObjective):
    """Each code is compared with the memory of the *other* modality, and pulled to the code both share.

    Over one modality alone (an image-only hasher) there is no other: the memory is its own one's, the shared code is
    the sign of its own, and what needs two modalities (discriminators) is not made.

    Args:
        gamma: weight of the quantisation term, mean_k (B_k - h_k)^2.
    """

    intra: ClassVar[bool] = False

    def __init__(self, gamma: float) -> None:
        super().__init__()
        self.gamma = gamma

    def joint(self, memory: CodeMemory, batch: Batch) -> Tensor:
        """(B, K) shared codes of the batch's items, B = sign(F + G), held constant."""
        rows = [codes.detach()[batch.ids] for codes in memory.codes.values()]
        return sign(torch.stack(rows).sum(0))

    def regularisation(self, output: HashOutput) -> Tensor:
        return self.gamma * quantisation(output)

    def forward(self, outputs: Outputs, batch: Batch, memory: CodeMemory) -> LossTerms:
        """Terms ``similarity`` and ``regularisation``, the latter towards the joint codes instead of the own signs."""
        joint = self.joint(memory, batch)
        distances = [(output.code - joint).square().mean() for output in outputs.values()]
        return {**super().forward(outputs, batch, memory), "regularisation": self.gamma * torch.stack(distances).mean()}


class PairLikelihood(CrossModalObjective):
    """Minus the log-likelihood of pairwise similarity across modalities: mean_j w_ij [softplus(Theta) - S Theta].

    Theta_ij = h_i . U_j / 2.

    Args:
        gamma: weight of the quantisation term.
        balance: weight similar pairs by #dissimilar / #similar of the training set (ours), which single-label data
            need: with one similar pair in twenty, codes learn first of all to differ.
    """

    similar_weight: Tensor

    def __init__(self, gamma: float, balance: bool) -> None:
        super().__init__(gamma)
        self.balance = balance
        self.register_buffer("similar_weight", torch.ones(()))

    def setup(self, facts: TrainFacts) -> None:
        if self.balance:
            if not 0.0 < facts.share_similar < 1.0:
                raise ValueError(f"cannot balance pairs: a share of {facts.share_similar:g} of them is similar")
            self.similar_weight.fill_((1.0 - facts.share_similar) / facts.share_similar)

    def similarity(self, output: HashOutput, labels: Tensor, codes: Tensor, code_labels: Tensor) -> Tensor:
        theta = output.code @ codes.T / 2
        similar = relevant(labels, code_labels).float()
        weight = 1.0 + (self.similar_weight - 1.0) * similar
        return (weight * (softplus(theta) - similar * theta)).mean(1)


@register("objective", "dcmh", paper="Jiang & Li, CVPR 2017", evidence="paper+code", state="measured")
class DCMH(PairLikelihood):
    """DCMH: maximum likelihood of similarity between image codes F and text codes G, with one joint code B.

    L = mean_ij [softplus(Theta_ij) - S_ij Theta_ij] + gamma mean (B - h)^2 + eta mean_k (mean_i h_ik)^2,
    Theta_ij = F_i . G_j / 2 and B = sign(F + G). The paper's head is ``linear`` (h are the logits); ``tanh`` works as
    well.

    Args:
        gamma: weight of the quantisation term, a mean over items and bits (ours: 0.1; the paper's 1 is K / N by this
            measure, 0.003 for 32 bits and 10 000 items).
        eta: weight of the balance term (ours: 0.1; the paper's 1 is K by this measure). At the start, while all codes
            of a modality are nearly the same, it is the larger part of the loss and holds back the first.
        balance: weight similar pairs, see ``PairLikelihood``. Off in the paper.

    Differs: every term is the published one divided by the pairs of a step, b N, except gamma's and eta's, which have
    their own scale, so that learning rates are of ordinary size. The paper trains the image net for an epoch, then the
    text net, then sets B; here one step trains both against the memory, which holds the other side constant: the same
    gradients, by turns of a step. B follows the memory at every step, not once an epoch. The mean of the balance term
    is the batch's; the published one is over the whole training set with only the batch's rows live, whose gradient
    answers for codes up to an epoch old, and at ordinary learning rates with momentum swings ever wider.
    """

    def __init__(self, gamma: float = 0.1, eta: float = 0.1, balance: bool = False) -> None:
        super().__init__(gamma, balance)
        self.eta = eta

    def forward(self, outputs: Outputs, batch: Batch, memory: CodeMemory) -> LossTerms:
        """The terms of every cross-modal objective, and ``balance``."""
        means = [output.code.mean(0).square().mean() for output in outputs.values()]
        return {**super().forward(outputs, batch, memory), "balance": self.eta * torch.stack(means).mean()}
