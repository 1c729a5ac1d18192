"""Files -> uint8 pixels, texts -> bags of words, and the augmentation of training images."""

from __future__ import annotations

import io
import logging
import os
import re
import struct
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional

from robusthash.core.runtime import Draws

logger = logging.getLogger(__name__)

Fit = Literal["crop", "stretch", "pad"]
OnError = Literal["skip", "raise"]

MAX_PIXELS = 50_000_000
"""Default limit of width x height: beyond any camera that a search engine meets, and 150 MB once decoded."""

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000")
"""What is opened at all; the rest of Pillow's list holds formats that start other programs (EPS)."""

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
    transparent pixels are laid on white. Integers of 16 bits are scaled by 1/257. Wider integers, and floats
    outside [0, 1], have no agreed range and are stretched from their least to their largest value.

    Args:
        source: a path, an ``ImageFile`` or a binary stream.
        size: side in pixels of the square result; None keeps the image's own size and ignores ``fit``.
        fit: ``crop`` takes the central square, ``stretch`` changes the aspect, ``pad`` adds black borders.
            Resizing is bicubic with antialiasing; large JPEG files are decoded at a fraction of their size,
            never below twice ``size``.
        max_pixels: largest width x height accepted, read from the header before anything is decoded.

    Raises:
        FileNotFoundError: no such file.
        ImageTooLarge: more than ``max_pixels`` pixels.
        UnreadableImage: not an image, truncated or corrupt. Both are ValueErrors.
        ValueError: an argument outside its range.
    """
    _check_arguments(size, fit, max_pixels)
    if isinstance(source, (str, Path)):
        source = ImageFile(Path(source))
    if isinstance(source, ImageFile):
        with source.open() as stream:
            return _decode(stream, str(source), size, fit, max_pixels)
    return _decode(source, str(getattr(source, "name", "<stream>")), size, fit, max_pixels)


def _check_arguments(size: int | None, fit: str, max_pixels: int) -> None:
    if size is not None and size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    if fit not in ("crop", "stretch", "pad"):
        raise ValueError(f"fit must be 'crop', 'stretch' or 'pad', got {fit!r}")
    if max_pixels < 1:
        raise ValueError(f"max_pixels must be at least 1, got {max_pixels}")


def _decode(stream: BinaryIO, name: str, size: int | None, fit: Fit, max_pixels: int) -> Tensor:
    try:
        with Image.open(stream, formats=FORMATS) as image:
            pixels = image.width * image.height
            if pixels > max_pixels:
                raise ImageTooLarge(
                    f"{name} has {image.width} x {image.height} = {pixels} pixels, more than the limit of "
                    f"{max_pixels}; raise max_pixels if you trust the file"
                )
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
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
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
    files: Sequence[str | Path | ImageFile],
    size: int,
    fit: Fit = "crop",
    max_pixels: int = MAX_PIXELS,
    workers: int | None = None,
) -> Iterator[Tensor | UnreadableImage]:
    """Decode in a thread pool, in order: (3, size, size) uint8, or the error of a file that cannot be read.

    A few hundred images are held at a time, whatever the number of files. ``workers`` None is up to eight
    threads.
    """
    _check_arguments(size, fit, max_pixels)

    def read(file: str | Path | ImageFile) -> Tensor | UnreadableImage:
        try:
            return read_image(file, size, fit, max_pixels)
        except UnreadableImage as error:
            return error

    with ThreadPoolExecutor(max_workers=workers or min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(files), _CHUNK):
            yield from pool.map(read, files[start : start + _CHUNK])


def read_images(
    files: Sequence[str | Path | ImageFile],
    size: int,
    fit: Fit = "crop",
    on_error: OnError = "skip",
    max_pixels: int = MAX_PIXELS,
    progress: Callable[[int, int], None] | None = None,
    workers: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Many image files -> pixels in memory, and which files they are.

    Args:
        files: paths or ``ImageFile`` records.
        on_error: ``skip`` leaves unreadable files out, with one warning that counts them and names the first
            few; ``raise`` raises the first error.
        progress: called with (files done, files in all).

    Returns:
        (K, 3, size, size) uint8 and (K,) int64 positions of the readable files in ``files``.

    Raises:
        UnreadableImage: under ``raise``.
        FileNotFoundError: a file that is not there, under both.
        ValueError: no file can be read.
    """
    check_on_error(on_error)
    _check_arguments(size, fit, max_pixels)
    pixels = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    kept: list[int] = []
    errors: list[UnreadableImage] = []
    for position, image in enumerate(iter_images(files, size, fit, max_pixels, workers)):
        if isinstance(image, UnreadableImage):
            if on_error == "raise":
                raise image
            errors.append(image)
        else:
            pixels[len(kept)] = image
            kept.append(position)
        if progress is not None:
            progress(position + 1, len(files))
    warn_unreadable(errors, len(files))
    return pixels[: len(kept)], torch.tensor(kept, dtype=torch.int64)


