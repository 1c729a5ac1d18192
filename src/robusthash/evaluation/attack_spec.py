"""Attack specs: each is one way to attack a context, with its own knowledge, gradients and restarts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from inspect import isroutine
from typing import Any, Literal, Protocol

from robusthash.attacks.base import Attack
from robusthash.attacks.threat_model import Threat
from robusthash.core.identity import describe, identity
from robusthash.core.types import Inputs
from robusthash.evaluation.attack_block import AttackedBlock, attack_block
from robusthash.evaluation.context import EvaluationContext
from robusthash.models.hasher import Hasher

Kind = Literal["white-box", "adaptive", "transfer", "black-box", "noise", "refined"]


class AttackSpec(Protocol):
    """One way to attack: plain data, keyed draws; its blocks are stored by (spec, restart, block)."""

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
        """Everything that its result depends on besides the context, as plain data (``core.identity``).

        Blocks stored under other settings are not taken.
        """

    def fitted(self, context: EvaluationContext) -> AttackSpec:
        """The spec with its learning parts trained on this context; itself where nothing learns."""

    def at(self, threat: Threat) -> AttackSpec:
        """The same spec under another threat, as for a curve over budgets."""

    def run(
        self, context: EvaluationContext, block: int, restart: int, start: Inputs | None = None
    ) -> AttackedBlock:
        """Attack one block of queries once.

        Args:
            restart: 0 for the first; keys the draws.
            start: feasible inputs to start from; a spec that cannot use them leaves them alone.
        """


@dataclass(frozen=True)
class GradientAttack:
    """An attack that differentiates the victim, or a view of it with other gradients.

    Args:
        attack: one of several restarts returns the best of its own; give it 1 where the spec has several.
        view: victim -> what is differentiated; the victim itself by default. Codes are always the victim's.
        view_name: name of the view, "" for the victim itself.
    """

    name: str
    attack: Attack
    restarts: int = 1
    kind: Kind = "white-box"
    view: Callable[[Hasher], Hasher] | None = None
    view_name: str = ""

    def __post_init__(self) -> None:
        if (self.view is None) != (not self.view_name):
            raise ValueError(f"the attack {self.name!r} needs a view and its name, or neither")
        if self.attack.restarts != 1 and self.restarts != 1:
            raise ValueError(f"the attack {self.name!r} counts restarts twice; give its attack 1")

    @property
    def threat(self) -> Threat:
        return self.attack.threat

    @property
    def targeted(self) -> bool:
        return self.attack.targeted

    def settings(self) -> dict[str, Any]:
        if self.view is None:
            return {"attack": self.attack.settings()}
        # a function shows no parameters, so the author of the spec named it
        view = self.view_name if isroutine(self.view) else describe(self.view)
        return {"attack": self.attack.settings(), "view": view}

    def fitted(self, context: EvaluationContext) -> GradientAttack:
        return replace(self, attack=context.fitted(self.attack))

    def at(self, threat: Threat) -> GradientAttack:
        threat = replace(threat, knowledge=self.threat.knowledge)
        return replace(self, attack=replace(self.attack, threat=threat))

    def run(
        self, context: EvaluationContext, block: int, restart: int, start: Inputs | None = None
    ) -> AttackedBlock:
        gradients = None if self.view is None else self.view(context.differentiated)
        return attack_block(context, self.attack, block, gradients, restart, start)


@dataclass(frozen=True)
class OwnAttack(GradientAttack):
    """An attack that a user adds to those of a tier.

    Args:
        source: digests of its code where that is a plug-in; blocks of another version are not taken.
    """

    source: tuple[str, ...] = ()

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), **({"source": list(self.source)} if self.source else {})}


@dataclass(frozen=True)
class RefinedAttack(GradientAttack):
    """An attack that starts each query at the worst point that the untargeted attacks before it reached.

    Args:
        after: identity of those attacks; blocks are stored by it.
    """

    kind: Kind = "refined"
    after: str = ""

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "after": self.after}

    def following(self, specs: Sequence[AttackSpec]) -> RefinedAttack:
        """The attack after these."""
        return replace(self, after=identity([[spec.name, spec.restarts, spec.settings()] for spec in specs]))
