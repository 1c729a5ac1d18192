"""Attack losses: agreement of the attacked code with the guidance, (B,), larger = nearer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from robusthash.attacks.base import Probe
from robusthash.core.hamming import sign
from robusthash.core.identity import name_of
from robusthash.core.registry import register
from robusthash.core.types import Guidance
from robusthash.objectives.base import HashObjective


@register("attack-loss", "agreement", paper="SAAT, TIFS 2023; DHTA, ECCV 2020")
@dataclass(frozen=True)
class Agreement:
    """(1/K) sum_k h'_k b_k: the linear loss of SAAT's paper, CgAT, P2P and DHTA."""

    def __call__(self, probe: Probe, guidance: Guidance) -> Tensor:
        return (probe.relaxed() * guidance.codes).mean(1)


@register("attack-loss", "masked", paper="SAAT code", evidence="paper+code")
@dataclass(frozen=True)
class MaskedAgreement:
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
class HAGLoss:
    """HAG: (masked mean of h' h + 1)^2 + (mean of masked h')^2, by the SAAT re-implementation.

    The mask keeps bits not yet flipped enough: |h'_k - sgn h_k| < 1 + margin. The clean code enters as the
    continuous tanh. An empty mask leaves (0 + 1)^2 with no gradient: the loss is not monotone in success, so
    never stop by it.
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
class SDHALoss:
    """SDHA: away from every relevant code at once, weighted by distance^-1/2, with gated bit distances.

    d(q, r) = sum_k [0.5 |q_k - r_k| sigma(s q_k r_k) + 1 - sigma(s q_k r_k)], s = 5; agreement is
    -(25 / K) mean_r w_r d(q, r) + MSE(x', x), descended. Codes are binary, so the sum over relevant codes
    aggregates exactly to two weights a bit, and the cost is O(K) a query once distances are known.

    Differs: the distance in the weight is clamped at 0.5 (1e-8 in the code lets one exact match dominate).
    """

    slope: float = 5.0
    strength: float = 25.0

    def __call__(self, probe: Probe, guidance: Guidance) -> Tensor:
        q, codes, positive = probe.relaxed(), guidance.codes, guidance.weights
        if positive is None:
            raise ValueError("SDHA needs a set of codes with weights; use the guide 'positives'")
        if not all(value.is_floating_point() for value in probe.inputs.values()):
            raise ValueError(
                "SDHA weighs the size of the change, which token ids do not have; use another 'like'"
            )
        with torch.no_grad():
            distances = (codes.shape[1] - sign(q) @ codes.T) / 2
            weights = positive * distances.clamp_min(0.5).rsqrt()
            plus = weights @ (codes > 0).float()
            minus = weights.sum(1, keepdim=True) - plus
        surrogate = (plus * self._bit(q) + minus * self._bit(-q)).sum(1)
        origin = probe.origin.inputs
        change = torch.stack(
            [(v - origin[n]).flatten(1).square().mean(1) for n, v in probe.inputs.items()]
        ).sum(0)
        return change - self.strength / codes.shape[1] * surrogate

    def _bit(self, product: Tensor) -> Tensor:
        """d(q, r) of one bit as a function of q r: 0.0067 at 1, 0.75 at 0, 1 at -1."""
        gate = torch.sigmoid(self.slope * product)
        return 0.5 * (1.0 - product).abs() * gate + 1.0 - gate


@register("attack-loss", "scale-free")
@dataclass(frozen=True)
class ScaleFree:
    """mean_k tanh(t_k u_k / s) with s the item's median |u|, held constant: a house loss on the logits.

    Multiplying all logits by any factor changes nothing, so saturated models cannot hide.
    """

    def __call__(self, probe: Probe, guidance: Guidance) -> Tensor:
        return (soft_bits(probe) * sign(guidance.codes)).mean(1)


def soft_bits(probe: Probe) -> Tensor:
    """(B, K) tanh(u / s) with s the item's median |u|, held constant; u is averaged over the attacked
    modalities."""
    logits = torch.stack([output.logits for output in probe.outputs.values()]).mean(0)
    size = logits.detach().abs().median(1, keepdim=True).values.clamp_min(1e-12)
    return torch.tanh(logits / size)


@register("attack-loss", "objective", paper="Madry et al., ICLR 2018", evidence="paper")
@dataclass(frozen=True)
class ObjectiveLoss:
    """Minus the training objective's similarity loss against the reference codes (FGSM / PGD on a hashing
    loss).

    The regularisation term is left out: its gradient only drives |h| down.
    """

    objective: HashObjective

    def identity_options(self) -> dict[str, Any]:
        """The objective by its name; its options and what it learned are the model's, like the weights."""
        return {"objective": name_of(self.objective)}

    def __call__(self, probe: Probe, guidance: Guidance) -> Tensor:
        reference, labels = probe.reference, probe.goal.labels
        if reference is None or reference.labels is None or labels is None:
            raise ValueError(
                "an attack on the objective needs labelled reference codes: use a W1 or W2 threat"
            )
        codes = torch.cat(list(reference.codes.values()))
        code_labels = reference.labels.repeat(len(reference.codes), 1)
        values = [self.objective.similarity(o, labels, codes, code_labels) for o in probe.outputs.values()]
        return -torch.stack(values).mean(0)


MaskedForm = Literal["linear", "code", "mirror"]


def mainstay_loss(form: MaskedForm, targeted: bool) -> Agreement | MaskedAgreement:
    """The loss of the mainstay attack: ``linear`` (paper, default), ``code``, or ``mirror`` (targeted
    only)."""
    if form == "linear":
        return Agreement()
    if form == "code" or (form == "mirror" and targeted):
        return MaskedAgreement(targeted, mirror=form == "mirror")
    raise ValueError(f"form must be 'linear', 'code' or (targeted) 'mirror', got {form!r}")
