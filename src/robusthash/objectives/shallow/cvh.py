"""CVH: canonical correlation of image and text features."""

from __future__ import annotations

import torch

from robusthash.core.registry import register
from robusthash.objectives.shallow.base import Projection, ShallowMethod, TrainingFeatures


@register(
    "shallow",
    "cvh",
    paper="Kumar and Udupa, IJCAI 2011",
    evidence="paper+code",
    modality="image+text",
    supervised=False,
    state="measured",
)
class CVH(ShallowMethod):
    """CVH: the K pairs of directions along which image and text features correlate most; a bit each.

    Cxy Cyy^-1 Cyx w = rho^2 Cxx w (scipy), w_y = Cyy^-1 Cyx w / rho. No labels. O(N D^2 + D^3). At most as
    many bits as the modality of fewer features has, hence the head ``kernel`` for ten topics.

    Args:
        lam: added to the diagonal of both covariances, 1e-4, as in a port (1e-6 in others).

    Differs: that port leaves the inverse of Cyy out, and is wrong there.
    """

    modalities = 2
    supervised = False

    def __init__(self, lam: float = 1e-4) -> None:
        if lam <= 0:
            raise ValueError(f"lam must be above 0, got {lam:g}")
        self.lam = lam

    def fit(self, known: TrainingFeatures) -> dict[str, Projection]:
        from scipy.linalg import eigh  # slow to import

        (first, x), (second, y) = known.values.items()
        least = min(x.shape[1], y.shape[1])
        if known.bits > least:
            raise ValueError(
                f"CVH makes at most one bit for each feature of the smaller modality, {least} here, not "
                f"{known.bits}; take fewer bits, or hasher.head: {{name: kernel, anchors: M}} with M from "
                f"{known.bits}"
            )
        cxx, cyy, cxy = covariances(x, y, self.lam)
        across = torch.linalg.solve(cyy, cxy.T)  # Cyy^-1 Cyx
        top = [x.shape[1] - known.bits, x.shape[1] - 1]
        values, vectors = eigh((cxy @ across).numpy(), cxx.numpy(), subset_by_index=top)
        weights = torch.from_numpy(vectors).flip(1)
        rho = torch.from_numpy(values).flip(0).clamp_min(1e-12).sqrt()
        offset = torch.zeros(known.bits, dtype=x.dtype)
        return {first: Projection(weights, offset), second: Projection(across @ weights / rho, offset)}


def covariances(x: torch.Tensor, y: torch.Tensor, lam: float) -> tuple[torch.Tensor, ...]:
    """Cxx + lam I, Cyy + lam I and Cxy of centred features, means over items."""
    cxx, cyy = (z.T @ z / len(z) + lam * torch.eye(z.shape[1], dtype=z.dtype) for z in (x, y))
    return cxx, cyy, x.T @ y / len(x)
