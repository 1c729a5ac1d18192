"""Webdataset shards as a collection: the members of plain tars, read where they lie."""

from __future__ import annotations

import io
import itertools
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robusthash.apps.collection.collection_items import (
    CollectionItem,
    Entry,
    SourceError,
    check_payload,
    digest_of,
    name_fault,
    once,
)
from robusthash.apps.experiment.index_items import OWN_KEYS
from robusthash.core.limited_files import MIB, parse_json
from robusthash.data.image_files import ImageFile, Skipped, irregular, path_text

_IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "jp2", "avif")
_TEXTS = {"cls": "class", "txt": "caption"}  # files of a webdataset sample, by the key of its payload
_LARGEST_IMAGE, _LARGEST_TEXT = 512 * MIB, MIB  # bytes
_LARGEST_HEADERS = (
    64 << 10
)  # bytes before a member: some hundred, with a long name and the like some thousand
_END = bytes(tarfile.BLOCKSIZE)  # of a tar: a block of zeros


class Tars:
    """Webdataset shards, each a part of its name."""

    label = "tar"

    def __init__(self, files: list[str], root: Path) -> None:
        self.root = Path(os.path.abspath(root))
        self._files = [Path(os.path.abspath(file)) for file in files]

    def listings(self) -> dict[str, str]:
        """The names of all parts, each with "": tars do not depend on each other. ValueError without any."""
        names = [part.name for part in self.parts(0, 1)]
        if not any(file.exists() for file in self._files):
            raise FileNotFoundError(f"no tar {path_text(self._files[0])}")
        if twice := [name for name, many in itertools.groupby(sorted(names)) if len(list(many)) > 1]:
            raise ValueError(f"two tars would be written as {twice[0]!r}; give folders of other names")
        return dict.fromkeys(names, "")

    def amounts(self) -> list[int]:
        """Bytes of each tar; 0 of one that is not there."""
        return [file.stat().st_size if file.exists() else 0 for file in self._files]

    def parts(self, first: int, step: int) -> Iterator[TarPart]:
        """The parts ``first``, ``first + step``, ..."""
        for file in self._files[first::step]:
            yield TarPart(file, os.path.relpath(file, self.root))


@dataclass(frozen=True)
class TarPart:
    """The images of one plain tar; the ``.json``, ``.cls`` and ``.txt`` files of a sample are its payload."""

    path: Path
    label: str  # relative to the root of the collection
    listing = ""

    @property
    def name(self) -> str:
        return self.label[: -len(".tar")].replace(os.sep, "--")

    def state(self) -> str:
        """A digest that changes with the images; raises ``SourceError``."""
        try:
            facts = self.path.stat()
        except OSError as error:
            raise SourceError(f"{path_text(self.path)}: {error.strerror}") from None
        if kind := irregular(facts.st_mode):
            raise SourceError(f"{path_text(self.path)}: it is {kind}, not a tar")
        return digest_of([[self.label, facts.st_size, facts.st_mtime_ns]])

    def entries(self) -> Iterator[Entry]:
        """The images, and the files that are passed over; raises ``SourceError``."""
        samples = itertools.groupby(self._members(), key=lambda member: _sample(member.name))
        return once(entry for _, members in samples for entry in self._of_sample(list(members)))

    def _members(self) -> Iterator[tarfile.TarInfo]:
        """The members in order; what is read of them lies where the tar says, so nothing is unpacked."""
        failure = ""
        try:
            with _HeaderFile(self.path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    file.left = _LARGEST_HEADERS
                    tar.members = []  # type: ignore[attr-defined]  # which it would all remember
                    length = sum(len(key) + len(value) for key, value in tar.pax_headers.items())
                    if tar.offset <= member.offset or length > _LARGEST_HEADERS:
                        raise tarfile.ReadError("a header that no tar has")
                    yield member
                file.seek(tar.offset)
                if file.read(len(_END)) != _END:
                    failure = "it is cut off, or damaged in the middle"
        except OSError as error:
            failure = error.strerror or str(error)
        except Exception as error:  # of tarfile, whose parsers of headers let through what their parts raise
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            failure = f"not a plain tar, or damaged ({reason})"
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
            if fault := name_fault(member.name):
                yield Skipped(path_text(name), fault)
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
        if own := [key for key in OWN_KEYS if key in payload]:
            raise ValueError(f"the index fills in {own[0]!r} itself; rename the key")
        check_payload(payload, "it")
        return payload


class _HeaderFile(io.FileIO):
    """A tar of which no more than ``left`` bytes are read: those of the headers of one member.

    A header says how long it is, and would be read whole into memory.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.left = _LARGEST_HEADERS

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= self.left:
            raise tarfile.ReadError(f"headers of more than {_LARGEST_HEADERS} bytes")
        self.left -= size
        return super().read(size) or b""


def _sample(name: str) -> str:
    """The key of a webdataset sample: the name up to the first dot of its last part."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _refusal(member: tarfile.TarInfo, largest: int | None) -> str:
    """The reason why a member of a tar is passed over; "" for one that is read."""
    if os.path.basename(member.name).startswith("."):
        return "a hidden file"
    if not member.isreg() or member.issparse():
        return "no regular file"
    if largest is None:
        return "neither an image nor what describes one"
    return f"it has {member.size} bytes, more than {largest}" if member.size > largest else ""
