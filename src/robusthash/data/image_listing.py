"""The image files below a folder, by their content, and every file that is passed over, with the reason."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from robusthash.data.image_files import BROKEN, FORMATS, UNREAD, Skipped, irregular, opened, path_text

_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")  # brands of the container


@dataclass(frozen=True)
class Listing:
    """The files below a folder."""

    images: tuple[Path, ...]  # sorted
    skipped: tuple[Skipped, ...]  # sorted


def list_images(folder: Path, deep: bool = True) -> Listing:
    """The images below ``folder`` and its subfolders: files that end like one, and any others that are one.

    A file that ends like an image is taken for one, so that a damaged picture is reported when it is read.
    Passed over are hidden files and folders, links to folders (name the folder itself), links to nothing,
    what is no regular file, and what is no image by its content. A folder that ends like an image is named
    too, and listed as any other.

    Args:
        deep: False looks at the files of the folder itself alone.
    """
    images: list[Path] = []
    skipped: list[Skipped] = []
    for entry in walk_images(folder, deep):
        if isinstance(entry, Skipped):
            skipped.append(entry)
        else:
            images.append(entry)
    return Listing(tuple(sorted(images)), tuple(sorted(skipped, key=lambda one: one.file)))


def walk_images(folder: Path, deep: bool = True) -> Iterator[Path | Skipped]:
    """``list_images`` one by one: of each folder its files by name, then its subfolders by name."""
    unlisted: list[OSError] = []
    for place, folders, files in os.walk(folder, onerror=unlisted.append):
        below = []
        for name in sorted(folders) if deep else ():
            path = Path(place, name)
            if name.startswith("."):
                yield _passed_over(path, "a hidden folder")
            elif path.is_symlink():
                yield _passed_over(path, "a link to a folder")
            else:
                below.append(name)
                if path.suffix.lower() in _endings():
                    yield _passed_over(path, "a folder, not an image file")
        folders[:] = below
        for name in sorted(files):
            path = Path(place, name)
            reason = _refusal(path)
            yield _passed_over(path, reason) if reason else path
    for error in unlisted:
        yield _passed_over(error.filename, error.strerror or "it cannot be listed")


def _passed_over(path: Path | str, reason: str) -> Skipped:
    return Skipped(path_text(path), reason)


@functools.cache
def _endings() -> frozenset[str]:
    return frozenset(end for end, kind in Image.registered_extensions().items() if kind in FORMATS)


def _refusal(path: Path) -> str:
    """The reason why a file is passed over; "" for an image."""
    if path.name.startswith("."):
        return "a hidden file"
    try:
        if kind := irregular(path.stat().st_mode):
            return kind
        if path.suffix.lower() in _endings():
            return ""
        with path.open("rb") as stream:
            return _refusal_of_content(stream.read(12)) or _unopened(path)
    except FileNotFoundError:
        return "a link to nothing" if path.is_symlink() else "gone since it was listed"
    except OSError as error:
        return error.strerror or type(error).__name__


def _refusal_of_content(head: bytes) -> str:
    if head[4:8] == b"ftyp" and head[8:12] in _HEIC:
        return "a HEIC picture, which is not read; save it as JPEG or PNG"
    return "" if head else "empty"


def _unopened(path: Path) -> str:
    try:
        with path.open("rb") as stream, opened(stream, sys.maxsize):
            return ""
    except BROKEN:
        return UNREAD
