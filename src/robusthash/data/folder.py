"""A user's own images: a folder of class folders, or a manifest over a folder or a plain tar."""

from __future__ import annotations

import csv
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TextIO

import torch
from torch import Tensor

from robusthash.core.limited_files import parse_json, regular
from robusthash.core.registry import register
from robusthash.core.words import some_names, some_of
from robusthash.data.base import RetrievalData, flat_options
from robusthash.data.image_files import ImageFile, ImageOptions, Skipped, decode
from robusthash.data.image_listing import list_images
from robusthash.data.image_text import TextOptions
from robusthash.data.label_cells import caption_texts, label_rows
from robusthash.data.splits import Indices, SplitOptions, assemble, note_unlabelled, sampled_split

LabelField = Literal["labels", "class"]

_OTHER: dict[LabelField, LabelField] = {"labels": "class", "class": "labels"}
_SPLIT_NAMES = frozenset({"train", "test", "val", "valid", "validation", "query", "database"})


@dataclass(frozen=True)
class ColumnSplits:
    """Values of a manifest's column ``split`` that go into each split.

    A value that is for queries is for nothing else, and each value must go somewhere.
    """

    query_splits: Sequence[str] = ("query", "test")
    train_splits: Sequence[str] = ("train",)
    database_splits: Sequence[str] = ("database", "train")
    validation_splits: Sequence[str] = ("validation", "val")

    def __post_init__(self) -> None:
        for values in vars(self).values():
            if isinstance(values, str):
                raise ValueError(f"the splits are lists of values of the column, got the text {values!r}")


@dataclass(frozen=True)
class Entry:
    """One image file with what is known of it."""

    file: ImageFile
    labels: tuple[str, ...]
    split: str = ""
    captions: tuple[str, ...] = ()
    also: tuple[str, ...] = ()  # labels of the other label column


@register("data", "folder")
@flat_options()
def folder(
    root: str | Path | None = None,
    archive: str | Path | None = None,
    manifest: str | Path | None = None,
    label_field: LabelField = "labels",
    image: ImageOptions = ImageOptions(),
    text: TextOptions = TextOptions(texts=False),
    splits: SplitOptions = SplitOptions(),
    columns: ColumnSplits = ColumnSplits(),
) -> RetrievalData:
    """Your own images, labelled by class folders or by a CSV or JSON-lines manifest.

    Content hashes are of the pixels at ``size``, so that a picture saved again without loss counts as the
    same. A query whose pixels are also in another split is dropped with a warning.

    Args:
        root: the folder of class folders, or the one that the manifest's ``file`` column is relative to.
        archive: a plain, uncompressed tar instead of ``root``; it needs a manifest.
        manifest: ``.csv`` or JSON lines with the columns ``file``, ``labels`` (names with ``;`` between, a
            list, or vectors of 0 and 1; a cell that may mean something else is refused), optionally
            ``class``, ``captions`` (a list or one text), ``split`` and ``id``. Items without a label are
            similar to nothing; they are kept, counted in the note and warned of.
        label_field: take the labels from ``labels`` or from ``class``. Where every row has the other column
            too, it becomes another label system of that name (``RetrievalData.by``).
        image, text: texts are the captions of the manifest.
        splits: the rule ``manifest`` follows the column ``split``; ``random`` draws; ``balanced`` draws
            equally over the classes and needs one label an item. None is ``manifest`` where the column is
            there, else ``random``. Of a drawn split: ``query`` None is a fifth of all items, ``train`` is
            disjoint from the database (None trains on all of it), ``database`` None is all the others.
        columns: for the rule ``manifest``.
    """
    if (root is None) == (archive is None):
        raise ValueError(f"give either root (a folder) or archive (a tar), got {root!r} and {archive!r}")
    if manifest is not None:
        entries, form = _entries_of_manifest(Path(manifest), root, archive, label_field, bool(text.texts))
        skipped: tuple[Skipped, ...] = ()
    else:
        entries, skipped = _entries_of_folder(root, bool(text.texts))
        form = ""
    source, readable = decode([entry.file for entry in entries], image)
    skipped += source.skipped
    entries = [entries[row] for row in readable.tolist()]
    labels, names = _multi_hot([entry.labels for entry in entries])
    rule = splits.split or ("manifest" if any(entry.split for entry in entries) else "random")
    if rule not in ("manifest", "random", "balanced"):
        raise ValueError(f"split must be 'manifest', 'random' or 'balanced', got {rule!r}")
    if rule == "manifest":
        splits.refuse_sizes("; set split='random' or 'balanced'")
        indices = _column_split(entries, columns, manifest)
    else:
        indices = sampled_split(labels, names, replace(splits, split=rule))
    note = f"Images {image}; split {rule}" + ("." if rule == "manifest" else f", seed {splits.seed}.")
    note += f" {form}" * bool(form)
    if unlabelled := note_unlabelled("folder", labels):
        note += f" {unlabelled}"
    if skipped:
        note += f" {len(skipped)} files passed over: {some_of(skipped, 3)}."
    also, label_note = _other_labels(entries, _OTHER[label_field])
    note += label_note
    text_form = None
    if text.texts:
        others = torch.cat([indices.query, indices.database])
        captions = [entry.captions for entry in entries]
        values, text_note, text_form = text.encode(captions, indices.train, others)
        source, note = replace(source, others={"text": values}), f"{note} {text_note}"
    data = assemble("folder", source, labels, source.hashes, indices, names, note, also, text_form)
    return replace(data, skipped=tuple(map(str, skipped))) if skipped else data


