"""Searches by oracle queries against a service that detects them: when they are refused, what they reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from robusthash.attacks.oracle import QueryOracle, QueryScore
from robusthash.attacks.query_search import search_by_queries
from robusthash.core.runtime import Draws, Progress, silent
from robusthash.core.types import Batch, Inputs
from robusthash.data.transforms import augment, eight_bits, to_pixels
from robusthash.defenses.query_detection import DetectionLimits, QueryDetector
from robusthash.evaluation.context import EvaluationContext
from robusthash.evaluation.runner import pass_progress
from robusthash.models.encoding import encode_signs
from robusthash.robustness.specs.oracle_attacks import OracleAttack
from robusthash.robustness.specs.transfer_attacks import keyed

SECONDS = 0.02  # between queries of one attacker: the rate that a service allows by default


@dataclass(frozen=True)
class Evasion:
    """Evasion by an attacker who knows of the detection, but not its salt.

    Attributes:
        clients: names that it queries under in turn.
        decoys: other images that it sends between two queries.
        blind: every query is sent moved by up to an eighth, mirrored or not, and brighter or darker, which
            changes its code little (query blinding; Chen et al., 2020).
    """

    name: str = "unaware"
    clients: int = 1
    decoys: int = 0
    blind: bool = False


@dataclass(frozen=True)
class Detected:
    """Attackers of one query each in front of one detector.

    Attributes:
        slowed, refused: (Q,) number of the oracle query that was first slowed or refused; 0 for never.
        answered: (Q,) oracle queries that were answered, of ``budget``.
        marks: numbers of oracle queries sent.
        ap: (Q, G) AP of the best input after each of them, the clean query among them.
    """

    slowed: Tensor
    refused: Tensor
    answered: Tensor
    budget: int
    marks: tuple[int, ...]
    ap: Tensor


class _Guarded:
    """The score of an attacker's queries, of a block, behind a detector; refused ones show nothing."""

    def __init__(
        self,
        ask: QueryScore,
        batch: Batch,
        detector: QueryDetector | None,
        evasion: Evasion,
        decoys: Tensor,
        draws: Draws,
    ) -> None:
        self.ask, self.batch, self.detector = ask, batch, detector
        self.evasion, self.decoys, self.draws = evasion, decoys, draws
        self.sent = 0
        self.slowed, self.refused, self.answered = (torch.zeros(len(batch), dtype=torch.int64) for _ in "srb")
        self.first: Tensor | None = None

    def __call__(self, inputs: Inputs) -> Tensor:
        images = eight_bits(self._blinded(inputs["image"]))
        self.sent += 1
        refused = torch.tensor(
            [self._refused(row, number) for number, row in enumerate(to_pixels(images))], dtype=torch.bool
        )
        score = self.ask({"image": images})
        self.first = score if self.first is None else self.first
        return torch.where(refused.to(score.device), self.first, score)

    def _refused(self, pixels: np.ndarray, number: int) -> bool:
        """Send one query of an attacker, after its decoys."""
        now, who = self.sent * SECONDS, f"{int(self.batch.ids[number])}/{self.sent % self.evasion.clients}"
        if self.detector is None:
            self.answered[number] += 1
            return False
        scope = self.draws.within("decoys", self.sent, number)
        places = (scope.uniform(torch.arange(self.evasion.decoys), ()) * len(self.decoys)).long()
        for decoy in to_pixels(self.decoys[places]) if len(places) else ():
            self.detector.see(decoy, who, now)
        detection = self.detector.see(pixels, who, now)
        if detection.verdict == "refuse":
            self.refused[number] = self.refused[number] or self.sent
        else:
            self.answered[number] += 1
            if detection.verdict == "slow":
                self.slowed[number] = self.slowed[number] or self.sent
        return detection.verdict == "refuse"

    def _blinded(self, images: Tensor) -> Tensor:
        if not self.evasion.blind or not self.sent:  # the clean query is sent as it is
            return images
        scope = self.draws.within("blind", self.sent)
        moved = augment(images, self.batch.ids, scope, pad=images.shape[-1] // 8)
        light = 0.7 + 0.6 * scope.within("light").uniform(self.batch.ids, (1, 1, 1))
        return (moved * light.to(moved)).clamp(0, 1)


def detected_search(
    context: EvaluationContext,
    spec: OracleAttack,
    limits: DetectionLimits | None,
    evasion: Evasion = Evasion(),
    marks: Sequence[int] = (100, 1000),
    progress: Progress = silent,
) -> Detected:
    """Attack every query of ``context`` by ``spec`` through one detector, each attacker under its own name.

    An attacker whose query is refused learns nothing of it and goes on. Decoys are other images of the
    database. Queries follow one another as fast as a service allows, so none is forgotten by its age.

    Args:
        limits: None detects nothing.
        marks: numbers of oracle queries at which AP is read.

    Raises:
        ValueError: marks that do not rise or exceed the budget of ``spec``; queries that are no images.
    """
    if context.direction[0] != "image":
        raise ValueError("queries are detected among images alone; take a direction that queries by image")
    if not marks or sorted(set(marks)) != list(marks) or marks[-1] > spec.budget:
        raise ValueError(f"marks must rise and end at most at the attack's {spec.budget}: {list(marks)}")
    draws = keyed(context, "detected", 0)
    salt = f"measured, {context.seed:016}".encode()
    detector = None if limits is None else QueryDetector(limits, salt)
    count = min(512, len(context.data.database))
    decoys = context.data.database.batch(torch.arange(count)).inputs["image"]
    blocks = []
    spec = replace(spec, marks=tuple(marks))
    for block in range(context.blocks):
        batch = context.batch(block)
        oracle = QueryOracle(context.victim, context.database, spec.budget, spec.knowledge, spec.k)
        ask = spec.query_score(context, batch, oracle)
        guarded = _Guarded(ask, batch, detector, evasion, decoys, draws)
        with pass_progress(context.victim, progress, f"{spec.name}, {evasion.name}", spec.budget):
            result = search_by_queries(
                spec.search, guarded, batch, spec.threat, draws, spec.budget, marks=spec.marks
            )
        blocks.append((guarded, _lowest(context, batch, result.best_after)))
        progress(block + 1, context.blocks, f"{spec.name}, {evasion.name}")
    return Detected(
        torch.cat([each.slowed for each, _ in blocks]),
        torch.cat([each.refused for each, _ in blocks]),
        torch.cat([each.answered for each, _ in blocks]),
        spec.budget,
        spec.marks,
        torch.cat([ap for _, ap in blocks]),
    )


def _lowest(context: EvaluationContext, batch: Batch, best: dict[int, Inputs]) -> Tensor:
    """(B, G) lowest AP up to each mark, the clean queries' among them, as 8-bit files."""
    assert batch.labels is not None
    candidates = [batch.inputs, *(best[mark] for mark in sorted(best))]
    signs = [encode_signs(context.victim, "image", eight_bits(inputs["image"])) for inputs in candidates]
    ap = torch.stack([context.expected_ap(each, batch.labels) for each in signs], 1)
    return ap.cummin(1).values[:, 1:]
