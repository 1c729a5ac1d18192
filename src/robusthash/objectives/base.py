"""Interface of hashing objectives, per-item similarity and quantisation losses, and the memory of codes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from robusthash.core.hamming import sign
from robusthash.core.labels import relevant
from robusthash.core.registry import name_of
from robusthash.core.types import Batch, HashOutput, LossTerms, Outputs, Reference
from robusthash.data.base import Split


@dataclass(frozen=True)
class TrainFacts:
    """Facts on the training set and the encoders that an objective may use before the first step."""

    items: int
    bits: int
    labels: Tensor | None  # (N, C) multi-hot
    seed: int
    share_similar: float  # share of ordered pairs of training items that share a label
    widths: Mapping[str, int] = field(default_factory=dict)  # feature width D of each modality's encoder
    aux_widths: Mapping[str, Mapping[str, int]] = field(
        default_factory=dict
    )  # of the features in their ``aux``
    split: Split | None = None  # the training items, whose labels are the ones above
    encoders: Mapping[str, nn.Module] = field(default_factory=dict)  # the hasher's, by modality

    @property
    def classes(self) -> int:
        if self.labels is None:
            raise ValueError("this objective needs labels, and the training split has none")
        return self.labels.shape[1]

    def refuse_one_sided(self, name: str) -> None:
        """A ``ValueError`` where every training item shares a label with every other, or none has one."""
        refuse_labels(name, self.labels, self.items)
        if self.share_similar == 1.0:
            raise ValueError(
                f"{name} learns from items that share no label, and all training items share one; give "
                "labels that tell them apart, or take an unsupervised objective"
            )


def refuse_labels(name: str, labels: Tensor | None, items: int) -> None:
    """A ``ValueError`` where the labels of the training items teach nothing: none, or all the same."""
    remedy = "or take an objective without labels (robusthash list objective)"
    if labels is None or not bool((labels > 0).any()):
        raise ValueError(
            f"{name} learns from labels, and none of the {items} training items has one; label some, {remedy}"
        )
    if bool((labels == labels[0]).all()):
        raise ValueError(
            f"{name} learns from labels, and all {items} training items have the same, so there is no pair "
            f"to tell apart; add items with other labels, {remedy}"
        )


def share_similar(labels: Tensor, block: int = 1024) -> float:
    """Share of ordered pairs (self-pairs included) that share a label, counted in blocks."""
    similar = sum(int(relevant(rows, labels).sum()) for rows in labels.split(block))
    return similar / len(labels) ** 2


def quantisation(output: HashOutput) -> Tensor:
    """(B,) mean squared distance of the relaxed code to its own sign, the sign held constant.

    Written with the absolute value, which is the same, so that a NaN reaches the loss and the loop reports
    it.
    """
    return (output.code.abs() - 1.0).square().mean(1)


class CodeMemory(nn.Module):
    """Last relaxed code, detached, and label of every training item, by modality, indexed by ``Batch.ids``.

    Filled by one eval-mode pass before the first step; the recipe then overwrites the rows of each batch with
    its clean outputs. DPSH's bank, SAAT's moving reference and ADSH's database codes are this one object.
    """

    labels: Tensor | None

    def __init__(self, items: int, bits: int, labels: Tensor | None, modalities: tuple[str, ...]) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("labels", labels)
        codes = {name: nn.Parameter(torch.zeros(items, bits), requires_grad=False) for name in modalities}
        self.codes = nn.ParameterDict(codes)

    @torch.no_grad()
    def update(self, outputs: Outputs, batch: Batch) -> None:
        """Overwrite the rows of ``batch``."""
        for name, output in outputs.items():
            self.codes[name][batch.ids] = output.code.detach().float()

    def joint(self, batch: Batch) -> Tensor:
        """(B, K) the code that the modalities of each item share, B = sign(F + G), held constant."""
        return sign(torch.stack([codes.detach()[batch.ids] for codes in self.codes.values()]).sum(0))

    def reference(self) -> Reference:
        """The signs, for attacks and guides."""
        return Reference({name: sign(values.detach()) for name, values in self.codes.items()}, self.labels)


class HashObjective(nn.Module, ABC):
    """Interface. Minimised; every term is per item, so that an attack may ascend it alone.

    A pairwise objective compares a code with reference codes; a center objective ignores them. Over several
    modalities the terms are averaged over the pairs of an output and the memory of a modality, so an attacked
    image alone is still compared with both.
    """

    supervised: ClassVar[bool] = True
    intra: ClassVar[bool] = True  # of several modalities, a code is compared with its own one's memory too
    training_only: ClassVar[tuple[str, ...]] = ("critics",)  # modules from ``setup`` that only training needs

    def __init__(self) -> None:
        super().__init__()
        # set here and not in the class, where the None would hide the module that setup makes
        self.critics: nn.Module | None = None  # discriminators: parameters that the group "critic" trains

    def setup(self, facts: TrainFacts) -> None:
        """Make what depends on the data (centers, pair weights). Called once, before training or resuming."""

    @abstractmethod
    def similarity(self, output: HashOutput, labels: Tensor, codes: Tensor, code_labels: Tensor) -> Tensor:
        """(B,) loss of each item's code against reference ``codes`` (M, K) with ``code_labels`` (M, C)."""

    def regularisation(self, output: HashOutput) -> Tensor:
        """(B,) weighted quantisation (or similar) term, which no attack ascends; 0 by default."""
        return torch.zeros(len(output.code), device=output.code.device)

    def advance(self) -> None:
        """Count an optimiser step (HashNet's continuation)."""

    def critic(self, outputs: Outputs, batch: Batch) -> LossTerms:
        """Loss of the discriminators on detached outputs, stepped before the objective; none by default."""
        return {}

    def end_epoch(self, memory: CodeMemory) -> None:
        """Update what is solved once an epoch."""

    def saved_state(self) -> dict[str, Tensor]:
        """State that stays with the trained model: all but the modules in ``training_only``."""
        dropped = tuple(f"{name}." for name in self.training_only)
        return {name: value for name, value in self.state_dict().items() if not name.startswith(dropped)}

    def both_labels(self, batch: Batch, memory: CodeMemory) -> tuple[Tensor, Tensor]:
        """Labels of the batch and of the memory."""
        if batch.labels is None or memory.labels is None:
            raise ValueError(f"{name_of(self)} is supervised, and this batch has no labels")
        return batch.labels, memory.labels

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
        labels, memory_labels = self.both_labels(batch, memory)
        pairs = self.pairs(outputs, memory)
        similarity = [self.similarity(o, labels, codes, memory_labels).mean() for o, codes in pairs]
        regularisation = [self.regularisation(o).mean() for o in outputs.values()]
        return {
            "similarity": torch.stack(similarity).mean(),
            "regularisation": torch.stack(regularisation).mean(),
        }
