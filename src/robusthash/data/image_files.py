"""Image files -> uint8 pixels: one file, many files in threads, and files that stay files."""

from __future__ import annotations

import functools
import importlib.util
import io
import logging
import os
import stat
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from robusthash.core.types import Inputs
from robusthash.core.words import some_of
from robusthash.data.base import as_input, content_hash
from robusthash.data.decoding_processes import READING, FileReading, done_in_order
from robusthash.data.marker_limits import check_parts
from robusthash.data.pixel_conversion import DECODING, MAX_PIXELS, Fit, resized, to_rgb, upright

logger = logging.getLogger(__name__)

OnError = Literal["skip", "raise"]

# formats that are opened at all; the rest of Pillow's list holds some that start other programs (EPS)
FORMATS: tuple[str, ...] = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000")
if importlib.util.find_spec("PIL.AvifImagePlugin"):
    FORMATS += ("AVIF",)

# what Pillow's decoders raise on broken files
BROKEN = (OSError, SyntaxError, ValueError, EOFError, OverflowError, struct.error, zlib.error)
UNREAD = f"its content is none of {', '.join(FORMATS)}"
_PILLOW_LIMIT = 89_478_485  # warned of, and refused from twice as many
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe (fifo)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class UnreadableImage(ValueError):
    """An image file that cannot be decoded; the message names the file, ``reason`` does not."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason or message


class ImageTooLarge(UnreadableImage):
    """An image of more pixels than allowed, refused before its pixels are decoded."""


@dataclass(frozen=True)
class Skipped:
    """A file that was passed over."""

    file: str
    reason: str

    def __str__(self) -> str:
        return f"{self.file} ({self.reason})"


def path_text(path: str | Path) -> str:
    """A path as text that can be written anywhere: bytes that are no UTF-8 appear as ``\\xe9``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def irregular(mode: int) -> str:
    """The kind of a file of this mode (``st_mode``) that is no regular file; "" for a regular one."""
    return "" if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "no regular file")


@dataclass(frozen=True)
class ImageOptions:
    """Options of image files that become square pixels.

    Attributes:
        size: side in pixels.
        fit: ``crop`` takes the central square, ``stretch`` changes the aspect, ``pad`` adds black borders.
            Resizing is bicubic with antialiasing; large JPEG files are decoded at a fraction of their size,
            never below twice ``size``.
        on_error: ``raise`` at the first unreadable file, or ``skip`` all such files with one warning that
            counts them.
        max_pixels: refuse files of more pixels (width x height), before anything is decoded.
        memory: bytes (1 GiB by default) that decoded images may take; those of a larger set that are beyond
            it are decoded again for each batch, with 0 all. ``decoding_processes.read_by`` goes before it.
    """

    size: int = 64
    fit: Fit = "crop"
    on_error: OnError = "raise"
    max_pixels: int = MAX_PIXELS
    memory: int = 1 << 30

    def __post_init__(self) -> None:
        _check_reading(self.size, self.fit, self.max_pixels)
        if self.on_error not in ("skip", "raise"):
            raise ValueError(f"on_error must be 'skip' or 'raise', got {self.on_error!r}")

    def __str__(self) -> str:
        """Fit and size, as the note of a data set names them."""
        return f"{self.fit} to {self.size} x {self.size}"


@dataclass(frozen=True)
class ImageFile:
    """An image file, or the bytes of one inside a plain archive."""

    path: Path
    member: str = ""  # name inside the archive, for messages
    offset: int = 0
    length: int | None = None  # bytes from ``offset``; None is the whole file

    def __str__(self) -> str:
        return path_text(self.path) + (f":{self.member}" if self.member else "")

    def open(self) -> BinaryIO:
        """A stream at the start of the image.

        Raises:
            FileNotFoundError: no such file.
            UnreadableImage: a folder, a pipe, a device or a loop of links, or the system lets nobody read it.
        """
        try:
            if kind := irregular(self.path.stat().st_mode):
                raise UnreadableImage(f"{self} is {kind}, not an image file", f"it is {kind}")
            archive = self.path.open("rb")
        except FileNotFoundError:
            raise
        except OSError as error:
            reason = str(error.strerror or error)
            raise UnreadableImage(f"cannot read {self}: {reason}", reason) from error
        if self.length is None:
            return archive
        with archive:
            archive.seek(self.offset)
            return io.BytesIO(archive.read(self.length))


