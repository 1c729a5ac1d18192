"""Lines of a suite: each is one way to attack a bench, with its own knowledge, view of the victim and
restarts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from inspect import isroutine
from typing import Any, Literal, Protocol

from robusthash.attacks.base import Attack
from robusthash.attacks.threat_model import Threat
from robusthash.core.identity import describe, identity
from robusthash.core.types import Inputs
from robusthash.evaluation.attack_block import Attacked, attack_block
from robusthash.evaluation.context import EvaluationContext
from robusthash.models.hasher import Hasher

Kind = Literal["white-box", "adaptive", "transfer", "black-box", "noise", "refined"]


class AttackSpec(Protocol):
    """One way to attack. Its results are kept by (line, restart, block), so a line is plain data and draws by
    keys."""

    @property
    def name(self) -> str:
        """Unique in its suite."""

    @property
    def kind(self) -> Kind: ...

    @property
    def restarts(self) -> int: ...

    @property
    def threat(self) -> Threat: ...

    @property
    def targeted(self) -> bool: ...

    def settings(self) -> dict[str, Any]:
        """Everything that its result depends on, beside the bench, as plain data (``core.identity``); what is
        kept under other settings is not taken."""

    def fitted(self, context: EvaluationContext) -> AttackSpec:
        """The line with what it has to learn learned on this bench; itself where nothing learns."""

    def at(self, threat: Threat) -> AttackSpec:
        """The same line under another threat, as for a curve over budgets."""

    def run(
        self, context: EvaluationContext, block: int, restart: int, start: Inputs | None = None
    ) -> Attacked:
        """Attack one block of queries once.

        Args:
            restart: 0 for the first; keys the draws.
            start: feasible inputs to start from; a line that cannot use them leaves them alone.
        """


@dataclass(frozen=True)
class GradientAttack:
    """A white-box line: an attack that differentiates the victim, or a view of it with other gradients.

    Args:
        attack: with ``restarts`` of 1; the line's own are kept apart.
        view: victim -> what is differentiated; the victim itself by default. Codes are always the victim's.
        seen: what the view is called, "" for the victim itself.
    """

    name: str
    attack: Attack
    restarts: int = 1
    kind: Kind = "white-box"
    view: Callable[[Hasher], Hasher] | None = None
    seen: str = ""

    def __post_init__(self) -> None:
        if (self.view is None) != (not self.seen):
            raise ValueError(f"the line {self.name!r} needs a view and its name, or neither")
        if self.attack.restarts != 1:
            raise ValueError(f"the line {self.name!r} counts restarts itself; give its attack 1")

    @property
    def threat(self) -> Threat:
        return self.attack.threat

    @property
    def targeted(self) -> bool:
        return self.attack.targeted

    def settings(self) -> dict[str, Any]:
        if self.view is None:
            return {"attack": self.attack.settings()}
        # a function shows no parameters: the line's author named it
        view = self.seen if isroutine(self.view) else describe(self.view)
        return {"attack": self.attack.settings(), "view": view}

    def fitted(self, context: EvaluationContext) -> GradientAttack:
        return replace(self, attack=context.fitted(self.attack))

    def at(self, threat: Threat) -> GradientAttack:
        return replace(
            self, attack=replace(self.attack, threat=replace(threat, knowledge=self.threat.knowledge))
        )

    def run(
        self, context: EvaluationContext, block: int, restart: int, start: Inputs | None = None
    ) -> Attacked:
        gradients = None if self.view is None else self.view(context.victim)
        return attack_block(context, self.attack, block, gradients, restart, start)


@dataclass(frozen=True)
class RefinedAttack(GradientAttack):
    """A white-box line that starts each query at the worst point that the untargeted lines before it came to.

    Args:
        after: identity of those lines; what is kept goes by it.
    """

    kind: Kind = "refined"
    after: str = ""

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "after": self.after}

    def following(self, specs: Sequence[AttackSpec]) -> RefinedAttack:
        """The line after these."""
        return replace(self, after=identity([[spec.name, spec.restarts, spec.settings()] for spec in specs]))
