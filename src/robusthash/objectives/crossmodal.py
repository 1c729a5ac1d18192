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
from robusthash.objectives.base import HashObjective, quantisation
from robusthash.objectives.memory import CodeMemory


def pair_likelihood(code: Tensor, labels: Tensor, codes: Tensor, code_labels: Tensor) -> Tensor:
    """(B,) mean over references of softplus(Theta) - S Theta, Theta = h . U / 2: minus the log-likelihood of S.

    Args:
        code: (B, K) relaxed codes h, bounded or not.
        labels: (B, C) multi-hot.
        codes: (M, K) reference codes U.
        code_labels: (M, C) multi-hot.
    """
    theta = code @ codes.T / 2
    return (softplus(theta) - relevant(labels, code_labels).float() * theta).mean(1)


class CrossModalObjective(HashObjective):
    """Each code is compared with the memory of the *other* modality, and pulled to the code both share.

    Over one modality alone (an image-only hasher) there is no other: the memory is its own one's, the shared code is the
    sign of its own, and what needs two modalities (discriminators) is not made.

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


@register("objective", "dcmh", paper="Jiang & Li, CVPR 2017", evidence="paper+code")
class DCMH(CrossModalObjective):
    """DCMH: maximum likelihood of similarity between image codes F and text codes G, with one joint code B.

    L = mean_ij [softplus(Theta_ij) - S_ij Theta_ij] + gamma mean (B - h)^2 + eta (N / b) sum_k (mean_i h_ik)^2,
    Theta_ij = F_i . G_j / 2 and B = sign(F + G); the mean of the last term runs over the whole training set, the batch's
    rows live and the others from the memory. The paper's head is ``linear`` (h are the logits); ``tanh`` works as well.

    Args:
        gamma: weight of the quantisation term, a mean over items and bits (ours: 0.1; the paper's 1 is K / N by this
            measure, 0.003 for 32 bits and 10 000 items).
        eta: weight of the balance term, in the published scale (1).

    Differs: every term is the published one divided by the pairs of a step, b N, except gamma's, so that learning rates
    are of ordinary size. The paper trains the image net for an epoch, then the text net, then sets B; here one step
    trains both against the memory, which holds the other side constant: the same gradients, by turns of a step. B follows
    the memory at every step, not once an epoch.
    """

    def __init__(self, gamma: float = 0.1, eta: float = 1.0) -> None:
        super().__init__(gamma)
        self.eta = eta

    def similarity(self, output: HashOutput, labels: Tensor, codes: Tensor, code_labels: Tensor) -> Tensor:
        return pair_likelihood(output.code, labels, codes, code_labels)

    def forward(self, outputs: Outputs, batch: Batch, memory: CodeMemory) -> LossTerms:
        """The terms of every cross-modal objective, and ``balance``."""
        balance = [self._balance(output.code, batch, memory.codes[name]) for name, output in outputs.items()]
        return {**super().forward(outputs, batch, memory), "balance": self.eta * torch.stack(balance).mean()}

    def _balance(self, code: Tensor, batch: Batch, codes: Tensor) -> Tensor:
        """|sum_i h_i|^2 / (b N) over all training items, of which the batch's rows are live."""
        others = codes.detach().sum(0) - codes.detach()[batch.ids].sum(0)
        return (others + code.sum(0)).square().sum() / (len(code) * len(codes))
