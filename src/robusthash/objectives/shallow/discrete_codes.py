"""COSDISH and SDH: discrete codes from columns of the similarity matrix, or that a classifier reads."""

from __future__ import annotations

import torch
from torch import Tensor

from robusthash.core.hamming import sign
from robusthash.core.registry import register
from robusthash.objectives.dsdh import label_codes
from robusthash.objectives.shallow.base import (
    Projection,
    ShallowMethod,
    TrainingFeatures,
    random_signs,
    ridge,
)


def square_codes(codes: Tensor, targets: Tensor, rest: Tensor, rest_targets: Tensor) -> Tensor:
    """Lower ||T - B B^T||_F^2 + 2 ||T_r - B_r B^T||_F^2 over B (m, K), bit by bit by coordinate steps.

    Args:
        codes: B in {-1, +1}.
        targets: (m, m) T, symmetric.
        rest, rest_targets: B_r (n, K), held fixed, and (n, m) T_r.
    """
    b = codes.clone()
    for k in range(b.shape[1]):
        others = b.clone()
        others[:, k] = 0.0
        quadratic = targets - others @ others.T  # what bit k has to fit among the sampled items
        quadratic.fill_diagonal_(0.0)
        linear = (rest_targets - rest @ others.T).T @ rest[:, k]
        for i in range(len(b)):
            slope = quadratic[i] @ b[:, k] + linear[i]
            b[i, k] = torch.where(slope == 0, b[i, k], slope.sign())
    return b


@register("shallow", "cosdish", paper="Kang et al., AAAI 2016", evidence="paper", state="measured")
class COSDISH(ShallowMethod):
    """COSDISH: min ||K S' - B B^T||_F^2 over codes B, by sampled columns of S'; codes are sgn(X W), W ridge.

    In each round ``columns`` items are drawn; the others get sgn(S' B_sampled), the exact minimiser of the
    L1 form, and the sampled ones are solved bit by bit. O(N m K) a round.

    Args:
        columns: m, sampled in each round; 0 is K, as in the paper.
        rounds: 20 (ours).
        gamma: of the ridge regression that stands for the paper's linear classifiers, 1.

    Differs: the binary quadratic program of a bit is solved by coordinate steps and not by the paper's
    clustering; S' of dissimilar pairs is -(#similar / #dissimilar), as ADSH's code has it, or ten classes
    would share a code.
    """

    pairwise = True

    def __init__(self, columns: int = 0, rounds: int = 20, gamma: float = 1.0) -> None:
        self.columns = columns
        self.rounds = rounds
        self.gamma = gamma

    def fit(self, known: TrainingFeatures) -> dict[str, Projection]:
        ((modality, x),) = known.values.items()
        similar = known.similar()
        share = float(similar.mean())
        signed = torch.where(similar > 0, 1.0, -share / (1.0 - share)).double()
        generator = known.draws.within("columns").generator()
        codes = random_signs(known, "codes")
        size = min(self.columns or known.bits, known.items - 1)
        for _ in range(self.rounds):
            order = torch.randperm(known.items, generator=generator)
            sampled, rest = order[:size], order[size:]
            votes = signed[rest][:, sampled] @ codes[sampled]
            codes[rest] = torch.where(votes == 0, codes[rest], sign(votes))
            inside, outside = (known.bits * signed[rows][:, sampled] for rows in (sampled, rest))
            codes[sampled] = square_codes(codes[sampled], inside, codes[rest], outside)
        return {modality: ridge(x, codes, self.gamma)}


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
