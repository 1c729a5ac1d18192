"""What one way to train is, and the plain one: a hasher on its objective."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from robusthash.core.registry import register
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, Codes, LossTerms, Outputs
from robusthash.data.base import RetrievalData, Split, batches
from robusthash.models.hasher import Hasher, frozen
from robusthash.objectives.base import HashObjective, TrainFacts, share_similar
from robusthash.objectives.code_memory import CodeMemory

FIGURES = "figures"
"""In place of a group's name: what a recipe yields with it is averaged into the log and not optimised."""


@dataclass(frozen=True)
class Moment:
    """Where training stands when a step is taken."""

    epoch: int
    progress: float  # share of all steps already taken, in [0, 1)
    draws: Draws  # of this epoch


class Recipe(ABC):
    """Interface: one way to train. The loop owns optimisers and checkpoints; the recipe owns modes and
    losses."""

    groups: ClassVar[tuple[str, ...] | None] = None
    """The optimiser groups that it may have, the first of them always, so that a recipe file can be checked
    when it is read; None is not told."""

    hasher: Hasher

    @abstractmethod
    def modules(self) -> dict[str, nn.Module]:
        """Everything with state, by name: what a checkpoint holds. ``hasher`` is always one of them."""

    @abstractmethod
    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by optimiser group: ``hasher``, and where there are any ``critic``, ``purifier``,
        ``guide``. Parts of ``hasher`` with settings of their own are told apart by the loop."""

    @abstractmethod
    def setup(self, data: RetrievalData, seed: int, batch_size: int) -> None:
        """Make what depends on the data, once, before the first step or a resume."""

    def pool(self, epoch: int) -> Tensor | None:
        """Positions trained on this epoch; None is all of them."""
        return None

    @abstractmethod
    def step(self, batch: Batch, moment: Moment) -> Iterator[tuple[str, LossTerms]]:
        """Yield (group, loss terms); the loop steps that group and resumes here. Losses are computed after
        the yield before them, because parameters moved. What comes with ``FIGURES`` as its group is only
        logged."""

    def end_epoch(self, epoch: int) -> None:  # noqa: B027 - only discrete solvers have something to do
        """After the last step of an epoch."""

    def database_codes(self) -> Codes | None:
        """Learned database codes, where the method makes them."""
        return None


def train_facts(split: Split, hasher: Hasher, seed: int) -> TrainFacts:
    """What an objective may know of ``split`` and of the hasher that it trains."""
    share = 0.0 if split.labels is None else share_similar(split.labels)
    widths = {name: int(encoder.width) for name, encoder in hasher.encoders.items()}  # type: ignore[arg-type]
    shown = {name: dict(getattr(encoder, "shown", {})) for name, encoder in hasher.encoders.items()}
    return TrainFacts(len(split), hasher.bits, split.labels, seed, share, widths, shown)


def detached(outputs: Outputs) -> Outputs:
    """The same outputs, from which no gradient flows back."""
    return {
        name: replace(
            o,
            logits=o.logits.detach(),
            code=o.code.detach(),
            features=o.features.detach(),
            aux={key: value.detach() for key, value in o.aux.items()},
        )
        for name, o in outputs.items()
    }


@torch.no_grad()
def fill_memory(memory: CodeMemory, hasher: Hasher, split: Split, batch_size: int) -> None:
    """One eval-mode pass, so that no row of the memory is ever empty."""
    with frozen(hasher):
        for batch in batches(split, batch_size, modalities=hasher.modalities):
            batch = batch.to(hasher.device)
            memory.update(hasher(batch.inputs), batch)


@register("recipe", "hashing", state="measured")
class HashingRecipe(Recipe):
    """Train a hasher on its objective, undefended."""

    groups = ("hasher", "critic")

    def __init__(self, hasher: Hasher, objective: HashObjective) -> None:
        self.hasher = hasher
        self.objective = objective
        self.memory: CodeMemory

    def modules(self) -> dict[str, nn.Module]:
        return {"hasher": self.hasher, "objective": self.objective, "memory": self.memory}

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        critics = [] if self.objective.critics is None else list(self.objective.critics.parameters())
        apart = {id(parameter) for parameter in critics}
        own = [parameter for parameter in self.objective.parameters() if id(parameter) not in apart]
        groups = {"hasher": [*self.hasher.parameters(), *own]}
        return {**groups, "critic": critics} if critics else groups

    def setup(self, data: RetrievalData, seed: int, batch_size: int) -> None:
        missing = [name for name in self.hasher.modalities if name not in data.modalities]
        if missing:
            raise ValueError(
                f"this hasher encodes {missing[0]!r}, and {data.name} has only {list(data.modalities)}"
            )
        device = self.hasher.device
        self.objective.to(device).setup(train_facts(data.train, self.hasher, seed))
        self.objective.to(device)  # what setup made
        memory = CodeMemory(len(data.train), self.hasher.bits, data.train.labels, self.hasher.modalities)
        self.memory = memory.to(device)
        fill_memory(self.memory, self.hasher, data.train, batch_size)

    def step(self, batch: Batch, moment: Moment) -> Iterator[tuple[str, LossTerms]]:
        self.hasher.train()
        outputs = self.hasher(batch.inputs)
        self.memory.update(outputs, batch)
        yield from self.critic_step(outputs, batch)
        yield "hasher", self.objective(outputs, batch, self.memory)
        self.objective.advance()

    def critic_step(self, outputs: Outputs, batch: Batch) -> Iterator[tuple[str, LossTerms]]:
        """The step of the objective's discriminators, where it has any."""
        if self.objective.critics is not None:
            yield "critic", self.objective.critic(detached(outputs), batch)

    def end_epoch(self, epoch: int) -> None:
        self.objective.end_epoch(self.memory)
