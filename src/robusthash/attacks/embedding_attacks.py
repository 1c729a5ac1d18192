"""Attacks on models that are searched by the cosine or Euclidean distance of float vectors.

``on_embeddings`` turns our own attacks on codes into those on vectors: the same aim, search and threat, with
closeness of the vectors in place of agreement of the bits. Guides are means of relevant items, or all items.
Attacks whose loss or guide is one of bits have no such form and are refused by name.

Closeness is differentiable and takes any scale: the cosine, or minus the squared distance in units of the
mean squared distance between known items.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from robusthash.attacks.base import Attack, Guide, Loss, Probe
from robusthash.attacks.guides import Anchor, Mainstay, Own, known
from robusthash.attacks.losses import ScaleFree
from robusthash.attacks.ranking_losses import MarginPN, Pull, SoftAP, Tallied, Wrong, soft_ap_of_distances
from robusthash.core.embeddings import Distance
from robusthash.core.labels import relevant
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, Goal, Guidance, Reference
from robusthash.models.hasher import Hasher

_BINS = 64  # of the soft AP, over one and a half times the range of a query's clean distances
_CELLS = 1 << 22  # (query, item) pairs at a time


@dataclass(frozen=True)
class Places(Guidance):
    """Vectors that attract or repel, and what closeness means among them."""

    metric: Distance = "cosine"
    unit: float = 1.0  # squared length by which squared distances are divided
    low: Tensor | None = None  # (B, 1) range of the clean distances of each query, of all items alone
    high: Tensor | None = None

    @staticmethod
    def among(vectors: Tensor, metric: Distance) -> tuple[Tensor, float]:
        """The vectors in the form that closeness takes, and the unit of it."""
        if metric == "cosine":
            return normalize(vectors, dim=1), 1.0
        return vectors, max(2 * float(vectors.var(0, correction=0).sum()), 1e-12)

    def apart(self, vectors: Tensor) -> Tensor:
        """(B, K) vectors -> (B, M) distance to every place: 1 - cos, or squared over ``unit``."""
        if self.metric == "cosine":
            return 1 - normalize(vectors, dim=1) @ self.codes.T
        squares = vectors.square().sum(1, keepdim=True) + self.codes.square().sum(1)
        return (squares - 2 * vectors @ self.codes.T) / self.unit

    def own_apart(self, vectors: Tensor) -> Tensor:
        """(B,) distance of each vector to the place of the same row."""
        if self.metric == "cosine":
            return 1 - (normalize(vectors, dim=1) * self.codes).sum(1)
        return (vectors - self.codes).square().sum(1) / self.unit


def vectors_of(probe: Probe) -> Tensor:
    """(B, K) vectors, the mean over attacked modalities."""
    return torch.stack([output.logits for output in probe.outputs.values()]).mean(0)


def _clean(victim: Hasher, batch: Batch) -> Tensor:
    with torch.no_grad():
        return torch.stack([output.logits for output in victim(batch.inputs).values()]).mean(0)


def _known_places(
    victim: Hasher, batch: Batch, goal: Goal, reference: Reference | None
) -> tuple[Tensor, Tensor, float, Tensor, Tensor]:
    """Clean vectors (B, D), known ones (N, D) and their unit, labels of the known items and of the goal."""
    vectors, labels, goal_labels = known(reference, goal)
    clean = _clean(victim, batch)
    places, unit = Places.among(vectors.to(clean), victim.distance)
    return clean, places, unit, labels, goal_labels


@dataclass(frozen=True)
class OwnVector(Guide):
    """The query's own clean vector; no labels."""

    def __call__(
        self, victim: Hasher, batch: Batch, goal: Goal, reference: Reference | None, draws: Draws
    ) -> Guidance:
        places, unit = Places.among(_clean(victim, batch), victim.distance)
        return Places(places, None, victim.distance, unit)


