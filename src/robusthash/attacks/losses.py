"""Attack losses: agreement of the attacked code with the guidance, (B,), larger = nearer.

At the end those of adaptive attacks: what an attacker adds who knows the defense.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from robusthash.attacks.base import Loss, Probe
from robusthash.attacks.frequency_bands import BANDS, Band, band_mask
from robusthash.core.hamming import sign
from robusthash.core.identity import name_of
from robusthash.core.registry import register
from robusthash.core.types import Guidance
from robusthash.objectives.base import HashObjective


@register("attack-loss", "agreement", paper="SAAT, TIFS 2023; DHTA, ECCV 2020")
@dataclass(frozen=True)
class Agreement(Loss):
    """(1/K) sum_k h'_k b_k: the linear loss of SAAT's paper, CgAT, P2P and DHTA."""

    def __call__(self, probe: Probe, guidance: Guidance) -> Tensor:
        return (probe.relaxed() * guidance.codes).mean(1)


@register("attack-loss", "masked", paper="SAAT code", evidence="paper+code")
@dataclass(frozen=True)
class MaskedAgreement(Loss):
    """SAAT's code: sum W (p^2 + 2p) / max(1, sum W) with p_k = h'_k b_k, over bits that are not yet done.

    Args:
        targeted: W = 1[p < 0.5] (towards) instead of 1[p > -0.5] (away).
        mirror: with ``targeted``, -(p^2 - 2p), which also pushes bits fully opposite to the target (ours; the
            code's form gives those almost no gradient).

    Differs: the mask is counted per item; the code counts it over the batch, which couples queries.
    """

    targeted: bool = False
    mirror: bool = False

    def __call__(self, probe: Probe, guidance: Guidance) -> Tensor:
        p = probe.relaxed() * guidance.codes
        mask = (p < 0.5 if self.targeted else p > -0.5).float()
        values = 2.0 * p - p.square() if self.targeted and self.mirror else p.square() + 2.0 * p
        return (mask * values).sum(1) / mask.sum(1).clamp_min(1.0)


@register("attack-loss", "hag", paper="Yang et al., IEEE Trans. Cybernetics 2020", evidence="paper+code")
@dataclass(frozen=True)
class HAGLoss(Loss):
    """HAG: (masked mean of h' h + 1)^2 + (mean of masked h')^2, by the SAAT re-implementation.

    The mask selects bits not yet flipped enough: |h'_k - sgn h_k| < 1 + margin. The clean code enters as the
    continuous tanh. An empty mask leaves (0 + 1)^2 with no gradient: not monotone in success, so never stop
    by it.
    """

    margin: float = 0.5
    beta: float = 1.0

    def __call__(self, probe: Probe, guidance: Guidance) -> Tensor:
        relaxed = probe.relaxed()
        mask = ((relaxed.detach() - sign(guidance.codes)).abs() < 1.0 + self.margin).float()
        product = (mask * relaxed * guidance.codes).sum(1) / (mask.sum(1) + 1e-8)
        return (product + 1.0).square() + self.beta * (mask * relaxed).mean(1).square()


@register("attack-loss", "sdha", paper="Lu et al., ICMR 2021", evidence="paper+code")
@dataclass(frozen=True)
class SDHALoss(Loss):
    """SDHA: away from every relevant code at once, weighted by distance^-1/2, with gated bit distances.

    d(q, r) = sum_k [0.5 |q_k - r_k| sigma(s q_k r_k) + 1 - sigma(s q_k r_k)], s = 5; agreement is -(25 / K)
    mean_r w_r d(q, r) + MSE(x', x), descended. Codes are binary, so the sum over relevant codes is exactly
    two weights a bit, and the cost is O(K) a query once distances are known.

    Differs: the distance in the weight is clamped at 0.5 (1e-8 in the code lets one exact match dominate).
    """

    slope: float = 5.0
    strength: float = 25.0
    power: ClassVar[float] = -0.5  # of the distance, in the weight
    cost: ClassVar[float] = 1.0  # of the size of the change: the search descends the agreement

    def __call__(self, probe: Probe, guidance: Guidance) -> Tensor:
        q, codes, positive = probe.relaxed(), guidance.codes, guidance.weights
        if positive is None:
            raise ValueError("SDHA needs a set of codes with weights; use the guide 'positives'")
        if not all(value.is_floating_point() for value in probe.inputs.values()):
            raise ValueError("SDHA weighs the size of the change, which token ids do not have")
        with torch.no_grad():
            distances = (codes.shape[1] - sign(q) @ codes.T) / 2
            far = distances.clamp_min(0.5)
            weights = positive * (far.rsqrt() if self.power == -0.5 else far.pow(self.power))
            plus = weights @ (codes > 0).float()
            minus = weights.sum(1, keepdim=True) - plus
        surrogate = (plus * self._bit(q) + minus * self._bit(-q)).sum(1)
        origin = probe.origin.inputs
        changes = [(v - origin[n]).flatten(1).square().mean(1) for n, v in probe.inputs.items()]
        return self.cost * torch.stack(changes).sum(0) - self.strength / codes.shape[1] * surrogate

    def _bit(self, product: Tensor) -> Tensor:
        """d(q, r) of one bit as a function of q r: 0.0067 at 1, 0.75 at 0, 1 at -1."""
        gate = torch.sigmoid(self.slope * product)
        return 0.5 * (1.0 - product).abs() * gate + 1.0 - gate


@register("attack-loss", "sdha-targeted", paper="Lu et al., ICMR 2021", evidence="paper+code", targeted=True)
@dataclass(frozen=True)
class SDHATargetedLoss(SDHALoss):
    """SDHA towards every code with the target labels, the farther the heavier: weight distance^0.3.

    d(q, r) = sum_k 0.5 |q_k - r_k| sigma(-s q_k r_k), s = 10; agreement is -(25 / K) mean_r w_r d(q, r) -
    MSE(x', x), ascended. The gate leaves a bit that agrees alone.

    Differs: the distance in the weight is clamped at 0.5, as in SDHA.
    """

    slope: float = 10.0
    power: ClassVar[float] = 0.3
    cost: ClassVar[float] = -1.0

    def _bit(self, product: Tensor) -> Tensor:
        """d(q, r) of one bit as a function of q r: 0 at 1, 0.25 at 0, 1 at -1."""
        return 0.5 * (1.0 - product).abs() * torch.sigmoid(-self.slope * product)


@register("attack-loss", "scale-free")
@dataclass(frozen=True)
class ScaleFree(Loss):
    """mean_k tanh(t_k u_k / s) on the logits u, s the item's median |u|, held constant. Ours.

    Multiplying all logits by any factor changes nothing, so saturated models cannot hide.
    """

    def __call__(self, probe: Probe, guidance: Guidance) -> Tensor:
        return (soft_bits(probe) * sign(guidance.codes)).mean(1)


@register("attack-loss", "sharp-bits")
@dataclass(frozen=True)
class SharpBits(Loss):
    """mean_k tanh(slope alpha t_k u_k / s), s as in ``scale-free``: nearly the bits that agree. Ours.

    With the published slope, alpha rises from 0.1 to 1: the search starts smooth and ends at the count. A
    soft tanh spends the budget on bits that have turned, or that will not turn.

    Args:
        slope: in median magnitudes, at the end.
    """

    slope: float = 24.0

    def __call__(self, probe: Probe, guidance: Guidance) -> Tensor:
        return torch.tanh(self.slope * probe.alpha * scaled_logits(probe) * sign(guidance.codes)).mean(1)


def soft_bits(probe: Probe) -> Tensor:
    """(B, K) tanh(u / s), s the item's median |u| held constant, u the mean over attacked modalities."""
    return torch.tanh(scaled_logits(probe))


def scaled_logits(probe: Probe) -> Tensor:
    """(B, K) u / s, s the item's median |u| held constant, u the mean over attacked modalities."""
    logits = torch.stack([output.logits for output in probe.outputs.values()]).mean(0)
    sizes = logits.detach().abs()
    largest = sizes.amax(1, keepdim=True)
    # a floor for items of which most logits are 0, in units of their own
    floor = 1e-12 * torch.where(largest > 0, largest, 1.0).clamp_max(1.0)
    return logits / torch.maximum(sizes.median(1, keepdim=True).values, floor)


@register("attack-loss", "objective", paper="Madry et al., ICLR 2018", evidence="paper")
@dataclass(frozen=True)
class ObjectiveLoss(Loss):
    """Minus the objective's similarity loss against the reference codes (FGSM / PGD on a hashing loss).

    The regularisation term is left out: its gradient only drives |h| down.
    """

    objective: HashObjective

    def identity_options(self) -> dict[str, Any]:
        """The objective by its name; its options and what it learned are the model's, like the weights."""
        return {"objective": name_of(self.objective)}

    def __call__(self, probe: Probe, guidance: Guidance) -> Tensor:
        reference, labels = probe.reference, probe.goal.labels
        if reference is None or reference.labels is None or labels is None:
            raise ValueError("the objective needs labelled reference codes: use a W1 or W2 threat")
        codes = torch.cat(list(reference.codes.values()))
        code_labels = reference.labels.repeat(len(reference.codes), 1)
        values = [self.objective.similarity(o, labels, codes, code_labels) for o in probe.outputs.values()]
        return -torch.stack(values).mean(0)


MaskedForm = Literal["linear", "code", "mirror"]


def mainstay_loss(form: MaskedForm, targeted: bool) -> Agreement | MaskedAgreement:
    """The loss of the mainstay attack: ``linear`` (paper, default), ``code``, or ``mirror`` (if targeted)."""
    if form == "linear":
        return Agreement()
    if form == "code" or (form == "mirror" and targeted):
        return MaskedAgreement(targeted, mirror=form == "mirror")
    raise ValueError(f"form must be 'linear', 'code' or (targeted) 'mirror', got {form!r}")


@register("attack-loss", "gate-opening")
@dataclass(frozen=True)
class GateOpening(Loss):
    """The loss of an attack, and a reward of ``weight`` times the mean gate of the attacked bands.

    A spectral gate that is open lets a perturbation pass (SAAH). The reward is ascended whatever the goal.
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
            raise ValueError("'gate-opening' needs a victim that shows a gate, such as 'spectral-gate'")
        means = []
        for gate in gates:
            masks = [band_mask(band, gate.shape[-1]) for band in self.bands]
            inside = torch.stack(masks).any(0).to(gate.device)
            means.append(gate[..., inside].flatten(1).mean(1))
        # the search ascends goal.sign times this, so the sign cancels
        return self.inner(probe, guidance) + probe.goal.sign * self.weight * torch.stack(means).mean(0)


@register("attack-loss", "repair-moved", supervised=False)
@dataclass(frozen=True)
class RepairMovedLoss(Loss):
    """|P(x') - P(x)|^2, as the view RepairMoved shows it: away from the purified clean input.

    Its gradient at the clean input is zero: start at random.
    """

    def __call__(self, probe: Probe, guidance: Guidance) -> Tensor:
        moved = [output.aux["moved"] for output in probe.outputs.values() if "moved" in output.aux]
        if not moved:
            raise ValueError("the loss 'repair-moved' needs the view RepairMoved of a victim with a purifier")
        return probe.goal.sign * torch.stack(moved).sum(0)


@register("attack-loss", "over-draws")
@dataclass(frozen=True)
class OverDraws(Loss):
    """The mean of a loss over samples of a random victim (EOT; Athalye et al., ICML 2018)."""

    inner: Loss = field(default_factory=ScaleFree)

    def __call__(self, probe: Probe, guidance: Guidance) -> Tensor:
        outputs = probe.outputs.items()
        if not all("draws" in output.aux for _, output in outputs):
            raise ValueError("'over-draws' needs a view that shows its samples: NoiseAveraged or MaskNoise")
        values = []
        for sample in range(min(len(output.aux["draws"]) for _, output in outputs)):
            sampled = {
                n: replace(o, logits=o.aux["draws"][sample], code=o.aux["draws/code"][sample])
                for n, o in outputs
            }
            values.append(self.inner(replace(probe, outputs=sampled), guidance))
        return torch.stack(values).mean(0)
