"""Threat-aware evaluation of a detector of queries: what it catches, and what passes it and does harm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from robusthash.attacks.base import Attack
from robusthash.core.runtime import Draws, Progress, silent
from robusthash.core.types import Codes
from robusthash.defenses.adversarial_query_detector import (
    CRITERIA,
    AdversarialQueryDetector,
    Denoised,
    Evading,
    criteria_of,
)
from robusthash.evaluation.context import EvaluationContext
from robusthash.evaluation.evaluate import attack_all, score_attack, score_clean
from robusthash.metrics.measure_key import MeasureKey

MOST_CODES = 10_000
"""Database codes that the distance criterion looks at; of more, evenly spaced ones."""
WEIGHTS = (0.01, 0.1, 1.0)
"""Weights of the excess that an adaptive attacker tries; of each query the one that does most harm counts."""


@dataclass(frozen=True)
class DetectedAttack:
    """An attack before a detector; shares and means are over the queries.

    ``value`` is the mean AP that the search alone would have. In ``passing`` a caught query is refused and
    counts as it was before the attack; of t-MAP, higher is worse in both.
    """

    attack: str
    attacker: str  # oblivious, adaptive, or worst: the most harmful of both
    measure: str  # MAP of the protocol, or its t-MAP
    value: float
    caught: float
    passing: float
    unnoticed: float  # not caught, and AP at most half of the clean one (t-AP: at least 0.5)
    auc: float  # of suspicion, attacked against clean
    by: dict[str, float]  # caught by each criterion alone


@dataclass(frozen=True)
class Detection:
    """Result of ``detect``. ``measured`` is the share of clean queries that is caught, each by limits of the
    others."""

    false_alarms: float
    measured: float
    queries: int
    direction: str
    headline: str
    clean: float
    attacks: tuple[DetectedAttack, ...]
    weights: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()

    def plain(self) -> dict[str, Any]:
        return {"schema": "robusthash.detection/1", **asdict(self), "criteria": list(CRITERIA)}


@dataclass(frozen=True)
class _Halves:
    """Two detectors, each calibrated on one half of the clean queries and used on the other."""

    second: Tensor  # (Q,) bool
    detectors: tuple[
        AdversarialQueryDetector, AdversarialQueryDetector
    ]  # for the first half, and for the second

    @staticmethod
    def of(clean: Tensor, false_alarms: float, seed: int) -> _Halves:
        order = Draws(seed, ("detector",)).uniform(torch.arange(len(clean)), ()).argsort()
        second = torch.zeros(len(clean), dtype=torch.bool)
        second[order[len(clean) // 2 :]] = True
        # of an odd number this one knows fewer, so what it takes is enough for both
        for_second = AdversarialQueryDetector(clean[~second], false_alarms)
        return _Halves(second, (AdversarialQueryDetector(clean[second], false_alarms), for_second))

    def _joined(self, name: str, criteria: Tensor) -> Tensor:
        parts = [getattr(detector, name)(criteria) for detector in self.detectors]
        second = self.second.view(-1, *[1] * (parts[0].dim() - 1))
        return torch.where(second, parts[1], parts[0])

    def caught(self, criteria: Tensor) -> Tensor:
        return self._joined("caught", criteria)

    def caught_by(self, criteria: Tensor) -> Tensor:
        return self._joined("caught_by", criteria)

    def suspicion(self, criteria: Tensor) -> Tensor:
        return self._joined("suspicion", criteria)


@dataclass(frozen=True)
class _Outcome:
    """Per query: AP (or t-AP) under an attack and before it, and whether the query is caught."""

    after: Tensor
    before: Tensor
    caught: Tensor
    suspicion: Tensor
    by: Tensor  # (Q, 3)
    targeted: bool
    measure: str

    @property
    def passing(self) -> Tensor:
        return torch.where(self.caught, self.before, self.after)

    @property
    def unnoticed(self) -> Tensor:
        harmed = self.after >= 0.5 if self.targeted else self.after <= 0.5 * self.before
        return harmed & ~self.caught

    def row(self, attack: str, attacker: str, clean: Tensor) -> DetectedAttack:
        """The means, next to the suspicion of ``clean`` queries."""
        by = dict(zip(CRITERIA, self.by.double().mean(0).tolist(), strict=True))
        numbers = (self.after, self.caught, self.passing, self.unnoticed)
        value, caught, passing, unnoticed = (float(each.double().nanmean()) for each in numbers)
        chance = auc(clean, self.suspicion)
        return DetectedAttack(attack, attacker, self.measure, value, caught, passing, unnoticed, chance, by)


def most_harmful(outcomes: Sequence[_Outcome]) -> _Outcome:
    """The outcome of most harm behind the detector, for each query."""
    first = outcomes[0]
    passing = torch.stack([outcome.passing for outcome in outcomes])
    harmful = (passing if first.targeted else -passing).nan_to_num(-torch.inf).argmax(0)

    def of(name: str) -> Tensor:
        rows = torch.stack([getattr(outcome, name) for outcome in outcomes])
        return rows[harmful, torch.arange(len(harmful))]

    columns = of("after"), of("before"), of("caught"), of("suspicion"), of("by")
    return _Outcome(*columns, first.targeted, first.measure)


def auc(clean: Tensor, attacked: Tensor) -> float:
    """Chance that an attacked query is more suspicious than a clean one; ties count half."""
    order = clean.sort().values
    below, upto = (torch.searchsorted(order, attacked, right=right) for right in (False, True))
    return float((below + upto).double().mean() / (2 * len(clean)))


def check_numbers(false_alarms: float, weights: Sequence[float]) -> None:
    """Raise ValueError for numbers that ``detect`` refuses whatever the data are."""
    if not 0.0 < false_alarms < 1.0:
        raise ValueError(f"a false-alarm rate is a share above 0 and below 1, got {false_alarms:g}")
    if not weights or not all(0.0 < weight < math.inf for weight in weights):
        raise ValueError(f"weights of the detector in the attack's loss are positive, got {list(weights)}")


def detect(
    context: EvaluationContext,
    attacks: Sequence[tuple[str, Attack]],
    false_alarms: float = 0.05,
    weights: Sequence[float] = WEIGHTS,
    progress: Progress = silent,
) -> Detection:
    """Evaluate the detector: oblivious attacks, and the same ones with its criteria in their loss.

    Limits come from clean queries, by halves: each half by those of the other, so no query is judged by
    limits that know it. The adaptive attacker knows the limits of all clean queries and the database codes.

    Args:
        attacks: by name; those that change the query modality of the context. An attack that follows no
            gradient of the victim has no adaptive form, which a note says.
        false_alarms: share of clean queries that may be caught.
        weights: that the adaptive attacker tries.

    Raises:
        ValueError: no attack, a victim searched by its numbers, a rate that the clean queries cannot show, a
            weight that is not positive, or inputs that cannot be denoised.
    """
    if not attacks:
        raise ValueError(f"no attack on the {context.direction[0]} is given; give one")
    check_numbers(false_alarms, weights)
    modality, victim = context.direction[0], context.victim
    codes = _sampled(context.codes)
    queries = torch.cat([context.batch(block).inputs[modality].cpu() for block in range(context.blocks)])
    criteria = criteria_of(victim, modality, queries, codes)
    halves = _Halves.of(criteria, false_alarms, context.seed)
    known, suspicion = AdversarialQueryDetector(criteria, false_alarms), halves.suspicion(criteria)

    def outcome(name: str, attack: Attack, gradients: Any = None) -> _Outcome:
        attacked = attack_all(context, attack, gradients, progress, name=name)
        result, key = score_attack(context, attack, attacked), MeasureKey(context.protocol.headline)
        measure = key.name("targeted") if attack.targeted else str(key)
        after, change = result.per_query[measure], result.per_query["gain" if attack.targeted else "drop"]
        criteria_now = criteria_of(victim, modality, attacked.inputs, codes)
        before = after - change if attack.targeted else after + change
        judged = halves.caught(criteria_now), halves.suspicion(criteria_now), halves.caught_by(criteria_now)
        return _Outcome(after, before, *judged, attack.targeted, measure)

    rows, notes = [], []
    for name, attack in attacks:
        oblivious = outcome(name, attack)
        rows.append(oblivious.row(name, "oblivious", suspicion))
        if not attack.search.by_gradient or attack.guide.substitutes or attack.threat.edits:
            notes.append(f"{name} follows no gradient of the victim and has no adaptive form")
            continue
        evading_outcomes = []
        for weight in weights:
            loss = Evading(attack.loss, weight, known, codes)
            evading = replace(attack, loss=loss, selects=False)
            evading_outcomes.append(outcome(f"{name}, evading by {weight:g}", evading, Denoised()(victim)))
        rows.append(most_harmful(evading_outcomes).row(name, "adaptive", suspicion))
        rows.append(most_harmful([oblivious, *evading_outcomes]).row(name, "worst", suspicion))
    return Detection(
        false_alarms=false_alarms,
        measured=float(halves.caught(criteria).double().mean()),
        queries=len(criteria),
        direction="2".join(part[0].upper() for part in context.direction),
        headline=context.protocol.headline,
        clean=score_clean(context).values[context.protocol.headline],
        attacks=tuple(rows),
        weights=tuple(weights),
        notes=tuple(notes),
    )


def _sampled(codes: Codes) -> Tensor:
    """(M, K) float signs of at most ``MOST_CODES`` codes, evenly spaced."""
    rows = torch.arange(0, len(codes), -(-len(codes) // MOST_CODES))
    return codes.take(rows).signs().float()
