"""Splits of a data set: seeded draws of training, query and database items, and the set made of them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from robusthash.core.option_types import Checked
from robusthash.core.registry import nearest
from robusthash.core.runtime import Draws
from robusthash.data.base import RetrievalData, Source, Split, TextForm, content_hash

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SplitOptions(Checked):
    """Protocol, sizes and seed of the splits of a data set.

    Attributes:
        split: name of a protocol or rule of the reader.
        query, train, database: numbers of items; None is the protocol's own number.
        seed: of the draw.
    """

    split: str | None = None
    query: int | None = None
    train: int | None = None
    database: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_sizes(query=self.query, train=self.train, database=self.database)

    def refuse_sizes(self, reason: str) -> None:
        """ValueError where a size is given; ``reason`` says why none can be and what to do."""
        if (self.query, self.train, self.database) != (None, None, None):
            raise ValueError(f"query, train and database are sizes of a drawn split{reason}")


@dataclass(frozen=True)
class SplitProtocol:
    """Sizes that papers use. Training items are part of the database, and no query is in either.

    Attributes:
        query, train: numbers of items; ``train`` None is every item that is no query.
        rule: ``random``; ``per-class`` draws equally over the classes, one class after the other, an item
            that an earlier class took not being drawn again; ``last`` takes the last items as queries.
        papers: that use it.
    """

    query: int
    train: int | None
    rule: Literal["random", "per-class", "last"]
    papers: str


@dataclass(frozen=True)
class Indices:
    """Row numbers of each split, int64, in split order. Training rows may also be database rows."""

    train: Tensor
    query: Tensor
    database: Tensor
    validation: Tensor | None = None


def check_sizes(**sizes: int | None) -> None:
    """ValueError where a number of items is below 1; None is no number."""
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def find_protocol(protocols: Mapping[str, SplitProtocol], split: str | None) -> SplitProtocol:
    """One of the named protocols; KeyError with the nearest name otherwise."""
    if split is None or split not in protocols:
        raise KeyError(f"no split is called {split!r}{nearest(str(split), protocols)}")
    return protocols[split]


def balanced_take(
    labels: Tensor,
    count: int | None,
    draws: Draws,
    among: Tensor,
    names: Sequence[str] = (),
    what: str = "items",
) -> Tensor:
    """(count,) rows ``among`` (N,) bool, as many of every class, in turns: every prefix is balanced.

    ``count`` None takes all. Raises ValueError where a class, of these ``names``, has too few items.
    """
    parts = _draw_by_class(labels, count, draws, among, names, what)
    turns = [torch.arange(len(part)) * len(parts) + number for number, part in enumerate(parts)]
    return torch.cat(parts)[torch.argsort(torch.cat(turns))]


def _draw_by_class(
    labels: Tensor, count: int | None, draws: Draws, among: Tensor, names: Sequence[str], what: str
) -> list[Tensor]:
    """Rows of each class, one class after the other without taking a row twice; the first give one more.

    Labels are (N,) classes or (N, C) multi-hot.
    """
    classes = int(labels.max()) + 1 if labels.ndim == 1 else labels.shape[1]
    free = among.clone()
    parts = []
    for number in range(classes):
        is_member = labels == number if labels.ndim == 1 else labels[:, number] > 0
        members = torch.nonzero(free & is_member).flatten()
        share = len(members) if count is None else count // classes + (number < count % classes)
        if share > len(members):
            name = repr(names[number]) if len(names) else str(number)
            raise ValueError(
                f"class {name} has {len(members)} items left for the {what} and {share} are needed "
                f"({count} over {classes} classes); ask for fewer"
            )
        rows = members[torch.randperm(len(members), generator=draws.within(number).generator())[:share]]
        free[rows] = False
        parts.append(rows)
    return parts


def class_split(
    labels: Tensor,
    sizes: SplitOptions,
    *,
    train_in_database: bool = False,
    query_among: Tensor | None = None,
    names: Sequence[str] = (),
) -> Indices:
    """The customary split of a single-label set, equal over the classes.

    Queries are drawn first, so they do not depend on the other sizes; then training items; then the database.
    ``train`` None takes every item that is no query (the training set is then the database); ``database``
    None takes every item that is no query and, unless ``train_in_database``, no training item.

    Args:
        labels: (N,) int64 classes.
        query_among: (N,) bool, the official test part: all queries are of it (``query`` None takes them all),
            and nothing else is. None lets every item be a query, and ``query`` None is a fifth.
        names: of the classes, for the message where one is too small for its share.
    """
    draws = Draws(sizes.seed).within("class-split")
    candidates, query = query_among, sizes.query
    if candidates is None:
        candidates, query = torch.ones(len(labels), dtype=torch.bool), _query_count(sizes, len(labels))
    queries = balanced_take(labels, query, draws.within("query"), candidates, names, "queries")
    rest = candidates.clone() if query_among is None else ~query_among
    rest[queries] = False
    training = balanced_take(labels, sizes.train, draws.within("train"), rest, names, "training items")
    if sizes.train is not None and not train_in_database:
        rest[training] = False
    database = balanced_take(labels, sizes.database, draws.within("database"), rest, names, "database items")
    return Indices(training, queries, database)


def random_split(count: int, sizes: SplitOptions, train_in_database: bool = True) -> Indices:
    """A split of ``count`` items that ignores labels, for multi-label sets.

    ``query`` None is a fifth of the items; ``train`` and ``database`` None as in ``class_split``.
    """
    query, train, database = _query_count(sizes, count), sizes.train, sizes.database
    draws = Draws(sizes.seed).within("random-split")
    order = torch.randperm(count, generator=draws.generator())
    queries, rest = order[:query], order[query:]
    training = rest[:train]
    pool = rest if train is None or train_in_database else rest[train:]
    if (
        train_in_database and database is not None
    ):  # a cut must not prefer the training items, which come first
        pool = pool[torch.randperm(len(pool), generator=draws.within("database").generator())]
    short = len(queries) < query or (train is not None and len(training) < train)
    if short or len(pool) < (database or 1):
        raise ValueError(
            f"{count} items are too few for query={query}, train={train}, database={database} "
            f"with train_in_database={train_in_database}; ask for fewer"
        )
    return Indices(training, queries, pool[:database])


def sampled_split(labels: Tensor, names: Sequence[str], splits: SplitOptions) -> Indices:
    """A split of (N, C) multi-hot ``labels``: ``random`` (the default), or ``balanced`` over the classes."""
    if splits.split in (None, "random"):
        return random_split(len(labels), splits, train_in_database=splits.train is None)
    if splits.split != "balanced":
        raise ValueError(f"a split that is drawn is 'random' or 'balanced', got {splits.split!r}")
    number = labels.sum(1)
    for wrong, labels_each in ((number > 1, "several"), (number == 0, "none")):
        if count := int(wrong.sum()):
            text = f"split='balanced' needs one label an item and {count} items have {labels_each}"
            raise ValueError(f"{text}; use 'random'")
    return class_split(labels.argmax(1), splits, names=names)


def _query_count(sizes: SplitOptions, count: int) -> int:
    return max(1, count // 5) if sizes.query is None else sizes.query


def protocol_split(
    labels: Tensor, protocol: SplitProtocol, sizes: SplitOptions, names: Sequence[str]
) -> Indices:
    """The split of (N, C) multi-hot ``labels`` by a protocol, or of other sizes under its rule.

    ``query`` and ``train`` None are the protocol's own numbers; ``database`` None is every item that is no
    query, else that many of those, drawn apart from the training items. ValueError where there are too few.
    """
    query = protocol.query if sizes.query is None else sizes.query
    train = protocol.train if sizes.train is None else sizes.train
    if protocol.rule == "random":
        return random_split(len(labels), replace(sizes, query=query, train=train))
    draws = Draws(sizes.seed).within("official-split")
    free = torch.ones(len(labels), dtype=torch.bool)
    if protocol.rule == "last":
        if query >= len(labels):
            raise ValueError(f"{query} queries were asked for and {len(labels) - 1} are there; ask for fewer")
        queries = torch.arange(len(labels))[-query:]
    else:
        queries = torch.cat(_draw_by_class(labels, query, draws.within("query"), free, names, "queries"))
    free[queries] = False
    rest = torch.nonzero(free).flatten()
    if train is None:
        training = rest
    elif protocol.rule == "last":
        training = draw_rows(rest, train, draws.within("train"), "training items")
    else:
        training = torch.cat(
            _draw_by_class(labels, train, draws.within("train"), free, names, "training items")
        )
    database = rest
    if sizes.database is not None:
        database = draw_rows(rest, sizes.database, draws.within("database"), "database items")
    return Indices(training, queries, database)


def draw_rows(rows: Tensor, count: int, draws: Draws, what: str) -> Tensor:
    """Draw ``count`` of the rows; ``what`` names them where there are too few."""
    if count > len(rows):
        raise ValueError(f"{count} {what} were asked for and {len(rows)} are there; ask for fewer")
    return rows[torch.randperm(len(rows), generator=draws.generator())[:count]]


def stable_subset(split: Split, count: int) -> Tensor:
    """(count,) positions of items chosen by the hash of their content, each first label in its share.

    The one choice of some of the queries, wherever not all are attacked: the same items come out, in the same
    order, however the split is ordered, so every model gets the same. All stay where there are no more.
    """
    if count < 1:
        raise ValueError(f"a subset needs at least one query, got {count}")
    if count >= len(split):
        return torch.arange(len(split))
    # hashed again: a split may itself have been drawn by the hash of the content
    keys = [hashlib.blake2b(b"suite" + bytes(value), digest_size=8).digest() for value in split.hashes]
    first = [-1] * len(split)  # number of an item's first label; -1 where it has none
    if split.labels is not None:
        first = torch.where(split.labels.sum(1) > 0, (split.labels > 0).float().argmax(1), -1).tolist()
    strata: dict[int, list[int]] = {}
    for position in sorted(range(len(split)), key=lambda i: (keys[i], first[i])):
        strata.setdefault(first[position], []).append(position)
    shares = {label: count * len(members) / len(split) for label, members in strata.items()}
    counts = {label: int(value) for label, value in shares.items()}
    by_remainder = sorted(shares, key=lambda label: (counts[label] - shares[label], label))
    for label in by_remainder[: count - sum(counts.values())]:
        counts[label] += 1
    subset = [position for label, members in strata.items() for position in members[: counts[label]]]
    return torch.tensor(sorted(subset, key=lambda i: (keys[i], first[i])))


def compact(indices: Indices) -> tuple[Tensor, Indices]:
    """The rows that any split needs, ascending, and the indices as positions among them."""
    parts = [indices.train, indices.query, indices.database]
    parts += [] if indices.validation is None else [indices.validation]
    needed, position = torch.unique(torch.cat(parts), return_inverse=True)
    return needed, Indices(*position.split([len(part) for part in parts]))


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """(N,) int64 -> (N, classes) float32."""
    return torch.nn.functional.one_hot(labels.long(), classes).float()


def hash_pixels(images: Tensor) -> np.ndarray:
    """(N, ...) uint8 -> (N,) ``"S16"`` content hashes: equal pixels, equal hash, however they are stored."""
    return np.array([content_hash(item.tobytes()) for item in images.numpy()], dtype="S16")


def note_unlabelled(name: str, labels: Tensor) -> str:
    """The note of a data set that counts items without a label, with a warning; "" where there are none."""
    count = int((labels.sum(1) == 0).sum())
    if count == 0:
        return ""
    note = f"{count} of {len(labels)} items have no label and are similar to nothing."
    logger.warning("%s: %s They are kept.", name, note)
    return note


def assemble(
    name: str,
    source: Source,
    labels: Tensor,
    hashes: np.ndarray,
    indices: Indices,
    label_names: Sequence[str],
    note: str = "",
    also: Mapping[str, Tensor] | None = None,
    text_form: TextForm | None = None,
) -> RetrievalData:
    """A checked data set from one source; queries whose content is in another split leave, with a warning.

    Args:
        labels: (N, C) multi-hot of all rows of the source.
        hashes: (N,) content hashes of all rows.
        also: other label systems of all rows, by name.

    Raises:
        ValueError: no query has a content of its own.
    """
    elsewhere = [rows for rows in (indices.train, indices.database, indices.validation) if rows is not None]
    twice = np.isin(hashes[indices.query.numpy()], hashes[torch.cat(elsewhere).numpy()])
    if len(twice) and twice.all():
        raise ValueError(
            f"{name}: no query is left, since all {len(twice)} have the same pixels as an item of another "
            f"split ({len(np.unique(hashes))} of {len(hashes)} items differ); leave copies out of the data"
        )
    if twice.any():
        count = f"{int(twice.sum())} of {len(twice)} queries"
        dropped = f"{count} dropped: the same pixels are also in another split"
        logger.warning("%s: %s", name, dropped)
        note = f"{note} {dropped}.".strip()

    def split(part: str, rows: Tensor) -> Split:
        others = {system: values[rows] for system, values in (also or {}).items()}
        return Split(part, source, rows, labels[rows], hashes[rows.numpy()], others)

    train, query = split("train", indices.train), split("query", indices.query[torch.from_numpy(~twice)])
    validation = None if indices.validation is None else split("validation", indices.validation)
    database = split("database", indices.database)
    return RetrievalData(
        name, train, query, database, tuple(label_names), validation, note, text_form=text_form
    )
