"""Our own objectives per query on the logits, blind to their scale, and the default attacks that use them.

All work on the soft bits tanh(u / s), s the item's median |u| held constant: multiplying all logits by any
factor changes nothing. Those over the database go through its DISTINCT codes in blocks, three passes of B x M
x K multiply-adds over the M distinct codes (margin-pn four), with B x M counts in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from robusthash.attacks.base import Attack, Guide, Loss, Probe
from robusthash.attacks.guides import Mainstay, Own, known, mainstay_code
from robusthash.attacks.losses import ScaleFree, soft_bits
from robusthash.attacks.pgd import APGD
from robusthash.attacks.threat_model import Attacked, threat_on
from robusthash.core.hamming import pack, sign, unpack
from robusthash.core.labels import relevant
from robusthash.core.registry import register
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, Goal, Guidance, Reference
from robusthash.metrics.average_precision import share
from robusthash.models.hasher import Hasher

_CELLS = 1 << 22  # (query, code) pairs at a time


@register("attack-guide", "wrong")
@dataclass(frozen=True)
class Wrong(Guide):
    """From the own representative to the nearest of another label: of two mainstay codes, own minus wrong.

    "Nearest" is by the clean code of the query, over the labels that the goal lacks and the reference has; of
    equally near ones the first label. A query that has every label has no wrong one and only leaves its own.

    Args:
        margin: bits on which both agree then pull nowhere; without it, the attack pursues the wrong one
            alone.
    """

    margin: bool = True

    def __call__(
        self, victim: Hasher, batch: Batch, goal: Goal, reference: Reference | None, draws: Draws
    ) -> Guidance:
        codes, labels, goal_labels = known(reference, goal)
        present = torch.nonzero(labels.sum(0) > 0).flatten()
        single = torch.eye(labels.shape[1], device=labels.device, dtype=labels.dtype)[present]
        representatives = mainstay_code(single, codes, labels)
        clean = sign(Own()(victim, batch, goal, reference, draws).codes).to(codes.dtype)
        lacked = goal_labels[:, present] == 0
        # whole numbers: ties are exact
        agreement = (clean @ representatives.T).masked_fill(~lacked, -torch.inf)
        wrong = representatives[agreement.argmax(1)]
        own = mainstay_code(goal_labels, codes, labels)
        pull = own - wrong if self.margin else -wrong
        return Guidance(torch.where(lacked.any(1, keepdim=True), pull, own))


@register("attack-loss", "pull")
@dataclass(frozen=True)
class Pull(Loss):
    """mean_k z_k g_k over the soft bits z; the guidance g is not binarised, so that a 0 pulls nowhere."""

    def __call__(self, probe: Probe, guidance: Guidance) -> Tensor:
        return (soft_bits(probe) * guidance.codes).mean(1)


@dataclass(frozen=True)
class Tally(Guidance):
    """Distinct reference codes; ``weights`` are relevant minus irrelevant items of each for each query."""

    items: Tensor = field(default_factory=lambda: torch.empty(0))  # (M,) items with each code

    @property
    def relevant(self) -> Tensor:
        """(B, M) relevant items with each code."""
        if self.weights is None:
            raise ValueError("a tally needs its weights")
        return (self.weights + self.items) / 2


@register("attack-guide", "tally")
@dataclass(frozen=True)
class Tallied(Guide):
    """Every distinct reference code with its counts of relevant and irrelevant items."""

    def __call__(
        self, victim: Hasher, batch: Batch, goal: Goal, reference: Reference | None, draws: Draws
    ) -> Guidance:
        codes, labels, goal_labels = known(reference, goal)
        packed, member, counts = torch.unique(pack(codes), dim=0, return_inverse=True, return_counts=True)
        distinct = unpack(packed, codes.shape[1]).to(codes)
        member, items = member.to(codes.device), counts.to(codes)
        sets, row = torch.unique(goal_labels, dim=0, return_inverse=True)
        near = torch.zeros(len(sets), len(distinct), device=codes.device)
        for number, labelled in enumerate(sets):  # one set at a time: no (B, N) matrix
            near[number].index_add_(0, member, relevant(labelled[None], labels)[0].to(near.dtype))
        return Tally(distinct, 2 * near[row] - items, items)


def soft_average_precision(items: Tensor, relevant: Tensor) -> Tensor:
    """(B,) expected AP as of ``metrics.average_precision`` for real counts, differentiable.

    The sums over a group are differences of digamma functions; (r - 1) / (n - 1) is taken as 0 where either
    is below one item, where it would be no probability.

    Args:
        items, relevant: (B, G) float64 items of each group, nearest first, and relevant ones among them.
    """
    before = items.cumsum(1) - items
    relevant_before = relevant.cumsum(1) - relevant
    ones = torch.digamma(before + items + 1) - torch.digamma(before + 1)
    steps = items - (before + 1) * ones
    several = items > 1 + 1e-9
    pairs = torch.where(several, (relevant - 1).clamp_min(0) / torch.where(several, items - 1, 1.0), 0.0)
    filled = items > 1e-9
    density = torch.where(filled, relevant / torch.where(filled, items, 1.0), 0.0)
    total = relevant.sum(1).detach()
    sums = (density * ((relevant_before + 1) * ones + pairs * steps)).sum(1)
    return torch.where(total > 0, sums / torch.where(total > 0, total, 1.0), 0.0)


class _SoftAP(torch.autograd.Function):
    """Soft AP of (B, K) soft bits and its gradient by blocks of codes: autograd would store every block.

    ``length`` is the distance beyond which all count as equal, K by default.
    """

    @staticmethod
    def forward(
        ctx: Any, bits: Tensor, codes: Tensor, items: Tensor, relevant: Tensor, length: int = 0
    ) -> Tensor:
        size, length = len(bits), length or bits.shape[1]
        blocks = torch.arange(len(codes), device=codes.device).split(max(1, _CELLS // size))
        # of items and of relevant ones, by distance
        profiles = torch.zeros(2, size, length + 2, dtype=torch.float64, device=bits.device)
        for block in blocks:
            low, beyond = _bins(bits, codes[block], length)
            groups = (items[block].expand(size, -1), relevant[:, block])
            for counts, profile in zip(groups, profiles, strict=True):
                profile.scatter_add_(1, low, (counts * (1 - beyond)).double())
                profile.scatter_add_(1, low + 1, (counts * beyond).double())
        with torch.enable_grad():
            profiles.requires_grad_(True)
            value = soft_average_precision(profiles[0], profiles[1])
            (slope,) = torch.autograd.grad(value.sum(), profiles)
        rise = slope.diff(dim=2).to(bits.dtype)  # of AP, as an item moves from one distance to the next
        grad = torch.zeros_like(bits)
        for block in blocks:
            low, _ = _bins(bits, codes[block], length)
            by_distance = items[block] * rise[0].gather(1, low) + relevant[:, block] * rise[1].gather(1, low)
            grad -= by_distance @ codes[block] / 2
        ctx.save_for_backward(grad)
        return value.detach().to(bits.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        return grads[0][:, None] * ctx.saved_tensors[0], None, None, None, None


def _bins(bits: Tensor, codes: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """(B, m) the whole part of the soft distance (length - z b) / 2 to each code, and what is beyond it."""
    distance = ((length - bits @ codes.T) / 2).clamp(0, length)
    low = distance.floor().long().clamp(0, length)  # NaN has some bin; the search refuses it by its value
    return low, distance - low


def soft_ap_of_distances(rows: Tensor, items: Tensor, relevant: Tensor, bins: int) -> Tensor:
    """(B,) soft AP where (bins - rows @ items.T) / 2 is the distance of each item, counted in [0, bins].

    Args:
        rows, items: (B, D) and (M, D).
        relevant: (B, M) 1 where an item is relevant.
    """
    ones = torch.ones(len(items), dtype=rows.dtype, device=rows.device)
    value: Tensor = _SoftAP.apply(rows, items.to(rows.dtype), ones, relevant.to(rows.dtype), bins)
    return value


@register("attack-loss", "soft-ap")
@dataclass(frozen=True)
class SoftAP(Loss):
    """The reported metric made differentiable: expected AP of the soft profile, with the guide ``tally``.

    Each distinct code counts for the two whole distances around its soft distance, in triangular bins of
    width 1; the closed form of the expected AP is applied to these counts.
    """

    def __call__(self, probe: Probe, guidance: Guidance) -> Tensor:
        tally, bits = _tally(guidance), soft_bits(probe)
        counts = (part.to(bits.dtype) for part in (tally.codes, tally.items, tally.relevant))
        value: Tensor = _SoftAP.apply(bits, *counts)
        return value


@register("attack-loss", "margin-pn")
@dataclass(frozen=True)
class MarginPN(Loss):
    """Mean soft agreement with the nearest relevant codes minus that with the nearest irrelevant ones.

    The nearest are those of the current binary code, at every step; of a distance that the cut splits, every
    item counts by the same share, so that no order decides.

    Args:
        nearest: items on each side; all where there are fewer.
    """

    nearest: int = 100

    def __post_init__(self) -> None:
        if self.nearest < 1:
            raise ValueError(f"nearest must be at least 1, got {self.nearest}")

    def __call__(self, probe: Probe, guidance: Guidance) -> Tensor:
        tally, bits = _tally(guidance), soft_bits(probe)
        codes, items, relevant = (part.to(bits.dtype) for part in (tally.codes, tally.items, tally.relevant))
        with torch.no_grad():
            towards, away = _nearest(bits, codes, (relevant, items - relevant), self.nearest)
        return (bits * (towards - away)).mean(1)


def _nearest(bits: Tensor, codes: Tensor, groups: Sequence[Tensor], nearest: int) -> list[Tensor]:
    """(B, K) mean code of the ``nearest`` of each group of (B, M) items by code; zeros if there are none."""
    size, length = bits.shape
    blocks = torch.arange(len(codes), device=codes.device).split(max(1, _CELLS // size))
    hard = sign(bits)
    profiles = torch.zeros(len(groups), size, length + 2, dtype=torch.float64, device=bits.device)
    for block in blocks:
        low, _ = _bins(hard, codes[block], length)
        for counts, profile in zip(groups, profiles, strict=True):
            profile.scatter_add_(1, low, counts[:, block].double())
    selected = torch.minimum((nearest - (profiles.cumsum(2) - profiles)).clamp_min(0), profiles)
    parts = share(selected, profiles).to(bits.dtype)
    totals = [torch.zeros_like(bits) for _ in groups]
    for block in blocks:
        low, _ = _bins(hard, codes[block], length)
        for counts, part, total in zip(groups, parts, totals, strict=True):
            total += (counts[:, block] * part.gather(1, low)) @ codes[block]
    counted = selected.sum(2).clamp_min(1).to(bits.dtype)
    return [total / count[:, None] for total, count in zip(totals, counted, strict=True)]


def _tally(guidance: Guidance) -> Tally:
    if not isinstance(guidance, Tally):
        raise ValueError("this loss counts items by code; use the guide 'tally'")
    return guidance


@register("attack", "flip-apgd", supervised=False, state="measured")
def flip_apgd(
    eps: float | None = None, steps: int = 100, restarts: int = 1, modality: Attacked = "image"
) -> Attack:
    """Default attack: APGD away from the query's own clean code; its search needs no labels."""
    parts = (Own(), ScaleFree(), APGD(steps), threat_on(modality, eps, knowledge="W2"))
    return Attack("flip-apgd", *parts, restarts=restarts, selects=True)


