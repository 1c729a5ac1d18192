"""Guides: the code, or the set of codes, that an attack moves away from or towards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from robusthash.attacks.base import Guide
from robusthash.core.hamming import sign
from robusthash.core.labels import cosine, overlap, relevant
from robusthash.core.registry import register
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, Goal, Guidance, Reference
from robusthash.models.hasher import Hasher


def known(reference: Reference | None, goal: Goal) -> tuple[Tensor, Tensor, Tensor]:
    """(codes (M, K), their labels (M, C), goal labels (B, C)); codes of several modalities end to end."""
    if reference is None or reference.labels is None or goal.labels is None:
        raise ValueError("this guide needs labelled reference codes: use a W1 or W2 threat and labelled data")
    codes = torch.cat(list(reference.codes.values()))
    return codes, reference.labels.repeat(len(reference.codes), 1), goal.labels


@register("attack-guide", "none", supervised=False)
@dataclass(frozen=True)
class Unguided(Guide):
    """For losses that need no code: an empty guidance, hence no representative MAP."""

    def __call__(
        self, victim: Hasher, batch: Batch, goal: Goal, reference: Reference | None, draws: Draws
    ) -> Guidance:
        return Guidance(torch.empty(0, victim.bits, device=victim.device))


@register("attack-guide", "own", paper="HAG 2020", supervised=False)
@dataclass(frozen=True)
class Own(Guide):
    """The query's own clean relaxed code, averaged where image and text are attacked together; no labels."""

    def __call__(
        self, victim: Hasher, batch: Batch, goal: Goal, reference: Reference | None, draws: Draws
    ) -> Guidance:
        with torch.no_grad():
            codes = [output.relaxed() for output in victim(batch.inputs).values()]
            return Guidance(torch.stack(codes).mean(0))


@register("attack-guide", "positives", paper="SDHA 2021")
@dataclass(frozen=True)
class Positives(Guide):
    """All reference codes that share a label with the goal, weighted 1 / count; else the own clean code."""

    def __call__(
        self, victim: Hasher, batch: Batch, goal: Goal, reference: Reference | None, draws: Draws
    ) -> Guidance:
        codes, labels, goal_labels = known(reference, goal)
        positive = relevant(goal_labels, labels).float()
        alone = positive.sum(1) == 0
        if alone.any():
            own = sign(Own()(victim, batch, goal, reference, draws).codes[alone])
            codes = torch.cat([codes, own])
            positive = torch.cat([positive, torch.eye(len(alone), device=codes.device)[:, alone]], 1)
        return Guidance(codes, positive / positive.sum(1, keepdim=True))


@register("attack-guide", "anchor", paper="DHTA 2020", targeted=True)
@dataclass(frozen=True)
class Anchor(Guide):
    """Component voting over ``items`` random reference codes with exactly the target labels.

    DHTA takes 9, P2P one. Drawn without replacement, keyed by query; all of them where fewer exist
    (published copies draw with replacement). A vote of 0 is +1. Where no reference item has exactly these
    labels, which the papers exclude, those vote that have all of them (and more), else those that share any.
    """

    items: int = 9
    label_codes = True

    def __call__(
        self, victim: Hasher, batch: Batch, goal: Goal, reference: Reference | None, draws: Draws
    ) -> Guidance:
        codes, labels, goal_labels = known(reference, goal)
        voters = self._voters(goal_labels, labels)
        if not voters.any(1).all():
            row = int(torch.nonzero(~voters.any(1))[0])
            raise ValueError(
                f"no reference item shares a label with the target of query {int(batch.ids[row])}; give the "
                "attack knowledge of the database, whose label sets the targets are (W2)"
            )
        rank = draws.uniform(batch.ids, (len(codes),)).masked_fill(~voters, 2.0)
        lowest, rows = rank.topk(min(self.items, len(codes)), dim=1, largest=False)
        votes = (codes[rows] * (lowest < 2.0).unsqueeze(2)).sum(1)
        return Guidance(sign(votes))

    @staticmethod
    def _voters(targets: Tensor, labels: Tensor) -> Tensor:
        """(B, M) bool: items with exactly the target labels; without any, those with all; else with any."""
        shared, size = overlap(targets, labels), targets.sum(1, keepdim=True)
        every = (shared == size) & (size > 0)
        voters = every & (labels.sum(1) == size)
        for wider in (every, shared > 0):
            voters = torch.where(voters.any(1, keepdim=True), voters, wider)
        return voters


MainstayWeights = Literal["code", "paper", "cgat"]


def mainstay_code(
    goal_labels: Tensor, codes: Tensor, labels: Tensor, weights: MainstayWeights = "code"
) -> Tensor:
    """The mainstay code of each label vector: sgn(sum_P w b - sum_N w b), of least weighted distance sum.

    Args:
        goal_labels: (B, C) label vectors; no image is needed.
        codes, labels: (M, K) reference codes in {-1, +1} and their (M, C) labels.
        weights: of the positives, with s the cosine of label vectors. ``code``: s / sum s (SAAT's code, most
            likely behind its numbers); ``paper``: s / count (TIFS 2023); ``cgat``: 1 / count (CgAT's code).
            Negatives always weigh 1 / count. On single-label data the three coincide.

    Returns:
        (B, K) in {-1, +1}; a sum within rounding (1e-6 of at most 2) of zero is a tie and gives +1, so that
        neither the order of the bank nor the batch size decides a bit.
    """
    if weights not in get_args(MainstayWeights):
        raise ValueError(f"mainstay weights must be 'code', 'paper' or 'cgat', got {weights!r}")
    with torch.autocast(codes.device.type, enabled=False):  # rounding to bf16 would decide bits
        similarity = cosine(goal_labels, labels)
        positive = (similarity > 0).float()
        pull = positive if weights == "cgat" else similarity
        weight = positive if weights == "paper" else pull
        # sums of signs are whole numbers and exact; dividing them afterwards keeps ties exact
        towards = pull @ codes / weight.sum(1, keepdim=True).clamp_min(1e-8)
        negatives = (len(codes) - positive.sum(1, keepdim=True)).clamp_min(1.0)
        away = (codes.sum(0) - positive @ codes) / negatives
    difference = towards - away
    return sign(torch.where(difference.abs() < 1e-6, 0.0, difference))


@register("attack-guide", "mainstay", paper="SAAT, TIFS 2023", evidence="paper+code")
@dataclass(frozen=True)
class Mainstay(Guide):
    """The mainstay code of the goal's labels over the reference codes (SAAT)."""

    weights: MainstayWeights = "code"
    label_codes = True

    def __call__(
        self, victim: Hasher, batch: Batch, goal: Goal, reference: Reference | None, draws: Draws
    ) -> Guidance:
        codes, labels, goal_labels = known(reference, goal)
        return Guidance(mainstay_code(goal_labels, codes, labels, self.weights))


@register("attack-guide", "center", paper="CgAT, WWW 2023", evidence="paper+code")
@dataclass(frozen=True)
class Center(Guide):
    """CgAT's center code: mean of the positives minus mean of the negatives, signed.

    Differs: an item without labels counts as a negative (the released code divides 0 by 0 there).
    """

    label_codes = True

    def __call__(
        self, victim: Hasher, batch: Batch, goal: Goal, reference: Reference | None, draws: Draws
    ) -> Guidance:
        return Mainstay("cgat")(victim, batch, goal, reference, draws)
