"""SDH: discrete codes from which a linear classifier reads the labels."""

from __future__ import annotations

from robusthash.core.registry import register
from robusthash.objectives.dsdh import label_codes
from robusthash.objectives.shallow.base import (
    Projection,
    ShallowMethod,
    TrainingFeatures,
    random_signs,
    ridge,
)


@register("shallow", "sdh", paper="Shen et al., CVPR 2015", evidence="paper", state="measured")
class SDH(ShallowMethod):
    """SDH: min ||Y - B W||^2 + lam ||W||^2 + nu ||B - F(X)||^2 over codes B, classifier W and projection F.

    ``rounds`` times: F by ridge regression of B, W by ridge regression of Y, B column by column (the solver
    of DSDH). The paper's features are Gaussian similarities to 1000 anchors: head ``kernel``. O(N D^2)
    once, O(N K (K + C)) a sweep.

    Args:
        lam, nu: 1 and 1e-5 in the paper.
        gamma: of the ridge regression of F (ours, for the paper's least squares), 1.
        rounds: 5.
        sweeps: over the columns in each round, at most 10.
    """

    def __init__(
        self, lam: float = 1.0, nu: float = 1e-5, gamma: float = 1.0, rounds: int = 5, sweeps: int = 10
    ) -> None:
        if rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {rounds}")
        self.lam = lam
        self.nu = nu
        self.gamma = gamma
        self.rounds = rounds
        self.sweeps = sweeps

    def fit(self, known: TrainingFeatures) -> dict[str, Projection]:
        ((modality, x),) = known.values.items()
        codes = random_signs(known, "codes")
        for _ in range(self.rounds):
            projection = ridge(x, codes, self.gamma)
            codes = label_codes(codes, projection(x), known.known_labels, self.nu, self.lam, self.sweeps)
        return {modality: ridge(x, codes, self.gamma)}
