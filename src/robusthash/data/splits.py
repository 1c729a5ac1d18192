"""Which items train, query and fill the database: seeded choices, the data set made of them, some of its
queries."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from robusthash.core.runtime import Draws
from robusthash.data.base import RetrievalData, Source, Split, content_hash

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Indices:
    """Row numbers of each split, int64, in split order. Training rows may also be database rows."""

    train: Tensor
    query: Tensor
    database: Tensor
    validation: Tensor | None = None


def balanced_take(
    labels: Tensor,
    count: int | None,
    draws: Draws,
    among: Tensor,
    names: Sequence[str] = (),
    what: str = "items",
) -> Tensor:
    """``count`` of the items ``among``, drawn equally from every class, ordered class after class in turn.

    So every prefix of the result is as balanced as it can be. Where ``count`` is no multiple of the number of
    classes, the first classes give one more.

    Args:
        labels: (N,) int64 classes 0..C-1 of all items.
        count: None takes all, in the same mixed order.
        draws: the scope of the choice.
        among: (N,) bool, the items that may be taken.
        names: of the classes, for messages.
        what: what the items are for, for messages.

    Returns:
        (count,) int64 row numbers.

    Raises:
        ValueError: a class has too few items; it is named, with both counts.
    """
    classes = int(labels.max()) + 1
    if count is not None and count < 1:
        raise ValueError(f"the number of {what} must be at least 1, got {count}")
    chosen, turns = [], []
    for number in range(classes):
        members = torch.nonzero(among & (labels == number)).flatten()
        wanted = len(members) if count is None else count // classes + (number < count % classes)
        if wanted > len(members):
            name = repr(names[number]) if len(names) else str(number)
            raise ValueError(
                f"class {name} has {len(members)} items left for the {what} and {wanted} are needed "
                f"({count} over {classes} classes); ask for fewer"
            )
        order = torch.randperm(len(members), generator=draws.within(number).generator())[:wanted]
        chosen.append(members[order])
        turns.append(torch.arange(wanted) * classes + number)
    return torch.cat(chosen)[torch.argsort(torch.cat(turns))]


def class_split(
    labels: Tensor,
    *,
    query: int | None,
    train: int | None,
    database: int | None = None,
    seed: int = 0,
    train_in_database: bool = False,
    query_among: Tensor | None = None,
    names: Sequence[str] = (),
) -> Indices:
    """The customary split of a single-label set, equal over the classes.

    Queries are drawn first and so do not depend on the other sizes; then the training items; then the
    database.

    Args:
        labels: (N,) int64 classes.
        query: how many in all; None takes all of ``query_among``.
        train: how many; None takes every item that is no query (the training set is then the database).
        database: how many; None takes every item that is no query and, unless ``train_in_database``, no
            training item.
        query_among: (N,) bool, the only items that may be queries, as in sets with an official test part.
            Those not chosen stay out of the other splits. None lets every item be one.
        names: of the classes, for messages.

    Raises:
        ValueError: a class is too small for its share, or a size is below 1.
    """
    draws = Draws(seed).within("class-split")
    everything = torch.ones(len(labels), dtype=torch.bool)
    if query is None and query_among is None:
        raise ValueError("query=None needs query_among, or every item would be a query")
    asked = everything if query_among is None else query_among
    queries = balanced_take(labels, query, draws.within("query"), asked, names, "queries")
    rest = everything.clone() if query_among is None else ~query_among
    rest[queries] = False
    training = balanced_take(labels, train, draws.within("train"), rest, names, "training items")
    if train is not None and not train_in_database:
        rest = rest.clone()
        rest[training] = False
    reference = balanced_take(labels, database, draws.within("database"), rest, names, "database items")
    return Indices(training, queries, reference)


def random_split(
    count: int,
    *,
    query: int,
    train: int | None,
    database: int | None = None,
    seed: int = 0,
    train_in_database: bool = True,
) -> Indices:
    """A split that ignores labels, for multi-label sets.

    Args:
        count: items in all.
        query: how many are queries.
        train: how many train; None: all that are no queries, which are then the database too.
        database: how many are searched; None: all that are no queries and, unless ``train_in_database``, do
            not train.

    Raises:
        ValueError: more items asked for than there are.
    """
    for what, size in (("query", query), ("train", train), ("database", database)):
        if size is not None and size < 1:
            raise ValueError(f"{what} must be at least 1, got {size}")
    draws = Draws(seed).within("random-split")
    order = torch.randperm(count, generator=draws.generator())
    queries, rest = order[:query], order[query:]
    training = rest if train is None else rest[:train]
    pool = rest if train is None or train_in_database else rest[train:]
    if (
        train_in_database and database is not None
    ):  # a cut must not prefer the training items, which stand first
        pool = pool[torch.randperm(len(pool), generator=draws.within("database").generator())]
    reference = pool if database is None else pool[:database]
    short = (len(queries) < query, train is not None and len(training) < train)
    if any(short) or len(reference) < (database or 1):
        raise ValueError(
            f"{count} items are too few for query={query}, train={train}, database={database} "
            f"with train_in_database={train_in_database}; ask for fewer"
        )
    return Indices(training, queries, reference)


def stable_subset(split: Split, count: int) -> Tensor:
    """(count,) positions of items chosen by the hash of their content, each first label in its share.

    The one choice of some of the queries, wherever not all are asked. The same items come out, in the same
    order, however the split is ordered; so every model is asked the same. Where the split has no more, all
    stay in its order.

    Raises:
        ValueError: count below 1.
    """
    if count < 1:
        raise ValueError(f"a subset needs at least one query, got {count}")
    if count >= len(split):
        return torch.arange(len(split))
    # hashed again: a split may itself have been drawn by the hash of the content
    keys = [hashlib.blake2b(b"suite" + bytes(value), digest_size=8).digest() for value in split.hashes]
    first = torch.full((len(split),), -1) if split.labels is None else _first_label(split.labels)
    strata: dict[int, list[int]] = {}
    for position in sorted(range(len(split)), key=lambda i: (keys[i], int(first[i]))):
        strata.setdefault(int(first[position]), []).append(position)
    shares = {label: count * len(members) / len(split) for label, members in strata.items()}
    taken = {label: int(value) for label, value in shares.items()}
    by_remainder = sorted(shares, key=lambda label: (taken[label] - shares[label], label))
    for label in by_remainder[: count - sum(taken.values())]:
        taken[label] += 1
    chosen = [position for label, members in strata.items() for position in members[: taken[label]]]
    return torch.tensor(sorted(chosen, key=lambda i: (keys[i], int(first[i]))))


def _first_label(labels: Tensor) -> Tensor:
    """(N,) index of the first label of each item; -1 where it has none."""
    return torch.where(labels.sum(1) > 0, (labels > 0).float().argmax(1), -1)


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
    """(N, ...) uint8 -> (N,) ``"S16"`` content hashes of each item's bytes: equal pixels collide, however
    stored."""
    array = images.numpy()
    return np.array([content_hash(item.tobytes()) for item in array], dtype="S16")


def assemble(
    name: str,
    source: Source,
    labels: Tensor,
    hashes: np.ndarray,
    indices: Indices,
    label_names: Sequence[str],
    note: str = "",
    also: Mapping[str, Tensor] | None = None,
) -> RetrievalData:
    """A checked data set from one source. Queries whose content is also in another split leave, with one
    warning.

    Args:
        labels: (N, C) multi-hot of all rows of the source.
        hashes: (N,) content hashes of all rows.
        also: other label systems of all rows, by name.

    Raises:
        ValueError: from ``RetrievalData``, e.g. where no query is left.
    """
    elsewhere = [rows for rows in (indices.train, indices.database, indices.validation) if rows is not None]
    twice = np.isin(hashes[indices.query.numpy()], hashes[torch.cat(elsewhere).numpy()])
    if twice.any():
        dropped = (
            f"{int(twice.sum())} of {len(twice)} queries dropped: the same pixels are also in another split"
        )
        logger.warning("%s: %s", name, dropped)
        note = f"{note} {dropped}.".strip()

    def split(part: str, rows: Tensor) -> Split:
        others = {system: values[rows] for system, values in (also or {}).items()}
        return Split(part, source, rows, labels[rows], hashes[rows.numpy()], others)

    return RetrievalData(
        name,
        split("train", indices.train),
        split("query", indices.query[torch.from_numpy(~twice)]),
        split("database", indices.database),
        tuple(label_names),
        None if indices.validation is None else split("validation", indices.validation),
        note,
    )