def read_image(
    source: str | Path | ImageFile | BinaryIO,
    size: int | None = None,
    fit: Fit = "crop",
    max_pixels: int = MAX_PIXELS,
) -> Tensor:
    """One image file -> (3, H, W) uint8 RGB; the first frame of an animation.

    The EXIF orientation is applied. Grey, palette and CMYK images become RGB (colour profiles are ignored);
    transparent pixels are laid on white. 16-bit integers are scaled by 1/257. Wider integers, and floats
    outside [0, 1], have no agreed range and are stretched from their least to their largest value.

    Args:
        size: side in pixels of the square result; None keeps the image's own size and ignores ``fit``.
        fit, max_pixels: as in ``ImageOptions``.

    Raises:
        FileNotFoundError: no such file.
        ImageTooLarge: more than ``max_pixels`` pixels.
        UnreadableImage: not an image, truncated or corrupt, or no regular file. Both are ValueErrors.
    """
    _check_reading(size, fit, max_pixels)
    source = as_file(source)
    if isinstance(source, ImageFile):
        with source.open() as stream:
            return _decode_one(stream, str(source), size, fit, max_pixels)
    return _decode_one(source, str(getattr(source, "name", "<stream>")), size, fit, max_pixels)


def _pixels(image: Image.Image, size: int | None, fit: Fit) -> Tensor:
    """(3, H, W) uint8 of an image, decoded where it is not yet."""
    rgb = to_rgb(upright(image))
    rgb = rgb if size is None else resized(rgb, size, fit)
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous()


def as_file(source: str | Path | ImageFile | BinaryIO) -> ImageFile | BinaryIO:
    """A path as an ``ImageFile``; anything else as it is."""
    return ImageFile(Path(source)) if isinstance(source, (str, Path)) else source


def pixels_of(image: Image.Image | np.ndarray, size: int | None, fit: Fit = "crop") -> Tensor:
    """An image in memory -> (3, H, W) uint8 RGB, by the rules of ``read_image``.

    Args:
        image: a PIL image, or an (H, W) or (H, W, 3) array of uint8.

    Raises:
        ValueError: an array of another type or shape.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)):
            raise ValueError(
                f"an array must be (H, W) or (H, W, 3) uint8 from 0 to 255, got {image.dtype} {image.shape}"
            )
        image = Image.fromarray(image)
    return _pixels(image, size, fit)


def _check_reading(size: int | None, fit: str, max_pixels: int) -> None:
    if size is not None and size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    if fit not in ("crop", "stretch", "pad"):
        raise ValueError(f"fit must be 'crop', 'stretch' or 'pad', got {fit!r}")
    if max_pixels < 1:
        raise ValueError(f"max_pixels must be at least 1, got {max_pixels}")


def opened(stream: BinaryIO, max_pixels: int) -> Image.Image:
    """Open an image of one of ``FORMATS`` without decoding it; ValueError for too many parts of it.

    ``max_pixels`` takes the place of Pillow's limit, unless a program has set that and not this one.
    """
    check_parts(stream)
    if max_pixels <= MAX_PIXELS and Image.MAX_IMAGE_PIXELS not in (None, _PILLOW_LIMIT):
        return Image.open(stream, formats=FORMATS)
    with DECODING.lock:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(stream, formats=FORMATS)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _decode_one(stream: BinaryIO, name: str, size: int | None, fit: Fit, max_pixels: int) -> Tensor:
    try:
        with opened(stream, max_pixels) as image:
            pixels = image.width * image.height
            if pixels > max_pixels:
                counted = f"{image.width} x {image.height} = {pixels} pixels"
                limit = f"{counted}, more than the limit of {max_pixels}"
                remedy = f"raise max_pixels (--max-pixels on the command line) to {pixels} if you trust it"
                raise ImageTooLarge(f"{name} has {limit}; {remedy}", f"it has {limit}; {remedy}")
            if size is not None:
                image.draft(image.mode, (2 * size, 2 * size))
            progressive = "progressive" in image.info  # such a JPEG is held whole, at whatever size it comes
            held = pixels if progressive else image.width * image.height
            return DECODING.run(held, lambda: _pixels(image, size, fit))
    except UnreadableImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        reason = f"more pixels than Pillow's own limit allows: {error}"
        raise ImageTooLarge(f"{name} has {reason}", f"it has {reason}") from error
    except BROKEN as error:
        reason = str(error).replace(repr(stream), "the file") or type(error).__name__
        reason = UNREAD if isinstance(error, UnidentifiedImageError) else reason
        raise UnreadableImage(f"cannot read {name} as an image: {reason}", reason) from error


def iter_images(
    files: Sequence[str | Path | ImageFile],
    options: ImageOptions,
    workers: int | None = None,
    processes: int = 0,
) -> Iterator[Tensor | UnreadableImage | FileNotFoundError]:
    """Decode in threads, in order: (3, size, size) uint8, or the error of a file that is no image or gone.

    A few hundred small images are held at a time, whatever the number of files, and large ones wait for
    each other: no more than ``MAX_PIXELS`` are decoded at once by a process.

    Args:
        workers: threads; by default one a core, at most eight.
        processes: that decode in place of threads, where it is above 0.

    Raises:
        ChildProcessError: a process that decodes died, and so did that in its place.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    read = functools.partial(_read_array, options=options)
    yield from map(_as_tensor, done_in_order(read, files, workers or min(8, os.cpu_count() or 1), processes))


