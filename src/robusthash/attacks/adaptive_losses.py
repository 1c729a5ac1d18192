"""Losses of adaptive attacks: what an attacker adds who knows the defense."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from robusthash.attacks.base import Loss, Probe
from robusthash.attacks.frequency_bands import BANDS, Band, band_mask
from robusthash.attacks.losses import ScaleFree
from robusthash.core.registry import register
from robusthash.core.types import Guidance


@register("attack-loss", "gate-opening")
@dataclass(frozen=True)
class GateOpening:
    """The loss of an attack, and a reward of ``weight`` times the mean gate of the attacked bands.

    A spectral gate that is open lets a perturbation pass (SAAH). The reward is ascended whatever the goal.

    Args:
        weight: lambda; the mean gate lies in [m_min, 1], ``ScaleFree`` in [-1, 1].
        bands: those that are attacked; all by default.
        inner: the loss proper.

    Raises:
        ValueError: bands without a name, or a victim that shows no gate.
    """

    weight: float = 1.0
    bands: tuple[Band, ...] = BANDS
    inner: Loss = field(default_factory=ScaleFree)

    def __post_init__(self) -> None:
        if not self.bands or set(self.bands) - set(BANDS):
            raise ValueError(f"bands must be some of {', '.join(BANDS)}, got {self.bands}")

    def __call__(self, probe: Probe, guidance: Guidance) -> Tensor:
        gates = [output.aux["gate"] for output in probe.outputs.values() if "gate" in output.aux]
        if not gates:
            raise ValueError(
                "the loss 'gate-opening' needs a victim that shows a gate, such as 'spectral-gate'"
            )
        means = []
        for gate in gates:
            mask = (
                torch.stack([band_mask(band, gate.shape[-1]) for band in self.bands]).any(0).to(gate.device)
            )
            means.append(gate[..., mask].flatten(1).mean(1))
        # the search ascends goal.sign times this, so the sign cancels
        return self.inner(probe, guidance) + probe.goal.sign * self.weight * torch.stack(means).mean(0)


@register("attack-loss", "repair-moved", supervised=False)
@dataclass(frozen=True)
class RepairMovedLoss:
    """|P(x') - P(x)|^2 in ``moved`` of a view that shows it: away from what the purifier made of the clean
    input.

    Its gradient at the clean input is zero: start at random.
    """

    def __call__(self, probe: Probe, guidance: Guidance) -> Tensor:
        moved = [output.aux["moved"] for output in probe.outputs.values() if "moved" in output.aux]
        if not moved:
            raise ValueError("the loss 'repair-moved' needs the view RepairMoved of a victim with a purifier")
        return probe.goal.sign * torch.stack(moved).sum(0)


@register("attack-loss", "over-draws")
@dataclass(frozen=True)
class OverDraws:
    """The mean of a loss over the looks that a view of a random victim took (EOT; Athalye et al., ICML 2018).

    Raises:
        ValueError: outputs without looks: attack the view NoiseAveraged or MaskNoise.
    """

    inner: Loss = field(default_factory=ScaleFree)

    def __call__(self, probe: Probe, guidance: Guidance) -> Tensor:
        if not all("draws" in output.aux for output in probe.outputs.values()):
            raise ValueError(
                "the loss 'over-draws' needs a view that shows its looks: NoiseAveraged or MaskNoise"
            )
        looks = min(len(output.aux["draws"]) for output in probe.outputs.values())
        values = []
        for look in range(looks):
            outputs = {
                name: replace(output, logits=output.aux["draws"][look], code=output.aux["draws/code"][look])
                for name, output in probe.outputs.items()
            }
            values.append(self.inner(replace(probe, outputs=outputs), guidance))
        return torch.stack(values).mean(0)
