"""Splits, data sets and batches, which every reader makes, and the helpers that readers share."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from robusthash.core import limited_files
from robusthash.core.labels import has_relevant
from robusthash.core.runtime import Draws, digest
from robusthash.core.types import Batch, Inputs

_DEPTH = 3  # folders that an unpacked archive may lie below the root

Reader = Callable[..., "RetrievalData"]


class Source(Protocol):
    """Items by row: in memory (``ArraySource``) or in files (``image_files.FileSource``)."""

    def __len__(self) -> int: ...

    def inputs(self, rows: Tensor) -> Inputs:
        """The inputs of these rows, by modality: images float32 in [0, 1]."""
        ...


class TextForm(Protocol):
    """The form of the texts of a data set, by which other texts become inputs too."""

    def encode(self, texts: Sequence[str]) -> Tensor:
        """N texts -> (N, V) bags or (N, L) token ids."""
        ...

    def plain(self) -> dict[str, Any]:
        """Plain data that ``image_text.text_form`` reads."""
        ...


def content_hash(data: bytes) -> bytes:
    """The 16 bytes that identify an item's content, as hex of a BLAKE2b."""
    return hashlib.blake2b(data, digest_size=8).hexdigest().encode()


def as_input(values: Tensor) -> Tensor:
    """Stored values as a hasher gets them: uint8 pixels as floats in [0, 1], bool bags as 0 and 1."""
    if values.dtype == torch.uint8:
        return values.float() / 255
    return values.float() if values.dtype == torch.bool else values


@dataclass(frozen=True)
class ArraySource:
    """Items in memory by modality, images as uint8 (a quarter of float's memory).

    ``image`` is (N, 3, H, W) uint8 or (N, V) float, ``text`` (N, V) float or bool, or (N, L) int64.
    """

    arrays: dict[str, Tensor]

    def __post_init__(self) -> None:
        sizes = {name: len(value) for name, value in self.arrays.items()}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"modalities of different length: {sizes}")

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def inputs(self, rows: Tensor) -> Inputs:
        return {name: as_input(value[rows]) for name, value in self.arrays.items()}

    def hashes(self) -> np.ndarray:
        """(N,) content hashes as ``"S16"`` byte strings; equal content, equal hash."""
        columns = [value.numpy() for _, value in sorted(self.arrays.items())]
        contents = (b"".join(column[row].tobytes() for column in columns) for row in range(len(self)))
        return np.array([content_hash(content) for content in contents], dtype="S16")


@dataclass(frozen=True)
class Split:
    """Some rows of a source, in a fixed order. ``Batch.ids`` are positions in this order."""

    name: str
    source: Source
    rows: Tensor  # (N,) int64
    labels: Tensor | None  # (N, C) multi-hot float32
    hashes: np.ndarray  # (N,) content hashes, "S16"
    also: dict[str, Tensor] = field(default_factory=dict)  # other label systems by name, (N, C')

    def __post_init__(self) -> None:
        if len(self.rows) == 0:
            raise ValueError(f"the {self.name} split is empty")
        if self.labels is not None:
            if len(self.labels) != len(self.rows):
                raise ValueError(f"{self.name}: {len(self.labels)} label rows for {len(self.rows)} items")
            if self.labels.ndim != 2:
                raise ValueError(f"{self.name}: labels are (N, C) multi-hot, got {[*self.labels.shape]}")
            if not ((self.labels == 0) | (self.labels == 1)).all():  # NaN is neither
                odd = self.labels[(self.labels != 0) & (self.labels != 1)][0]
                raise ValueError(
                    f"{self.name}: labels are (N, C) of 0 and 1, and one is {odd:g}; two items are relevant "
                    "to each other where both have a 1 in one column"
                )

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, positions: Tensor) -> Batch:
        """The items at these positions."""
        labels = None if self.labels is None else self.labels[positions]
        return Batch(self.source.inputs(self.rows[positions]), labels, positions.to(torch.int64))

    def take(self, positions: Tensor, name: str | None = None) -> Split:
        """A split of these positions, in their order; the name stays unless another is given."""
        labels = None if self.labels is None else self.labels[positions]
        also = {system: values[positions] for system, values in self.also.items()}
        rows, hashes = self.rows[positions], self.hashes[positions.numpy()]
        return Split(name or self.name, self.source, rows, labels, hashes, also)

    @property
    def groups(self) -> dict[str, Tensor]:
        """(N,) bool by name: items that are scored apart, where the source tells its items apart."""
        return {name: rows[self.rows] for name, rows in getattr(self.source, "groups", {}).items()}

    def fingerprint(self) -> str:
        """Digest of the ordered content and the labels: equal only for the same items in the same order."""
        labels = b"" if self.labels is None else self.labels.numpy().tobytes()
        return hashlib.sha256(self.hashes.tobytes() + labels).hexdigest()[:16]

    def unlabelled(self) -> int:
        """Number of items without a label, which are similar to nothing."""
        return len(self) if self.labels is None else int((self.labels.sum(1) == 0).sum())


