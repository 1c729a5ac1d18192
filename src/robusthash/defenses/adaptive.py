"""Attacks of somebody who knows a defense, which the file of the defense registers as kind ``adaptive``.

``robustness/specs/adaptive_attacks.py`` collects them by the class that a victim declares and the parts that
it has.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass

from robusthash.attacks.base import Attack, Guide, Loss, Search
from robusthash.attacks.guides import Mainstay, Own, Unguided
from robusthash.attacks.losses import RepairMovedLoss, ScaleFree
from robusthash.attacks.pgd import APGD
from robusthash.attacks.text_edits import GreedyFlips
from robusthash.attacks.threat_model import Threat
from robusthash.core.registry import register
from robusthash.models.gates import gates_of
from robusthash.models.hasher import Hasher
from robusthash.models.surrogate_gradients import GradientView, RepairIdentity, RepairLearnt, RepairMoved


@dataclass(frozen=True)
class AdaptiveAttack:
    """An attack on a victim, or on a view of it with other gradients.

    Args:
        first: a stage before it, from whose result in the query modality this one starts. Untargeted.
    """

    attack: Attack
    view: GradientView | None = None
    first: AdaptiveAttack | None = None


@dataclass(frozen=True)
class AdaptiveSetting:
    """The threat and steps of adaptive attacks; builds them from default parts.

    Defaults are the mainstay code (at W0 the query's own), scale-free agreement and APGD, or greedy edits of
    words. At W2 points are selected by exact AP.

    Args:
        gradient_cut: no gradient passes the victim, so its purifiers must be taken for something else.
    """

    threat: Threat
    steps: int
    gradient_cut: bool = False

    @property
    def half(self) -> int:
        """Steps of each of two stages."""
        return max(2, self.steps // 2)

    def search(self, steps: int | None = None, random_start: bool = False) -> Search:
        steps = steps or self.steps
        return GreedyFlips() if self.threat.edits else APGD(steps, random_start=random_start)

    def attack(
        self,
        name: str,
        view: GradientView | None = None,
        *,
        loss: Loss | None = None,
        guide: Guide | None = None,
        search: Search | None = None,
        steps: int | None = None,
        selects: bool = True,
    ) -> AdaptiveAttack:
        """An attack whose parts are the defaults where none are given."""
        default: Guide = Own() if self.threat.knowledge == "W0" else Mainstay()
        parts = guide or default, loss or ScaleFree(), search or self.search(steps)
        by_metric = selects and self.threat.knowledge == "W2"
        return AdaptiveAttack(Attack(name, *parts, self.threat, selects=by_metric), view)

    def staged(self, name: str, first: AdaptiveAttack, view: GradientView | None = None) -> AdaptiveAttack:
        """The default attack in half of the steps, from the result of ``first``; named ``name``."""
        then = self.attack(f"{name}-then", view, steps=self.half)
        return AdaptiveAttack(then.attack, view, first)


class AdaptiveAttacks(ABC):
    """Interface of kind ``adaptive``, registered under the class that hashers with the defense declare."""

    @abstractmethod
    def modalities(self, victim: Hasher) -> Collection[str]:
        """The modalities in which a victim has this defense; none where it has not."""

    @abstractmethod
    def attacks(self, victim: Hasher, modality: str, setting: AdaptiveSetting) -> list[AdaptiveAttack]:
        """The attacks on a victim that has this defense in ``modality``, which the threat attacks."""


@register("adaptive", "purifier")
class PurifierAttacks(AdaptiveAttacks):
    """Any purifier: the identity's gradient, a learnt one, and fooling the purifier before the hash."""

    def modalities(self, victim: Hasher) -> Collection[str]:
        return [name for name in victim.purifiers if name not in gates_of(victim)]

    def attacks(self, victim: Hasher, modality: str, setting: AdaptiveSetting) -> list[AdaptiveAttack]:
        cut = setting.gradient_cut
        view, search = RepairMoved("own"), setting.search(setting.half, random_start=True)
        if cut:
            view = RepairMoved("identity")
        moved = setting.attack(
            "two-stage-first", view, guide=Unguided(), loss=RepairMovedLoss(), search=search, selects=False
        )
        return [
            setting.attack("repair-identity", RepairIdentity()),
            setting.attack("repair-learnt", RepairLearnt()),
            setting.staged("two-stage", moved, RepairIdentity() if cut else None),
        ]
