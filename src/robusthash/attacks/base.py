"""An attack is guide x loss x search x threat. The model comes in at the call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from robusthash.attacks.threat_model import Threat, per_item
from robusthash.core.hamming import sign
from robusthash.core.identity import changes, describe
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, Goal, Guidance, Inputs, Outputs, Reference
from robusthash.data.base import RetrievalData
from robusthash.models.hasher import Hasher, frozen

Select = Callable[[Tensor], Tensor]
"""(B, K) signs -> (B,) reported metric from the adversary's side, larger = better for the attack."""

Score = Callable[[Inputs, float], tuple[Tensor, Tensor]]
"""(attacked inputs, progress in [0, 1]) -> ((B,) score to ascend, (B, K) logits)."""


@dataclass(frozen=True)
class Probe:
    """One look at the victim: all that a loss may use."""

    outputs: Outputs
    inputs: Inputs
    origin: Batch
    goal: Goal
    alpha: float
    reference: Reference | None

    def relaxed(self) -> Tensor:
        """(B, K) relaxed code, averaged over the attacked modalities."""
        return torch.stack([output.relaxed(self.alpha) for output in self.outputs.values()]).mean(0)


@dataclass(frozen=True)
class Found:
    """What a search came back with. Counts are per query, of the search itself: what a guide asks is not in
    them."""

    inputs: Inputs
    trace: Tensor  # (steps,) mean score before each step
    forward: int
    backward: int


class Guide(Protocol):
    """Where the goal lies in Hamming space.

    One whose guidance is a single code of each item, which stands for the goal's labels, says so by an
    attribute ``label_codes = True``: outer losses that pull attacked items to the guidance need it.
    """

    def __call__(
        self, victim: Hasher, batch: Batch, goal: Goal, reference: Reference | None, draws: Draws
    ) -> Guidance: ...


class Loss(Protocol):
    """Agreement with the guidance, (B,), larger = nearer; the search ascends ``goal.sign`` times it."""

    def __call__(self, probe: Probe, guidance: Guidance) -> Tensor: ...


class Search(Protocol):
    """Ascends a score inside a threat. Per item: no step of one query may depend on another.

    A search of edits instead of steps says so by a class attribute ``edits = True``, one that compares scores
    of different steps by ``steady = True``, one that needs no gradient by ``by_gradient = False``. One that
    must look inside what it differentiates offers ``looking(victim) -> Search``, and one whose budget is made
    for a victim ``bound(threat, victim, data) -> Threat``.
    """

    def __call__(
        self,
        score: Score,
        batch: Batch,
        threat: Threat,
        draws: Draws,
        select: Select | None,
        start: Inputs | None,
    ) -> Found: ...


def published_slope(progress: float) -> float:
    """Slope alpha of tanh after a share ``progress`` of the steps: ten equal blocks of 0.1 (x5), .2, .3, .5,
    .7, 1."""
    return (0.1, 0.1, 0.1, 0.1, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)[min(int(progress * 10 + 1e-9), 9)]


@dataclass(frozen=True)
class AttackOutput:
    """Attacked inputs and how they were found."""

    batch: Batch
    guidance: Guidance
    trace: Tensor
    forward: int  # per query, of the search; the guide's own look and the encoding of ``signs`` come on top
    backward: int
    signs: Tensor  # (B, K) the code of the returned inputs, encoded anew