@dataclass(frozen=True)
class RetrievalData:
    """Train, query and database splits of one data set, checked when made.

    Raises:
        ValueError: a query is also in the database or in the training set. Training items may be in the
            database (published protocols differ); ``train_in_database`` counts them.
    """

    name: str
    train: Split
    query: Split
    database: Split
    label_names: tuple[str, ...]
    validation: Split | None = None
    note: str = ""  # what a reader of results must know, e.g. that pixels were re-encoded
    skipped: tuple[str, ...] = ()  # files that a reader passed over, with the reason
    text_form: TextForm | None = None  # None where there are no texts, or vectors of unknown origin
    train_in_database: int = field(init=False)

    def __post_init__(self) -> None:
        queries = self.query.hashes
        for other in (self.database, self.train):
            shared = np.isin(queries, other.hashes)
            if shared.any():
                first = int(np.flatnonzero(shared)[0])
                example = f"first: query {first}, content {queries[first].decode()}"
                count = f"{int(shared.sum())} of {len(queries)} queries"
                raise ValueError(f"{count} are also in the {other.name} split ({example}); remove them there")
        shared = np.isin(self.train.hashes, self.database.hashes)
        object.__setattr__(self, "train_in_database", int(shared.sum()))

    def __repr__(self) -> str:
        """A few lines to read; the fields have the rest."""
        splits = {"train": self.train, "query": self.query, "database": self.database}
        if self.validation is not None:
            splits["validation"] = self.validation
        names = ", ".join(self.label_names[:6]) + ", ..." * (len(self.label_names) > 6)
        lines = [
            f"RetrievalData {self.name!r}: {', '.join(self.modalities)}",
            "  " + ", ".join(f"{name} {len(split)}" for name, split in splits.items()),
            f"  {len(self.label_names)} labels: {names}",
        ]
        return "\n".join([*lines, *([f"  {self.note}"] if self.note else [])])

    @staticmethod
    def from_arrays(images: Any, labels: Any, **options: Any) -> RetrievalData:
        """Your own images and labels in memory as a data set; see ``data.own_data.from_arrays``."""
        from robusthash.data.own_data import from_arrays  # which imports this module

        return from_arrays(images, labels, **options)

    @staticmethod
    def from_dataset(dataset: Any, **options: Any) -> RetrievalData:
        """A torch ``Dataset`` or ``DataLoader`` as a data set; see ``data.own_data.from_dataset``."""
        from robusthash.data.own_data import from_dataset

        return from_dataset(dataset, **options)

    @property
    def splits(self) -> dict[str, Split]:
        """The splits by name; ``validation`` only where there is one."""
        splits = {"train": self.train, "query": self.query, "database": self.database}
        return splits if self.validation is None else {**splits, "validation": self.validation}

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the inputs that items have."""
        return tuple(self._example())

    @property
    def vocabulary(self) -> int | None:
        """Width V of texts as bags of words (length L of token ids), or None where there are no texts."""
        inputs = self._example()
        return inputs["text"].shape[1] if "text" in inputs else None

    @property
    def image_size(self) -> tuple[int, ...]:
        """(H, W) of the images, or (V,) where they are vectors of features."""
        shape = self._example()["image"].shape
        return tuple(shape[-2:]) if len(shape) == 4 else tuple(shape[1:])

    def _example(self) -> Inputs:
        return self.train.batch(torch.zeros(1, dtype=torch.int64)).inputs

    @property
    def label_systems(self) -> tuple[str, ...]:
        """Names of the other labels that items carry, e.g. ``class`` next to multi-labels."""
        return tuple(self.train.also)

    def by(self, system: str) -> RetrievalData:
        """The same items, relevant to each other by another label system; ValueError where there is none."""
        if system not in self.train.also:
            has = list(self.label_systems)
            raise ValueError(f"{self.name} has no labels {system!r} besides its own; it has {has}")
        splits = {
            name: replace(split, labels=split.also[system], also={}) for name, split in self.splits.items()
        }
        note = f"{self.note} Relevance by {system}.".strip()
        facts = {"note": note, "skipped": self.skipped, "text_form": self.text_form}
        return RetrievalData(self.name, **splits, label_names=(), **facts)  # type: ignore[arg-type]

    def without_relevant(self) -> int:
        """Number of queries that share no label with any item of the database."""
        if self.query.labels is None or self.database.labels is None:
            return len(self.query)
        return int((~has_relevant(self.query.labels, self.database.labels)).sum())

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
            "unlabelled": {name: split.unlabelled() for name, split in self.splits.items()},
            "without_relevant": self.without_relevant(),
            "train_in_database": self.train_in_database,
            "note": self.note,
        }


def batches(
    split: Split,
    batch_size: int,
    shuffle: Draws | None = None,
    positions: Tensor | None = None,
    modalities: Sequence[str] | None = None,
    start: int = 0,
    least: int = 1,
) -> Iterator[Batch]:
    """Batches of ``split``, decoded one ahead; the last may be smaller.

    Args:
        batch_size: items per batch, at least 1.
        shuffle: the order is drawn from this scope; None keeps the split's order.
        positions: only these positions of the split (a pool); None for all.
        modalities: only these, where the split has them; None for all.
        start: batches to leave out at the start.
        least: a last batch of fewer items joins the one before it.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    order = torch.arange(len(split)) if positions is None else positions
    if shuffle is not None:
        order = order[torch.randperm(len(order), generator=shuffle.generator())]

    def read(chunk: Tensor) -> Batch:
        batch = split.batch(chunk)
        return batch if modalities is None else batch.only(modalities)

    # one thread reads ahead, so that decoding the next batch overlaps computing on this one
    chunks = list(order.split(batch_size))
    if len(chunks) > 1 and len(chunks[-1]) < least:
        chunks[-2:] = [torch.cat(chunks[-2:])]
    first, *others = chunks[start:]
    with ThreadPoolExecutor(max_workers=1) as reader:
        ahead = reader.submit(read, first)
        for chunk in others:
            current, ahead = ahead, reader.submit(read, chunk)
            yield current.result()
        yield ahead.result()


