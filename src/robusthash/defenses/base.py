"""Interface of outer losses: the outputs of a step that they get, and their needs of the inner attack."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from robusthash.attacks.base import Attack
from robusthash.core.registry import build, catalogue
from robusthash.core.types import Batch, Goal, Guidance, LossTerms, Outputs
from robusthash.objectives.base import CodeMemory, HashObjective


@dataclass(frozen=True)
class Round:
    """One step of adversarial training. ``guidance`` is recomputed after the memory was updated."""

    batch: Batch
    attacked: Batch
    goal: Goal
    clean: Outputs
    robust: Outputs  # of the attacked modalities alone
    guidance: Guidance
    memory: CodeMemory
    objective: HashObjective
    progress: float  # share of training, in [0, 1)

    def objective_terms(self, prefix: str, outputs: Outputs, weight: float = 1.0) -> LossTerms:
        """Terms of the hashing objective on ``outputs``, times ``weight``, named ``prefix/term``."""
        terms = self.objective(outputs, self.batch, self.memory)
        return {f"{prefix}/{name}": weight * value for name, value in terms.items()}


@dataclass(frozen=True)
class Needs:
    """Needs of an outer loss, its attribute ``needs``; one that takes any attack declares nothing.

    Args:
        goal: ``own`` where the guidance must belong to the item's own labels (an untargeted attack),
            ``target`` where the loss uses the labels that the attack aims at.
        label_codes: the guidance must be one code an item that stands for the labels, as ``Guide`` says.
        modality: the one that must be attacked.
    """

    goal: Literal["own", "target"] | None = None
    label_codes: bool = False
    modality: str | None = None

    def unmet(self, attack: Attack) -> str:
        """Reason why the attack does not do; "" where it does."""
        if self.goal == "own" and attack.targeted:
            return (
                "the attack is targeted, and this loss pulls to the guidance, which must be of the own labels"
            )
        if self.goal == "target" and not attack.targeted:
            return "this loss needs the labels that a targeted inner attack aims at"
        if self.label_codes and not attack.label_codes:
            return (
                f"its guide {type(attack.guide).__name__} does not give one code an item that stands for "
                "the item's labels (a guide that does says label_codes = True)"
            )
        if self.modality is not None and self.modality not in attack.threat.balls:
            return f"this loss needs attacked {self.modality}s, and {attack.threat.name} leaves them alone"
        return ""


class OuterLoss(ABC):
    """Interface of a defense's own loss in adversarial training.

    One that learns is an ``nn.Module`` too, with ``setup(facts)``; its parameters train along.
    """

    needs: Needs = Needs()

    @abstractmethod
    def __call__(self, turn: Round) -> LossTerms:
        """The weighted terms of one step."""

    def figures(self, turn: Round) -> LossTerms:
        """Scalars for the log, which are not optimised; none by default."""
        return {}


def check_needs(attack: Attack, outer: OuterLoss, objective: HashObjective) -> None:
    """Refuse an inner attack that does not give what the outer loss needs.

    Raises:
        ValueError: with the registered attacks that fit this loss, and the losses that fit this attack.
    """
    if not isinstance(outer, OuterLoss):
        raise ValueError(f"an outer loss is an OuterLoss (defenses.base), got a {type(outer).__name__}")
    reason = _unmet(outer, attack)
    if not reason:
        return
    attacked = set(attack.threat.balls)
    attacks = _registered("attack", attacked, lambda other: not _unmet(outer, other), objective=objective)
    outers = _registered("outer", attacked, lambda other: not _unmet(other, attack))
    name = next((card.name for card in catalogue("outer") if card.make is type(outer)), type(outer).__name__)
    raise ValueError(
        f"the inner attack {attack.name!r} does not fit the outer loss {name!r}: {reason}. "
        f"Attacks that fit {name!r}: {', '.join(attacks) or 'none'}; "
        f"losses that fit {attack.name!r}: {', '.join(outers) or 'none'}"
    )


def _unmet(outer: OuterLoss, attack: Attack) -> str:
    """Why an attack cannot be the inner attack of an outer loss; "" where it can."""
    if attack.guide.learns and not hasattr(attack.guide, "terms"):
        return "it learns once for a finished victim, and the victim of training changes with each step"
    return outer.needs.unmet(attack)


def _registered(kind: str, attacked: set[str], fits: Callable[[Any], bool], **context: Any) -> list[str]:
    """Names of a kind that fit, of those that need nothing but the context and change what is attacked."""
    names = []
    for card in catalogue(kind):
        parameters = inspect.signature(card.make).parameters.values()
        required = {p.name for p in parameters if p.default is inspect.Parameter.empty}
        usable = card.modality in ("any", *attacked) and required <= set(context)
        if usable and fits(build(kind, card.name, **context)):
            names.append(card.name)
    return names
