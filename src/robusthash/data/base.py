"""Splits and retrieval data sets: what every reader makes and everything else consumes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from robusthash.core.runtime import digest
from robusthash.core.types import Batch, Inputs


class Source(Protocol):
    """Where items come from: memory (``ArraySource``) or files (``files.FileSource``)."""

    def __len__(self) -> int: ...

    def inputs(self, rows: Tensor) -> Inputs:
        """The inputs of these rows, by modality: images float32 in [0, 1]."""
        ...

    def hashes(self) -> np.ndarray:
        """(N,) content hashes as ``"S16"`` byte strings; equal content, equal hash."""
        ...


def content_hash(data: bytes) -> bytes:
    """The 16 bytes that identify an item's content, as hex of a BLAKE2b."""
    return hashlib.blake2b(data, digest_size=8).hexdigest().encode()


def as_input(values: Tensor) -> Tensor:
    """What a hasher gets of stored values: pixels in [0, 1]; bags, kept as bool to save memory, as 0 and
    1."""
    if values.dtype == torch.uint8:
        return values.float() / 255
    return values.float() if values.dtype == torch.bool else values


@dataclass(frozen=True)
class ArraySource:
    """Items held in memory: images as uint8 (a quarter of float's memory), other modalities as they are."""

    arrays: dict[
        str, Tensor
    ]  # "image": (N, 3, H, W) uint8 or (N, V) float; "text": (N, V) float/bool, (N, L) int64

    def __post_init__(self) -> None:
        sizes = {name: len(value) for name, value in self.arrays.items()}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"modalities of different length: {sizes}")

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def inputs(self, rows: Tensor) -> Inputs:
        return {name: as_input(value[rows]) for name, value in self.arrays.items()}

    def hashes(self) -> np.ndarray:
        columns = [value.numpy() for _, value in sorted(self.arrays.items())]
        return np.array(
            [content_hash(b"".join(c[i].tobytes() for c in columns)) for i in range(len(self))], dtype="S16"
        )


@dataclass(frozen=True)
class Split:
    """Some rows of a source, in a fixed order. ``Batch.ids`` are positions in this order."""

    name: str
    source: Source
    rows: Tensor  # (N,) int64
    labels: Tensor | None  # (N, C) multi-hot float32
    hashes: np.ndarray  # (N,) content hashes, "S16"
    also: dict[str, Tensor] = field(
        default_factory=dict
    )  # other label systems of the same items, by name, (N, C')

    def __post_init__(self) -> None:
        if len(self.rows) == 0:
            raise ValueError(f"the {self.name} split is empty")
        if self.labels is not None:
            if len(self.labels) != len(self.rows):
                raise ValueError(f"{self.name}: {len(self.labels)} label rows for {len(self.rows)} items")
            if not torch.isfinite(self.labels).all():
                raise ValueError(f"{self.name}: labels hold NaN or infinite values")

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, positions: Tensor) -> Batch:
        """The items at these positions."""
        labels = None if self.labels is None else self.labels[positions]
        return Batch(self.source.inputs(self.rows[positions]), labels, positions.to(torch.int64))

    def take(self, positions: Tensor, name: str | None = None) -> Split:
        """A split of these positions, in their order; a name is kept unless another is given."""
        labels = None if self.labels is None else self.labels[positions]
        also = {system: values[positions] for system, values in self.also.items()}
        return Split(
            name or self.name, self.source, self.rows[positions], labels, self.hashes[positions.numpy()], also
        )

    def fingerprint(self) -> str:
        """Digest of the ordered content and the labels: equal only for the same items in the same order."""
        labels = b"" if self.labels is None else self.labels.numpy().tobytes()
        return hashlib.sha256(self.hashes.tobytes() + labels).hexdigest()[:16]


def _unlabelled(split: Split) -> int:
    """Items without a label, which are similar to nothing."""
    return len(split) if split.labels is None else int((split.labels.sum(1) == 0).sum())


@dataclass(frozen=True)
class RetrievalData:
    """Train, query and database splits of one data set, checked when made.

    Raises:
        ValueError: where a query is also in the database or in the training set. Training items may be in the
            database (published protocols differ); ``train_in_database`` records how many are.
    """

    name: str
    train: Split
    query: Split
    database: Split
    label_names: tuple[str, ...]
    validation: Split | None = None
    note: str = ""  # what a reader of results must know, e.g. that pixels were re-encoded
    train_in_database: int = field(init=False)

    def __post_init__(self) -> None:
        queries = self.query.hashes
        for other in (self.database, self.train):
            shared = np.isin(queries, other.hashes)
            if shared.any():
                first = int(np.flatnonzero(shared)[0])
                raise ValueError(
                    f"{int(shared.sum())} of {len(queries)} queries are also in the {other.name} split "
                    f"(first: query {first}, content {queries[first].decode()}); remove them from one of the two"
                )
        object.__setattr__(
            self, "train_in_database", int(np.isin(self.train.hashes, self.database.hashes).sum())
        )

    @property
    def splits(self) -> dict[str, Split]:
        made = {"train": self.train, "query": self.query, "database": self.database}
        return made if self.validation is None else {**made, "validation": self.validation}

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self.train.batch(torch.zeros(1, dtype=torch.int64)).inputs)

    @property
    def vocabulary(self) -> int | None:
        """Width V of the texts as bags of words (length L where they are token ids), or None where there are
        none."""
        inputs = self.train.batch(torch.zeros(1, dtype=torch.int64)).inputs
        return inputs["text"].shape[1] if "text" in inputs else None

    @property
    def label_systems(self) -> tuple[str, ...]:
        """Names of the other labels that items carry, e.g. ``class`` beside multi-labels."""
        return tuple(self.train.also)

    def by(self, system: str) -> RetrievalData:
        """The same items, relevant to each other by another label system.

        Raises:
            ValueError: where the items have no such labels.
        """
        if system not in self.train.also:
            raise ValueError(
                f"{self.name} has no labels {system!r} beside its own; it has {list(self.label_systems)}"
            )
        relabelled = {
            name: replace(split, labels=split.also[system], also={}) for name, split in self.splits.items()
        }
        note = f"{self.note} Relevance by {system}.".strip()
        return RetrievalData(self.name, **relabelled, label_names=(), note=note)

    @property
    def image_size(self) -> tuple[int, ...]:
        """(H, W) of the images, or (V,) where they are vectors of features."""
        shape = self.train.batch(torch.zeros(1, dtype=torch.int64)).inputs["image"].shape
        return tuple(shape[-2:]) if len(shape) == 4 else tuple(shape[1:])

    def fingerprint(self) -> str:
        """Digest of all splits, in order."""
        return digest({name: split.fingerprint() for name, split in self.splits.items()}, 16)

    def describe(self) -> dict[str, Any]:
        """Sizes, digests and notes, as results carry them."""
        return {
            "name": self.name,
            "sizes": {name: len(split) for name, split in self.splits.items()},
            "fingerprints": {name: split.fingerprint() for name, split in self.splits.items()},
            "labels": len(self.label_names),
            "unlabelled": {name: _unlabelled(split) for name, split in self.splits.items()},
            "train_in_database": self.train_in_database,
            "note": self.note,
        }
