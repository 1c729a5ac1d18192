"""CVH and SCM: correlation of image and text features, canonical or weighed by shared labels."""

from __future__ import annotations

import torch
from torch import Tensor

from robusthash.core.hamming import sign
from robusthash.core.registry import register
from robusthash.objectives.shallow.base import Projection, ShallowMethod, TrainingFeatures


class Correlation(ShallowMethod):
    """Methods that solve for directions of image and text under covariances with ``lam`` on the diagonal."""

    modalities = 2

    def __init__(self, lam: float = 1e-4) -> None:
        if lam <= 0:
            raise ValueError(f"lam must be above 0, got {lam:g}")
        self.lam = lam


@register(
    "shallow",
    "cvh",
    paper="Kumar and Udupa, IJCAI 2011",
    evidence="paper+code",
    modality="image+text",
    supervised=False,
    state="measured",
)
class CVH(Correlation):
    """CVH: the K pairs of directions along which image and text features correlate most; a bit each.

    Cxy Cyy^-1 Cyx w = rho^2 Cxx w (scipy), w_y = Cyy^-1 Cyx w / rho. No labels. O(N D^2 + D^3). At most as
    many bits as the modality of fewer features has, hence the head ``kernel`` for ten topics.

    Args:
        lam: added to the diagonal of both covariances, 1e-4, as in a port (1e-6 in others).

    Differs: that port leaves the inverse of Cyy out, and is wrong there.
    """

    supervised = False

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


@register(
    "shallow",
    "scm",
    paper="Zhang and Li, AAAI 2014",
    evidence="paper+code",
    modality="image+text",
    state="measured",
)
class SCM(Correlation):
    """SCM-seq: max sum_ij S_ij <image code i, text code j>, S = 2 L L^T - 1 of unit labels, bit by bit.

    A bit is the top generalised pair of directions of C = X^T S Y (scipy's svds, after whitening by both
    covariances); then what it explains is taken out: C <- C - (X^T v_x)(Y^T v_y)^T / K. O(N D^2 + D^3), and
    O(N D) a bit.

    Args:
        lam: added to the diagonal of both covariances, 1e-4.

    Differs: the paper ends where an eigenvalue rises; here all K bits are made.
    """

    def fit(self, known: TrainingFeatures) -> dict[str, Projection]:
        (first, x), (second, y) = known.values.items()
        labels = known.known_labels / known.known_labels.norm(dim=1, keepdim=True).clamp_min(1e-12)
        cxx, cyy, _ = covariances(x, y, self.lam)
        left, right = torch.linalg.cholesky(cxx), torch.linalg.cholesky(cyy)
        cross = 2.0 * (x.T @ labels) @ (y.T @ labels).T - torch.outer(x.sum(0), y.sum(0))
        pairs = []
        for _ in range(known.bits):
            half = torch.linalg.solve_triangular(left, cross, upper=False)
            whitened = torch.linalg.solve_triangular(right, half.T, upper=False).T
            u, v = top_pair(whitened)
            wx = torch.linalg.solve_triangular(left.T, u, upper=True)[:, 0]
            wy = torch.linalg.solve_triangular(right.T, v, upper=True)[:, 0]
            pairs.append((wx, wy))
            explained = torch.outer(x.T @ sign(x @ wx), y.T @ sign(y @ wy))
            cross = cross - explained / known.bits
        offset = torch.zeros(known.bits, dtype=x.dtype)
        wx, wy = (torch.stack(columns, 1) for columns in zip(*pairs, strict=True))
        return {first: Projection(wx, offset), second: Projection(wy, offset)}


def top_pair(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(N, 1) and (M, 1) singular vectors of the largest singular value of an (N, M) matrix."""
    from scipy.sparse.linalg import svds  # slow to import

    if min(matrix.shape) == 1:  # svds takes no matrix of one row or column
        u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :1], vt[:1].T
    start = matrix.sum(int(matrix.shape[0] < matrix.shape[1])) + 1e-12
    u, _, vt = svds(matrix.numpy(), k=1, v0=start.numpy(), which="LM")
    return torch.from_numpy(u.copy()), torch.from_numpy(vt.T.copy())
