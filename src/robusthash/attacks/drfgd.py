"""DRFGD's attack: away from every relevant code against the mean irrelevant one; swapped, it aligns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robusthash.attacks.base import Attack, Guide, Loss, Probe
from robusthash.attacks.guides import Own
from robusthash.attacks.pgd import PGD
from robusthash.attacks.threat_model import Attacked, threat_on
from robusthash.core.hamming import sign
from robusthash.core.labels import relevant
from robusthash.core.registry import register
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, Goal, Guidance, Reference
from robusthash.models.hasher import Hasher


def set_contrast(code: Tensor, guidance: Guidance, tau: float = 0.05, *, mean: bool = True) -> Tensor:
    """(B,) L_Adv = log(1 + sum_p exp((s_p - s_N) / tau)), lower = farther from the first set (Eq 1-2).

    s_j = <h, b_j> / 2K is the agreement with item j, up to a constant that cancels: minus the Hamming
    distance over K, summed over the modalities of the item. s_N is the mean over the second set.

    Args:
        code: (B, K) relaxed codes h in [-1, 1].
        guidance: shared codes (M, K), the sum over an item's modalities, and weights (B, M): above 0 in the
            first set (its members are pushed away), below 0 in the second, 0 in neither. ``swapped``
            exchanges the sets.
        tau: temperature, 0.05 in the paper.
        mean: take the mean over the first set instead of the printed sum, so that its size does not matter
            (ours). For an attack by signed steps both are the same.
    """
    if guidance.weights is None:
        raise ValueError("set-contrast needs a set of codes with signed weights; use the guide 'signed-sets'")
    if not tau > 0.0:
        raise ValueError(f"tau must be positive, got {tau:g}")
    first, second = guidance.weights > 0, (guidance.weights < 0).to(code.dtype)
    with torch.autocast(code.device.type, enabled=False):  # over a small tau bf16 would be off by whole units
        codes = guidance.codes.to(code.dtype)
        scores = code @ codes.T / (2 * codes.shape[1])
        against = (scores * second).sum(1, keepdim=True) / second.sum(1, keepdim=True).clamp_min(1.0)
        # exponents reach 40: exp of them would lose the smaller ones, so the sum is taken in the log domain
        exponents = ((scores - against) / tau).masked_fill(~first, -torch.inf)
        if mean:
            exponents = exponents - first.sum(1, keepdim=True).clamp_min(1).to(code.dtype).log()
        return torch.logsumexp(torch.cat([torch.zeros_like(exponents[:, :1]), exponents], 1), 1)


def swapped(guidance: Guidance) -> Guidance:
    """The two sets exchanged: what pushed away from the relevant codes pulls towards them (alignment)."""
    return Guidance(guidance.codes, None if guidance.weights is None else -guidance.weights)


@register("attack-guide", "signed-sets", paper="DRFGD, AAAI 2026", evidence="paper")
@dataclass(frozen=True)
class SignedSets(Guide):
    """Reference items that share a label with the goal, 1 / count each, and the others, -1 / count each.

    The code of an item is the sum over its modalities. A query without a relevant item has its own clean code
    as the only one; without an irrelevant item, the second set is empty and its mean agreement is 0.

    Args:
        most: items of each set at most, drawn without replacement, keyed by query (ours; the paper takes
            all).
    """

    most: int = 256

    def __post_init__(self) -> None:
        if self.most < 1:
            raise ValueError(f"most must be at least 1, got {self.most}")

    def __call__(
        self, victim: Hasher, batch: Batch, goal: Goal, reference: Reference | None, draws: Draws
    ) -> Guidance:
        if reference is None or reference.labels is None or goal.labels is None:
            raise ValueError("this guide needs labelled reference codes: use a W1 or W2 threat and labels")
        codes = torch.stack(list(reference.codes.values())).sum(0)
        positive = relevant(goal.labels, reference.labels)
        towards = self._sampled_shares(positive, batch, draws.within("relevant"))
        weights = towards - self._sampled_shares(~positive, batch, draws.within("irrelevant"))
        alone = ~positive.any(1)
        if alone.any():
            own = sign(Own()(victim, batch, goal, reference, draws).codes[alone]).to(codes.dtype)
            codes = torch.cat([codes, len(reference.codes) * own])
            weights = torch.cat([weights, torch.eye(len(alone), device=codes.device)[:, alone]], 1)
        return Guidance(codes, weights)

    def _sampled_shares(self, mask: Tensor, batch: Batch, draws: Draws) -> Tensor:
        """(B, M) 1 / count for at most ``most`` items of the mask, 0 elsewhere."""
        rank = draws.uniform(batch.ids, (mask.shape[1],)).masked_fill(~mask, 2.0)
        lowest, rows = rank.topk(min(self.most, mask.shape[1]), dim=1, largest=False)
        inside = (lowest < 2.0).float()
        shares = inside / inside.sum(1, keepdim=True).clamp_min(1.0)
        return torch.zeros_like(rank).scatter(1, rows, shares)


@register("attack-loss", "set-contrast", paper="DRFGD, AAAI 2026", evidence="paper")
@dataclass(frozen=True)
class SetContrast(Loss):
    """``set_contrast`` of the attacked code; descended (goal sign -1) it leaves the relevant codes."""

    tau: float = 0.05
    mean: bool = True

    def __call__(self, probe: Probe, guidance: Guidance) -> Tensor:
        return set_contrast(probe.relaxed(), guidance, self.tau, mean=self.mean)


@register("attack", "drfgd", paper="DRFGD, AAAI 2026", evidence="paper", state="measured")
def drfgd(
    eps: float | None = None,
    steps: int = 20,
    step_size: float | None = None,
    tau: float = 0.05,
    most: int = 256,
    random_start: bool = True,
    modality: Attacked = "image",
) -> Attack:
    """DRFGD's attack: away from relevant codes of both modalities, towards the mean irrelevant one. 20 steps.

    Budget 8/255 with steps of 3/255 in pixels; 0.05 with steps of 0.006 on bags of words, which corresponds
    to no real text: over a vocabulary of 1,386 it sums up to 69 words, where a text has about five. Random
    start: ours, the paper does not say.
    """
    customary = 3 / 500 if modality == "text" else 3 / 255
    search = PGD(steps, customary if step_size is None else step_size, random_start=random_start)
    return Attack("drfgd", SignedSets(most), SetContrast(tau), search, threat_on(modality, eps))
