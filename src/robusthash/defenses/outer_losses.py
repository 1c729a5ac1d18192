"""Outer losses of adversarial training: plain PGD-AT, CgAT, SAAT. Each is what its paper adds, no more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robusthash.core.registry import register
from robusthash.core.types import LossTerms, Outputs
from robusthash.defenses.adversarial_training import Round
from robusthash.defenses.requirements import Needs
from robusthash.objectives.base import quantisation


def _original(turn: Round) -> LossTerms:
    """The hashing objective on the clean outputs: L_ori(x)."""
    return {
        f"clean/{name}": value for name, value in turn.objective(turn.clean, turn.batch, turn.memory).items()
    }


def _agreement(outputs: Outputs, codes: Tensor) -> Tensor:
    """Mean over the batch of (1/K) b . h(x'), averaged over modalities."""
    return torch.stack([(output.relaxed() * codes).mean() for output in outputs.values()]).mean()


TO_OWN_CODE = Needs(goal="own", label_codes=True)
"""Of losses that pull attacked items to the code of their own labels."""


@register("outer", "pgd-at", state="measured")
@dataclass(frozen=True)
class PlainAT:
    """Plain PGD adversarial training (control D0): the hashing objective on clean and on attacked outputs.

    L = L_ori(x) + adversarial * L_ori(x'); the attacked codes are compared with the clean memory.
    """

    adversarial: float = 1.0

    def __call__(self, turn: Round) -> LossTerms:
        robust = turn.objective(turn.robust, turn.batch, turn.memory)
        return {
            **_original(turn),
            **{f"robust/{name}": self.adversarial * value for name, value in robust.items()},
        }


@register("outer", "cgat", paper="CgAT, WWW 2023", evidence="paper+code", state="measured")
@dataclass(frozen=True)
class CgATOuter:
    """CgAT: L = L_ori(x) - adversarial * (1/K) b_c . h(x'), b_c the center code."""

    adversarial: float = 1.0
    needs: ClassVar[Needs] = TO_OWN_CODE

    def __call__(self, turn: Round) -> LossTerms:
        return {
            **_original(turn),
            "adversarial": -self.adversarial * _agreement(turn.robust, turn.guidance.codes),
        }


@register("outer", "saat", paper="SAAT, TIFS 2023", evidence="paper+code", state="measured")
@dataclass(frozen=True)
class SAATOuter:
    """SAAT: L = L_ori(x) - adversarial * (1/K) b_m . h(x') + quantisation * mean (h(x') - sgn h(x'))^2.

    b_m is the mainstay code over the memory after this batch's update.

    Args:
        adversarial: lambda, 1 in the paper.
        quantisation: mu, 1e-4; of the mean, as in the code (the paper writes a sum over bits, K times as
            much).
    """

    adversarial: float = 1.0
    quantisation: float = 1e-4
    needs: ClassVar[Needs] = TO_OWN_CODE

    def __call__(self, turn: Round) -> LossTerms:
        spread = torch.stack([quantisation(output).mean() for output in turn.robust.values()]).mean()
        return {
            **_original(turn),
            "adversarial": -self.adversarial * _agreement(turn.robust, turn.guidance.codes),
            "quantisation": self.quantisation * spread,
        }
