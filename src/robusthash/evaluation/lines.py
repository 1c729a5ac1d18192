"""Lines of a suite: each is one way to attack a bench, with its own knowledge, view of the victim and restarts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Protocol

from robusthash.attacks.base import Attack
from robusthash.attacks.threat import Threat
from robusthash.core.runtime import digest
from robusthash.core.types import Inputs
from robusthash.evaluation.attacked import Attacked, attack_block
from robusthash.evaluation.bench import Bench
from robusthash.models.hasher import Hasher

Kind = Literal["white-box", "adaptive", "transfer", "black-box", "noise", "refined"]


class Line(Protocol):
    """One way to attack. Its results are kept by (line, restart, block), so a line is plain data and draws by keys."""

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
        """Everything that its result depends on, beside the bench; what is kept under other settings is not taken."""

    def fitted(self, bench: Bench) -> Line:
        """The line with what it has to learn learned on this bench; itself where nothing learns."""

    def at(self, threat: Threat) -> Line:
        """The same line under another threat, as for a curve over budgets."""

    def run(self, bench: Bench, block: int, restart: int, start: Inputs | None = None) -> Attacked:
        """Attack one block of queries once.

        Args:
            restart: 0 for the first; keys the draws.
            start: feasible inputs to start from; a line that cannot use them leaves them alone.
        """


def attack_settings(attack: Attack) -> dict[str, Any]:
    """What the result of an attack depends on, beside the bench and what is differentiated."""
    parts = {"guide": repr(attack.guide), "loss": repr(attack.loss), "threat": asdict(attack.threat)}
    return {"attack": attack.name, "budget": attack.budget, **parts}


@dataclass(frozen=True)
class Gradient:
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
        return {**attack_settings(self.attack), "seen": self.seen}

    def fitted(self, bench: Bench) -> Gradient:
        return replace(self, attack=bench.fitted(self.attack))

    def at(self, threat: Threat) -> Gradient:
        return replace(self, attack=replace(self.attack, threat=replace(threat, knowledge=self.threat.knowledge)))

    def run(self, bench: Bench, block: int, restart: int, start: Inputs | None = None) -> Attacked:
        gradients = None if self.view is None else self.view(bench.victim)
        return attack_block(bench, self.attack, block, gradients, restart, start)


@dataclass(frozen=True)
class Refined(Gradient):
    """A white-box line that starts each query at the worst point that the untargeted lines before it came to.

    Args:
        after: digest of those lines; what is kept goes by it.
    """

    kind: Kind = "refined"
    after: str = ""

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "after": self.after}

    def following(self, lines: Sequence[Line]) -> Refined:
        """The line after these."""
        return replace(self, after=digest([[line.name, line.restarts, line.settings()] for line in lines]))
