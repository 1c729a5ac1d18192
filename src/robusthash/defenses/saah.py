"""SAAH: adversarial training of a hasher behind a spectral gate, with the gate's two own terms."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from robusthash.attacks.frequency_bands import BANDS, Banded
from robusthash.attacks.losses import GateOpening
from robusthash.core.registry import register
from robusthash.core.types import HashOutput, LossTerms
from robusthash.defenses.adaptive import AdaptiveAttack, AdaptiveAttacks, AdaptiveSetting
from robusthash.defenses.base import OuterLoss, Round
from robusthash.defenses.outer_losses import PlainAT
from robusthash.models.block_dct import BlockDCT
from robusthash.models.gates import GateView, gates_of
from robusthash.models.hasher import Hasher

Reduction = Literal["block", "sum", "mean"]


def spectral_stability(change: Tensor, gate: Tensor, reduction: Reduction = "block") -> Tensor:
    """L_stab = || DCT(x - x') * m^2 ||^2, averaged over the batch (SAAH, Eq. 11).

    Linear in the transform, so one DCT of the difference is enough. The difference is a constant: the term
    reaches the gate of the clean image alone, and no weight of the encoder.

    Args:
        change: (B, C, H, W) x - x'.
        gate: (B, P, n, n) m of the clean image, not detached.
        reduction: of an image. ``block`` (ours): the sum inside a block, averaged over blocks; ``sum``: over
            all blocks, which at 224 px holds the gate near 0.1 whatever the retention; ``mean``: over all
            coefficients, which leaves the term without effect. The paper does not say.
    """
    with torch.no_grad():
        energy = BlockDCT(gate.shape[-1]).to(change)(change).square().sum(2)
    by_block = (energy * gate.square().square()).sum((2, 3))
    if reduction == "sum":
        return by_block.sum(1).mean()
    return by_block.mean() if reduction == "block" else by_block.sum() / change.numel()


@register("outer", "saah", paper="SAAH, SIGIR 2026", evidence="paper", state="measured")
@dataclass(frozen=True)
class SAAHOuter(OuterLoss):
    """SAAH: L = L_hash(P(x)) + L_hash(P(x')) + stability * L_stab + retention * R_bound (Eq. 11-13).

    R_bound is (mean of m - rho)^2 of each clean image, averaged over the batch; rho is the gate's. x' passes
    through its own gate, L_stab weighs by that of x. The attacked codes are compared with the clean memory.
    The hasher needs a gate: ``hasher.purifiers.image: spectral-gate``. Inner attack of the paper: ``pgd`` on
    the objective from the clean image, 7 steps; size and eps are not stated (here 2/255 and 8/255).

    Args:
        stability: lambda_s, 1 in the paper; 0 switches the term off.
        retention: gamma, 1 in the paper; 0 switches the term off.
        stab_reduction: see ``spectral_stability``.
    """

    stability: float = 1.0
    retention: float = 1.0
    stab_reduction: Reduction = "block"

    def __post_init__(self) -> None:
        for name in ("stability", "retention"):
            if getattr(self, name) < 0.0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name):g}")
        if self.stab_reduction not in get_args(Reduction):
            known = ", ".join(get_args(Reduction))
            raise ValueError(f"stab_reduction must be one of {known}, got {self.stab_reduction!r}")

    def __call__(self, turn: Round) -> LossTerms:
        name, output = _gated(turn)
        change = turn.batch.inputs[name] - turn.attacked.inputs[name]
        return {
            **PlainAT()(turn),
            "stability": self.stability * spectral_stability(change, output.aux["gate"], self.stab_reduction),
            "retention": self.retention * output.aux["excess"].square().mean(),
        }

    def figures(self, turn: Round) -> LossTerms:
        """Mean and deviations of the gate on clean images.

        Near a ``gate/spread`` over frequencies of 0 the gate only scales the image, which the first layer
        undoes; ``gate/images``, the deviation of the mean over images, would be invisible to a batch-level
        R_bound.
        """
        gate = _gated(turn)[1].aux["gate"].detach()
        return {
            "gate/mean": gate.mean(),
            "gate/spread": gate.mean(1).flatten(1).std(1, unbiased=False).mean(),
            "gate/images": gate.flatten(1).mean(1).std(unbiased=False),
        }


def _gated(turn: Round) -> tuple[str, HashOutput]:
    """The modality that passes through a gate, and its clean output."""
    for name, output in turn.clean.items():
        if {"gate", "excess"} <= set(output.aux):
            return name, output
    raise ValueError(
        "outer 'saah' needs a hasher with a spectral gate, and this one has none; "
        "add 'purifiers: {image: spectral-gate}' to its hasher section, or use outer 'pgd-at'"
    )


@register("adaptive", "gate", paper="SAAH, SIGIR 2026", modality="image")
class GateAttacks(AdaptiveAttacks):
    """Spectral gates: other gates for the gradient, single bands, and opening the gate."""

    def modalities(self, victim: Hasher) -> Collection[str]:
        return gates_of(victim)

    def attacks(self, victim: Hasher, modality: str, setting: AdaptiveSetting) -> list[AdaptiveAttack]:
        views = [GateView("frozen"), GateView("minimum"), GateView("one"), GateView("smooth")]
        search, block = setting.search(), gates_of(victim)[modality].dct.block
        return [
            *(setting.attack(f"gate-{view.gate}", view) for view in views),
            *(setting.attack(f"band-{band}", search=Banded(search, band, block)) for band in BANDS),
            setting.attack("gate-opening", loss=GateOpening()),
        ]