@dataclass(frozen=True)
class MeanAnchor(Guide):
    """The mean vector of the known items that share a label with the goal; without any, the own clean one.

    Args:
        margin: the mean of all others pushes the other way.
    """

    margin: bool = True

    def __call__(
        self, victim: Hasher, batch: Batch, goal: Goal, reference: Reference | None, draws: Draws
    ) -> Guidance:
        clean, vectors, unit, labels, goal_labels = _known_places(victim, batch, goal, reference)
        positive = relevant(goal_labels, labels).to(clean)
        count = positive.sum(1, keepdim=True)
        towards = torch.where(count > 0, positive @ vectors / count.clamp_min(1), clean)
        others = (len(vectors) - count).clamp_min(1)
        away = (vectors.sum(0) - positive @ vectors) / others
        places, _ = Places.among(torch.cat([towards, away]), victim.distance)
        one = torch.eye(len(count)).to(clean)
        pull = float(self.margin) * (count < len(vectors)).to(clean)
        return Places(places, torch.cat([one, -one * pull], 1), victim.distance, unit)


@dataclass(frozen=True)
class WrongAnchor(Guide):
    """From the mean of the goal's items to the nearest mean of a label that the goal lacks.

    Args:
        margin: without it, the attack pursues the wrong one alone.
    """

    margin: bool = True

    def __call__(
        self, victim: Hasher, batch: Batch, goal: Goal, reference: Reference | None, draws: Draws
    ) -> Guidance:
        clean, vectors, unit, labels, goal_labels = _known_places(victim, batch, goal, reference)
        present = torch.nonzero(labels.sum(0) > 0).flatten()
        members = labels[:, present].to(clean).T
        means, _ = Places.among(members @ vectors / members.sum(1, keepdim=True), victim.distance)
        lacked = goal_labels[:, present] == 0
        apart = Places(means, None, victim.distance, unit).apart(clean)
        nearest = apart.masked_fill(~lacked, torch.inf).argmin(1)
        wrong = torch.nn.functional.one_hot(nearest, len(means)) * lacked.any(1, keepdim=True)
        own = MeanAnchor(margin=False)(victim, batch, goal, reference, draws)
        one = torch.eye(len(batch)).to(clean)
        # a query that has every label has no wrong one and only leaves its own
        stay = one if self.margin else one * (~lacked.any(1)).to(clean)
        weights = torch.cat([stay, torch.zeros_like(one), -wrong.to(clean)], 1)
        return Places(torch.cat([own.codes, means]), weights, victim.distance, unit)


@dataclass(frozen=True)
class AllItems(Guide):
    """Every known item, +1 where it is relevant and -1 where it is not."""

    def __call__(
        self, victim: Hasher, batch: Batch, goal: Goal, reference: Reference | None, draws: Draws
    ) -> Guidance:
        clean, vectors, unit, labels, goal_labels = _known_places(victim, batch, goal, reference)
        places = Places(vectors, 2 * relevant(goal_labels, labels).to(clean) - 1, victim.distance, unit)
        apart = places.apart(clean)
        low, high = apart.amin(1, keepdim=True), apart.amax(1, keepdim=True)
        slack = ((high - low) / 4).clamp_min(1e-6)
        return replace(places, low=low - slack, high=high + slack)


@dataclass(frozen=True)
class Closeness(Loss):
    """Minus the distance to the places that attract, plus that to those that repel, by their weights."""

    def __call__(self, probe: Probe, guidance: Guidance) -> Tensor:
        places, vectors = _places(guidance), vectors_of(probe)
        if places.weights is None:
            return -places.own_apart(vectors)
        return -(places.weights * places.apart(vectors)).sum(1)


@dataclass(frozen=True)
class EmbeddingSoftAP(Loss):
    """The expected AP of distances in triangular bins over each query's own range: the reported measure made
    differentiable."""

    def __call__(self, probe: Probe, guidance: Guidance) -> Tensor:
        places, vectors = _places(guidance), vectors_of(probe)
        if places.low is None or places.high is None or places.weights is None:
            raise ValueError("the soft AP needs all items; use the guide AllItems")
        return soft_ap_of_distances(*_linear(places, vectors), (places.weights + 1) / 2, _BINS)


