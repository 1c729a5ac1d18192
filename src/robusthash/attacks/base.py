"""An attack is guide x loss x search x threat; the model comes in at the call."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from robusthash.attacks.budgets import per_item
from robusthash.attacks.threat_model import Threat
from robusthash.core.identity import changes, describe
from robusthash.core.option_types import Checked
from robusthash.core.registry import build
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, Goal, Guidance, Inputs, Outputs, Reference
from robusthash.data.base import RetrievalData
from robusthash.models.hasher import Hasher, frozen

Select = Callable[[Tensor], Tensor]
"""(B, K) signs or vectors -> (B,) reported metric of the adversary, larger = better for the attack."""

Score = Callable[[Inputs, float], tuple[Tensor, Tensor]]
"""(attacked inputs, progress in [0, 1]) -> ((B,) score to ascend, (B, K) logits)."""

Start = Inputs | None
"""Feasible inputs that a search starts from; None is its own start."""


@dataclass(frozen=True)
class Probe:
    """One forward pass of the victim: all that a loss may use."""

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
class SearchResult:
    """Attacked inputs and the cost of the search, per query.

    Passes and oracle queries are those of the search itself; a guide's own pass and the encoding of ``signs``
    come on top.
    """

    inputs: Inputs  # of the attacked modalities
    trace: Tensor  # (steps,) mean score before each step; (0,) of a search by oracle queries
    forward: int = 0
    backward: int = 0
    oracle_queries: int = 0
    best_after: dict[int, Inputs] = field(
        default_factory=dict
    )  # best inputs after a number of oracle queries
    score: Tensor | None = None  # (B,) of the inputs, as the attacker saw it, of a search by oracle queries
    guidance: Guidance = field(
        default_factory=lambda: Guidance(torch.empty(0, 0))
    )  # empty where there is none
    signs: Tensor | None = (
        None  # (B, K) code (or vector) of the inputs, where ``Attack.__call__`` encoded them
    )


class Guide(Checked, ABC):
    """Place of the goal in Hamming space.

    ``label_codes``: the guidance is a single code of each item, which stands for the goal's labels; outer
    losses that pull attacked items to the guidance need it. ``learns``: ``fitted`` must be called for each
    victim. ``pairs``: it needs known codes of every modality. ``substitutes``: the search ascends the score
    of a model of its own (``ascended_model``), and the attacker holds neither the victim nor its codes.
    """

    label_codes: bool = False
    learns: bool = False
    pairs: bool = False
    substitutes: bool = False
    fit_steps: int = 0  # that the last fit took
    fit_queries: int = 0  # oracle queries to the victim that it took
    fit_items: int = 0  # training items that it saw
    file: Path | None = None  # where what it learned is kept, if one is named

    @abstractmethod
    def __call__(
        self, victim: Hasher, batch: Batch, goal: Goal, reference: Reference | None, draws: Draws
    ) -> Guidance: ...

    def fitted(self, victim: Hasher, data: RetrievalData, reference: Reference | None, draws: Draws) -> Guide:
        """The guide with its learning parts trained on this victim; itself where nothing learns."""
        return self

    def under(self, threat: Threat) -> Guide:
        """The guide with what its fit must know of the budget."""
        return self

    def at_most(self, steps: int) -> Guide:
        """The guide with a fit of at most this many epochs."""
        return self

    def fit_size(self, items: int) -> int:
        """Items that a fit on this many training items passes in all, at most; an estimate of its cost."""
        return items

    def ascended_model(self, victim: Hasher) -> Hasher:
        """The model whose score the search ascends: the victim, or a substitute."""
        return victim


class Loss(Checked, ABC):
    """Agreement with the guidance, (B,), larger = nearer; the search ascends ``goal.sign`` times it."""

    @abstractmethod
    def __call__(self, probe: Probe, guidance: Guidance) -> Tensor: ...


class Search(Checked, ABC):
    """Ascent of a score inside a threat. Per item: no step of one query may depend on another.

    ``edits``: it changes words or tokens instead of taking steps. ``steady``: it compares scores of different
    steps. ``by_gradient``: it differentiates the score.
    """

    steps: int = 1
    edits: bool = False
    steady: bool = False
    by_gradient: bool = True

    @abstractmethod
    def __call__(
        self, score: Score, batch: Batch, threat: Threat, draws: Draws, select: Select | None, start: Start
    ) -> SearchResult: ...

    def check(self, threat: Threat, origin: Inputs | None = None) -> None:  # few have steps
        """Refuse steps that are too long for a threat; with ``origin``, for inputs of that shape."""

    def reach(self, threat: Threat) -> float:
        """Length of the longest path of its steps, in units of the first modality; inf where it has none."""
        return math.inf

    def bound(self, threat: Threat, victim: Hasher, data: RetrievalData) -> Threat:
        """The threat with a budget made for this victim; itself where none is."""
        return threat

    def with_victim(self, victim: Hasher) -> Search:
        """The search with access to the inside of the victim; itself where the score is enough."""
        return self

    def towards(self, guidance: Guidance) -> Search:
        """The search with the guidance in hand; itself where the score is enough."""
        return self


def published_slope(progress: float) -> float:
    """Slope alpha of tanh at ``progress``: ten equal blocks of 0.1 (x5), .2, .3, .5, .7, 1."""
    return (0.1, 0.1, 0.1, 0.1, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)[min(int(progress * 10 + 1e-9), 9)]


@dataclass(frozen=True)
class Attack(Checked):
    """Guide x loss x search x threat.

    Args:
        slope: ``published`` schedules alpha by the papers' ten blocks, ``one`` fixes alpha = 1.
        targeted: the goal carries target labels and sign +1.
        restarts: independent searches, each after the first from a random start; the best per query by
            ``select``, else by score, is returned.
        selects: return the point of best reported metric among those of the search; the evaluator then hands
            over ``select``, which needs the database codes (W2). Published attacks return their last point.
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
        for part, base in ((self.guide, Guide), (self.loss, Loss), (self.search, Search)):
            if not isinstance(part, base):
                name = type(part).__name__
                raise TypeError(f"{name} is no {base.__name__}; derive it from attacks.base.{base.__name__}")
        if self.selects and self.threat.knowledge != "W2":
            raise ValueError(f"selecting needs the database codes (W2), not {self.threat.knowledge}")
        if self.restarts < 1:
            raise ValueError(f"restarts must be at least 1, got {self.restarts}")
        if self.slope not in ("published", "one"):
            raise ValueError(f"slope must be 'published' or 'one', got {self.slope!r}")
        if self.slope != "one" and self.search.steady:
            raise ValueError(
                f"{type(self.search).__name__} compares scores of different steps, which a scheduled slope "
                f"changes; give it slope 'one', not {self.slope!r}"
            )
        if self.threat.edits != self.search.edits:
            raise ValueError(
                f"{type(self.search).__name__} cannot search {self.threat.name}: edit budgets on bags of "
                "words take the search 'greedy-flips', budgets of token swaps 'greedy-swaps', norm balls any "
                "other, and they cannot be mixed"
            )
        self.search.check(self.threat)

    def fit(
        self, victim: Hasher, data: RetrievalData, reference: Reference | None, *, draws: Draws
    ) -> Attack:
        """The attack with its learning parts trained on this victim; itself where nothing learns.

        The evaluator calls this once for a victim, with what the threat lets the attacker know.
        """
        guide = self.guide.under(self.threat).fitted(victim, data, reference, draws.within(self.name))
        threat = self.search.bound(self.threat, victim, data)
        same = guide is self.guide and threat is self.threat
        return self if same else replace(self, guide=guide, threat=threat)

    @property
    def label_codes(self) -> bool:
        """True where the guidance is a single code of each item that stands for the goal's labels."""
        return self.guide.label_codes

    @property
    def fit_steps(self) -> int:
        """Steps that the guide was fitted with to its victim; 0 where nothing learns."""
        return self.guide.fit_steps

    @property
    def fit_uses(self) -> tuple[int, int]:
        """Oracle queries to the victim, and training items, that the guide was fitted with."""
        return self.guide.fit_queries, self.guide.fit_items

    @property
    def falls_short(self) -> str:
        """A line where all steps together do not reach the edge of the budget; "" where they do."""
        reach, ball = self.search.reach(self.threat), next(iter(self.threat.balls.values()))
        if reach >= ball.eps * (1 - 1e-6):
            return ""
        return (
            f"the {self.search.steps} steps of {self.name} reach {reach:.4g} of the budget {ball.eps:.4g} "
            f"({ball.norm}): take at least {math.ceil(ball.eps / reach * self.search.steps - 1e-6)} steps, "
            "or a longer step_size"
        )

    def check_inputs(self, inputs: Inputs) -> None:
        """Refuse budgets and steps longer than any change of inputs of these shapes."""
        for name, ball in self.threat.balls.items():
            if name in inputs:
                ball.check_length(ball.eps, "eps", inputs[name])
        self.search.check(self.threat, inputs)

    @property
    def budget(self) -> str:
        """Search, steps, slope, restarts and knowledge, as results carry them."""
        return f"{self.search}, slope {self.slope}, starts {self.restarts}, {self.threat.knowledge}"

    def budget_settings(self) -> dict[str, Any]:
        """``budget`` as plain data, by which budgets are compared."""
        parts = {"slope": self.slope, "restarts": self.restarts, "knowledge": self.threat.knowledge}
        return {"search": describe(self.search), **parts}

    def settings(self) -> dict[str, Any]:
        """Plain data that the result depends on: names, parameters that are not the default, threat."""
        return {**changes(self, skip=("threat",)), "threat": self.threat.settings()}

    def aim(
        self, victim: Hasher, batch: Batch, goal: Goal, reference: Reference | None, draws: Draws
    ) -> tuple[Score, Guidance]:
        """The score that a search ascends on this victim, and its guidance; arguments as of ``perturb``."""
        missing = [name for name in self.threat.balls if name not in batch.inputs]
        if missing:
            raise ValueError(f"{self.threat.name} attacks {missing}, which this batch does not have")
        attacked, model = batch.only(self.threat.balls), self.guide.ascended_model(victim)
        self.check_inputs(attacked.inputs)
        guidance = self.guide(victim, attacked, goal, reference, draws.within(self.name, "guide"))

        def score(inputs: Inputs, progress: float) -> tuple[Tensor, Tensor]:
            alpha = published_slope(progress) if self.slope == "published" else 1.0
            outputs = model(inputs)
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
        start: Start = None,
    ) -> SearchResult:
        """Search for the attacked inputs; the victim is frozen in eval mode meanwhile, and restored.

        Args:
            batch: clean items; modalities that the threat does not name are left alone.
            goal: own labels with sign -1, or target labels with sign +1.
            reference: codes and labels that the attacker knows; None at W0.
            draws: source of all random numbers, keyed by item id.
            select: the reported metric, where the attacker may compute it.
            start: feasible inputs to start from, e.g. the solution at a smaller eps.
        """
        if select is not None:
            select = _on_logits(select, victim)
        if self.search.by_gradient and torch.is_inference_mode_enabled():
            raise ValueError(f"{self.name} needs gradients; call it outside of your torch.inference_mode()")
        with frozen(victim), frozen(self.guide.ascended_model(victim)), torch.enable_grad():
            score, guidance = self.aim(victim, batch, goal, reference, draws)
            search = self.search.with_victim(victim).towards(guidance)
            result = search(score, batch, self.threat, draws.within(self.name, 0), select, start)
            for restart in range(1, self.restarts):
                scope = draws.within(self.name, restart)
                elsewhere = self.threat.random_start(batch.inputs, batch.ids, scope)
                another = search(score, batch, self.threat, scope, select, elsewhere)
                result = _better(score, select, result, another)
        return replace(result, guidance=guidance)

    def __call__(
        self,
        victim: Hasher,
        batch: Batch,
        goal: Goal,
        reference: Reference | None,
        *,
        draws: Draws,
        select: Select | None = None,
        start: Start = None,
    ) -> SearchResult:
        """``perturb`` and encode the result again (published loops report the code of one step earlier)."""
        result = self.perturb(victim, batch, goal, reference, draws=draws, select=select, start=start)
        with frozen(victim), torch.no_grad():
            signs = victim.compared(next(iter(victim(result.inputs).values())).logits)
        return replace(result, signs=signs)


def as_attack(attack: Any) -> Attack:
    """An attack as it is, or made from a name or a mapping as recipes have it.

    Raises:
        KeyError, ValueError: as of ``registry.build``; anything else that is no attack.
    """
    made = build("attack", attack) if isinstance(attack, str | Mapping) else attack
    if not isinstance(made, Attack):
        raise ValueError(f"{made!r:.60} is no attack; make one, as robusthash.attacks.mainstay() does")
    return made


def _on_logits(select: Select, victim: Hasher) -> Select:
    """``select`` for the logits of a victim, of which its search compares the signs or the numbers."""
    return lambda logits: select(victim.compared(logits))


def _better(score: Score, select: Select | None, first: SearchResult, second: SearchResult) -> SearchResult:
    """Per query, the better of two searches by ``select`` or, without it, by their final score."""
    with torch.no_grad():
        values = []
        for result in (first, second):
            value, logits = score(result.inputs, 1.0)
            values.append(value if select is None else select(logits))
    win = values[1] > values[0]
    inputs = {n: torch.where(per_item(win, v), second.inputs[n], v) for n, v in first.inputs.items()}
    return SearchResult(
        inputs, first.trace, first.forward + second.forward + 2, first.backward + second.backward
    )
