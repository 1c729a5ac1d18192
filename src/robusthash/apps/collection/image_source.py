"""Collections of images, read part by part: folders, manifests, and webdataset shards (plain tar files)."""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from robusthash.apps.collection.collection_items import (
    CollectionItem,
    Entry,
    check_payload,
    digest_of,
    name_fault,
    once,
)
from robusthash.apps.collection.tar_source import TarPart, Tars
from robusthash.apps.experiment.index_items import described_file
from robusthash.core.words import some_of
from robusthash.data.folder import iter_manifest
from robusthash.data.image_files import ImageFile, Skipped, path_text
from robusthash.data.image_listing import walk_images
from robusthash.index.payload_filter import check_key

_TABLES = (".csv", ".parquet")
_MANIFESTS = (".csv", ".jsonl", ".ndjson", ".parquet")


def open_source(images: str | Path, part_size: int) -> Collection:
    """The collection that a path names: a folder, a manifest, or tars such as ``shards-{000..099}.tar``.

    Raises:
        FileNotFoundError: nothing of that name.
        ValueError: another kind of file, or braces that are malformed.
    """
    text = os.fspath(images)
    if text.lower().endswith(".tar"):
        below = Path(text.partition("{")[0] + "_").parent  # the folder of all files of a pattern
        return Tars([text] if Path(text).exists() else expanded(text), below)
    path = Path(images)
    if path.is_dir():
        return ListedImages(path, os.path.basename(os.path.abspath(path)), part_size, path)
    if path.suffix.lower() in _MANIFESTS:
        if not path.is_file():
            raise FileNotFoundError(f"no manifest {path_text(path)}")
        return ListedImages(path.parent, path.name, part_size, path)
    if ".tar." in path.name.lower() or path.suffix.lower() == ".tgz":
        raise ValueError(
            f"{path_text(path)} is compressed; images are read in place from plain tars: unpack it"
        )
    if not path.exists():
        raise FileNotFoundError(f"no folder, manifest or tar {path_text(path)}")
    raise ValueError(
        f"{path_text(path)} is no collection: give a folder, a manifest ({', '.join(_MANIFESTS)}) or tars "
        "(shards-{000..099}.tar)"
    )


@dataclass(frozen=True)
class ListedPart:
    """Images that follow each other in a listing."""

    name: str
    listed: tuple[Entry, ...]

    @property
    def items(self) -> list[CollectionItem]:
        return [entry for entry in self.listed if isinstance(entry, CollectionItem)]

    @property
    def listing(self) -> str:
        """A digest of what is listed in it, whatever became of the files."""
        return digest_of([item.name, item.payload] for item in self.items)

    def state(self) -> str:
        """A digest that changes with the images."""
        return digest_of(map(_state_of, self.items))

    def entries(self) -> Iterator[Entry]:
        """The images, and the files that are passed over."""
        return once(self.listed)


class ListedImages:
    """The images of a folder, or of a manifest, cut into parts of ``size``."""

    def __init__(self, root: Path, label: str, size: int, listing: Path) -> None:
        self.root, self.label = Path(os.path.abspath(root)), label
        self._size, self._listing = size, listing

    def listings(self) -> dict[str, str]:
        """The names of all parts, each with the digest of what is listed in it; ValueError without any."""
        return self._counted[0]

    def amounts(self) -> list[int]:
        """Images of each part."""
        return self._counted[1]

    @cached_property
    def _counted(self) -> tuple[dict[str, str], list[int]]:
        """Digests and images of all parts; the listing is read once, a part at a time."""
        listings, amounts, part = dict[str, str](), list[int](), ListedPart("", ())
        for part in self._parts():
            listings[part.name] = part.listing
            amounts.append(len(part.items))
        if not sum(amounts):
            why = f": {some_of(part.listed, 3)}" if part.listed else ""
            raise ValueError(
                f"{path_text(self._listing)} names no image; {len(part.listed)} files were passed over{why}"
            )
        return listings, amounts

    def parts(self, first: int, step: int) -> Iterator[ListedPart]:
        """The parts ``first``, ``first + step``, ..."""
        return itertools.islice(self._parts(), first, None, step)

    def _parts(self) -> Iterator[ListedPart]:
        number, listed, images = 0, list[Entry](), 0
        for entry in self._entries():
            if isinstance(entry, CollectionItem):
                if images == self._size:  # only now: what is passed over at the end joins the last part
                    yield ListedPart(self._name(number), tuple(listed))
                    number, listed, images = number + 1, [], 0
                images += 1
            listed.append(entry)
        if listed:
            yield ListedPart(self._name(number), tuple(listed))

    def _name(self, number: int) -> str:
        return f"part-{number:06d}"

    def _entries(self) -> Iterator[Entry]:
        if self._listing.is_dir():
            for entry in walk_images(self.root):
                if isinstance(entry, Path):
                    yield self._item(os.path.relpath(entry, self.root), {})
                else:
                    yield Skipped(entry.file.removeprefix(path_text(self.root) + os.sep), entry.reason)
            return
        table = self._listing.suffix.lower() in _TABLES
        for where, row in _rows(self._listing):
            name, payload = described_file(row, where)
            if table:  # a column that no index takes is refused; of JSON lines the row is passed over
                _check_columns(row, where)
            fault = name_fault(name)
            try:
                check_payload(payload, "its payload")
            except ValueError as error:
                fault = fault or str(error)
            if fault:
                yield Skipped(name.encode("utf-8", "backslashreplace").decode(), f"{where}: {fault}")
            else:
                yield self._item(os.path.normpath(name), payload)

    def _item(self, name: str, payload: dict[str, Any]) -> CollectionItem:
        return CollectionItem(name, ImageFile(self.root / name), payload)


