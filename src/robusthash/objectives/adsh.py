"""ADSH: a network for queries against learned database codes, and the column-wise solver of those codes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robusthash.core.hamming import sign
from robusthash.core.labels import relevant
from robusthash.core.registry import name_of, register
from robusthash.core.types import Batch, HashOutput, LossTerms, Outputs
from robusthash.objectives.base import CodeMemory, HashObjective, TrainFacts, quantisation


class DiscreteMemory(CodeMemory):
    """Learned database codes V: ``codes`` change by ``assign`` alone, and batches only leave their outputs.

    A guide or an objective that is given this memory hence gets V. ``latest`` (N, K) holds the outputs U of
    the items that ``seen`` (N,) marks since the last ``assign``.
    """

    seen: Tensor

    def __init__(self, items: int, bits: int, labels: Tensor | None, modalities: tuple[str, ...]) -> None:
        super().__init__(items, bits, labels, modalities)
        latest = {name: nn.Parameter(torch.zeros(items, bits), requires_grad=False) for name in modalities}
        self.latest = nn.ParameterDict(latest)
        self.register_buffer("seen", torch.zeros(items, dtype=torch.bool))

    @torch.no_grad()
    def update(self, outputs: Outputs, batch: Batch) -> None:
        """Note the outputs of ``batch``; its codes stay as they are."""
        for name, output in outputs.items():
            self.latest[name][batch.ids] = output.code.detach().float()
        self.seen[batch.ids] = True

    @torch.no_grad()
    def assign(self, codes: dict[str, Tensor]) -> None:
        """Set new codes V (N, K) in {-1, +1} by modality; no output is marked afterwards."""
        for name, values in codes.items():
            self.codes[name].copy_(values)
        self.seen.zero_()


def similarity_sums(
    labels: Tensor, row_labels: Tensor, outputs: Tensor, dissimilar: float = 1.0, block: int = 4096
) -> Tensor:
    """S'^T U (n, K) in float64, made from labels in blocks so that the (m, n) similarity is never in memory.

    Args:
        labels: (n, C) of the database.
        row_labels: (m, C) of the sampled items.
        outputs: (m, K) their real codes U.
        dissimilar: S' is +1 where two items share a label and ``-dissimilar`` elsewhere.
    """
    real = outputs.double()
    similar = (relevant(part, row_labels) for part in labels.split(block))
    return torch.cat([torch.where(part, 1.0, -dissimilar).double() @ real for part in similar])


def discrete_update(codes: Tensor, outputs: Tensor, rows: Tensor, sums: Tensor, gamma: float) -> Tensor:
    """One cyclic sweep over the columns of V, each set to its exact minimiser with the others fixed.

    J(V) = ||U V^T - K S'||_F^2 + gamma ||U - V_rows||_F^2 (DSARH Eq 29-33 corrected), hence with Q = -2 K
    S'^T U - 2 gamma Ubar:  V_k <- -sgn(2 V_-k (U_-k^T U_k) + Q_k), by columns already updated. J never rises.
    Where the argument is zero, the old bit stays.

    Args:
        codes: (n, K) V in {-1, +1}.
        outputs: (m, K) U in [-1, 1].
        rows: (m,) int64 distinct positions of the sampled items in V.
        sums: (n, K) S'^T U, see ``similarity_sums``.
        gamma: weight of the items' own codes.
    """
    v, u = codes.double(), outputs.double()  # in float32 rounding would decide bits whose argument is zero
    linear = -2.0 * codes.shape[1] * sums.double()
    linear[rows] -= 2.0 * gamma * u
    return column_sweep(v, u.T @ u, linear).to(codes.dtype)


def column_sweep(codes: Tensor, gram: Tensor, linear: Tensor) -> Tensor:
    """One cyclic sweep over the columns of V (n, K) in {-1, +1}, each set to its exact minimiser.

    J(V) = tr(V G V^T) + tr(V Q^T), G symmetric (K, K) and Q (n, K), hence V_k <- -sgn(2 V_-k G_-k,k + Q_k). J
    never rises; where the argument is zero, the old bit stays.
    """
    v = codes.clone()
    for k in range(codes.shape[1]):
        others = gram[:, k].clone()
        others[k] = 0.0
        slope = 2.0 * (v @ others) + linear[:, k]
        v[:, k] = torch.where(slope == 0, v[:, k], -slope.sign())
    return v


@register("objective", "adsh", paper="Jiang and Li, AAAI 2018", evidence="paper+code", state="measured")
class ADSH(HashObjective):
    """ADSH: regress inner products with the database codes V, and stay near the own row of V.

    L = (1/K) mean_ij (u_i . V_j - K S'_ij)^2 + (gamma / (n K)) mean_i ||u_i - V_i||^2, i in the batch, j over
    all n training items, u = tanh. V is the memory: with the recipe ``asymmetric`` it is solved after each
    epoch; under another recipe it would be the signs of the network's own last outputs, which is not ADSH.

    Args:
        gamma: 200 in the paper, next to a sum over n pairs; hence gamma / n here.
        soft: S' of dissimilar pairs is -(#similar / #dissimilar) as in the authors' code; otherwise -1 as in
            the paper, with which few similar pairs among many classes do not count.

    Differs: divided by K, so that learning rates do not depend on the bits; the ratio is that of the training
    set (of each sampled block in the code), so that an item's loss does not depend on the sample.
    """

    dissimilar: Tensor
    items: Tensor

    def __init__(self, gamma: float = 200.0, soft: bool = True) -> None:
        super().__init__()
        self.gamma = gamma
        self.soft = soft
        self.register_buffer("dissimilar", torch.ones(()))
        self.register_buffer("items", torch.ones(()))

    def setup(self, facts: TrainFacts) -> None:
        self.items.fill_(facts.items)
        facts.refuse_one_sided(name_of(self))
        if self.soft:
            self.dissimilar.fill_(facts.share_similar / (1.0 - facts.share_similar))

    def similarity(self, output: HashOutput, labels: Tensor, codes: Tensor, code_labels: Tensor) -> Tensor:
        bits = codes.shape[1]
        target = bits * torch.where(relevant(labels, code_labels), 1.0, -self.dissimilar)
        return (output.code @ sign(codes).T - target).square().mean(1) / bits

    def regularisation(self, output: HashOutput) -> Tensor:
        """(B,) the same weight on the distance to the own signs, for items that are not in V."""
        return self.gamma / self.items * quantisation(output)

    def forward(self, outputs: Outputs, batch: Batch, memory: CodeMemory) -> LossTerms:
        terms = super().forward(outputs, batch, memory)
        near = [(o.code - sign(memory.codes[name][batch.ids])).square().mean() for name, o in outputs.items()]
        return {**terms, "regularisation": self.gamma / self.items * torch.stack(near).mean()}

    def end_epoch(self, memory: CodeMemory) -> None:
        """Solve V from the outputs of this epoch, where V is learned."""
        if not isinstance(memory, DiscreteMemory):
            return
        labels, rows = memory.labels, torch.nonzero(memory.seen).flatten()
        if labels is None or len(rows) == 0:
            raise ValueError("ADSH solves its codes from trained labelled items, and there are none")
        solved = {}
        for name, codes in memory.codes.items():
            outputs = memory.latest[name][rows]
            sums = similarity_sums(labels, labels[rows], outputs, float(self.dissimilar))
            solved[name] = discrete_update(codes.data, outputs, rows, sums, self.gamma)
        memory.assign(solved)
