"""What an outer loss needs of the inner attack, and whether an attack gives it: goal, guidance, modality."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from robusthash.attacks.base import Attack
from robusthash.core.registry import build, catalogue
from robusthash.objectives.base import HashObjective


@dataclass(frozen=True)
class Needs:
    """Declared by an outer loss as its attribute ``needs``; one that takes any attack declares nothing.

    Args:
        goal: ``own`` where the guidance must belong to the item's own labels (an untargeted attack),
            ``target`` where the loss looks at the labels that the attack aims at.
        label_codes: the guidance must be one code an item that stands for the labels, as ``Guide`` says.
        modality: what must be attacked.
    """

    goal: Literal["own", "target"] | None = None
    label_codes: bool = False
    modality: str | None = None

    def unmet(self, attack: Attack) -> str:
        """Why the attack does not do; "" where it does."""
        if self.goal == "own" and attack.targeted:
            return "the attack is targeted, and this loss pulls to the guidance, which must be that of the own labels"
        if self.goal == "target" and not attack.targeted:
            return "this loss needs the labels that a targeted inner attack aims at"
        if self.label_codes and not attack.label_codes:
            return (
                f"its guide {type(attack.guide).__name__} does not give one code an item that stands for the item's "
                "labels (a guide that does says label_codes = True)"
            )
        if self.modality is not None and self.modality not in attack.threat.balls:
            return f"this loss needs attacked {self.modality}s, and {attack.threat.name} leaves them alone"
        return ""


def check_needs(attack: Attack, outer: object, objective: HashObjective) -> None:
    """Refuse an inner attack that does not give what the outer loss declares to need.

    Raises:
        ValueError: with the registered attacks that fit this loss, and the losses that fit this attack.
    """
    reason = _unmet(attack, outer)
    if not reason:
        return
    attacked = set(attack.threat.balls)
    attacks = _registered("attack", attacked, lambda other: not _unmet(other, outer), objective=objective)
    outers = _registered("outer", attacked, lambda other: not _unmet(attack, other))
    name = next((c.name for c in catalogue("outer") if c.make is type(outer)), type(outer).__name__)
    raise ValueError(
        f"the inner attack {attack.name!r} does not fit the outer loss {name!r}: {reason}. Attacks that fit {name!r}: "
        f"{', '.join(attacks) or 'none'}; losses that fit {attack.name!r}: {', '.join(outers) or 'none'}"
    )


def _unmet(attack: Attack, outer: object) -> str:
    needs: Needs | None = getattr(outer, "needs", None)
    return "" if needs is None else needs.unmet(attack)


def _registered(kind: str, attacked: set[str], fits: Callable[[Any], bool], **context: Any) -> list[str]:
    """The names of a kind that ``fits``, of those that need nothing but the context and change what is
    attacked."""
    names = []
    for card in catalogue(kind):
        parameters = inspect.signature(card.make).parameters.values()
        required = {p.name for p in parameters if p.default is inspect.Parameter.empty}
        if (
            card.modality in ("any", *attacked)
            and required <= set(context)
            and fits(build(kind, card.name, **context))
        ):
            names.append(card.name)
    return names
