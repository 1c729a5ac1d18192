"""Outer losses of adversarial training: PGD-AT, ATRDH, CgAT, SAAT and DSARH, each what its paper adds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from robusthash.core.labels import relevant
from robusthash.core.registry import register
from robusthash.core.types import LossTerms, Outputs
from robusthash.defenses.base import Needs, OuterLoss, Round
from robusthash.objectives.base import quantisation

CLEAN_ONLY = "regularisation"  # name of the quantisation in every objective
TO_OWN_CODE = Needs(goal="own", label_codes=True)
"""Needs of losses that pull attacked items to the code of their own labels."""


def agreement(outputs: Outputs, codes: Tensor) -> Tensor:
    """Mean over the batch of (1/K) b . h(x'), averaged over modalities."""
    return torch.stack([(output.relaxed() * codes).mean() for output in outputs.values()]).mean()


@register("outer", "pgd-at", state="measured")
@dataclass(frozen=True)
class PlainAT(OuterLoss):
    """Plain PGD adversarial training (control D0): the hashing objective on clean and on attacked outputs.

    L = L_ori(x) + adversarial * L_ori(x'); the attacked codes are compared with the clean memory.
    """

    adversarial: float = 1.0

    def __call__(self, turn: Round) -> LossTerms:
        robust = turn.objective_terms("robust", turn.robust, self.adversarial)
        return {**turn.objective_terms("clean", turn.clean), **robust}


@register("outer", "atrdh", paper="Wang et al., SIGIR 2021", evidence="paper+code", state="measured")
@dataclass(frozen=True)
class ATRDHOuter(OuterLoss):
    """ATRDH: L = L_ori(x) + adversarial * mean_ij ((1/K) h(x'_i) . U_j - S'_ij)^2, S' in {-1, +1}.

    U are the clean real codes of all training items, held constant; over several modalities the term is the
    mean over the pairs of an attacked modality and a memory. The paper's inner attack is ``tha`` from a
    random start, its prototype net trained along: 7 steps of 2/255.

    Differs: the memory holds true codes from the first step on (the code starts it at zero, which only adds a
    constant); targets share no label with the item (the code draws any label set of the database); the attack
    runs in eval mode.

    Args:
        adversarial: 1 in the authors' code, 2 in SAAT's copy.
    """

    adversarial: float = 1.0

    def __call__(self, turn: Round) -> LossTerms:
        own, labels = turn.batch.labels, turn.memory.labels
        if own is None or labels is None:
            raise ValueError("ATRDH keeps similarities of labels, and the training split has none")
        signed = 2.0 * relevant(own, labels).float() - 1.0
        errors = [
            (output.code @ codes.T / codes.shape[1] - signed).square().mean()
            for output in turn.robust.values()
            for codes in turn.memory.codes.values()
        ]
        clean = turn.objective_terms("clean", turn.clean)
        return {**clean, "adversarial": self.adversarial * torch.stack(errors).mean()}


@register("outer", "cgat", paper="CgAT, WWW 2023", evidence="paper+code", state="measured")
@dataclass(frozen=True)
class CgATOuter(OuterLoss):
    """CgAT: L = L_ori(x) - adversarial * (1/K) b_c . h(x'), b_c the center code."""

    adversarial: float = 1.0
    needs = TO_OWN_CODE

    def __call__(self, turn: Round) -> LossTerms:
        clean = turn.objective_terms("clean", turn.clean)
        return {**clean, "adversarial": -self.adversarial * agreement(turn.robust, turn.guidance.codes)}


@register("outer", "saat", paper="SAAT, TIFS 2023", evidence="paper+code", state="measured")
@dataclass(frozen=True)
class SAATOuter(OuterLoss):
    """SAAT: L = L_ori(x) - adversarial * (1/K) b_m . h(x') + quantisation * mean (h(x') - sgn h(x'))^2.

    b_m is the mainstay code over the memory after this batch's update.

    Args:
        adversarial: lambda, 1 in the paper.
        quantisation: mu, 1e-4; of the mean, as in the code (the paper writes a sum over bits, K times as
            much).
    """

    adversarial: float = 1.0
    quantisation: float = 1e-4
    needs = TO_OWN_CODE

    def __call__(self, turn: Round) -> LossTerms:
        spread = torch.stack([quantisation(output).mean() for output in turn.robust.values()]).mean()
        return {
            **turn.objective_terms("clean", turn.clean),
            "adversarial": -self.adversarial * agreement(turn.robust, turn.guidance.codes),
            "quantisation": self.quantisation * spread,
        }


@register("outer", "dsarh", paper="DSARH, Zhang et al., manuscript 2024", evidence="paper", state="measured")
@dataclass(frozen=True)
class DSARHOuter(OuterLoss):
    """DSARH: L = (1 - lam) L_sim(x) + lam L_sim(x') + quantisation(x), with whatever objective is trained.

    x' holds the attacked items of the attacked modalities and clean ones of the others, so that text keeps
    its full weight where only images are attacked. It learns nothing from them: the memory that attacked
    images are compared with is constant, as in Eq 18, and holds codes of clean items. The paper's own
    objectives are ``dsarh`` (image-text) and ``adsh`` (images).

    Args:
        lam: 0 is plain training, 1 trains on attacked items alone (the paper's account of its curves).
        lam_mode: ``additive`` is Eq 18 as printed, L(x) + lam L_sim(x') on the attacked modalities, for lam
            1.

    Differs: the paper prints the additive form and describes the convex one; its value of lam is not given,
    0.5 is ours. Quantisation stays on clean codes at full weight (as Eq 23 and 27 of the image form).
    """

    lam: float = 0.5
    lam_mode: Literal["convex", "additive"] = "convex"

    def __post_init__(self) -> None:
        if self.lam_mode not in ("convex", "additive"):
            raise ValueError(f"lam_mode must be 'convex' or 'additive', got {self.lam_mode!r}")
        if self.lam < 0.0 or (self.lam_mode == "convex" and self.lam > 1.0):
            raise ValueError(f"lam must lie in [0, 1] (at least 0 where additive), got {self.lam:g}")

    def __call__(self, turn: Round) -> LossTerms:
        convex = self.lam_mode == "convex"
        share = 1.0 - self.lam if convex else 1.0
        clean = turn.objective_terms("clean", turn.clean)
        clean = {n: value if n == f"clean/{CLEAN_ONLY}" else share * value for n, value in clean.items()}
        attacked = {**turn.clean, **turn.robust} if convex else turn.robust
        robust = turn.objective_terms("robust", attacked, self.lam)
        robust.pop(f"robust/{CLEAN_ONLY}", None)
        return {**clean, **robust}
