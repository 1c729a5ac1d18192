"""Collections of images, read part by part: folders, manifests, and webdataset shards (plain tar files)."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from robusthash.apps.collection.brace_ranges import expanded
from robusthash.apps.experiment.library_items import described_file
from robusthash.core.limited_files import MIB, parse_json
from robusthash.data.folder import iter_manifest
from robusthash.data.image_files import ImageFile, Skipped, path_text
from robusthash.data.image_listing import walk_images
from robusthash.index.payload_filter import to_json

_MANIFESTS = (".csv", ".jsonl", ".ndjson", ".parquet")
_IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "jp2", "avif")  # in a tar
_TEXTS = {"cls": "class", "txt": "caption"}  # files of a webdataset sample, by the key of its payload
_LARGEST_IMAGE, _LARGEST_TEXT = 512 * MIB, MIB  # bytes inside a tar
_END = bytes(tarfile.BLOCKSIZE)  # of a tar: a block of zeros


class SourceError(ValueError):
    """A part of a collection that cannot be read, as a damaged tar; the others can."""


@dataclass(frozen=True)
class CollectionItem:
    """One image of a collection."""

    name: str  # relative to the root of the collection; in a tar "shard.tar:member"
    file: ImageFile
    payload: Mapping[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> int:
        """62 bits of the SHA-256 of the name: the same wherever and with whatever else it is encoded."""
        return int.from_bytes(hashlib.sha256(os.fsencode(self.name)).digest()[:8], "big") >> 2


Entry = CollectionItem | Skipped


class ImagePart(Protocol):
    """Images that are encoded, and safe on disk, together."""

    @property
    def name(self) -> str:
        """The name of its files in the output."""

    def state(self) -> str:
        """A digest that changes with the images; raises ``SourceError``."""

    def entries(self) -> Iterator[Entry]:
        """The images, and the files that are passed over; raises ``SourceError``."""


class Collection(Protocol):
    """A collection of images, whose parts are always the same and in the same order."""

    root: Path  # which the names of items are relative to
    label: str  # that the output holds codes of: a folder or manifest by name, or "tar"

    def names(self) -> list[str]:
        """The names of all parts; raises ValueError where there is nothing to encode."""

    def amounts(self) -> list[int]:
        """The size of each part, in images, or in bytes of tars."""

    def parts(self, first: int, step: int) -> Iterator[ImagePart]:
        """The parts ``first``, ``first + step``, ..."""


def open_source(images: str | Path, part_size: int) -> Collection:
    """The collection that a path names: a folder, a manifest, or tars such as ``shards-{000..099}.tar``.

    Raises:
        FileNotFoundError: nothing of that name.
        ValueError: another kind of file, or braces that are malformed.
    """
    text = os.fspath(images)
    if text.lower().endswith(".tar"):
        return Tars([text] if Path(text).exists() else expanded(text), _before_braces(text))
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


# ------------------------------------------------------------------------------------ folders, manifests


@dataclass(frozen=True)
class ListedPart:
    """Images that follow each other in a listing."""

    name: str
    listed: tuple[Entry, ...]

    def state(self) -> str:
        return _digest(_state_of(entry) for entry in self.listed if isinstance(entry, CollectionItem))

    def entries(self) -> Iterator[Entry]:
        return _once(self.listed)


class ListedImages:
    """The images of a folder, or of a manifest, cut into parts of ``size``."""

    def __init__(self, root: Path, label: str, size: int, listing: Path) -> None:
        self.root, self.label = Path(os.path.abspath(root)), label
        self._size, self._listing = size, listing

    def names(self) -> list[str]:
        return [self._name(number) for number in range(len(self.amounts()))]

    def amounts(self) -> list[int]:
        """Images of each part; the listing is read whole, an item at a time."""
        counted, passed = 0, 0
        for entry in self._entries():
            counted += isinstance(entry, CollectionItem)
            passed += isinstance(entry, Skipped)
        if not counted:
            raise ValueError(f"{path_text(self._listing)} names no image; {passed} files were passed over")
        whole, left = divmod(counted, self._size)
        return [self._size] * whole + [left] * bool(left)

    def parts(self, first: int, step: int) -> Iterator[ImagePart]:
        number, listed, images = 0, list[Entry](), 0
        for entry in self._entries():
            if isinstance(entry, CollectionItem):
                if images == self._size:  # only now: what is passed over at the end joins the last part
                    if number % step == first:
                        yield ListedPart(self._name(number), tuple(listed))
                    number, listed, images = number + 1, [], 0
                images += 1
            if number % step == first:
                listed.append(entry)
        if listed and number % step == first:
            yield ListedPart(self._name(number), tuple(listed))

    def _name(self, number: int) -> str:
        return f"part-{number:06d}"

    def _entries(self) -> Iterator[Entry]:
        if self._listing.is_dir():
            for found in walk_images(self.root):
                if isinstance(found, Path):
                    yield self._item(os.path.relpath(found, self.root), {})
                else:
                    yield Skipped(found.file.removeprefix(path_text(self.root) + os.sep), found.reason)
            return
        for where, row in _rows(self._listing):
            name, payload = described_file(row, where)
            try:
                to_json(payload, "its payload")
                if "\0" in name:
                    raise ValueError("no file name holds a NUL character")
            except ValueError as error:
                yield Skipped(name, str(error))
            else:
                yield self._item(os.path.normpath(name), payload)

    def _item(self, name: str, payload: dict[str, Any]) -> CollectionItem:
        return CollectionItem(name, ImageFile(self.root / name), payload)


def _once(entries: Iterable[Entry]) -> Iterator[Entry]:
    """The entries of a part, without images of a name (or, by chance, an id) that was there before."""
    seen: set[int] = set()
    for entry in entries:
        if isinstance(entry, CollectionItem) and entry.id in seen:
            yield Skipped(path_text(entry.name), "its name is there already")
            continue
        if isinstance(entry, CollectionItem):
            seen.add(entry.id)
        yield entry


def _rows(manifest: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place in words, row) of a manifest, one by one."""
    if manifest.suffix.lower() != ".parquet":
        for line, row in iter_manifest(manifest):
            yield f"{path_text(manifest)}, line {line}", row
        return
    from robusthash.apps.collection.encoded_parts import parquet

    library = parquet()
    try:
        file = library.ParquetFile(manifest)
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                yield f"{path_text(manifest)}, row {number}", {n: _plain(v) for n, v in row.items() if _is(v)}
                number += 1
    except (OSError, library.lib.ArrowException) as error:
        raise ValueError(f"{path_text(manifest)} cannot be read as Parquet: {error}") from None


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


