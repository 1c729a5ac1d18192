"""Adaptive attacks: those that the file of each defense registers, as attacks of a suite."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from robusthash.attacks.guides import Unguided
from robusthash.attacks.losses import ObjectiveLoss, OverDraws
from robusthash.attacks.threat_model import Threat
from robusthash.core.registry import catalogue
from robusthash.core.runtime import Draws
from robusthash.core.types import Inputs
from robusthash.defenses.adaptive import AdaptiveAttack, AdaptiveAttacks, AdaptiveSetting, PurifierAttacks
from robusthash.evaluation.attack_block import AttackedBlock, attack_block
from robusthash.evaluation.attack_spec import AttackSpec, GradientAttack, Kind
from robusthash.evaluation.context import EvaluationContext
from robusthash.models.hasher import Hasher
from robusthash.models.surrogate_gradients import (
    GradientView,
    NoiseAveraged,
    RepairIdentity,
    ViewedHasher,
    keyed_noise,
)
from robusthash.objectives.base import HashObjective
from robusthash.robustness.victim_behaviour import VictimBehaviour

UNDEFENDED = ("plain", "adversarial")
"""Classes that hide nothing: a suite's white-box attacks are their adaptive ones."""


@dataclass(frozen=True)
class Adaptive(GradientAttack):
    """A gradient attack on a view that may depend on the clean inputs, draw, or learn.

    Passes are counted as those of the victim that the view asks for. Draws of a randomised victim are keyed
    by seed, attack, block and restart, so that the attack can be repeated.
    """

    kind: Kind = "adaptive"

    def fitted(self, context: EvaluationContext) -> Adaptive:
        draws = Draws(context.seed, ("fit", self.name))
        with keyed_noise(draws.key(), context.victim.device):
            spec: Adaptive = replace(self, attack=context.fitted(self.attack))
            if not isinstance(self.view, GradientView):
                return spec
            view = self.view.fitted(context.victim, context.data.train, self.threat.balls, self._near, draws)
            return replace(spec, view=view)

    def _near(self, inputs: Inputs, ids: torch.Tensor, draws: Draws) -> Inputs:
        """Training items moved as far as queries will be: at random, within the threat."""
        return self.threat.random_start(inputs, ids, draws)

    def run(
        self, context: EvaluationContext, block: int, restart: int, start: Inputs | None = None
    ) -> AttackedBlock:
        draws = Draws(context.seed, ("view", self.name, str(block), str(restart)))
        with keyed_noise(draws.key(), context.victim.device):
            view = self.view(context.differentiated) if self.view is not None else None
            if isinstance(view, ViewedHasher):
                view = view.for_block(context.batch(block, self.threat.balls).inputs, draws)
            result = attack_block(context, self.attack, block, view, restart, start)
        price = (*view.passes, 1) if isinstance(view, ViewedHasher) else (1, 1, 1)
        return replace(result, passes=result.passes * torch.tensor([price]))


@dataclass(frozen=True)
class Staged:
    """Two attacks in a row: the second starts from the first one's result in the query modality."""

    name: str
    first: GradientAttack
    then: GradientAttack
    restarts: int = 1
    kind: Kind = "adaptive"

    def __post_init__(self) -> None:
        if self.first.threat != self.then.threat:
            threats = f"{self.first.threat} and {self.then.threat}"
            raise ValueError(f"the stages of {self.name!r} have the threats {threats}")
        if self.first.targeted or self.then.targeted:
            raise ValueError(f"the stages of {self.name!r} cannot be targeted: they hand on one input")

    @property
    def threat(self) -> Threat:
        return self.then.threat

    @property
    def targeted(self) -> bool:
        return False

    def settings(self) -> dict[str, Any]:
        return {"first": self.first.settings(), "then": self.then.settings()}

    def fitted(self, context: EvaluationContext) -> Staged:
        return replace(self, first=self.first.fitted(context), then=self.then.fitted(context))

    def at(self, threat: Threat) -> Staged:
        return replace(self, first=self.first.at(threat), then=self.then.at(threat))

    def run(
        self, context: EvaluationContext, block: int, restart: int, start: Inputs | None = None
    ) -> AttackedBlock:
        first = self.first.run(context, block, restart, start)
        clean = context.batch(block, self.threat.balls).inputs
        inputs = {name: clean[name] for name in self.threat.balls}
        inputs[context.direction[0]] = first.inputs.to(context.victim.device)
        result = self.then.run(context, block, restart, inputs)
        return replace(result, passes=result.passes + first.passes, seconds=result.seconds + first.seconds)