def _multi_hot(rows: Sequence[Sequence[str]]) -> tuple[Tensor, tuple[str, ...]]:
    """Labels of N items -> (N, C) float32 and the sorted names of the columns."""
    names = tuple(sorted({label for row in rows for label in row}))
    column = {name: number for number, name in enumerate(names)}
    labels = torch.zeros(len(rows), len(names))
    for number, row in enumerate(rows):
        labels[number, [column[label] for label in row]] = 1
    return labels, names


def _other_labels(entries: Sequence[Entry], field: LabelField) -> tuple[dict[str, Tensor], str]:
    """The label system of the other column where every item has it, and the note where only some do."""
    lacking = sum(not entry.also for entry in entries)
    if lacking == 0:
        return {field: _multi_hot([entry.also for entry in entries])[0]}, ""
    note = f" {lacking} of {len(entries)} items have no {field!r}, which is left out."
    return {}, note if lacking < len(entries) else ""


def _column_split(entries: Sequence[Entry], columns: ColumnSplits, manifest: str | Path | None) -> Indices:
    """The split that the column ``split`` of the manifest writes down."""
    values = {entry.split for entry in entries}
    if not any(values):
        raise ValueError("split='manifest' needs a manifest with a column 'split'; or draw one")
    unknown = sorted(values.difference(*vars(columns).values()))
    if unknown:
        raise ValueError(
            f"{manifest}: the manifest's split column holds {', '.join(map(repr, unknown))}, which no split "
            "takes; name them in query_splits, train_splits, database_splits or validation_splits"
        )
    query = set(columns.query_splits)

    def rows(of: Iterable[str]) -> Tensor:
        return torch.tensor([row for row, entry in enumerate(entries) if entry.split in of]).long()

    parts = {
        "train": rows(set(columns.train_splits) - query),
        "query": rows(query),
        "database": rows(set(columns.database_splits) - query),
    }
    for name, part in parts.items():
        if len(part) == 0:
            held = ", ".join(sorted(map(repr, values)))
            missing = f"no row of the manifest is for the {name} split"
            raise ValueError(f"{manifest}: {missing}; its split column holds {held}")
    validation = rows(set(columns.validation_splits) - query)
    return Indices(**parts, validation=validation if len(validation) else None)