def _digest(values: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()[:32]


# ------------------------------------------------------------------------------------------------- tars


class Tars:
    """Webdataset shards, each a part of its name."""

    label = "tar"

    def __init__(self, files: list[str], root: Path) -> None:
        self.root = Path(os.path.abspath(root))
        self._files = [Path(os.path.abspath(file)) for file in files]

    def names(self) -> list[str]:
        names = [part.name for part in self.parts(0, 1)]
        if not any(file.exists() for file in self._files):
            raise FileNotFoundError(f"no tar {path_text(self._files[0])}")
        if twice := [name for name, many in itertools.groupby(sorted(names)) if len(list(many)) > 1]:
            raise ValueError(f"two tars would be written as {twice[0]!r}; give folders of other names")
        return names

    def amounts(self) -> list[int]:
        """Bytes of each tar; 0 of one that is not there."""
        return [file.stat().st_size if file.exists() else 0 for file in self._files]

    def parts(self, first: int, step: int) -> Iterator[TarPart]:
        for file in self._files[first::step]:
            yield TarPart(file, os.path.relpath(file, self.root))


@dataclass(frozen=True)
class TarPart:
    """The images of one plain tar; the ``.json``, ``.cls`` and ``.txt`` files of a sample are its payload."""

    path: Path
    label: str  # relative to the root of the collection

    @property
    def name(self) -> str:
        return self.label[: -len(".tar")].replace(os.sep, "--")

    def state(self) -> str:
        try:
            facts = self.path.stat()
        except OSError as error:
            raise SourceError(f"{path_text(self.path)}: {error.strerror}") from None
        return _digest([[self.label, facts.st_size, facts.st_mtime_ns]])

    def entries(self) -> Iterator[Entry]:
        samples = itertools.groupby(self._members(), key=lambda member: _sample(member.name))
        return _once(entry for _, members in samples for entry in self._of_sample(list(members)))

    def _members(self) -> Iterator[tarfile.TarInfo]:
        """The members in order; what is read of them lies where the tar says, so nothing is unpacked."""
        failure = ""
        try:
            with tarfile.open(self.path, "r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # which it would all remember
                    yield member
                with self.path.open("rb") as file:
                    file.seek(tar.offset)
                    if file.read(len(_END)) != _END:
                        failure = "it is cut off, or damaged in the middle"
        except tarfile.TarError as error:
            failure = f"not a plain tar, or damaged ({error})"
        except OSError as error:
            failure = error.strerror or str(error)
        if failure:  # outside of the handlers: an error of the disk would be taken for one of writing
            raise SourceError(f"{path_text(self.path)}: {failure}")

    def _of_sample(self, members: list[tarfile.TarInfo]) -> Iterator[Entry]:
        """The images of one sample, and its files that are passed over."""
        payload: dict[str, Any] = {}
        images: list[tarfile.TarInfo] = []
        for member in members:
            name, ending = f"{self.label}:{member.name}", member.name.rpartition(".")[2].lower()
            if member.isdir():
                continue
            image, described = ending in _IMAGES, ending == "json" or ending in _TEXTS
            if reason := _refusal(member, _LARGEST_IMAGE if image else _LARGEST_TEXT if described else None):
                yield Skipped(path_text(name), reason)
            elif image:
                images.append(member)
            elif described:
                try:
                    payload |= self._described(member, ending)
                except ValueError as error:
                    yield Skipped(path_text(name), str(error))
        for member in images:
            file = ImageFile(self.path, member.name, member.offset_data, member.size)
            yield CollectionItem(f"{self.label}:{member.name}", file, payload)

    def _described(self, member: tarfile.TarInfo, ending: str) -> dict[str, Any]:
        """The payload in one file of a sample."""
        with ImageFile(self.path, member.name, member.offset_data, member.size).open() as stream:
            content = stream.read()
        try:
            text = content.decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            raise ValueError("it is not UTF-8 text") from None
        payload = {_TEXTS[ending]: text} if ending in _TEXTS else parse_json(text, "it", once=True)
        if not isinstance(payload, dict):
            raise ValueError("it is no JSON object")
        if own := [key for key in ("path", "path_hex") if key in payload]:
            raise ValueError(f"the index fills in {own[0]!r} itself; rename the key")
        to_json(payload, "it")
        return payload


def _sample(name: str) -> str:
    """The key of a webdataset sample: the name up to the first dot of its last part."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _refusal(member: tarfile.TarInfo, largest: int | None) -> str:
    """Why a member of a tar is passed over; "" for one that is read."""
    if os.path.basename(member.name).startswith("."):
        return "a hidden file"
    if not member.isreg() or member.issparse():
        return "no regular file"
    if largest is None:
        return "neither an image nor what describes one"
    return f"it has {member.size} bytes, more than {largest}" if member.size > largest else ""


def _before_braces(pattern: str) -> Path:
    """The folder below which all files of a pattern lie."""
    return Path(pattern.partition("{")[0] + "_").parent