def adaptive_attacks(
    victim: Hasher,
    objective: HashObjective | None,
    threat: Threat,
    steps: int = 100,
    restarts: int = 1,
    *,
    behaviour: VictimBehaviour | None = None,
) -> tuple[AttackSpec, ...]:
    """Attacks for the class that a victim declares and for its parts; none for undefended ones.

    They come on top of a suite's white-box attacks, which differentiate through the whole defense. Each
    defense's own are registered by its file as kind ``adaptive``, and come by name. Defenses of a modality
    that the threat leaves alone have none.

    Args:
        objective: that of the training; given, one attack more is on it (APGD on the similarity loss).
        steps: of each; two-stage ones split them.
        behaviour: the result of ``observed``. With it, a random victim is averaged over its noise whatever is
            declared, a purifier that is not random has no averaging, and one whose gradient is cut is taken
            for the identity.

    Raises:
        ValueError: a detector, which is no part of a hasher; a black-box threat; a declared part that is not
            there, or a class that no file registers.
    """
    declared = victim.declared
    if declared == "detector":
        raise ValueError(
            "a detector is no part of a hasher: an attack on it must include its criteria, and refused "
            "queries must be counted, which 'robusthash detect' does; declare the class of the hasher itself "
            "instead"
        )
    if threat.knowledge not in ("W0", "W1", "W2"):
        raise ValueError(
            f"adaptive attacks differentiate the victim: they need W0, W1 or W2, not {threat.knowledge}"
        )
    cut = behaviour is not None and behaviour.cut
    setting = AdaptiveSetting(threat, steps, gradient_cut=cut)
    attacks: list[AdaptiveAttack] = []
    known: dict[str, AdaptiveAttacks] = {card.name: card.make() for card in catalogue("adaptive")}
    if declared not in (*known, *UNDEFENDED, "randomised"):
        raise ValueError(f"the hasher declares {declared!r}, for which no file registers adaptive attacks")
    for name, defense in known.items():
        modalities = defense.modalities(victim)
        if name == declared and not modalities:
            raise ValueError(
                f"the hasher declares {name!r} and has no such part: add it, or declare another class"
            )
        attacked = [modality for modality in modalities if modality in threat.balls]
        if attacked:
            attacks += defense.attacks(victim, attacked[0], setting)
    purifiers = set(PurifierAttacks().modalities(victim)) & set(threat.balls)
    random = behaviour.randomised if behaviour is not None else bool(purifiers)
    if random or declared == "randomised":
        view = NoiseAveraged(20, identity=cut and bool(victim.purifiers))
        attacks.append(setting.attack("eot-20", view, loss=OverDraws()))
    if attacks and objective is not None and threat.knowledge != "W0":
        through = RepairIdentity() if cut and victim.purifiers else None
        loss = ObjectiveLoss(objective)
        attacks.append(setting.attack("trained-objective", through, guide=Unguided(), loss=loss))
    return tuple(_spec(attack, restarts) for attack in attacks)


def _spec(entry: AdaptiveAttack, restarts: int) -> Adaptive | Staged:
    attack, view = entry.attack, entry.view
    spec = Adaptive(attack.name, attack, restarts, view=view, view_name="" if view is None else repr(view))
    if entry.first is None:
        return spec
    first = _spec(entry.first, restarts)
    assert isinstance(first, GradientAttack)
    return Staged(attack.name.removesuffix("-then"), first, spec, restarts)
