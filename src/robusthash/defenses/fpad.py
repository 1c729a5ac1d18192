"""FPAD: collaborative adversarial training on clean and attacked items, with fuzzy prototypes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robusthash.attacks.fpad import memberships
from robusthash.core.registry import register
from robusthash.core.types import LossTerms
from robusthash.defenses.base import OuterLoss, Round
from robusthash.defenses.outer_losses import TO_OWN_CODE, agreement


def class_means(codes: list[Tensor], labels: Tensor) -> Tensor:
    """(C, K) mean over the items of a class, and over modalities, of codes (N, K); 0 of an empty class."""
    counts = labels.sum(0).clamp_min(1.0)[:, None]
    return torch.stack([labels.T @ rows / counts for rows in codes]).mean(0)


@register("outer", "fpad", paper="Yu et al., TCSVT 2025", evidence="reconstruction", state="measured")
@dataclass(frozen=True)
class FPADOuter(OuterLoss):
    """FPAD: L = L_ori(x) + adversarial * [L_ori(x') - (1/K) q . h(x')] + rectification * KL(mu(x) || mu(x')).

    q is the fuzzy prototype of the inner attack ``fpad``, trained along (group "guide"); mu are the
    ``memberships`` of an item in the classes, by the mean codes of the memory, and mu(x) is held constant.

    Cost: with T steps of the attack T + 2 forward and T + 1 backward passes, and one forward pass each for
    the memberships of attack and loss. Differs: abstract alone is public (no code): fuzzy prototypes in
    Hamming space that supervise the attack, a rectification that holds the meaning of clean and attacked
    items together, and training on both modalities are the paper's; every formula and weight is ours.

    Args:
        temperature: of the memberships.
    """

    adversarial: float = 1.0
    rectification: float = 1.0
    temperature: float = 0.25
    needs = TO_OWN_CODE

    def __post_init__(self) -> None:
        if min(self.adversarial, self.rectification) < 0.0 or not self.temperature > 0.0:
            raise ValueError(
                "weights must not be negative and the temperature must be positive, got "
                f"{self.adversarial:g}, {self.rectification:g}, {self.temperature:g}"
            )

    def __call__(self, turn: Round) -> LossTerms:
        if turn.memory.labels is None:
            raise ValueError("FPAD has a prototype of each class, and the training split has no labels")
        means = class_means([codes.detach() for codes in turn.memory.codes.values()], turn.memory.labels)
        divergences = []
        for name, output in turn.robust.items():
            clean = memberships(turn.clean[name].relaxed().detach(), means, self.temperature)
            moved = memberships(output.relaxed(), means, self.temperature)
            divergences.append((clean * (clean.clamp_min(1e-12).log() - moved.clamp_min(1e-12).log())).sum(1))
        return {
            **turn.objective_terms("clean", turn.clean),
            **turn.objective_terms("robust", turn.robust, self.adversarial),
            "adversarial": -self.adversarial * agreement(turn.robust, turn.guidance.codes),
            "rectification": self.rectification * torch.stack(divergences).mean(),
        }
