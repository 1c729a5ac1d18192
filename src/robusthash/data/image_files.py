"""Image files -> uint8 pixels: one file, many files in threads, and files that stay files."""

from __future__ import annotations

import io
import logging
import os
import struct
import sys
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from robusthash.core.types import Inputs
from robusthash.data.base import as_input, content_hash

logger = logging.getLogger(__name__)

Fit = Literal["crop", "stretch", "pad"]
OnError = Literal["skip", "raise"]

MAX_PIXELS = 50_000_000  # width x height, 150 MB once decoded
# formats that are opened at all; the rest of Pillow's list holds some that start other programs (EPS)
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000")
SUFFIXES = frozenset(
    [".jpg", ".jpeg", ".png", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm", ".jp2"]
)

# what Pillow's decoders raise on broken files
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, OverflowError, struct.error, zlib.error)
_CHUNK = 256  # images decoded ahead; bounds the memory of one pass


class UnreadableImage(ValueError):
    """An image file that cannot be decoded; the message names the file and the reason."""


class ImageTooLarge(UnreadableImage):
    """An image of more pixels than allowed, refused before its pixels are decoded."""


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
        memory: bytes (1 GiB by default) that decoded images may take; a larger set is decoded again for each
            batch, and 0 always does so.
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
        return f"{self.path}:{self.member}" if self.member else str(self.path)

    def open(self) -> BinaryIO:
        """A stream at the start of the image."""
        if self.length is None:
            return self.path.open("rb")
        with self.path.open("rb") as archive:
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
        UnreadableImage: not an image, truncated or corrupt. Both are ValueErrors.
    """
    _check_reading(size, fit, max_pixels)
    if isinstance(source, (str, Path)):
        source = ImageFile(Path(source))
    if isinstance(source, ImageFile):
        with source.open() as stream:
            return _decode_one(stream, str(source), size, fit, max_pixels)
    return _decode_one(source, str(getattr(source, "name", "<stream>")), size, fit, max_pixels)


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
    rgb = _to_rgb(ImageOps.exif_transpose(image))
    rgb = rgb if size is None else _resize(rgb, size, fit)
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous()


def _check_reading(size: int | None, fit: str, max_pixels: int) -> None:
    if size is not None and size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    if fit not in ("crop", "stretch", "pad"):
        raise ValueError(f"fit must be 'crop', 'stretch' or 'pad', got {fit!r}")
    if max_pixels < 1:
        raise ValueError(f"max_pixels must be at least 1, got {max_pixels}")


def _decode_one(stream: BinaryIO, name: str, size: int | None, fit: Fit, max_pixels: int) -> Tensor:
    try:
        with Image.open(stream, formats=FORMATS) as image:
            pixels = image.width * image.height
            if pixels > max_pixels:
                limit = (
                    f"{pixels} pixels, more than the limit of {max_pixels}; raise max_pixels if you trust it"
                )
                raise ImageTooLarge(f"{name} has {image.width} x {image.height} = {limit}")
            if size is not None:
                image.draft(image.mode, (2 * size, 2 * size))
            rgb = _to_rgb(ImageOps.exif_transpose(image))
            if size is not None:
                rgb = _resize(rgb, size, fit)
    except UnreadableImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLarge(f"{name} has more pixels than Pillow's own limit allows: {error}") from error
    except _BROKEN as error:
        reason = str(error).replace(repr(stream), "the file") or type(error).__name__
        raise UnreadableImage(f"cannot read {name} as an image: {reason}") from error
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_to_8_bits(np.asarray(image)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """Wide integers or floats -> uint8, by the rule that ``read_image`` states."""
    if not np.isfinite(values).all():
        raise ValueError("it holds NaN or infinite values")
    low, high = 0.0, 1.0 if values.dtype.kind == "f" else 65535.0
    least, largest = float(values.min()), float(values.max())
    if least < low or largest > high:
        low, high = least, largest
    scale = 255.0 / (high - low) if high > low else 0.0
    return np.rint((values.astype(np.float64) - low) * scale).astype(np.uint8)


def _resize(image: Image.Image, size: int, fit: Fit) -> Image.Image:
    width, height = image.size
    bicubic = Image.Resampling.BICUBIC
    if fit == "stretch":
        return image.resize((size, size), bicubic)
    if fit == "crop":
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        return image.resize((size, size), bicubic, box=(left, top, left + side, top + side))
    scale = size / max(width, height)
    inner = image.resize((max(1, round(width * scale)), max(1, round(height * scale))), bicubic)
    square = Image.new("RGB", (size, size))
    square.paste(inner, ((size - inner.width) // 2, (size - inner.height) // 2))
    return square


def iter_images(
    files: Sequence[str | Path | ImageFile], options: ImageOptions
) -> Iterator[Tensor | UnreadableImage]:
    """Decode in up to eight threads, in order: (3, size, size) uint8, or the error of an unreadable file.

    A few hundred images are held at a time, whatever the number of files.
    """

    def read(file: str | Path | ImageFile) -> Tensor | UnreadableImage:
        try:
            return read_image(file, options.size, options.fit, options.max_pixels)
        except UnreadableImage as error:
            return error

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(files), _CHUNK):
            yield from pool.map(read, files[start : start + _CHUNK])


@dataclass(frozen=True)
class FileSource:
    """Images of files, in memory where they fit, else decoded for each batch; other modalities in memory."""

    files: tuple[str | Path | ImageFile, ...]
    options: ImageOptions
    hashes: np.ndarray  # (N,) "S16" of the pixels
    images: Tensor | None  # (N, 3, size, size) uint8
    others: dict[str, Tensor] = field(default_factory=dict)  # e.g. "text": (N, V) float32 or bool

    def __len__(self) -> int:
        return len(self.files)

    def inputs(self, rows: Tensor) -> Inputs:
        """As of ``Source``; raises ``UnreadableImage`` where a file was damaged after it was checked."""
        if self.images is not None:
            images = self.images[rows]
        else:
            files, options = [self.files[row] for row in rows.tolist()], self.options
            images, _ = read_images(files, options.size, options.fit, "raise", options.max_pixels)
        others = {name: as_input(values[rows]) for name, values in self.others.items()}
        return {"image": as_input(images), **others}


def decode(files: Sequence[str | Path | ImageFile], options: ImageOptions) -> tuple[FileSource, Tensor]:
    """Decode every file once: the readable ones with hashes of their pixels, and their (K,) positions.

    Raises ``UnreadableImage`` under ``on_error="raise"``, and ValueError where no file can be read.
    """
    fits = len(files) * 3 * options.size**2 <= options.memory
    images = torch.empty(len(files) if fits else 0, 3, options.size, options.size, dtype=torch.uint8)
    rows: list[int] = []
    hashes: list[bytes] = []
    errors: list[UnreadableImage] = []
    for row, image in enumerate(iter_images(files, options)):
        if isinstance(image, UnreadableImage):
            if options.on_error == "raise":
                raise type(image)(f'{image}; on_error="skip" leaves such files out') from image
            errors.append(image)
            continue
        if fits:
            images[len(rows)] = image
        rows.append(row)
        hashes.append(content_hash(image.numpy().tobytes()))
    if errors:
        first = "; ".join(str(error) for error in errors[:3])
        if not rows:
            raise ValueError(f"none of the {len(files)} images could be read: {first}")
        logger.warning("%d of %d images skipped as unreadable: %s", len(errors), len(files), first)
    readable, in_memory = tuple(files[row] for row in rows), images[: len(rows)] if fits else None
    return FileSource(readable, options, np.array(hashes, "S16"), in_memory), torch.tensor(rows).long()


def read_images(
    files: Sequence[str | Path | ImageFile],
    size: int,
    fit: Fit = "crop",
    on_error: OnError = "skip",
    max_pixels: int = MAX_PIXELS,
) -> tuple[Tensor, Tensor]:
    """Image files -> (K, 3, size, size) uint8, and (K,) positions of the readable ones, as ``decode``."""
    source, rows = decode(files, ImageOptions(size, fit, on_error, max_pixels, memory=sys.maxsize))
    assert source.images is not None  # any number of images fits
    return source.images, rows