_Unread = UnreadableImage | FileNotFoundError


def _read_array(file: str | Path | ImageFile, options: ImageOptions) -> np.ndarray | _Unread:
    """The pixels of a file as an array, which goes from one process to another by its bytes; or its error."""
    try:
        return read_image(file, options.size, options.fit, options.max_pixels).numpy()
    except (UnreadableImage, FileNotFoundError) as error:
        return error


def _as_tensor(read: np.ndarray | _Unread) -> Tensor | _Unread:
    return torch.from_numpy(read) if isinstance(read, np.ndarray) else read


@dataclass(frozen=True)
class FileSource:
    """Images of files: the first ones in memory as far as they fit, others decoded for each batch.

    Other modalities are in memory.
    """

    files: tuple[str | Path | ImageFile, ...]
    options: ImageOptions
    hashes: np.ndarray  # (N,) "S16" of the pixels
    images: Tensor  # (K, 3, size, size) uint8, of the first K files
    others: dict[str, Tensor] = field(default_factory=dict)  # e.g. "text": (N, V) float32 or bool
    skipped: tuple[Skipped, ...] = ()  # files that could not be read
    processes: int = 0  # that decode; 0 for threads

    def __len__(self) -> int:
        return len(self.files)

    def inputs(self, rows: Tensor) -> Inputs:
        """As of ``Source``; raises ``UnreadableImage`` where a file was damaged after it was checked."""
        others = {name: as_input(values[rows]) for name, values in self.others.items()}
        return {"image": as_input(self._pixels(rows)), **others}

    def _pixels(self, rows: Tensor) -> Tensor:
        """(B, 3, size, size) uint8."""
        held = rows < len(self.images)
        if held.all():
            return self.images[rows]
        pixels = self.images.new_empty(len(rows), *self.images.shape[1:])
        pixels[held] = self.images[rows[held]]
        places = torch.nonzero(~held).flatten().tolist()
        files = [self.files[row] for row in rows[~held].tolist()]
        images = iter_images(files, self.options, processes=self.processes)
        for place, image in zip(places, images, strict=True):
            pixels[place] = _decoded(image)
        return pixels


def _decoded(image: Tensor | _Unread) -> Tensor:
    """The pixels, where a file could be read; raised is its error."""
    if isinstance(image, UnreadableImage):
        raise type(image)(f'{image}; on_error="skip" leaves such files out') from image
    if isinstance(image, FileNotFoundError):
        raise image
    return image


def decode(
    files: Sequence[str | Path | ImageFile], options: ImageOptions, whole: bool = False
) -> tuple[FileSource, Tensor]:
    """Decode every file once: the readable ones with hashes of their pixels, and their (K,) positions.

    Args:
        whole: hold all images, whatever memory they take.

    Raises:
        UnreadableImage: under ``on_error="raise"``.
        ValueError: no file can be read.
    """
    reading = READING.get(FileReading())
    memory = options.memory if reading.cache is None else reading.cache
    fits = len(files) if whole else min(len(files), memory // (3 * options.size**2))
    images = torch.empty(fits, 3, options.size, options.size, dtype=torch.uint8)
    rows: list[int] = []
    hashes: list[bytes] = []
    skipped: list[Skipped] = []
    for row, image in enumerate(iter_images(files, options, processes=reading.workers)):
        if isinstance(image, UnreadableImage) and options.on_error == "skip":
            skipped.append(Skipped(str(as_file(files[row])), image.reason))
            continue
        pixels = _decoded(image)
        if len(rows) < fits:
            images[len(rows)] = pixels
        rows.append(row)
        hashes.append(content_hash(pixels.numpy().tobytes()))
    if skipped:
        if not rows:
            raise ValueError(f"none of the {len(files)} images could be read: {some_of(skipped)}")
        count = f"{len(skipped)} of {len(files)}"
        logger.warning("%s images skipped as unreadable: %s", count, some_of(skipped))
    readable, held = tuple(files[row] for row in rows), images[: len(rows)]
    hashed, counted, number = np.array(hashes, "S16"), tuple(skipped), reading.workers
    source = FileSource(readable, options, hashed, held, skipped=counted, processes=number)
    return source, torch.tensor(rows).long()


def read_images(
    files: Sequence[str | Path | ImageFile],
    size: int,
    fit: Fit = "crop",
    on_error: OnError = "skip",
    max_pixels: int = MAX_PIXELS,
) -> tuple[Tensor, Tensor]:
    """Image files -> (K, 3, size, size) uint8, and (K,) positions of the readable ones, as ``decode``."""
    source, rows = decode(files, ImageOptions(size, fit, on_error, max_pixels), whole=True)
    return source.images, rows
