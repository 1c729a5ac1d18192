"""ITQ: principal components rotated until they are near their signs."""

from __future__ import annotations

import torch

from robusthash.core.hamming import sign
from robusthash.core.registry import register
from robusthash.objectives.shallow.base import Projection, ShallowMethod, TrainingFeatures


@register(
    "shallow",
    "itq",
    paper="Gong and Lazebnik, CVPR 2011",
    evidence="paper",
    supervised=False,
    state="measured",
)
class ITQ(ShallowMethod):
    """ITQ: the first K principal components X P, rotated by the R that lowers ||sgn(X P R) - X P R||_F.

    From a random rotation, ``rounds`` times: B = sgn(X P R), then R by orthogonal Procrustes (scipy). No
    labels. O(N D^2 + D^3), and O(N K^2) a round.

    Args:
        rounds: 50 in the paper.
    """

    supervised = False

    def __init__(self, rounds: int = 50) -> None:
        self.rounds = rounds

    def fit(self, known: TrainingFeatures) -> dict[str, Projection]:
        from scipy.linalg import orthogonal_procrustes  # slow to import

        ((modality, x),) = known.values.items()
        if known.bits > x.shape[1]:
            raise ValueError(f"ITQ makes at most one bit a feature: {x.shape[1]} features, {known.bits} bits")
        components = torch.linalg.eigh(x.T @ x).eigenvectors.flip(1)[:, : known.bits]
        v = x @ components
        generator = known.draws.within("rotation").generator()
        gaussian = torch.randn(known.bits, known.bits, generator=generator, dtype=torch.float64)
        rotation = torch.linalg.qr(gaussian).Q
        for _ in range(self.rounds):
            rotation = torch.from_numpy(orthogonal_procrustes(v.numpy(), sign(v @ rotation).numpy())[0])
        weights = components @ rotation
        return {modality: Projection(weights, torch.zeros(known.bits, dtype=torch.float64))}
