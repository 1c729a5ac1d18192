"""What the readers of official image-text sets share: finding files, choosing items as papers do, making
splits."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from robusthash.core.registry import nearest
from robusthash.core.runtime import Draws
from robusthash.data.base import RetrievalData
from robusthash.data.image_files import Decoding
from robusthash.data.splits import Indices, assemble, compact, random_split
from robusthash.data.text_modality import TextStyle, note_empty
from robusthash.data.transforms import ImageFile

logger = logging.getLogger(__name__)

Rule = Literal["random", "per-class", "last"]

_DEPTH = 3  # folders that an unpacked archive may lie below the root


@dataclass(frozen=True)
class Protocol:
    """How papers cut a set. The training items are part of the database, and no query is in either.

    Attributes:
        query, train: numbers of items; ``train`` None is every item that is no query.
        rule: ``random``; ``per-class`` draws equally over the classes, one class after the other, an item
            that an earlier class took not being drawn again; ``last`` takes the last items as queries.
        papers: that use it.
    """

    query: int
    train: int | None
    rule: Rule
    papers: str


def protocol(named: Mapping[str, Protocol], split: str) -> Protocol:
    """One of the named protocols; KeyError with the nearest name otherwise."""
    if split not in named:
        raise KeyError(f"no split is called {split!r}{nearest(split, named)}")
    return named[split]


@dataclass(frozen=True)
class Pool:
    """All items of a set before any is chosen."""

    files: tuple[ImageFile, ...]
    labels: Tensor  # (N, C) float32
    names: tuple[str, ...]  # of the label columns
    texts: tuple[tuple[str, ...], ...] | None = None  # of each item
    bags: Tensor | None = None  # (N, V) bool or float32, where the set comes with text vectors of its own
    note: str = ""

    def __post_init__(self) -> None:
        sizes = {"files": len(self.files), "labels": len(self.labels)}
        sizes |= {} if self.texts is None else {"texts": len(self.texts)}
        sizes |= {} if self.bags is None else {"bags": len(self.bags)}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"items of different number: {sizes}")

    def __len__(self) -> int:
        return len(self.files)

    def take(self, rows: Tensor) -> Pool:
        """The items of these rows, in their order."""
        chosen = rows.tolist()
        return replace(
            self,
            files=tuple(self.files[row] for row in chosen),
            labels=self.labels[rows],
            texts=None if self.texts is None else tuple(self.texts[row] for row in chosen),
            bags=None if self.bags is None else self.bags[rows],
        )

    def only(self, wanted: Tensor, lacking: str) -> Pool:
        """The items where ``wanted`` (N,) holds; the others are counted in the note as ``lacking`` something.

        Raises:
            ValueError: none is left.
        """
        dropped = int((~wanted).sum())
        if dropped == 0:
            return self
        said = f"{dropped} of {len(self)} items dropped: {lacking}."
        if dropped == len(self):
            raise ValueError(f"no item is left: {said}")
        return replace(self.take(torch.nonzero(wanted).flatten()), note=f"{self.note} {said}".strip())

    def on_disk(self, belong: str) -> Pool:
        """The items whose image files are there; a set may be partial, and then one warning says so.

        Args:
            belong: which archive the images are in and where they go, for the message.

        Raises:
            FileNotFoundError: none is there.
        """
        there = torch.tensor([file.path.is_file() for file in self.files])
        if not there.any():
            raise FileNotFoundError(
                f"none of the {len(self)} images is there (first: {self.files[0]}); {belong}"
            )
        if not there.all():
            logger.warning("%d of %d images are not there (%s)", int((~there).sum()), len(self), belong)
        return self.only(there, "their image file is not there")

    def expect(self, count: int) -> Pool:
        """Warns where a complete set does not have the published number of items."""
        if len(self) == count:
            return self
        said = f"Published protocols have {count} items here, these files give {len(self)}."
        logger.warning("%s", said)
        return replace(self, note=f"{self.note} {said}".strip())


def make_data(
    name: str, pool: Pool, indices: Indices, decoding: Decoding, style: TextStyle, note: str = ""
) -> RetrievalData:
    """The data set of chosen items: images decoded, texts encoded, splits checked.

    The images of the splits are decoded once here, and the content hashes are of their pixels. Unreadable
    files leave every split under ``on_error="skip"``.
    """
    needed, indices = compact(indices)
    pool = pool.take(needed)
    decoded = decoding.decode(pool.files)
    if len(decoded.kept) < len(pool):
        kept = torch.tensor(decoded.kept)
        pool, indices = pool.take(kept), _renumbered(indices, kept, len(needed))
    others: dict[str, Tensor] = {}
    said = f"{note} {pool.note}".strip()
    if style.texts:
        others["text"], about = _text(pool, indices, style)
        said = f"{said} {about}".strip()
    return assemble(name, decoded.source(others), pool.labels, decoded.hashes, indices, pool.names, said)


def _text(pool: Pool, indices: Indices, style: TextStyle) -> tuple[Tensor, str]:
    if pool.bags is not None and style.texts != "tokens":
        return pool.bags, note_empty(~pool.bags.any(1))
    if pool.texts is None:
        raise ValueError(f"these items come without texts, and texts={style.texts!r} was asked for")
    return style.encode(pool.texts, indices.train, torch.cat([indices.query, indices.database]))


def _renumbered(indices: Indices, kept: Tensor, total: int) -> Indices:
    """Indices into ``total`` items as indices into those kept."""
    number = torch.full((total,), -1)
    number[kept] = torch.arange(len(kept))

    def part(rows: Tensor) -> Tensor:
        return number[rows][number[rows] >= 0]

    held = indices.validation
    return Indices(
        part(indices.train), part(indices.query), part(indices.database), None if held is None else part(held)
    )


def choose(
    labels: Tensor,
    how: Protocol,
    query: int | None,
    train: int | None,
    database: int | None,
    seed: int,
    names: Sequence[str],
) -> Indices:
    """Queries, training items and database of a protocol, or of other sizes under its rule.

    Args:
        labels: (N, C) multi-hot.
        query, train: None is the protocol's own number.
        database: None is every item that is no query; else so many of those, drawn apart from the training
            items.
        names: of the label columns, for messages.

    Raises:
        ValueError: there are too few items, of all or of one class, or a size is below 1.
    """
    query = how.query if query is None else query
    train = how.train if train is None else train
    if how.rule == "random":
        return random_split(len(labels), query=query, train=train, database=database, seed=seed)
    for what, size in (("query", query), ("train", train), ("database", database)):
        if size is not None and size < 1:
            raise ValueError(f"{what} must be at least 1, got {size}")
    draws = Draws(seed).within("official-split")
    everything = torch.arange(len(labels))
    if how.rule == "last":
        _enough(len(everything) - 1, query, "queries")
        queries = everything[-query:]
    else:
        queries = _class_after_class(labels, query, everything, draws.within("query"), names, "queries")
    rest = everything[~torch.isin(everything, queries)]
    training = rest
    if train is not None and how.rule == "last":
        training = _some(rest, train, draws.within("train"), "training items")
    elif train is not None:
        training = _class_after_class(labels, train, rest, draws.within("train"), names, "training items")
    reference = (
        rest if database is None else _some(rest, database, draws.within("database"), "database items")
    )
    return Indices(training, queries, reference)


def _class_after_class(
    labels: Tensor, count: int, among: Tensor, draws: Draws, names: Sequence[str], what: str
) -> Tensor:
    """``count`` rows, as many of every class, drawn one class after the other without taking a row twice."""
    classes = labels.shape[1]
    free = torch.zeros(len(labels), dtype=torch.bool)
    free[among] = True
    taken = []
    for number in range(classes):
        wanted = count // classes + (number < count % classes)
        members = torch.nonzero(free & (labels[:, number] > 0)).flatten()
        if wanted > len(members):
            raise ValueError(
                f"class {names[number]!r} has {len(members)} items left for the {what} and {wanted} are needed "
                f"({count} over {classes} classes); ask for fewer"
            )
        rows = members[torch.randperm(len(members), generator=draws.within(number).generator())[:wanted]]
        free[rows] = False
        taken.append(rows)
    return torch.cat(taken)


def _some(rows: Tensor, count: int, draws: Draws, what: str) -> Tensor:
    _enough(len(rows), count, what)
    return rows[torch.randperm(len(rows), generator=draws.generator())[:count]]


def _enough(there: int, count: int, what: str) -> None:
    if count > there:
        raise ValueError(f"{count} {what} were asked for and {there} are there; ask for fewer")


def find(root: Path, name: str, belong: str) -> Path:
    """The file or folder ``name`` at ``root`` or up to three folders below, wherever an archive was unpacked.

    Args:
        name: may hold folders, as in ``annotations/captions_val2017.json``.
        belong: which official archive it is in and where it goes, for the message.

    Raises:
        FileNotFoundError: it is nowhere.
        ValueError: two are equally near.
    """
    for depth in range(_DEPTH + 1):
        found = [path for path in sorted(root.glob("*/" * depth + name)) if _is_own(path.relative_to(root))]
        if len(found) > 1:
            raise ValueError(
                f"{name} is there twice, at {found[0]} and {found[1]}; give the root of one of them"
            )
        if found:
            return found[0]
    raise FileNotFoundError(f"no {name} in {root.absolute()}; {belong}")


def _is_own(path: Path) -> bool:
    """Whether no folder on the way is hidden or what a Mac adds to archives."""
    return not any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def lines_of(path: Path) -> list[str]:
    """The non-empty lines of a text file, with either line ending; bytes that are no UTF-8 become a mark."""
    return [line.strip() for line in path.read_text("utf-8", errors="replace").splitlines() if line.strip()]
