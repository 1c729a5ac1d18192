"""Adversarial training: the inner maximisation and the outer minimisation that all these defenses share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from robusthash.attacks.base import Attack
from robusthash.core.labels import draw_targets
from robusthash.core.registry import register
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, Goal, LossTerms
from robusthash.data.base import RetrievalData
from robusthash.defenses.base import OuterLoss, Round, check_needs
from robusthash.models.hasher import Hasher, frozen
from robusthash.objectives.base import CodeMemory, HashObjective
from robusthash.training.recipe import FIGURES, HashingRecipe, Moment, Recipe, train_facts


@register("recipe", "adversarial", state="measured")
class AdversarialTraining(Recipe):
    """Min-max training: attack the hasher as it is, then lower the outer loss on clean and attacked outputs.

    Order of a step (SAAT's code): guidance from the memory before this batch, attack in eval mode, attacked
    and clean forward in train mode, memory update from the clean outputs, guidance again, outer loss.

    Over image and text, the attack has the codes of both; only the modalities that its threat names are
    attacked, and ``Round.robust`` holds only those: the others get the gradient of clean items alone.

    Args:
        hasher: start it from a trained one; the papers always do.
        objective: the hashing objective, kept on the clean outputs.
        attack: the inner attack; its threat bounds training too. A targeted one aims each item at a label set
            of the training set that shares nothing with its own, drawn again each epoch; where none exists,
            at its own labels, which harms nothing. A guide that learns (an ``nn.Module`` with
            ``setup(facts)`` and ``terms(goal labels, reference, draws)``) is the optimiser group "guide",
            stepped before the attack.
        outer: the defense's own loss; see ``Needs`` for what it needs of the attack.
        warmup: share of training over which eps grows from 0 to its full size (SFCL).
    """

    groups = ("hasher", "critic", "guide")

    def __init__(
        self, hasher: Hasher, objective: HashObjective, attack: Attack, outer: OuterLoss, warmup: float = 0.0
    ) -> None:
        if not 0.0 <= warmup < 1.0:
            raise ValueError(f"warmup is a share of training in [0, 1), got {warmup:g}")
        check_needs(attack, outer, objective)
        self.hasher = hasher
        self.objective = objective
        self.attack = attack
        self.outer = outer
        self.warmup = warmup
        self.plain = HashingRecipe(
            hasher, objective
        )  # undefended training with the same objective and memory
        if hasher.declared == "plain":
            hasher.declared = hasher.spec["declared"] = "adversarial"

    @property
    def _learning(self) -> dict[str, nn.Module]:
        """The guide and the outer loss, where they have parameters of their own."""
        parts: dict[str, object] = {"guide": self.attack.guide, "outer": self.outer}
        return {name: part for name, part in parts.items() if isinstance(part, nn.Module)}

    def modules(self) -> dict[str, nn.Module]:
        return {**self.plain.modules(), **self._learning}

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        groups, learning = self.plain.parameter_groups(), self._learning
        if "outer" in learning:
            groups["hasher"] = [*groups["hasher"], *learning["outer"].parameters()]
        if "guide" in learning:
            groups["guide"] = list(learning["guide"].parameters())
        return groups

    def setup(self, data: RetrievalData, seed: int, batch_size: int) -> None:
        missing = sorted(set(self.attack.threat.balls) - set(self.hasher.modalities))
        if missing:
            raise ValueError(f"the inner attack changes {missing[0]!r}, which this hasher does not encode")
        self.plain.setup(data, seed, batch_size)
        facts = train_facts(data.train, self.hasher, seed)
        for part in self._learning.values():
            part.to(self.hasher.device).setup(facts)  # type: ignore[operator]
            part.to(self.hasher.device)

    def step(self, batch: Batch, moment: Moment) -> Iterator[tuple[str, LossTerms]]:
        memory, objective, draws = self.plain.memory, self.plain.objective, moment.draws
        victim = self.plain.hasher  # the hasher, or what of it learns
        goal = self._goal(batch, memory, draws)
        self.hasher.train()
        if "guide" in self._learning:
            guide: Any = self.attack.guide
            yield "guide", guide.terms(goal.labels, memory.reference(), draws)
        ramp = 1.0 if not self.warmup else min(1.0, moment.progress / self.warmup)
        attack = replace(self.attack, threat=self.attack.threat.scaled(ramp)) if ramp < 1.0 else self.attack
        result = attack.perturb(victim, batch, goal, memory.reference(), draws=draws)
        changed = {name: value.detach() for name, value in result.inputs.items()}
        robust, clean = victim(changed), victim(batch.inputs)
        memory.update(clean, batch)
        with frozen(victim), torch.no_grad():
            guidance = self.attack.guide(victim, batch, goal, memory.reference(), draws)
        yield from self.plain.critic_step(clean, batch)
        attacked = batch.with_inputs(changed)
        turn = Round(batch, attacked, goal, clean, robust, guidance, memory, objective, moment.progress)
        yield "hasher", self.outer(turn)
        if figures := self.outer.figures(turn):
            yield FIGURES, figures
        objective.advance()

    def _goal(self, batch: Batch, memory: CodeMemory, draws: Draws) -> Goal:
        if not self.attack.targeted:
            return Goal(batch.labels, -1)
        if batch.labels is None or memory.labels is None:
            reason = "is targeted and needs labels, which the training split lacks"
            raise ValueError(f"{self.attack.name!r} {reason}")
        targets = draw_targets(batch.labels, batch.ids, memory.labels, 1, draws)[:, 0].to(batch.labels.device)
        impossible = targets.sum(1, keepdim=True) == 0
        if impossible.all():
            raise ValueError(
                "no training item has a possible target: every label set shares a label with each"
            )
        return Goal(torch.where(impossible, batch.labels, targets), +1)

    def end_epoch(self, epoch: int) -> None:
        self.plain.end_epoch(epoch)
