"""Attacks on bags of words under an edit budget: a few words inserted or removed, so that the result is a
real text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from robusthash.attacks.base import Attack, Found, Score, Select
from robusthash.attacks.pgd import _ascend, _offered, _start
from robusthash.attacks.threat_model import Edits, Threat, edit_threat
from robusthash.core.hamming import sign
from robusthash.core.registry import build, register
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, Inputs
from robusthash.objectives.base import HashObjective


@register("attack-search", "greedy-flips")
@dataclass(frozen=True)
class GreedyFlips:
    """One flip a step: the gradient ranks all feasible flips, the best few are tried, and the best of them is
    kept.

    By first order a flip of entry j gains grad_j (1 - 2 x_j). Of the ``candidates`` of largest gain the one
    of highest true score is taken where it raises the score; otherwise the item stays as it is. An earlier
    flip may be taken back. There are as many steps as edits; nothing is drawn, and ties go to the earlier
    word.

    Args:
        candidates: flips tried exactly in each step, one forward pass each.

    Raises:
        ValueError: no candidate, or a threat of norm balls.
    """

    candidates: int = 8
    edits: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.candidates < 1:
            raise ValueError(f"candidates must be at least 1, got {self.candidates}")

    def __call__(
        self,
        score: Score,
        batch: Batch,
        threat: Threat,
        draws: Draws,
        select: Select | None,
        start: Inputs | None,
    ) -> Found:
        origin, budget = batch.inputs["text"], _words(threat, "greedy flips").count
        x = threat.project(_start(batch, threat, draws, False, start), {"text": origin})["text"]
        steps, tried = max(1, budget), min(self.candidates, origin.shape[1])
        rows = torch.arange(len(x), device=x.device)

        def look(x: Tensor, progress: float) -> tuple[Tensor, Tensor, Tensor]:
            value, logits, grad = _ascend(score, {"text": x}, progress)
            gain = grad["text"] * (1.0 - 2.0 * x)
            return value, logits, gain.masked_fill(~_feasible(x, origin, budget), -torch.inf)

        def flip(x: Tensor, column: Tensor) -> Tensor:
            flipped = x.clone()
            flipped[rows, column] = 1.0 - flipped[rows, column]
            return flipped

        return greedy(score, x, look, flip, steps, tried, select)


Look = Callable[[Tensor, float], tuple[Tensor, Tensor, Tensor]]
"""(texts, progress) -> (B,) score, (B, K) logits, (B, M) first-order gain of each edit, -inf where not
allowed."""


def greedy(
    score: Score,
    x: Tensor,
    look: Look,
    edit: Callable[[Tensor, Tensor], Tensor],
    steps: int,
    tried: int,
    select: Select | None,
) -> Found:
    """One edit a step: of the ``tried`` of largest gain the one of highest true score, where it raises the
    score.

    Args:
        x: (B, ...) texts to start from.
        edit: (texts, (B,) numbers of edits) -> edited texts, a new tensor.
    """
    rows = torch.arange(len(x), device=x.device)
    trace, best = [], None
    for step in range(steps):
        progress = step / steps
        value, logits, gain = look(x, progress)
        trace.append(value.mean())
        if select is not None:
            best = _offered(best, select(sign(logits)), {"text": x})
        order = gain.argsort(dim=1, descending=True, stable=True)[:, :tried]
        highest, chosen = value, x
        for column in order.T:
            edited = edit(x, column)
            with torch.no_grad():
                reached = score({"text": edited}, progress)[0]
            better = (reached > highest) & gain[rows, column].isfinite()
            highest = torch.where(better, reached, highest)
            chosen = torch.where(better[:, None], edited, chosen)
        x = chosen
    forward = steps * (1 + tried)
    if select is not None:
        with torch.no_grad():
            best = _offered(best, select(sign(score({"text": x}, 1.0)[1])), {"text": x})
        return Found(best.inputs, torch.stack(trace), forward + 1, steps)
    return Found({"text": x}, torch.stack(trace), forward, steps)


@register("attack-search", "exact-flips", modality="text", evidence="own")
@dataclass(frozen=True)
class ExactFlips:
    """Every word is tried and the edit of lowest AP kept; once all edits are spent, one is exchanged at a
    time.

    For attackers who know the database and may pass as many texts through their copy of the model as they
    like. Of equal AP the text of higher score is taken, so that a flat metric is left behind; ties go to the
    earlier word. A search ends where no text of the block finds anything better. Greedy, so a lower bound on
    what m edits can do.

    Args:
        exchanges: rounds after the edits are spent, in each of which every edit is taken back once and every
            word tried in its place.

    Raises:
        ValueError: a threat of norm balls, or an attack that does not select by the reported metric.
    """

    exchanges: int = 2
    edits: ClassVar[bool] = True
    by_gradient: ClassVar[bool] = False

    def __call__(
        self,
        score: Score,
        batch: Batch,
        threat: Threat,
        draws: Draws,
        select: Select | None,
        start: Inputs | None,
    ) -> Found:
        edits = _words(threat, "exact flips")
        if select is None:
            raise ValueError("exact flips choose by the reported metric: give the attack selects=True and W2")
        origin, asked = batch.inputs["text"], 0
        x = threat.project(_start(batch, threat, draws, False, start), {"text": origin})["text"]
        trace: list[Tensor] = []

        def rated(x: Tensor) -> Tensor:
            """(B, 2) reported metric and score, compared in this order."""
            nonlocal asked
            asked += 1
            with torch.no_grad():
                value, logits = score({"text": x}, 1.0)
            return torch.stack([select(sign(logits)).double(), value.double()], 1)

        best = rated(x)
        for number in range(edits.count + self.exchanges):
            bases = (
                [x] if number < edits.count else [_without(x, origin, place) for place in range(edits.count)]
            )
            before, kept = best, x
            for base in bases:
                for column in range(x.shape[1]):
                    tried = base.clone()
                    tried[:, column] = 1.0 - tried[:, column]
                    rating = rated(tried)
                    allowed = (tried != origin).sum(1) <= edits.count
                    better = allowed & _higher(rating, best)
                    best = torch.where(better[:, None], rating, best)
                    kept = torch.where(better[:, None], tried, kept)
            x = kept
            trace.append(best[:, 1].mean())
            if torch.equal(best, before):
                break
        return Found({"text": x}, torch.stack(trace), asked, 0)


def _words(threat: Threat, search: str) -> Edits:
    budget = threat.balls.get("text")
    if len(threat.balls) != 1 or not isinstance(budget, Edits):
        raise ValueError(f"{search} search edits of texts alone, not {threat.name}")
    return budget


def _without(x: Tensor, origin: Tensor, place: int) -> Tensor:
    """(B, V) texts with edit number ``place`` of each, counted from its first word, taken back where it has
    one."""
    changed = x != origin
    which = changed & (changed.cumsum(1) == place + 1)
    return torch.where(which, origin, x)


def _higher(left: Tensor, right: Tensor) -> Tensor:
    """(B,) whether (B, 2) ratings are higher, the second column deciding between equals."""
    equal = left[:, 0] == right[:, 0]
    return (left[:, 0] > right[:, 0]) | (equal & (left[:, 1] > right[:, 1]))


def _feasible(x: Tensor, origin: Tensor, budget: int) -> Tensor:
    """(B, V) bool: flipping this entry leaves the text within its budget."""
    flipped = x != origin
    return flipped | (flipped.sum(1, keepdim=True) < budget)


@register("attack", "text-edits", modality="text")
def text_edits(
    objective: HashObjective, like: str | Mapping[str, Any] = "mainstay", edits: int = 3, candidates: int = 8
) -> Attack:
    """Edit a few words of each text, with the guide and the loss of any other attack: ``like: dhta``.

    Ours; no paper attacks the words themselves. Greedy, so a lower bound on what m edits can do. alpha is 1
    throughout.

    Args:
        like: an attack by name or settings, whose guide, loss, goal and knowledge are taken over.
        edits: m, words inserted or removed at most.
        candidates: flips tried exactly for each edit.
    """
    model: Attack = build("attack", like, objective=objective)
    threat = edit_threat(edits, model.threat.knowledge)
    return replace(model, name="text-edits", search=GreedyFlips(candidates), threat=threat, slope="one")