def _entries_of_folder(root: str | Path | None, captions: bool) -> tuple[list[Entry], tuple[Skipped, ...]]:
    """Every image below the class folders of ``root``, which give the labels, and the files passed over."""
    if root is None:
        raise ValueError("an archive needs a manifest, which says what its files are")
    if captions:
        raise ValueError(
            "texts=True needs the texts: set manifest to a file, .csv or JSON lines, "
            "with the columns 'file', 'labels' and 'captions'"
        )
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(
            f"no folder {root.absolute()}; it should hold a folder of images for each class"
        )
    top = list_images(root, deep=False)
    if top.images:
        raise ValueError(
            f"{len(top.images)} images lie in {root} itself and have no label (first: {top.images[0].name}); "
            "move each into a folder named like its class, or give a manifest"
        )
    classes = [path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    if not classes:
        raise ValueError(f"{root} is empty: it holds neither class folders nor images")
    if {path.name.lower() for path in classes} <= _SPLIT_NAMES:
        raise ValueError(
            f"the folders of {root} are named like splits ({some_names([each.name for each in classes])}), "
            "not like classes; give a manifest with the columns file, labels and split"
        )
    listed = {path.name: list_images(path) for path in classes}
    empty = [name for name, listing in listed.items() if not listing.images]
    if empty:
        count = f"{len(empty)} class folders of {root}"
        raise ValueError(f"{count} hold no image: {some_names(empty)}; fill them")
    skipped = [*top.skipped, *(one for listing in listed.values() for one in listing.skipped)]
    entries = [Entry(ImageFile(file), (name,)) for name, at in listed.items() for file in at.images]
    return entries, tuple(skipped)


def _entries_of_manifest(
    manifest: Path,
    root: str | Path | None,
    archive: str | Path | None,
    label_field: LabelField,
    with_captions: bool,
) -> tuple[list[Entry], str]:
    """The rows of a CSV or JSON-lines manifest, their files found in a folder or in a plain tar.

    The second value is a note on the form of the labels.
    """
    rows, other = manifest_rows(manifest), _OTHER[label_field]
    for column in ("file", label_field, "captions") if with_captions else ("file", label_field):
        lacking = [line for line, row in rows if column not in row]
        if lacking:
            raise ValueError(
                f"{len(lacking)} of {len(rows)} rows of {manifest} have no column {column!r} (first: line "
                f"{lacking[0]}); the columns of the first row are {', '.join(rows[0][1])}"
            )
    _refuse_repeated([str(PurePosixPath(str(row["file"]))) for _, row in rows], "file", manifest)
    _refuse_repeated([str(row["id"]) for _, row in rows if row.get("id") not in (None, "")], "id", manifest)
    labels, form = label_rows(
        [(n, row[label_field]) for n, row in rows], f"{manifest}, column {label_field!r}"
    )
    also, _ = label_rows([(n, row.get(other)) for n, row in rows], f"{manifest}, column {other!r}")
    if not any(labels) and any(also):
        raise ValueError(
            f"no row of {manifest} has a label in the column {label_field!r}; fill it, or set label_field to "
            f"{other!r} where the labels stand there"
        )
    members = {} if archive is None else _members(Path(archive))
    entries, missing = [], []
    for (_, row), own, others in zip(rows, labels, also, strict=True):
        name = str(row["file"])
        file = _file_below(Path(root), name) if root is not None else members.get(name.removeprefix("./"))
        if file is None:
            missing.append(name)
            continue
        captions = caption_texts(row.get("captions"))
        entries.append(Entry(file, own, str(row.get("split") or ""), captions, others))
    if missing:
        count = f"{len(missing)} of {len(rows)} files of {manifest}"
        raise FileNotFoundError(f"{count} are not in {archive or root}: {some_names(missing)}")
    return entries, form


def manifest_rows(manifest: Path) -> list[tuple[int, dict[str, Any]]]:
    """(line number, row) of every row of a CSV or JSON-lines file; ValueError names a wrong line."""
    rows = list(iter_manifest(manifest))
    if not rows:
        raise ValueError(f"{manifest} has no rows")
    return rows


def iter_manifest(manifest: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of ``manifest_rows`` one by one, whatever their number."""
    if not regular(manifest).exists():
        raise FileNotFoundError(f"no manifest {manifest.absolute()}")
    is_csv = manifest.suffix.lower() in (".csv", ".tsv")
    # lines of JSON end at "\n" alone: others are allowed inside texts
    with manifest.open(encoding="utf-8-sig", newline="" if is_csv else "\n") as stream:
        try:
            yield from (_csv_rows if is_csv else _json_rows)(manifest, stream)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{manifest} is not UTF-8 text (byte {error.start}); save it as UTF-8"
            ) from error


def _csv_rows(manifest: Path, stream: TextIO) -> Iterator[tuple[int, dict[str, Any]]]:
    header = stream.readline(1 << 16)
    stream.seek(0)
    # a header without commas: as programs write tables where the comma is the decimal sign, or with tabs
    separator = next((one for one in ",\t;" if one in header), ",")
    reader = csv.DictReader(stream, strict=True, delimiter=separator)
    try:
        if twice := [name for name, count in Counter(reader.fieldnames or ()).items() if count > 1]:
            raise ValueError(f"{manifest} has two columns {twice[0]!r}; join them into one, with ';' between")
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f"{manifest}, line {reader.line_num} has not as many fields as the header")
            yield reader.line_num, dict(row)
    except csv.Error as error:
        raise ValueError(f"{manifest}, after line {reader.line_num}: not CSV, {error}") from error


def _json_rows(manifest: Path, stream: TextIO) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, content in enumerate(stream, start=1):
        if not content.strip():
            continue
        row = parse_json(content, f"{manifest}, line {line}", once=True)
        if not isinstance(row, dict):
            more = "; write one object a line, without the list around them" if isinstance(row, list) else ""
            raise ValueError(f"{manifest}, line {line} is not a JSON object{more}")
        yield line, row


def _refuse_repeated(values: Iterable[str], column: str, manifest: Path) -> None:
    twice = [value for value, count in Counter(values).items() if count > 1]
    if twice:
        count = f"{len(twice)} values of column {column!r}"
        raise ValueError(f"{count} occur twice in {manifest}: {some_names(twice)}")


def _members(archive: Path) -> dict[str, ImageFile]:
    """Regular files of a plain tar, by name, to be read in place."""
    if not archive.is_file():
        raise FileNotFoundError(f"no archive {archive.absolute()}")
    try:
        with tarfile.open(archive, "r:") as opened:
            members = [member for member in opened if member.isreg() and not member.issparse()]
    except tarfile.TarError as error:
        raise ValueError(f"{archive} is not a plain tar ({error}); uncompress it first") from error
    return {
        member.name.removeprefix("./"): ImageFile(archive, member.name, member.offset_data, member.size)
        for member in members
    }


def _file_below(root: Path, name: str) -> ImageFile | None:
    relative = PurePosixPath(name.replace("\\", "/"))
    if relative.is_absolute() or ".." in relative.parts:
        raise ValueError(f"the manifest names {name!r}; files must lie below {root}")
    path = root / relative
    return ImageFile(path) if path.is_file() else None
