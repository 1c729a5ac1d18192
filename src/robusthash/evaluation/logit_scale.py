"""The size of a victim's logits, and the victim with ordinary ones where its own would mislead attacks.

Codes are signs, so a positive factor for each bit changes none of them. It changes what gradients find: of
bits that differ in size by thousands, only some have a gradient that counts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from robusthash.core.types import Inputs
from robusthash.models.hasher import Hasher, frozen

MEASURED = 64  # queries whose logits are measured
SPREAD = 1e3  # largest factor between the sizes of two ordinary bits; of DCT hashes it is some hundreds
LEAST, LARGEST = (
    1e-6,
    1e9,
)  # ordinary sizes; tanh saturates long before, which the losses allow for themselves


@dataclass(frozen=True)
class LogitScale:
    """Factors by modality that bring logits to a size of about 1; none where they are ordinary.

    Bits of similar size share one factor, so that their proportions stay; others have each their own.
    """

    factors: Mapping[str, Tensor] = field(default_factory=dict)  # (K,)
    low: float = 1.0  # smallest and largest mean |logit| of a bit, of the modalities that have factors
    high: float = 1.0

    @property
    def note(self) -> str:
        """A line for results; "" where there are no factors."""
        if not self.factors:
            return ""
        return (
            f"the logits of this victim have sizes from {self.low:.2g} to {self.high:.2g} by bit: attacks "
            "saw them brought to about 1, which leaves every code as it is"
        )

    def applied(self, victim: Hasher) -> Hasher:
        """The victim with the same codes and these factors on its logits; itself where there are none."""
        if not self.factors:
            return victim
        heads = {
            name: _Scaled(head, self.factors[name].to(victim.device)) if name in self.factors else head
            for name, head in victim.heads.items()
        }
        scaled = copy.copy(victim)  # all else is shared, and the victim keeps its own dictionary of parts
        scaled.__dict__["_modules"] = {**victim._modules, "heads": nn.ModuleDict(heads)}
        return scaled


class _Scaled(nn.Module):
    """A head whose logits are multiplied by a factor for each bit."""

    factors: Tensor

    def __init__(self, head: nn.Module, factors: Tensor) -> None:
        super().__init__()
        self.head, self.bits = head, head.bits
        self.register_buffer("factors", factors)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, float]:
        logits, code, _ = self.head(features)
        dtype = torch.get_default_dtype()
        return logits.to(dtype) * self.factors.to(dtype), code, 1.0


def logit_scale(victim: Hasher, batches: Iterable[Inputs]) -> LogitScale:
    """Measure some inputs; vectors that are searched by their numbers keep their scale."""
    if victim.distance != "hamming":
        return LogitScale()
    sizes: dict[str, list[Tensor]] = {}
    with frozen(victim), torch.no_grad():
        for inputs in batches:
            for name, output in victim(inputs).items():
                sizes.setdefault(name, []).append(output.logits.detach().cpu().double().abs())
    means = {name: torch.cat(parts).mean(0) for name, parts in sizes.items()}
    factors, live = {}, []
    for name, size in means.items():
        used = size[size > 0]
        low, high = (float(used.min()), float(used.max())) if len(used) else (1.0, 1.0)
        even = high <= SPREAD * low
        if not bool(size.isfinite().all()) or (even and low >= LEAST and high <= LARGEST):
            continue
        level = used.mean().expand(size.shape) if even else torch.where(size > 0, size, 1.0)
        factors[name] = level.reciprocal().clamp(1e-37, 1e37)
        live += [low, high]
    return LogitScale(factors, min(live), max(live)) if factors else LogitScale()
