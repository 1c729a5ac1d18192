"""SePH: codes whose distances follow the distribution of shared labels, then a logistic regression a bit."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from robusthash.core.hamming import sign
from robusthash.core.labels import cosine
from robusthash.core.registry import register
from robusthash.objectives.shallow.base import Projection, ShallowMethod, TrainingFeatures

_ITEMS = 5000  # of which N^2 numbers are held a few times


def divergence(codes: Tensor, target: Tensor, alpha: float) -> tuple[float, Tensor]:
    """KL(P || Q) + alpha / (N K) || |H| - 1 ||^2 and its gradient at H (N, K).

    Q_ij is proportional to 1 / (1 + d_ij) over ordered pairs of different items, d = ||h_i - h_j||^2 / 4.
    ``target`` (N, N) is P, symmetric, with a zero diagonal and the sum 1.
    """
    squares = codes.square().sum(1)
    distances = (squares[:, None] + squares - 2.0 * codes @ codes.T).clamp_min(0.0) / 4
    nearness = 1.0 / (1.0 + distances)
    nearness.fill_diagonal_(0.0)
    shares = nearness / nearness.sum()
    ratio = target / shares.clamp_min(1e-300)
    value = torch.where(target > 0, target * ratio.clamp_min(1e-300).log(), 0.0).sum()
    pull = (target - shares) * nearness
    gradient = pull.sum(1, keepdim=True) * codes - pull @ codes
    excess = codes.abs() - 1.0
    weight = alpha / codes.numel()
    value = value + weight * excess.square().sum()
    return float(value), gradient + 2.0 * weight * excess * sign(codes)


@register(
    "shallow",
    "seph",
    paper="Lin et al., CVPR 2015",
    evidence="paper+code",
    modality="image+text",
    state="measured",
)
class SePH(ShallowMethod):
    """SePH: min KL(P || Q) + alpha / (N K) || |H| - 1 ||^2, P of labels and Q of distances of codes.

    P is the cosine of label vectors, scaled to the sum 1; Q is proportional to 1 / (1 + |h_i - h_j|^2 / 4).
    A bit is then predicted by logistic regression in each modality (scikit-learn). The paper's features are
    Gaussian similarities to 500 anchors: head ``kernel``. O(N^2 K) an iteration and N^2 numbers in memory.

    Args:
        alpha: 0.01.
        iterations: of the descent on H, 100.
        penalty: C of the logistic regressions, 1 (ours; the paper chooses it by cross-validation).

    Differs: L-BFGS (scipy) instead of gradient descent with momentum; at most 5000 training items, drawn
    where there are more; an item of the database is encoded as a query is, from one modality.
    """

    modalities = 2
    pairwise = True

    def __init__(self, alpha: float = 0.01, iterations: int = 100, penalty: float = 1.0) -> None:
        if iterations < 1 or penalty <= 0:
            raise ValueError(f"iterations and penalty must be above 0, got {iterations} and {penalty:g}")
        self.alpha = alpha
        self.iterations = iterations
        self.penalty = penalty

    def fit(self, known: TrainingFeatures) -> dict[str, Projection]:
        generator = known.draws.within("items").generator()
        rows = torch.randperm(known.items, generator=generator)[:_ITEMS]
        labels = known.known_labels[rows]
        target = cosine(labels, labels).double()
        target.fill_diagonal_(0.0)
        if target.sum() == 0:
            raise ValueError("SePH needs items that share a label, and no two of these do")
        codes = self._codes(target / target.sum(), known)
        return {name: self._regressed(x[rows], codes) for name, x in known.values.items()}

    def _codes(self, target: Tensor, known: TrainingFeatures) -> Tensor:
        from scipy.optimize import minimize  # slow to import

        shape = (len(target), known.bits)
        generator = known.draws.within("codes").generator()
        start = 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64)

        def descend(flat: np.ndarray) -> tuple[float, np.ndarray]:
            value, gradient = divergence(torch.from_numpy(flat).view(shape), target, self.alpha)
            return value, gradient.numpy().ravel()

        options = {"maxiter": self.iterations}
        result = minimize(descend, start.numpy().ravel(), jac=True, method="L-BFGS-B", options=options)
        codes = torch.from_numpy(result.x).view(shape)
        return sign(codes - codes.mean(0))

    def _regressed(self, x: Tensor, codes: Tensor) -> Projection:
        from sklearn.linear_model import LogisticRegression  # slow to import

        weights, offsets = [], []
        for bit in codes.T:
            model = LogisticRegression(C=self.penalty, solver="newton-cholesky").fit(x.numpy(), bit.numpy())
            weights.append(torch.from_numpy(model.coef_[0].copy()))
            offsets.append(float(model.intercept_[0]))
        return Projection(torch.stack(weights, 1), torch.tensor(offsets, dtype=torch.float64))