def _linear(places: Places, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """(B, D') rows z and (M, D') items b, of which (bins - z b) / 2 is the distance in bins of the range."""
    assert places.low is not None
    assert places.high is not None
    scale = 2 * _BINS / (places.high - places.low)  # (B, 1)
    ones = torch.ones_like(places.codes[:, :1])
    if places.metric == "cosine":
        rows, base, own = scale * normalize(vectors, dim=1), scale * (1 - places.low), torch.zeros_like(ones)
    else:
        squares = vectors.square().sum(1, keepdim=True) / places.unit
        rows, base = 2 * scale * vectors / places.unit, scale * (squares - places.low)
        own = places.codes.square().sum(1, keepdim=True) / places.unit
    return torch.cat([rows, _BINS - base, -scale], 1), torch.cat([places.codes, ones, own], 1)


@dataclass(frozen=True)
class EmbeddingMargin(Loss):
    """Mean closeness to the nearest relevant items minus that to the nearest irrelevant ones, at every step.

    Args:
        nearest: items on each side; all where there are fewer.
    """

    nearest: int = 100

    def __call__(self, probe: Probe, guidance: Guidance) -> Tensor:
        places, vectors = _places(guidance), vectors_of(probe)
        if places.weights is None:
            raise ValueError("the margin needs all items; use the guide AllItems")
        sides = []
        for side in (1, -1):
            best: Tensor | None = None
            step = max(1, _CELLS // max(1, len(vectors)))
            for start in range(0, len(places.codes), step):
                rows = slice(start, start + step)
                part = replace(places, codes=places.codes[rows])
                other = places.weights[:, rows] != side
                apart = part.apart(vectors).masked_fill(other, torch.inf)
                best = apart if best is None else torch.cat([best, apart], 1)
                best = best.topk(min(self.nearest, best.shape[1]), dim=1, largest=False).values
            assert best is not None
            finite = torch.isfinite(best)
            sides.append(torch.where(finite, best, 0.0).sum(1) / finite.sum(1).clamp_min(1))
        return sides[1] - sides[0]


def _places(guidance: Guidance) -> Places:
    if not isinstance(guidance, Places):
        raise ValueError("this loss compares float vectors; use a guide of attacks.embedding_attacks")
    return guidance


# ------------------------------------------------------------------------------------------ translation


def on_embeddings(attack: Attack) -> Attack:
    """The same attack on float vectors, under its own name.

    Raises:
        ValueError: its guide or its loss is one of bits, which vectors do not have.
    """
    if isinstance(attack.loss, Closeness | EmbeddingSoftAP | EmbeddingMargin):
        return attack
    guide, loss = _guide(attack), _loss(attack)
    if guide is None or loss is None:
        raise ValueError(
            f"the attack {attack.name!r} ({type(attack.guide).__name__}, {type(attack.loss).__name__}) works "
            "on bits, and this victim is searched by float vectors; those that have a form there are "
            "guided-apgd, wrong-apgd, flip-apgd, soft-ap-apgd, margin-pn-apgd and guided-targeted-apgd"
        )
    search: Any = attack.search
    if isinstance(guide, OwnVector) and hasattr(search, "random_start"):
        search = replace(search, random_start=True)  # at its own vector the distance has no slope
    return replace(attack, guide=guide, loss=loss, search=search)


def _guide(attack: Attack) -> Guide | None:
    guide = attack.guide
    if isinstance(guide, Wrong):
        return WrongAnchor(guide.margin)
    if isinstance(guide, Own):
        return OwnVector()
    if isinstance(guide, Mainstay | Anchor):
        return MeanAnchor(margin=not attack.targeted)
    return AllItems() if isinstance(guide, Tallied) else None


def _loss(attack: Attack) -> Loss | None:
    loss = attack.loss
    if isinstance(loss, MarginPN):
        return EmbeddingMargin(loss.nearest)
    if isinstance(loss, SoftAP):
        return EmbeddingSoftAP()
    return Closeness() if isinstance(loss, ScaleFree | Pull) else None
