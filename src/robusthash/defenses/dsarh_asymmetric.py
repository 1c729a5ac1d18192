"""Asymmetric training, plain (ADSH) or adversarial (DSARH): a network for queries, learned database codes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from robusthash.attacks.base import Attack
from robusthash.core.hamming import pack, sign
from robusthash.core.registry import name_of, register
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, Codes, LossTerms
from robusthash.data.base import RetrievalData, Split
from robusthash.defenses.adversarial_training import AdversarialTraining
from robusthash.defenses.base import OuterLoss
from robusthash.defenses.outer_losses import DSARHOuter
from robusthash.models.hasher import Hasher
from robusthash.objectives.adsh import ADSH, DiscreteMemory
from robusthash.objectives.base import HashObjective
from robusthash.training.recipe import HashingRecipe, Moment, Recipe


@register(
    "recipe",
    "asymmetric",
    paper="ADSH, AAAI 2018; DSARH, manuscript 2024",
    evidence="paper",
    state="measured",
)
class Asymmetric(Recipe):
    """ADSH, and with an ``attack`` DSARH for images. An epoch is one outer iteration.

    Each epoch samples ``items`` of the training split, trains the network on them ``inner_epochs`` times with
    the codes V of the whole split fixed, then solves V column by column from the latest outputs. V is the
    memory of an inner attack and an outer loss. The paper's learning rate, times 0.9 an outer iteration, is
    the schedule ``exponential`` with gamma 0.9^epochs.

    Args:
        hasher: of one modality.
        objective: ``adsh``.
        attack: the inner attack (``dsarh``); without it this is plain ADSH.
        outer: the mixture of clean and attacked loss, ``dsarh`` where an attack is given without one.
        items: sampled in each epoch, 2000 in the paper; all where the split has fewer.
        inner_epochs: passes over them, 3 in the paper.
        start: V before the first epoch: ``random`` signs (the zeros of published code would leave the first
            epoch without a gradient), or the ``network``'s own signs where it was trained before.
        database: ``learned`` searches V where every database item is a training item; ``network`` never does.

    Differs: V is solved on clean outputs only. The passes over a sample are shuffled together.
    """

    groups = ("hasher", "guide")

    def __init__(
        self,
        hasher: Hasher,
        objective: HashObjective,
        attack: Attack | None = None,
        outer: OuterLoss | None = None,
        items: int = 2000,
        inner_epochs: int = 3,
        start: Literal["random", "network"] = "random",
        database: Literal["learned", "network"] = "learned",
    ) -> None:
        if not isinstance(objective, ADSH):
            passed = name_of(objective)
            raise ValueError(f"the recipe 'asymmetric' solves codes of the objective 'adsh', not of {passed}")
        if len(hasher.modalities) != 1:
            has = list(hasher.modalities)
            raise ValueError(f"asymmetric training is for one modality, and this hasher has {has}")
        if attack is None and outer is not None:
            raise ValueError("an outer loss needs an attack; without one 'asymmetric' is plain ADSH")
        for name, value in (("items", items), ("inner_epochs", inner_epochs)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        words = {"start": (start, "random", "network"), "database": (database, "learned", "network")}
        for name, (word, one, other) in words.items():
            if word not in (one, other):
                raise ValueError(f"{name} must be {one!r} or {other!r}, got {word!r}")
        self.hasher = hasher
        self.objective = objective
        self.items = items
        self.inner_epochs = inner_epochs
        self.start = start
        self.database = database
        self._inner: HashingRecipe | AdversarialTraining
        if attack is None:
            self._inner = self._plain = HashingRecipe(hasher, objective)
        else:
            self._inner = AdversarialTraining(hasher, objective, attack, outer or DSARHOuter())
            self._plain = self._inner.plain
        self._data: RetrievalData
        self._draws: Draws

    @property
    def memory(self) -> DiscreteMemory:
        """V and the latest outputs."""
        memory = self._plain.memory
        assert isinstance(memory, DiscreteMemory), "made by setup"
        return memory

    def modules(self) -> dict[str, nn.Module]:
        return self._inner.modules()

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return self._inner.parameter_groups()

    def setup(self, data: RetrievalData, seed: int, batch_size: int) -> None:
        self._inner.setup(data, seed, batch_size)
        self._data, self._draws = data, Draws(seed, ("asymmetric",))
        codes, bits = self._plain.memory.reference().codes, self.hasher.bits
        memory = DiscreteMemory(len(data.train), bits, data.train.labels, self.hasher.modalities)
        self._plain.memory = memory.to(self.hasher.device)
        if self.start == "random":
            ids = torch.arange(len(data.train))
            codes = {n: sign(self._draws.within("codes", n).uniform(ids, (bits,)) - 0.5) for n in codes}
        self.memory.assign(codes)

    def pool(self, epoch: int) -> Tensor:
        """(items * inner_epochs,) the sample of this outer iteration, once for each pass."""
        order = torch.randperm(len(self._data.train), generator=self._draws.within("pool", epoch).generator())
        return order[: self.items].repeat(self.inner_epochs)

    def epoch_items(self, train: int) -> int:
        return min(self.items, train) * self.inner_epochs

    def step(self, batch: Batch, moment: Moment) -> Iterator[tuple[str, LossTerms]]:
        yield from self._inner.step(batch, moment)

    def end_epoch(self, epoch: int) -> None:
        self._inner.end_epoch(epoch)

    def database_codes(self) -> Codes | None:
        """V in the order of the database split where each of its items was trained on, else None."""
        rows = None if self.database == "network" else same_items(self._data.database, self._data.train)
        if rows is None:
            return None
        (codes,) = self.memory.codes.values()
        return Codes(pack(codes.data.cpu()[rows]), self.hasher.bits, torch.arange(len(rows)))


def same_items(split: Split, among: Split) -> Tensor | None:
    """(N,) position in ``among`` of each item of ``split``, by content and labels; None if any is missing."""
    positions = {key: position for position, key in enumerate(_keys(among))}
    rows = [positions.get(key, -1) for key in _keys(split)]
    return None if -1 in rows else torch.tensor(rows)


def _keys(split: Split) -> list[tuple[bytes, bytes]]:
    labels = [b""] * len(split) if split.labels is None else [row.tobytes() for row in split.labels.numpy()]
    return list(zip(split.hashes.tolist(), labels, strict=True))