Collection = ListedImages | Tars
"""A collection of images, whose parts are always the same and in the same order."""

ImagePart = ListedPart | TarPart
"""Images that are encoded, and safe on disk, together."""


def _rows(manifest: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place in words, row) of a manifest, one by one."""
    if manifest.suffix.lower() != ".parquet":
        for line, row in iter_manifest(manifest):
            yield f"{path_text(manifest)}, line {line}", row
        return
    from robusthash.apps.collection.encoded_parts import parquet

    library = parquet()
    import pyarrow

    try:
        file = library.ParquetFile(manifest)
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                yield f"{path_text(manifest)}, row {number}", {n: _plain(v) for n, v in row.items() if _is(v)}
                number += 1
    except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise ValueError(f"{path_text(manifest)} cannot be read as Parquet: {reason}") from None


def _check_columns(row: Mapping[str, Any], where: str) -> None:
    try:
        for column in row:
            check_key(column)
    except ValueError as error:
        raise ValueError(f"{where}: {error}; rename the column") from None


def _is(value: Any) -> bool:
    """False of null and NaN, by which a table says that there is no value."""
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def _plain(value: Any) -> Any:
    """Dates and times as ISO 8601; all else as it is."""
    return value.isoformat() if hasattr(value, "isoformat") else value


def _state_of(item: CollectionItem) -> list[Any]:
    """The name, payload, size and time of a file; of one that is gone, without size and time."""
    try:
        facts = item.file.path.stat()
    except OSError:
        return [item.name, item.payload]
    return [item.name, item.payload, facts.st_size, facts.st_mtime_ns]


_MOST = 1_000_000  # names of one pattern
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_FORMS = "a range of numbers such as {000..099}, or a list such as {a,b}"


def expanded(pattern: str) -> list[str]:
    """The names that a pattern stands for, in order; a text without braces stands for itself.

    A range counts up, by one, with as many digits as it is written with. Several braces are combined, the
    last one running fastest.

    Raises:
        ValueError: braces that are not closed, nested, empty, or of another form; names that repeat.

    Example:
        >>> expanded("s-{08..10}.tar")
        ['s-08.tar', 's-09.tar', 's-10.tar']
    """
    pieces = re.split(r"(\{[^{}]*\})", pattern)
    if any("{" in piece or "}" in piece for piece in pieces[::2]):
        raise ValueError(f"the braces of {pattern!r} are not closed, or nested; write {_FORMS}")
    choices = [[piece] if place % 2 == 0 else _choices(piece, pattern) for place, piece in enumerate(pieces)]
    count = 1
    for several in choices:
        count *= len(several)
    if count > _MOST:
        raise ValueError(f"{pattern!r} stands for {count:,} names, more than {_MOST:,}")
    names = ["".join(parts) for parts in itertools.product(*choices)]
    if len(set(names)) < len(names):
        raise ValueError(f"{pattern!r} stands for the same name more than once")
    return names


def _choices(brace: str, pattern: str) -> list[str]:
    """The texts that one pair of braces stands for."""
    inside = brace[1:-1]
    if ends := _RANGE.fullmatch(inside):
        first, last = ends.groups()
        padded = len(first) > 1 and first[0] == "0"
        if (padded or last[0] == "0") and len(first) != len(last):
            width = max(len(first), len(last))
            better = f"{{{first.zfill(width)}..{last.zfill(width)}}}"
            raise ValueError(f"{brace} in {pattern!r} has ends of unlike widths; did you mean {better}?")
        if int(first) > int(last):
            raise ValueError(f"{brace} in {pattern!r} counts down; write {{{last}..{first}}}")
        if int(last) - int(first) >= _MOST:
            raise ValueError(f"{brace} in {pattern!r} stands for more than {_MOST:,} names")
        return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    listed = inside.split(",")
    if len(listed) < 2 or not all(listed) or ".." in inside:
        raise ValueError(f"{brace} in {pattern!r} is not understood; write {_FORMS}")
    return listed
