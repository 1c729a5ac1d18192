"""DSDH: pair likelihood with discrete codes from which labels can be read by a linear map."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robusthash.core.hamming import sign
from robusthash.core.registry import register
from robusthash.core.types import Batch, HashOutput, LossTerms, Outputs
from robusthash.objectives.adsh import column_sweep
from robusthash.objectives.base import CodeMemory, TrainFacts, quantisation
from robusthash.objectives.pairwise import PairLikelihood


def label_codes(
    codes: Tensor, outputs: Tensor, labels: Tensor, pull: float, decay: float, sweeps: int
) -> Tensor:
    """Discrete codes B from which labels are read best: W by ridge regression, then B column by column.

    Lowers J(B, W) = ||Y - B W||_F^2 + decay ||W||_F^2 + pull ||B - U||_F^2, which no step raises.

    Args:
        codes: (N, K) B in {-1, +1} to start from.
        outputs: (N, K) real codes U.
        labels: (N, C) Y.
        pull, decay: weights of the distance to U and of the size of W.
        sweeps: over the columns, at most; ends where none changes.
    """
    b, y = codes.double(), labels.double()
    eye = torch.eye(b.shape[1], dtype=b.dtype, device=b.device)
    w = torch.linalg.solve(b.T @ b + decay * eye, b.T @ y)
    linear = -2.0 * (y @ w.T + pull * outputs.double())
    for _ in range(sweeps):
        before, b = b, column_sweep(b, w @ w.T, linear)
        if torch.equal(before, b):
            break
    return b


class SolvedCodes(nn.Module):
    """The discrete codes B (N, K) of the training items, which only training needs."""

    codes: Tensor

    def __init__(self, items: int, bits: int) -> None:
        super().__init__()
        self.register_buffer("codes", torch.zeros(items, bits))  # zero: not solved yet


@register("objective", "dsdh", paper="Li et al., NeurIPS 2017", evidence="paper+code", state="measured")
class DSDH(PairLikelihood):
    """DSDH: the pair likelihood of DPSH, and a pull to discrete codes B that a linear classifier reads best.

    L = mean_ij w_ij [softplus(Omega_ij) - S_ij Omega_ij] + (eta K / N) mean (B - h)^2. After each epoch W is
    the ridge regression of labels on B, and B is solved column by column: min ||Y - B W||^2 + nu/mu ||W||^2
    + eta/mu ||B - U||^2, U the memory. In the first epoch B are the signs of the memory. One forward and
    backward pass an item; the solver takes O(N K (K + C)) a sweep.

    Args:
        eta: 55, weight of the pull, next to a sum over N^2 pairs; hence eta K / N in mean form.
        mu, nu: 1 and 1, weights of the labels and of ||W||^2.
        sweeps: over the columns of B after each epoch, 10.
        balance: see ``WeightedPairs``.

    Differs: the published PyTorch codes (DeepHash, CgAT) lack the pull, so B and W have no effect on their
    net; it is in the paper and here. B is solved at the end of an epoch, from the signs of U (theirs: at its
    start, from random signs the first time). h is tanh of the logits, as for DPSH.
    """

    training_only = ("critics", "solved")
    pull: Tensor

    def __init__(
        self, eta: float = 55.0, mu: float = 1.0, nu: float = 1.0, sweeps: int = 10, balance: bool = False
    ) -> None:
        if not (mu > 0 and nu > 0):
            raise ValueError(f"mu and nu must be above 0, to regress labels, got {mu:g}, {nu:g}")
        super().__init__(balance)
        self.eta = eta
        self.mu = mu
        self.nu = nu
        self.sweeps = sweeps
        self.register_buffer("pull", torch.zeros(()))

    def setup(self, facts: TrainFacts) -> None:
        super().setup(facts)
        if facts.classes == 0:
            raise ValueError("DSDH regresses labels on codes, and this data set has no label names")
        self.pull.fill_(self.eta * facts.bits / facts.items)
        self.solved = SolvedCodes(facts.items, facts.bits)

    def regularisation(self, output: HashOutput) -> Tensor:
        """(B,) the pull to the own signs, for items that are not in B."""
        return self.pull * quantisation(output)

    def forward(self, outputs: Outputs, batch: Batch, memory: CodeMemory) -> LossTerms:
        terms = super().forward(outputs, batch, memory)
        solved, own = self.solved.codes[batch.ids], memory.joint(batch)
        target = torch.where(solved == 0, own, solved)
        near = [(output.code - target).square().mean() for output in outputs.values()]
        return {**terms, "regularisation": self.pull * torch.stack(near).mean()}

    def end_epoch(self, memory: CodeMemory) -> None:
        """Solve W and B from the memory."""
        if memory.labels is None:
            raise ValueError("DSDH solves its codes from labels, and the training split has none")
        outputs = torch.stack([codes.detach() for codes in memory.codes.values()]).mean(0)
        weights = (self.eta / self.mu, self.nu / self.mu, self.sweeps)
        self.solved.codes.copy_(label_codes(sign(outputs), outputs, memory.labels, *weights))
