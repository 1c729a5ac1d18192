"""What a hashing objective is: a per-item similarity loss, a quantisation loss, and how they are summed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from robusthash.core.labels import relevant
from robusthash.core.types import Batch, HashOutput, LossTerms, Outputs
from robusthash.objectives.code_memory import CodeMemory


@dataclass(frozen=True)
class TrainFacts:
    """What an objective may know of the training set before the first step."""

    items: int
    bits: int
    labels: Tensor | None  # (N, C) multi-hot
    seed: int
    share_similar: float  # share of ordered pairs of training items that share a label
    widths: Mapping[str, int] = field(default_factory=dict)  # feature width D of each modality's encoder
    shown: Mapping[str, Mapping[str, int]] = field(
        default_factory=dict
    )  # widths of what encoders show in ``aux``

    @property
    def classes(self) -> int:
        if self.labels is None:
            raise ValueError("this objective needs labels, and the training split has none")
        return self.labels.shape[1]


def share_similar(labels: Tensor, block: int = 1024) -> float:
    """Share of ordered pairs (self-pairs included) that share a label, counted in blocks."""
    similar = sum(int(relevant(rows, labels).sum()) for rows in labels.split(block))
    return similar / len(labels) ** 2


def quantisation(output: HashOutput) -> Tensor:
    """(B,) mean squared distance of the relaxed code to its own sign, the sign held constant.

    Written with the absolute value, which is the same, so that a NaN reaches the loss and the loop can say
    where.
    """
    return (output.code.abs() - 1.0).square().mean(1)


class HashObjective(nn.Module, ABC):
    """Interface. Minimised; every term is per item, so that an attack may ascend it alone.

    A pairwise objective compares a code with reference codes; a center objective ignores them.
    Over several modalities the terms are averaged over the pairs of an output and the memory of a modality,
    so that the image-only case and the image-text case are the same lines, and an attacked image alone is
    still compared with both.
    """

    supervised: ClassVar[bool] = True
    intra: ClassVar[bool] = True  # of several modalities, a code is compared with its own one's memory too
    training_only: ClassVar[tuple[str, ...]] = (
        "critics",
    )  # modules that setup makes and only training needs

    def __init__(self) -> None:
        super().__init__()
        # set here and not in the class, where the None would hide the module that setup makes
        self.critics: nn.Module | None = None  # discriminators: parameters that the group "critic" trains

    def setup(self, facts: TrainFacts) -> None:
        """Make what depends on the data (centers, pair weights). Called once, before training or resuming."""

    @abstractmethod
    def similarity(self, output: HashOutput, labels: Tensor, codes: Tensor, code_labels: Tensor) -> Tensor:
        """(B,) loss of each item's code against reference ``codes`` (M, K) with ``code_labels`` (M, C)."""

    @abstractmethod
    def regularisation(self, output: HashOutput) -> Tensor:
        """(B,) weighted quantisation (or similar) term, which no attack ascends."""

    def advance(self) -> None:
        """One optimiser step has been taken (HashNet's continuation)."""

    def critic(self, outputs: Outputs, batch: Batch) -> LossTerms:
        """Loss of the discriminators on detached outputs, stepped before the objective; none by default."""
        return {}

    def end_epoch(self, memory: CodeMemory) -> None:
        """After the last step of an epoch."""

    def kept(self) -> dict[str, Tensor]:
        """State that stays with the trained model: all but the modules in ``training_only``."""
        apart = tuple(f"{name}." for name in self.training_only)
        return {name: value for name, value in self.state_dict().items() if not name.startswith(apart)}

    def pairs(self, outputs: Outputs, memory: CodeMemory) -> list[tuple[HashOutput, Tensor]]:
        """Each output with each memory (M, K) that it is compared with."""
        several = len(memory.codes) > 1
        return [
            (output, codes)
            for modality, output in outputs.items()
            for other, codes in memory.codes.items()
            if self.intra or not several or other != modality
        ]

    def forward(self, outputs: Outputs, batch: Batch, memory: CodeMemory) -> LossTerms:
        """Terms ``similarity`` and ``regularisation``, means over the batch."""
        labels, bank_labels = batch.labels, memory.labels
        if labels is None or bank_labels is None:
            raise ValueError(f"{type(self).__name__} is supervised, and this batch has no labels")
        pairs = self.pairs(outputs, memory)
        return {
            "similarity": torch.stack(
                [self.similarity(o, labels, c, bank_labels).mean() for o, c in pairs]
            ).mean(),
            "regularisation": torch.stack([self.regularisation(o).mean() for o in outputs.values()]).mean(),
        }
