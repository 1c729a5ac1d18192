"""A user's own images: a folder of class folders, or a manifest over a folder or a plain tar."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from robusthash.core.registry import register
from robusthash.data.base import RetrievalData
from robusthash.data.image_files import MEMORY, Decoding, FileSource
from robusthash.data.manifest import Entry, LabelField, entries_of_folder, entries_of_manifest, other_field
from robusthash.data.splits import Indices, assemble, class_split, random_split
from robusthash.data.text_modality import Caption, Texts, TextStyle
from robusthash.data.transforms import MAX_PIXELS, Fit, OnError

__all__ = ["FileSource", "folder"]

logger = logging.getLogger(__name__)

SplitRule = Literal["manifest", "random", "balanced"]


@register("data", "folder")
def folder(
    root: str | Path | None = None,
    archive: str | Path | None = None,
    manifest: str | Path | None = None,
    label_field: LabelField = "labels",
    size: int = 64,
    fit: Fit = "crop",
    texts: Texts = False,
    caption: Caption = "all",
    vocabulary: int = 1000,
    tokenizer: str | Path | None = None,
    max_length: int = 64,
    split: SplitRule | None = None,
    query_splits: Sequence[str] = ("query", "test"),
    train_splits: Sequence[str] = ("train",),
    database_splits: Sequence[str] = ("database", "train"),
    validation_splits: Sequence[str] = ("validation", "val"),
    query: int | None = None,
    train: int | None = None,
    database: int | None = None,
    seed: int = 0,
    on_error: OnError = "raise",
    max_pixels: int = MAX_PIXELS,
    memory: int = MEMORY,
) -> RetrievalData:
    """Your own images, labelled by class folders or by a CSV or JSON-lines manifest.

    Every file is decoded once when the set is loaded: that finds the unreadable ones and gives content
    hashes, which are of the pixels at ``size``, so that a picture saved again without loss is known as the
    same. A query whose pixels are also in another split is dropped with a warning. Images stay in memory when
    they fit in ``memory``.

    Args:
        root: the folder of class folders, or the one that the manifest's ``file`` column is relative to.
        archive: a plain, uncompressed tar instead of ``root``; it needs a manifest.
        manifest: ``.csv`` or JSON lines with the columns ``file``, ``labels`` (a list, or ``;`` between),
            optionally ``class``, ``captions``, ``split`` and ``id``. Items without a label are similar to
            nothing; they are kept, counted in the note and warned of.
        label_field: take the labels from ``labels`` or from ``class``. Where every row has the other column
            too, it becomes another label system of that name (``RetrievalData.by``).
        size: side of the square images in pixels.
        fit: ``crop``, ``stretch`` or ``pad``, as in ``read_image``.
        texts: ``True`` adds a bag of the words of an image's captions as modality ``text``, ``"tokens"``
            token ids for a transformer. An item with an empty text is kept, counted in the note and warned
            of.
        caption: use the ``first`` caption of an image, or ``all`` of them joined.
        vocabulary: most frequent words of the training captions that the bag counts.
        tokenizer, max_length: for tokens, the folder with the tokenizer and the longest text; longer ones are
            cut.
        split: ``manifest`` follows the column ``split``; ``random`` draws; ``balanced`` draws equally over
            the classes and needs one label an item. None: ``manifest`` where the column is there, else
            ``random``.
        query_splits, train_splits, database_splits, validation_splits: under ``manifest``, the values of the
            column that go into each split; a value that is for queries is for nothing else, and each value
            must go somewhere.
        query: under ``random`` and ``balanced``, the number of queries; None is a fifth of all items.
        train: number of training items, disjoint from the database; None trains on the whole database.
        database: number of database items; None is all the others.
        on_error: ``raise`` at the first unreadable file, or ``skip`` all such files with one warning.
        max_pixels: refuse files of more pixels.
        memory: bytes; 0 always decodes from the files.

    Raises:
        FileNotFoundError: a folder, archive, manifest or listed file is missing.
        ValueError: no labels, broken rows, repeated files, empty classes, unreadable files
            (``UnreadableImage``), a split that cannot be made.
    """
    decoding = Decoding(size, fit, on_error, max_pixels, memory)
    style = TextStyle(texts, caption, vocabulary, tokenizer, max_length)
    entries = _entries(root, archive, manifest, label_field, bool(texts))
    decoded = decoding.decode([entry.file for entry in entries])
    entries = [entries[row] for row in decoded.kept]
    labels, names = _multi_hot([entry.labels for entry in entries])
    if split is None:
        split = "manifest" if any(entry.split for entry in entries) else "random"
    if split == "manifest":
        if (query, train, database) != (None, None, None):
            raise ValueError(
                "query, train and database are sizes of a drawn split; set split='random' or 'balanced'"
            )
        indices = _manifest_split(entries, train_splits, query_splits, database_splits, validation_splits)
    else:
        indices = _drawn_split(labels, names, split, query, train, database, seed)
    also: dict[str, Tensor] = {}
    note = f"Images {fit} to {size} x {size}; split {split}" + (
        "." if split == "manifest" else f", seed {seed}."
    )
    note += _note_unlabelled(labels)
    lacking = sum(not entry.also for entry in entries)
    if lacking == 0:
        also[other_field(label_field)] = _multi_hot([entry.also for entry in entries])[0]
    elif lacking < len(entries):
        note += f" {lacking} of {len(entries)} items have no {other_field(label_field)!r}, which is left out."
    others: dict[str, Tensor] = {}
    if texts:
        asked = torch.cat([indices.query, indices.database])
        others["text"], said = style.encode([entry.captions for entry in entries], indices.train, asked)
        note += f" {said}"
    return assemble("folder", decoded.source(others), labels, decoded.hashes, indices, names, note, also)


def _multi_hot(rows: Sequence[Sequence[str]]) -> tuple[Tensor, tuple[str, ...]]:
    """Labels of N items -> (N, C) float32 and the sorted names of the columns."""
    names = tuple(sorted({label for row in rows for label in row}))
    column = {name: number for number, name in enumerate(names)}
    labels = torch.zeros(len(rows), len(names))
    for number, row in enumerate(rows):
        labels[number, [column[label] for label in row]] = 1
    return labels, names


def _note_unlabelled(labels: Tensor) -> str:
    """Warns of items without a label, and says how many there are; nothing where there are none."""
    count = int((labels.sum(1) == 0).sum())
    if count == 0:
        return ""
    said = f"{count} of {len(labels)} items have no label and are similar to nothing."
    logger.warning("folder: %s They are kept.", said)
    return f" {said}"


def _entries(
    root: str | Path | None,
    archive: str | Path | None,
    manifest: str | Path | None,
    label_field: LabelField,
    texts: bool,
) -> list[Entry]:
    if label_field not in ("labels", "class"):
        raise ValueError(f"label_field must be 'labels' or 'class', got {label_field!r}")
    if (root is None) == (archive is None):
        raise ValueError(
            f"give either root (a folder) or archive (a tar), got root={root!r} and archive={archive!r}"
        )
    if manifest is not None:
        where = (None if root is None else Path(root), None if archive is None else Path(archive))
        return entries_of_manifest(Path(manifest), *where, label_field, texts)
    if root is None:
        raise ValueError("an archive needs a manifest, which says what its files are")
    if texts:
        raise ValueError("texts=True needs a manifest with a column 'captions'")
    return entries_of_folder(Path(root))


def _manifest_split(
    entries: Sequence[Entry],
    train: Sequence[str],
    query: Sequence[str],
    database: Sequence[str],
    validation: Sequence[str],
) -> Indices:
    for values in (train, query, database, validation):
        if isinstance(values, str):
            raise ValueError(f"the splits are lists of values of the split column, got the text {values!r}")
    if not any(entry.split for entry in entries):
        raise ValueError(
            "split='manifest' needs a manifest with a column 'split'; use 'random' or 'balanced'"
        )
    unknown = sorted({entry.split for entry in entries} - {*train, *query, *database, *validation})
    if unknown:
        raise ValueError(
            f"the manifest's split column holds {', '.join(map(repr, unknown))}, which no split takes; "
            "name them in query_splits, train_splits, database_splits or validation_splits"
        )

    def rows(wanted: set[str]) -> Tensor:
        return torch.tensor(
            [row for row, entry in enumerate(entries) if entry.split in wanted], dtype=torch.int64
        )

    asked = set(query)
    held = rows(set(validation) - asked)
    parts = {"train": rows(set(train) - asked), "query": rows(asked), "database": rows(set(database) - asked)}
    for name, part in parts.items():
        if len(part) == 0:
            found = ", ".join(sorted({repr(entry.split) for entry in entries}))
            raise ValueError(
                f"no row of the manifest is for the {name} split; its split column holds {found}"
            )
    return Indices(**parts, validation=held if len(held) else None)


def _drawn_split(
    labels: Tensor,
    names: tuple[str, ...],
    rule: str,
    query: int | None,
    train: int | None,
    database: int | None,
    seed: int,
) -> Indices:
    query = max(1, len(labels) // 5) if query is None else query
    if rule == "random":
        return random_split(
            len(labels),
            query=query,
            train=train,
            database=database,
            seed=seed,
            train_in_database=train is None,
        )
    if rule != "balanced":
        raise ValueError(f"split must be 'manifest', 'random' or 'balanced', got {rule!r}")
    for number, many in (
        (int((labels.sum(1) > 1).sum()), "several"),
        (int((labels.sum(1) == 0).sum()), "none"),
    ):
        if number:
            raise ValueError(
                f"split='balanced' needs one label an item and {number} items have {many}; use 'random'"
            )
    return class_split(labels.argmax(1), query=query, train=train, database=database, seed=seed, names=names)
