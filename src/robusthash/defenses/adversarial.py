"""Adversarial training: the inner maximisation and the outer minimisation that all these defenses share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from robusthash.attacks.base import Attack
from robusthash.core.types import Batch, Goal, Guidance, LossTerms, Outputs
from robusthash.data.base import RetrievalData
from robusthash.models.hasher import Hasher, frozen
from robusthash.objectives.base import HashObjective
from robusthash.objectives.memory import CodeMemory
from robusthash.training.recipe import HashingRecipe, Moment, Recipe


@dataclass(frozen=True)
class Round:
    """All that an outer loss may look at. ``guidance`` is recomputed after the memory was updated."""

    batch: Batch
    attacked: Batch
    goal: Goal
    clean: Outputs
    robust: Outputs
    guidance: Guidance
    memory: CodeMemory
    objective: HashObjective
    progress: float


Outer = Callable[[Round], LossTerms]


class AdversarialTraining(Recipe):
    """Min-max training: attack the hasher as it stands, then lower the outer loss on clean and attacked outputs.

    Order of a step (SAAT's code): guidance from the memory before this batch, attack in eval mode, attacked and clean
    forward in train mode, memory update from the clean outputs, guidance again, outer loss.

    Args:
        hasher: start it from a trained one; the papers always do.
        objective: the hashing objective, kept on the clean outputs.
        attack: the inner attack; its threat bounds training too.
        outer: the defense's own loss.
    """

    def __init__(self, hasher: Hasher, objective: HashObjective, attack: Attack, outer: Outer) -> None:
        if attack.targeted:
            raise ValueError(f"{attack.name!r} is targeted; adversarial training here moves away from own labels")
        self.hasher = hasher
        self.attack = attack
        self.outer = outer
        self._plain = HashingRecipe(hasher, objective)
        hasher.declared = hasher.spec["declared"] = "adversarial"

    def modules(self) -> dict[str, nn.Module]:
        return self._plain.modules()

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return self._plain.parameter_groups()

    def setup(self, data: RetrievalData, seed: int, batch_size: int) -> None:
        self._plain.setup(data, seed, batch_size)

    def step(self, batch: Batch, moment: Moment) -> Iterator[tuple[str, LossTerms]]:
        memory, objective = self._plain.memory, self._plain.objective
        goal = Goal(batch.labels, -1)
        self.hasher.train()
        found, _ = self.attack.perturb(self.hasher, batch, goal, memory.reference(), draws=moment.draws)
        attacked = batch.with_inputs({name: value.detach() for name, value in found.inputs.items()})
        robust, clean = self.hasher(attacked.inputs), self.hasher(batch.inputs)
        memory.update(clean, batch)
        with frozen(self.hasher), torch.no_grad():
            guidance = self.attack.guide(self.hasher, batch, goal, memory.reference(), moment.draws)
        turn = Round(batch, attacked, goal, clean, robust, guidance, memory, objective, moment.progress)
        yield "hasher", self.outer(turn)
        objective.advance()
