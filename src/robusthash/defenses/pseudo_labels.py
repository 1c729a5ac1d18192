"""Adversarial training on labelled items and on unlabelled ones, which the undefended model labels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from robusthash.attacks.base import Attack
from robusthash.core.hamming import unpack
from robusthash.core.registry import register
from robusthash.core.runtime import Draws
from robusthash.core.types import Inputs
from robusthash.data.base import RetrievalData, Source, Split
from robusthash.defenses.adversarial_training import AdversarialTraining
from robusthash.defenses.base import OuterLoss
from robusthash.models.encoding import encode_split
from robusthash.models.hasher import Hasher
from robusthash.objectives.base import HashObjective


@dataclass(frozen=True)
class JoinedSource:
    """The rows of one source, then those of another of the same modalities and shapes."""

    first: Source
    second: Source

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def inputs(self, rows: Tensor) -> Inputs:
        second = rows >= len(self.first)
        joined: Inputs = {}
        for source, mask, offset in (
            (self.first, ~second, 0),
            (self.second, second, len(self.first)),
        ):
            if mask.any():
                for name, values in source.inputs(rows[mask] - offset).items():
                    joined.setdefault(name, values.new_empty(len(rows), *values.shape[1:]))[mask] = values
        return joined


@register("recipe", "pseudo-labels", evidence="own", state="measured")
class PseudoLabels(AdversarialTraining):
    """Adversarial training where a share of the items is unlabelled. Ours; after Carmon et al., NeurIPS 2019.

    The unlabelled items are those of the database that are not trained on; their own labels are never read.
    Before the first step each gets the labels that more than half of its nearest training items have by the
    codes of the model that training starts from, or the most frequent one where none has a majority.

    Args:
        share: of unlabelled items in an epoch, which passes every labelled item once; drawn again each epoch.
        neighbours: nearest training items that vote.

    Cost: one pass over training and database items before the first step; an epoch passes 1 / (1 - share)
    times the labelled items, so take as many fewer epochs.
    """

    starts_trained = True

    def __init__(
        self,
        hasher: Hasher,
        objective: HashObjective,
        attack: Attack,
        outer: OuterLoss,
        warmup: float = 0.0,
        share: float = 0.5,
        neighbours: int = 10,
    ) -> None:
        if not 0.0 < share < 1.0:
            raise ValueError(f"share is one of unlabelled items, in (0, 1), got {share:g}")
        if neighbours < 1:
            raise ValueError(f"neighbours must be at least 1, got {neighbours}")
        super().__init__(hasher, objective, attack, outer, warmup)
        self.share = share
        self.neighbours = neighbours
        self.labelled = 0

    def enlarged(self, data: RetrievalData) -> RetrievalData:
        """The data with the unlabelled items behind the labelled ones of the training split."""
        train, labels = data.train, data.train.labels
        if labels is None:
            raise ValueError(f"{data.name} has no training labels, from which others get theirs")
        others = np.flatnonzero(~np.isin(data.database.hashes, train.hashes))
        if len(others) == 0:
            raise ValueError(
                f"all items of the database of {data.name} are trained on, so none is unlabelled; "
                "take the recipe 'adversarial'"
            )
        pool = data.database.take(torch.from_numpy(others))
        rows = torch.cat([train.rows, pool.rows + len(train.source)])
        hashes = np.concatenate([train.hashes, pool.hashes])
        voted = torch.cat([labels, self._voted(train, labels, pool)])
        self.labelled = len(train)
        source = JoinedSource(train.source, pool.source)
        return replace(data, train=Split(train.name, source, rows, voted, hashes))

    def _voted(self, train: Split, labels: Tensor, pool: Split) -> Tensor:
        """(M, C) labels of the unlabelled items."""
        codes, block = _codes(self.hasher, train), []
        for rows in _codes(self.hasher, pool).split(1024):
            nearest = (rows @ codes.T).topk(min(self.neighbours, len(codes)), 1).indices
            votes = labels[nearest].mean(1)
            majority = votes > 0.5
            first = one_hot(votes.argmax(1), votes.shape[1]).bool()
            block.append(torch.where(majority.any(1, keepdim=True), majority, first).float())
        return torch.cat(block)

    def setup(self, data: RetrievalData, seed: int, batch_size: int) -> None:
        super().setup(data, seed, batch_size)
        self.unlabelled = len(data.train) - self.labelled
        self.draws = Draws(seed, ("pseudo-labels",))

    def pool(self, epoch: int) -> Tensor | None:
        count = min(self.unlabelled, self.epoch_items(self.labelled) - self.labelled)
        generator = self.draws.within(epoch).generator()
        sample = torch.randperm(self.unlabelled, generator=generator)[:count]
        return torch.cat([torch.arange(self.labelled), self.labelled + sample])

    def epoch_items(self, train: int) -> int:
        return round(train / (1.0 - self.share))


def _codes(hasher: Hasher, split: Split) -> Tensor:
    """(N, K) signs of a split, those of several modalities next to each other."""
    encoded = encode_split(hasher, split).values()
    return torch.cat([unpack(codes.packed, codes.bits) for codes in encoded], 1).float()