def check_on_error(on_error: str) -> None:
    """ValueError unless ``skip`` or ``raise``."""
    if on_error not in ("skip", "raise"):
        raise ValueError(f"on_error must be 'skip' or 'raise', got {on_error!r}")


def warn_unreadable(errors: Sequence[UnreadableImage], total: int) -> None:
    """One warning for all skipped files; ValueError where nothing is left."""
    if not errors:
        return
    first = "; ".join(str(error) for error in errors[:3])
    if len(errors) == total:
        raise ValueError(f"none of the {total} images could be read: {first}")
    logger.warning("%d of %d images skipped as unreadable: %s", len(errors), total, first)


def words_of(text: str) -> list[str]:
    """Lower-cased words: runs of letters and digits, an apostrophe inside allowed."""
    return re.findall(r"[^\W_]+(?:['’][^\W_]+)*", unicodedata.normalize("NFKC", text).lower())


@dataclass(frozen=True)
class Vocabulary:
    """The words that a bag of words counts, most frequent first. Make it with ``fit``, from training texts
    only."""

    words: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.words:
            raise ValueError("a vocabulary needs at least one word; are all texts empty?")
        if len(set(self.words)) != len(self.words):
            raise ValueError("a vocabulary must not hold a word twice")

    def __len__(self) -> int:
        return len(self.words)

    @classmethod
    def fit(cls, texts: Iterable[str], size: int = 1000, without: Collection[str] = ()) -> Vocabulary:
        """The ``size`` most frequent words, those of ``without`` left out; equal counts in alphabetical
        order."""
        if size < 1:
            raise ValueError(f"a vocabulary needs a size of at least 1, got {size}")
        counts = Counter(word for text in texts for word in words_of(text))
        for word in without:
            counts.pop(word, None)
        ordered = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(tuple(ordered[:size]))

    def encode(self, texts: Sequence[str], values: Literal["binary", "counts"] = "binary") -> Tensor:
        """N texts -> (N, V) float32: 1 where the word occurs, or how often. Words not in the vocabulary are
        ignored."""
        if values not in ("binary", "counts"):
            raise ValueError(f"values must be 'binary' or 'counts', got {values!r}")
        column = {word: number for number, word in enumerate(self.words)}
        found = [
            (row, column[word]) for row, text in enumerate(texts) for word in words_of(text) if word in column
        ]
        bags = torch.zeros(len(texts), len(self.words))
        rows, columns = torch.tensor(found, dtype=torch.int64).reshape(-1, 2).unbind(1)
        bags.index_put_((rows, columns), torch.ones(()), accumulate=True)
        return bags.clamp(max=1) if values == "binary" else bags

    def unseen(self, texts: Iterable[str], without: Collection[str] = ()) -> tuple[int, int]:
        """(words that ``encode`` ignores, all words), those of ``without`` aside, repetitions counted."""
        known, aside = set(self.words), set(without)
        found = [word in known for text in texts for word in words_of(text) if word not in aside]
        return found.count(False), len(found)


def augment(images: Tensor, ids: Tensor, draws: Draws, flip: bool = True, pad: int = 4) -> Tensor:
    """Random crop after reflect padding, and a horizontal flip of every second image, keyed by item id.

    Only pixels of the image itself are moved, so the result stays in the range of the input.

    Args:
        images: (B, 3, H, W) float in [0, 1].
        ids: (B,) int64; the same id, scope and seed give the same change whatever the batch. Narrow ``draws``
            by the epoch, or every epoch is the same.
        flip: mirror with probability one half.
        pad: pixels of padding on each side; the crop moves by up to so many. Less than H and W.

    Returns:
        (B, 3, H, W), a new tensor.
    """
    height, width = images.shape[-2:]
    if not images.is_floating_point():
        raise ValueError(f"augment takes float images in [0, 1], got {images.dtype}")
    if len(ids) != len(images):
        raise ValueError(f"{len(ids)} ids for {len(images)} images")
    if not 0 <= pad < min(height, width):
        raise ValueError(
            f"pad must lie in 0..{min(height, width) - 1} for {height} x {width} images, got {pad}"
        )
    numbers = draws.within("augment").uniform(ids.to(images.device), (3,))
    top, left = (numbers[:, :2] * (2 * pad + 1)).long().unbind(1)
    rows = top[:, None] + torch.arange(height, device=images.device)  # (B, H)
    columns = left[:, None] + torch.arange(width, device=images.device)  # (B, W)
    if flip:
        columns = torch.where(numbers[:, 2:] < 0.5, columns.flip(1), columns)
    padded = functional.pad(images, (pad, pad, pad, pad), mode="reflect") if pad else images
    item = torch.arange(len(images), device=images.device)[:, None, None]
    return (
        padded.permute(0, 2, 3, 1)[item, rows[:, :, None], columns[:, None, :]]
        .permute(0, 3, 1, 2)
        .contiguous()
    )