@dataclass(frozen=True)
class Attack:
    """Guide x loss x search x threat.

    Args:
        slope: ``published`` schedules alpha by the papers' ten blocks, ``one`` keeps alpha = 1.
        targeted: the goal carries target labels and sign +1.
        restarts: independent searches, each after the first from a random start; the best by ``select``, else
            by score, is kept per query.
        selects: return the point of best reported metric that was seen; the evaluator then hands over
            ``select``, which needs the database codes (W2). Published attacks return their last point.
    """

    name: str
    guide: Guide
    loss: Loss
    search: Search
    threat: Threat
    slope: Literal["published", "one"] = "one"
    targeted: bool = False
    restarts: int = 1
    selects: bool = False

    def __post_init__(self) -> None:
        if self.selects and self.threat.knowledge != "W2":
            raise ValueError(
                f"selecting by the reported metric needs the database codes (W2), not {self.threat.knowledge}"
            )
        if self.restarts < 1:
            raise ValueError(f"restarts must be at least 1, got {self.restarts}")
        if self.slope not in ("published", "one"):
            raise ValueError(f"slope must be 'published' or 'one', got {self.slope!r}")
        if self.slope != "one" and getattr(self.search, "steady", False):
            raise ValueError(
                f"{type(self.search).__name__} compares scores of different steps, which a scheduled slope changes; "
                f"give it slope 'one', not {self.slope!r}"
            )
        if self.threat.edits != getattr(self.search, "edits", False):
            raise ValueError(
                f"{type(self.search).__name__} cannot search {self.threat.name}: edit budgets on bags of words take "
                "the search 'greedy-flips', budgets of token swaps 'greedy-swaps', norm balls any other, and they "
                "cannot be mixed"
            )

    def fit(
        self, victim: Hasher, data: RetrievalData, reference: Reference | None, *, draws: Draws
    ) -> Attack:
        """The attack with its learning parts trained on this very victim; itself where nothing learns.

        A guide that learns offers ``fitted(victim, data, reference, draws) -> Guide``. The evaluator calls
        this once for a victim, before the first block of queries, with what the threat lets the attacker
        know.
        """
        learn, bind = getattr(self.guide, "fitted", None), getattr(self.search, "bound", None)
        guide = self.guide if learn is None else learn(victim, data, reference, draws.within(self.name))
        threat = self.threat if bind is None else bind(self.threat, victim, data)
        return self if learn is None and bind is None else replace(self, guide=guide, threat=threat)

    @property
    def label_codes(self) -> bool:
        """Whether the guidance is a single code of each item that stands for the goal's labels."""
        return bool(getattr(self.guide, "label_codes", False))

    @property
    def fit_steps(self) -> int:
        """Steps that the guide was fitted with to its victim; 0 where nothing learns."""
        return int(getattr(self.guide, "fit_steps", 0))

    @property
    def budget(self) -> str:
        """Search, steps, slope, restarts and knowledge, as results carry them."""
        return f"{self.search}, slope {self.slope}, starts {self.restarts}, {self.threat.knowledge}"

    def budget_settings(self) -> dict[str, Any]:
        """What ``budget`` says, as plain data: by it budgets are compared, whatever the text is."""
        parts = {"slope": self.slope, "restarts": self.restarts, "knowledge": self.threat.knowledge}
        return {"search": describe(self.search), **parts}

    def settings(self) -> dict[str, Any]:
        """What its result depends on, as plain data: names and parameters that are not the default, and the
        threat."""
        return {**changes(self, skip=("threat",)), "threat": self.threat.settings()}

    def aim(
        self, victim: Hasher, batch: Batch, goal: Goal, reference: Reference | None, draws: Draws
    ) -> tuple[Score, Guidance]:
        """What a search ascends on this victim, and the guidance behind it; the arguments are those of
        ``perturb``.

        Raises:
            ValueError: the batch lacks a modality that the threat attacks.
        """
        missing = [name for name in self.threat.balls if name not in batch.inputs]
        if missing:
            raise ValueError(f"{self.threat.name} attacks {missing}, which this batch does not have")
        guidance = self.guide(
            victim, batch.only(self.threat.balls), goal, reference, draws.within(self.name, "guide")
        )

        def score(inputs: Inputs, progress: float) -> tuple[Tensor, Tensor]:
            alpha = published_slope(progress) if self.slope == "published" else 1.0
            outputs = victim(inputs)
            value = goal.sign * self.loss(Probe(outputs, inputs, batch, goal, alpha, reference), guidance)
            return value, next(iter(outputs.values())).logits

        return score, guidance

    def perturb(
        self,
        victim: Hasher,
        batch: Batch,
        goal: Goal,
        reference: Reference | None,
        *,
        draws: Draws,
        select: Select | None = None,
        start: Inputs | None = None,
    ) -> tuple[Found, Guidance]:
        """Search for the attacked inputs. The victim is put in eval mode with frozen parameters, and
        restored.

        Args:
            batch: clean items; modalities that the threat does not name are left alone.
            goal: own labels with sign -1, or target labels with sign +1.
            reference: codes and labels that the attacker knows; None at W0.
            draws: source of all random numbers, keyed by item id.
            select: the reported metric, where the attacker may compute it.
            start: feasible inputs to start from, e.g. the solution at a smaller eps.
        """
        with frozen(victim), torch.enable_grad():
            score, guidance = self.aim(victim, batch, goal, reference, draws)
            attacked = batch.only(self.threat.balls)
            look = getattr(self.search, "looking", None)
            search: Search = self.search if look is None else look(victim)
            found = search(score, batch, self.threat, draws.within(self.name, 0), select, start)
            for restart in range(1, self.restarts):
                scope = draws.within(self.name, restart)
                elsewhere = self.threat.random_start(attacked.inputs, batch.ids, scope)
                again = search(score, batch, self.threat, scope, select, elsewhere)
                found = _better(score, select, found, again)
        return found, guidance

    def __call__(
        self,
        victim: Hasher,
        batch: Batch,
        goal: Goal,
        reference: Reference | None,
        *,
        draws: Draws,
        select: Select | None = None,
        start: Inputs | None = None,
    ) -> AttackOutput:
        """``perturb``, then encode what it returned anew (published loops report the code of one step
        earlier)."""
        found, guidance = self.perturb(
            victim, batch, goal, reference, draws=draws, select=select, start=start
        )
        with frozen(victim), torch.no_grad():
            signs = sign(next(iter(victim(found.inputs).values())).logits)
        attacked = batch.with_inputs(found.inputs)
        return AttackOutput(attacked, guidance, found.trace, found.forward, found.backward, signs)


def _better(score: Score, select: Select | None, first: Found, second: Found) -> Found:
    """Per query, the better of two searches by ``select`` or, without it, by their final score."""
    with torch.no_grad():
        values = []
        for found in (first, second):
            value, logits = score(found.inputs, 1.0)
            values.append(select(sign(logits)) if select is not None else value)
    win = values[1] > values[0]
    inputs = {
        name: torch.where(per_item(win, value), second.inputs[name], value)
        for name, value in first.inputs.items()
    }
    return Found(inputs, first.trace, first.forward + second.forward + 2, first.backward + second.backward)
