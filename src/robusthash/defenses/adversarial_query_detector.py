"""A detector of adversarial queries by criteria in Hamming space, and the attack of somebody who knows it.

Unsupervised: it sees clean queries alone. A reconstruction: of Xiao, Wang and Gao, "Unsupervised
Multi-Criteria Adversarial Detection in Deep Image Retrieval" (SecureComm 2023), the abstract was readable.
The three criteria, Hamming distance, quantisation loss and denoising, are theirs; formulas and the way they
are joined are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from robusthash.attacks.base import Loss, Probe
from robusthash.core.hamming import sign
from robusthash.core.registry import register
from robusthash.core.types import Guidance, HashOutput, Inputs, Outputs
from robusthash.models.hasher import Hasher, frozen
from robusthash.models.purifier import with_gradient_of
from robusthash.models.surrogate_gradients import GradientView, ViewedHasher

CRITERIA = ("distance", "quantisation", "denoising")
DENOISED = "denoised"  # entry of ``HashOutput.aux``: logits of the denoised input


def denoised(x: Tensor) -> Tensor:
    """Images (B, C, H, W) under a 3 x 3 median, bags of words (B, V) in whole words (straight through).

    Raises:
        ValueError: other inputs, such as token ids or feature vectors.
    """
    if x.dim() == 4 and min(x.shape[-2:]) >= 2:
        around = pad(x, (1, 1, 1, 1), mode="reflect").unfold(2, 3, 1).unfold(3, 3, 1).flatten(4)
        return around.median(-1).values
    if x.dim() == 2 and x.is_floating_point() and bool(((x >= 0) & (x <= 1)).all()):
        return with_gradient_of(x.round(), x)
    raise ValueError(
        f"the detector denoises images (B, C, H, W) and bags of words in [0, 1], not {x.dtype} inputs of "
        f"shape {tuple(x.shape)}"
    )


class DenoisedHasher(ViewedHasher):
    """The victim with the logits of each denoised input in ``aux``."""

    passes = (2, 2)

    def forward(self, inputs: Inputs) -> Outputs:
        outputs = self.gradients(inputs)
        smooth = self.gradients({name: denoised(values) for name, values in inputs.items()})
        return {
            name: replace(output, aux={**output.aux, DENOISED: smooth[name].logits})
            for name, output in outputs.items()
        }


@register("gradient-view", "denoised")
@dataclass(frozen=True)
class Denoised(GradientView):
    """The victim with the logits of each denoised input next to those of the input."""

    def __call__(self, victim: Hasher) -> ViewedHasher:
        return DenoisedHasher(victim, victim)


def measured(output: HashOutput, codes: Tensor, near: int = 10) -> Tensor:
    """(B, 3) the raw ``CRITERIA`` of a ``DenoisedHasher``'s output, each in [0, 1].

    The mean share of bits in which the ``near`` nearest codes differ; mean (1 - |tanh u|)^2; the share of
    bits that denoising flips. Signs have the gradient of tanh u (straight through).

    Args:
        codes: (M, K) database codes in {-1, +1}.
    """
    soft, smooth = torch.tanh(output.logits), torch.tanh(output.aux[DENOISED])
    code, other = (with_gradient_of(sign(values.detach()), values) for values in (soft, smooth))
    bits = codes.shape[1]
    nearest = (code @ codes.T.to(code)).topk(min(near, len(codes)), 1).values
    far = 0.5 - nearest.mean(1) / (2 * bits)
    return torch.stack([far, (1.0 - soft.abs()).square().mean(1), (code - other).abs().mean(1) / 2], 1)


@torch.no_grad()
def criteria_of(victim: Hasher, modality: str, inputs: Tensor, codes: Tensor, batch_size: int = 64) -> Tensor:
    """(N, 3) criteria of inputs of one modality, on the CPU; two passes of the victim."""
    view, codes = Denoised()(victim), codes.to(victim.device)
    rows = []
    with frozen(victim):
        for part in inputs.split(batch_size):
            output = view({modality: part.to(victim.device)})[modality]
            rows.append(measured(output, codes).double().cpu())
    return torch.cat(rows)


@dataclass(frozen=True)
class AdversarialQueryDetector:
    """Limits by clean queries: a query is caught where any criterion is beyond its limit.

    Quantisation is unusual in both directions, so it counts by its distance from the clean median. A query's
    suspicion is how far it is above the clean median, in spreads, by the criterion where that is most. The
    limit is the suspicion that a share ``false_alarms`` of clean queries exceeds (split conformal).

    Args:
        clean: (n, 3) criteria of clean queries.
        false_alarms: in (0, 1).

    Raises:
        ValueError: a share outside, or so small that ``clean`` has too few queries for it.
    """

    clean: Tensor
    false_alarms: float = 0.05

    def __post_init__(self) -> None:
        if not 0.0 < self.false_alarms < 1.0:
            raise ValueError(f"a false-alarm rate is a share above 0 and below 1, got {self.false_alarms:g}")
        judged = len(self.clean[self._judged])
        if self._place(judged) > judged:
            least = math.ceil(1.5 * (math.ceil(1 / self.false_alarms) - 1))
            rate = math.ceil(1e3 / (judged + 1)) / 1e3
            raise ValueError(
                f"a false-alarm rate of {self.false_alarms:g} takes {least} clean queries to calibrate by, "
                f"and there are {len(self.clean)} (of a run, half of its queries): take more queries"
                + f", or a rate of at least {rate:g}"
                * (rate < 1)
            )

    @property
    def _judged(self) -> Tensor:
        """(n,) the clean queries that set the limit; every third one sets medians and spreads instead."""
        return torch.arange(len(self.clean)) % 3 != 0

    def _place(self, count: int) -> int:
        """Position of the limit among ``count`` sorted suspicions, from 1."""
        return math.ceil((1.0 - self.false_alarms) * (count + 1) - 1e-9)

    def unusual(self, criteria: Tensor) -> Tensor:
        """(B, 3) the criteria, larger = more suspicious."""
        usual = self.clean[~self._judged, 1].median()
        middle = (criteria[:, 1] - usual.to(criteria)).abs()
        return torch.stack([criteria[:, 0], middle, criteria[:, 2]], 1)

    @cached_property
    def _scale(self) -> tuple[Tensor, Tensor]:
        """(3,) clean medians, and (3,) spreads: from the median to the 90th percentile, at least 0.01."""
        known = self.unusual(self.clean[~self._judged])
        middle, high = known.quantile(torch.tensor([0.5, 0.9], dtype=known.dtype), 0)
        return middle, (high - middle).clamp_min(0.01)

    def _spreads(self, criteria: Tensor) -> Tensor:
        """(B, 3) how many spreads each criterion is above its median."""
        middle, spread = self._scale
        return (self.unusual(criteria) - middle) / spread

    def suspicion(self, criteria: Tensor) -> Tensor:
        """(B,) the largest number of spreads."""
        return self._spreads(criteria).amax(1)

    @cached_property
    def limit(self) -> float:
        """The suspicion above which a query is caught."""
        suspicion = self.suspicion(self.clean[self._judged])
        return float(suspicion.sort().values[self._place(len(suspicion)) - 1])

    def caught(self, criteria: Tensor) -> Tensor:
        """(B,) bool."""
        return self.suspicion(criteria) > self.limit

    def caught_by(self, criteria: Tensor) -> Tensor:
        """(B, 3) bool, by each criterion alone."""
        return self._spreads(criteria) > self.limit

    def limits(self) -> tuple[Tensor, Tensor]:
        """(3,) largest values of ``unusual`` that are not caught, and (3,) the spreads."""
        middle, spread = self._scale
        return middle + self.limit * spread, spread


@register("attack-loss", "evading")
@dataclass(frozen=True)
class Evading(Loss):
    """Any agreement, and what each criterion of a detector is beyond its limit, in clean spreads.

    For the view ``Denoised``; a query that is not caught pays nothing.

    Args:
        base: the loss without a detector.
        weight: of the excess, summed over the criteria.
        detector, codes: what the attacker knows, and (M, K) database codes.
    """

    base: Loss
    weight: float = 1.0
    detector: AdversarialQueryDetector | None = field(default=None, compare=False, repr=False)
    codes: Tensor | None = field(default=None, compare=False, repr=False)

    def __call__(self, probe: Probe, guidance: Guidance) -> Tensor:
        if self.detector is None or self.codes is None:
            raise ValueError("the loss 'evading' needs a detector and the database codes that it knows")
        limits, spreads = self.detector.limits()
        excesses = []
        for output in probe.outputs.values():
            unusual = self.detector.unusual(measured(output, self.codes.to(output.logits)))
            beyond = (unusual - limits.to(unusual)) / spreads.to(unusual)
            excesses.append(beyond.clamp_min(0.0).sum(1))
        price = torch.stack(excesses).mean(0)
        return self.base(probe, guidance) - probe.goal.sign * self.weight * price
