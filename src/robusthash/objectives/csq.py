"""Objectives that pull codes to fixed class centers: CSQ."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from robusthash.core.hamming import sign
from robusthash.core.registry import register
from robusthash.core.runtime import Draws
from robusthash.core.types import HashOutput
from robusthash.objectives.base import HashObjective, TrainFacts


def hadamard_centers(classes: int, bits: int, draws: Draws) -> Tensor:
    """(C, K) class centers in {-1, +1}.

    Rows of the Hadamard matrix and of its negative while K is a power of two; the rest are balanced random
    rows (K // 2 minus ones), drawn anew up to 20 times until all are more than K / 4 apart and at least K / 2
    on average; where no draw meets both, the one of largest least distance is taken.
    """
    rows = torch.empty(0, bits)
    if bits & (bits - 1) == 0:
        from scipy.linalg import hadamard  # a while to import, and only these lengths need it

        square = torch.from_numpy(hadamard(bits)).float()
        rows = torch.cat([square, -square])[:classes]
    missing = classes - len(rows)
    if missing == 0:
        return rows
    generator = draws.within("centers").generator()
    best, best_distance = rows, -1.0
    for _ in range(20):
        order = torch.rand(missing, bits, generator=generator).argsort(1)
        drawn = torch.cat([rows, torch.where(order < bits // 2, -1.0, 1.0)])
        gaps = (bits - drawn @ drawn.T) / 2
        gaps = gaps[~torch.eye(classes, dtype=torch.bool)] if classes > 1 else torch.tensor([float(bits)])
        if gaps.min() > bits / 4 and gaps.mean() >= bits / 2:
            return drawn
        if gaps.min() > best_distance:
            best, best_distance = drawn, float(gaps.min())
    return best


@register("objective", "csq", paper="Yuan et al., CVPR 2020", evidence="paper+code", state="measured")
class CSQ(HashObjective):
    """CSQ: central similarity; each code towards the center of its class.

    L = mean softplus(-2 c v) [binary cross-entropy of (1 + tanh v) / 2] + quantisation * mean (|h| - 1)^2.
    The center of a multi-label item is the sign of the sum of its class centers; zero sums are filled from
    one random vector drawn at construction.

    Args:
        quantisation: weight of the last term (1e-4 in CgAT's code, 0.05 in SAAT's).

    Differs: works for any K and C (the center rule of the published codes where they have one).
    """

    centers: Tensor
    filler: Tensor

    def __init__(self, quantisation: float = 1e-4) -> None:
        super().__init__()
        self.quantisation = quantisation
        self.register_buffer("centers", torch.empty(0))
        self.register_buffer("filler", torch.empty(0))

    def setup(self, facts: TrainFacts) -> None:
        draws = Draws(facts.seed, ("csq",))
        device = self.centers.device
        self.centers = hadamard_centers(facts.classes, facts.bits, draws).to(device)
        generator = draws.within("filler").generator()
        self.filler = sign(torch.rand(facts.bits, generator=generator) - 0.5).to(device)

    def targets(self, labels: Tensor) -> Tensor:
        """(B, C) labels -> (B, K) centers in {-1, +1}."""
        total = labels @ self.centers
        return torch.where(total == 0, self.filler, total.sign())

    def similarity(self, output: HashOutput, labels: Tensor, codes: Tensor, code_labels: Tensor) -> Tensor:
        pull = softplus(-2.0 * self.targets(labels) * output.logits / output.scale).mean(1)
        return pull * (
            labels.sum(1) > 0
        )  # an item without labels has no center, and is not pulled to the filler

    def regularisation(self, output: HashOutput) -> Tensor:
        return self.quantisation * (output.code.abs() - 1.0).square().mean(1)