def flat_options(*without: str) -> Callable[[Reader], Reader]:
    """Let a reader that takes option records be called by their fields, as recipes name them.

    A parameter whose default is a dataclass instance is replaced by the fields of that class, with the
    instance's values as defaults. Fields in ``without`` are no options of this reader.
    """

    def flatten(reader: Reader) -> Reader:
        signature = inspect.signature(reader, eval_str=True)
        parameters: list[inspect.Parameter] = []
        records: dict[str, tuple[Any, set[str]]] = {}
        for name, parameter in signature.parameters.items():
            record = parameter.default
            if not dataclasses.is_dataclass(record):
                parameters.append(parameter)
                continue
            fields = inspect.signature(type(record), eval_str=True).parameters.values()
            flat_fields = [field for field in fields if field.name not in without]
            parameters += [field.replace(default=getattr(record, field.name)) for field in flat_fields]
            records[name] = record, {field.name for field in flat_fields}
        flat = signature.replace(parameters=parameters)

        @functools.wraps(reader)
        def read(*args: Any, **kwargs: Any) -> RetrievalData:
            options = flat.bind(*args, **kwargs).arguments
            for name, (record, fields) in records.items():
                values = {field: options.pop(field) for field in fields & options.keys()}
                options[name] = replace(record, **values)
            return reader(**options)

        read.__signature__ = flat  # type: ignore[attr-defined]
        return read

    return flatten


def find(root: Path, name: str, belong: str) -> Path:
    """The file or folder ``name`` at ``root`` or up to three folders below, wherever an archive was unpacked.

    ``belong`` says, for the message, which archive it is in and where it goes. Raises FileNotFoundError where
    it is nowhere, and ValueError where two are equally near.
    """
    for depth in range(_DEPTH + 1):
        paths = [path for path in sorted(root.glob("*/" * depth + name)) if _is_own(path.relative_to(root))]
        if len(paths) > 1:
            raise ValueError(f"{name} is there twice, at {paths[0]} and {paths[1]}; give the root of one")
        if paths:
            return paths[0]
    raise FileNotFoundError(f"no {name} in {root.absolute()}; {belong}")


def _is_own(path: Path) -> bool:
    """True where no folder on the way is hidden or one that a Mac adds to archives."""
    return not any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def lines_of(path: Path) -> list[str]:
    """The non-empty lines of a text file, with either line ending; bytes that are no UTF-8 become a mark."""
    return [line.strip() for line in path.read_text("utf-8", errors="replace").splitlines() if line.strip()]


def read_npz(path: Path, keys: Sequence[str], what: str) -> dict[str, np.ndarray]:
    """The arrays ``keys`` of an ``.npz`` file of the data set ``what``; pickles are refused."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path.absolute()}; it should hold the arrays {', '.join(keys)}")
    try:
        return limited_files.read_npz(path, keys)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is not a {what} archive: {error}") from error