@register("attack", "wrong-apgd", state="measured")
def wrong_apgd(
    eps: float | None = None,
    steps: int = 100,
    restarts: int = 1,
    modality: Attacked = "image",
    margin: bool = True,
) -> Attack:
    """Default attack: APGD towards the nearest representative of another label, and away from the own one.

    ``margin=False`` pursues the wrong representative alone.
    """
    parts = (Wrong(margin), Pull(), APGD(steps), threat_on(modality, eps, knowledge="W2"))
    return Attack("wrong-apgd", *parts, restarts=restarts, selects=True)


@register("attack", "soft-ap-apgd", state="measured")
def soft_ap_apgd(
    eps: float | None = None, steps: int = 100, restarts: int = 1, modality: Attacked = "image"
) -> Attack:
    """Default attack: APGD on a differentiable form of the expected AP over the whole database."""
    parts = (Tallied(), SoftAP(), APGD(steps), threat_on(modality, eps, knowledge="W2"))
    return Attack("soft-ap-apgd", *parts, restarts=restarts, selects=True)


@register("attack", "margin-pn-apgd", state="measured")
def margin_pn_apgd(
    eps: float | None = None,
    steps: int = 100,
    restarts: int = 1,
    modality: Attacked = "image",
    nearest: int = 100,
) -> Attack:
    """Default attack: APGD away from the nearest relevant items and towards the nearest irrelevant ones."""
    parts = (Tallied(), MarginPN(nearest), APGD(steps), threat_on(modality, eps, knowledge="W2"))
    return Attack("margin-pn-apgd", *parts, restarts=restarts, selects=True)


@register("attack", "guided-targeted-apgd", targeted=True, state="measured")
def guided_targeted_apgd(
    eps: float | None = None, steps: int = 100, restarts: int = 1, modality: Attacked = "image"
) -> Attack:
    """Default attack: APGD on the scale-free agreement with the mainstay code of the target labels."""
    parts = (Mainstay(), ScaleFree(), APGD(steps), threat_on(modality, eps, knowledge="W2"))
    return Attack("guided-targeted-apgd", *parts, targeted=True, restarts=restarts, selects=True)
