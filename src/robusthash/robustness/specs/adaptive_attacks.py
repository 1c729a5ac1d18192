"""Adaptive lines: for each kind of defense the attacks of somebody who knows it. All are run and the lowest
counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from robusthash.attacks.adaptive_losses import GateOpening, OverDraws, RepairMovedLoss
from robusthash.attacks.base import Attack, Guide, Loss, Search
from robusthash.attacks.frequency_bands import BANDS, Banded
from robusthash.attacks.guides import Mainstay, Own, Unguided
from robusthash.attacks.losses import ObjectiveLoss, ScaleFree
from robusthash.attacks.pgd import APGD
from robusthash.attacks.threat_model import Threat
from robusthash.attacks.word_edits import GreedyFlips
from robusthash.core.runtime import Draws
from robusthash.core.types import Inputs
from robusthash.evaluation.attack_block import AttackedBlock, attack_block
from robusthash.evaluation.attack_spec import AttackSpec, GradientAttack, Kind
from robusthash.evaluation.context import EvaluationContext
from robusthash.models.hasher import Hasher
from robusthash.models.purifier_gradients import RepairIdentity, RepairLearnt, RepairMoved
from robusthash.models.sfcl import DOMAINS
from robusthash.models.surrogate_gradients import (
    BranchSeen,
    GateSeen,
    MaskNoise,
    MaskSeen,
    NoiseAveraged,
    View,
    gates_of,
    keyed_noise,
    masks_of,
)
from robusthash.objectives.base import HashObjective
from robusthash.robustness.victim_behaviour import Observed

See = Callable[[Hasher], Hasher]


@dataclass(frozen=True)
class Adaptive(GradientAttack):
    """A gradient line on a view that may have to be told the clean inputs, to draw, or to learn.

    Passes are counted as those of the victim that the view asks for. What a randomised victim draws is keyed
    by seed, line, block and restart, so that the line can be repeated.
    """

    kind: Kind = "adaptive"

    def fitted(self, context: EvaluationContext) -> Adaptive:
        draws = Draws(context.seed, ("fit", self.name))
        with keyed_noise(draws.key(), context.victim.device):
            spec: Adaptive = replace(self, attack=context.fitted(self.attack))
            if not isinstance(self.view, RepairLearnt):
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
            seen = self.view(context.victim) if self.view is not None else None
            if isinstance(seen, View):
                seen = seen.around(context.batch(block, self.threat.balls).inputs, draws)
            found = attack_block(context, self.attack, block, seen, restart, start)
        price = (*seen.passes, 1) if isinstance(seen, View) else (1, 1, 1)
        return replace(found, passes=found.passes * torch.tensor([price]))


@dataclass(frozen=True)
class Staged:
    """Two lines in a row: the second starts from what the first found in the query modality. Untargeted.

    Raises:
        ValueError: lines of different threats, or a targeted one.
    """

    name: str
    first: GradientAttack
    then: GradientAttack
    restarts: int = 1
    kind: Kind = "adaptive"

    def __post_init__(self) -> None:
        if self.first.threat != self.then.threat:
            raise ValueError(
                f"the stages of {self.name!r} have the threats {self.first.threat} and {self.then.threat}"
            )
        if self.first.targeted or self.then.targeted:
            raise ValueError(
                f"the stages of {self.name!r} cannot be targeted: they hand on one input per query"
            )

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
        begun = self.first.run(context, block, restart, start)
        clean = context.batch(block, self.threat.balls).inputs
        known = {name: clean[name] for name in self.threat.balls}
        known[context.direction[0]] = begun.inputs.to(context.victim.device)
        found = self.then.run(context, block, restart, known)
        return replace(found, passes=found.passes + begun.passes, seconds=found.seconds + begun.seconds)


@dataclass(frozen=True)
class _Maker:
    """Makes lines of one threat, steps and restarts."""

    threat: Threat
    steps: int
    restarts: int

    @property
    def guide(self) -> Guide:
        return Own() if self.threat.knowledge == "W0" else Mainstay()

    def search(self, steps: int, random_start: bool = False) -> Search:
        return GreedyFlips() if self.threat.edits else APGD(steps, random_start=random_start)

    def spec(
        self,
        name: str,
        view: See | None = None,
        *,
        loss: Loss | None = None,
        guide: Guide | None = None,
        search: Search | None = None,
        steps: int | None = None,
        selects: bool = True,
    ) -> Adaptive:
        search, loss = search or self.search(steps or self.steps), loss or ScaleFree()
        knows = selects and self.threat.knowledge == "W2"
        attack = Attack(name, guide or self.guide, loss, search, self.threat, selects=knows)
        return Adaptive(name, attack, self.restarts, view=view, seen="" if view is None else repr(view))

    def staged(self, name: str, first: Adaptive, view: See | None = None) -> Staged:
        return Staged(name, first, self.spec(f"{name}-then", view, steps=self.half), self.restarts)

    @property
    def half(self) -> int:
        return max(2, self.steps // 2)


def adaptive_attacks(
    victim: Hasher,
    objective: HashObjective | None,
    threat: Threat,
    steps: int = 100,
    restarts: int = 1,
    *,
    seen: Observed | None = None,
) -> tuple[AttackSpec, ...]:
    """The lines for what a victim declares and for the parts that it has; none for plain and adversarial
    training.

    They come on top of a suite's white-box lines, which differentiate through the whole defense. Guides and
    losses are the house's: mainstay code and scale-free agreement; at W0, the query's own code. At W2 points
    are selected by exact AP. Defenses of a modality that the threat leaves alone have no lines.

    Args:
        objective: the one trained with; given, a line attacks it (APGD on the similarity loss) beside the
            others.
        steps: of each line; two-stage lines split them.
        seen: what ``observed`` said. With it, what is random has its lines whatever is declared, purifiers
            that are not get no averaging over noise, and a purifier whose gradient is cut is taken for the
            identity throughout.

    Raises:
        ValueError: a detector, of which the package has none; a black-box threat; a declared part that is not
            there.
    """
    declared = victim.declared
    if declared == "detector":
        raise ValueError(
            "the package has no detector: an attack on 'detector' must include the detector's score, and rejected "
            "queries must be scored; declare the class of the hasher itself, and evaluate the detector elsewhere"
        )
    if threat.knowledge not in ("W0", "W1", "W2"):
        raise ValueError(
            f"adaptive lines differentiate the victim: they need W0, W1 or W2, not {threat.knowledge}"
        )
    make = _Maker(threat, steps, restarts)
    gated = {name: gate for name, gate in gates_of(victim).items() if name in threat.balls}
    repairs = [name for name in victim.purifiers if name in threat.balls and name not in gated]
    masked = [name for name in masks_of(victim) if name in threat.balls]
    if declared in ("gate", "purifier") and not victim.purifiers:
        raise ValueError(
            f"the hasher declares {declared!r} and has no purifier: give it as one, or declare another class"
        )
    if declared == "mask" and not masks_of(victim):
        raise ValueError(
            "the hasher declares 'mask' and its encoder has none: use 'sfcl', or declare another class"
        )
    cut = seen is not None and seen.cut
    specs: list[AttackSpec] = []
    if gated:
        specs += _gate_attacks(make, next(iter(gated.values())).dct.block)
    if masked:
        specs += _mask_attacks(make, masks_of(victim)[masked[0]].hard_eval)
    if repairs:
        specs += _repair_attacks(make, cut)
    random = seen.randomised if seen is not None else declared == "randomised" or bool(repairs)
    if random or declared == "randomised":
        specs.append(
            make.spec("eot-20", NoiseAveraged(20, identity=cut and bool(victim.purifiers)), loss=OverDraws())
        )
    if specs and objective is not None and threat.knowledge != "W0":
        specs.append(make.spec("trained-objective", guide=Unguided(), loss=ObjectiveLoss(objective)))
    return tuple(specs)


def _gate_attacks(make: _Maker, block: int) -> list[AttackSpec]:
    """SAAH: other gates for the gradient, single bands, and opening the gate."""
    views = [GateSeen("frozen"), GateSeen("minimum"), GateSeen("one"), GateSeen("smooth")]
    search = make.search(make.steps)
    return [
        *(make.spec(f"gate-{view.gate}", view) for view in views),
        *(make.spec(f"band-{band}", search=Banded(search, band, block)) for band in BANDS),
        make.spec("gate-opening", loss=GateOpening()),
    ]


def _mask_attacks(make: _Maker, hard: bool) -> list[AttackSpec]:
    """SFCL: the mask that it does not use, training noise, and each branch before the fused code."""
    other = MaskSeen("soft" if hard else "hard")
    alone = {b: make.spec(f"branch-{b}-first", BranchSeen(b), steps=make.half) for b in DOMAINS}
    return [
        make.spec(f"mask-{other.mask}", other),
        make.spec("mask-noise-20", MaskNoise(20), loss=OverDraws()),
        *(make.staged(f"branch-{branch}", first) for branch, first in alone.items()),
    ]


def _repair_attacks(make: _Maker, cut: bool) -> list[AttackSpec]:
    """DRFGD, TPAP: the identity's gradient, a learnt one, and fooling the purifier before the hash."""
    view = RepairMoved("identity" if cut else "own")
    random = make.search(make.half, random_start=True)
    moved = make.spec(
        "two-stage-first", view, guide=Unguided(), loss=RepairMovedLoss(), search=random, selects=False
    )
    return [
        make.spec("repair-identity", RepairIdentity()),
        make.spec("repair-learnt", RepairLearnt()),
        make.staged("two-stage", moved, RepairIdentity() if cut else None),
    ]
