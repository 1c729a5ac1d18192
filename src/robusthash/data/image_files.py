"""Image files that stay files: checked and hashed once, decoded again for each batch where memory is
short."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from robusthash.core.types import Inputs
from robusthash.data.base import ArraySource, Source, as_input, content_hash
from robusthash.data.transforms import (
    MAX_PIXELS,
    Fit,
    ImageFile,
    OnError,
    UnreadableImage,
    check_on_error,
    iter_images,
    read_images,
    warn_unreadable,
)

MEMORY = 1 << 30
"""Decoded images are kept in memory when they take at most so many bytes (1 GiB), else decoded for each
batch."""


@dataclass(frozen=True)
class FileSource:
    """Images decoded when asked for, so that memory does not grow with the set; other modalities in
    memory."""

    files: tuple[ImageFile, ...]
    size: int
    fit: Fit
    max_pixels: int
    others: dict[str, Tensor]  # e.g. "text": (N, V) float32 or bool
    pixel_hashes: np.ndarray  # (N,) "S16", from the pass that checked the files

    def __post_init__(self) -> None:
        sizes = {"image": len(self.files), **{name: len(value) for name, value in self.others.items()}}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"modalities of different length: {sizes}")

    def __len__(self) -> int:
        return len(self.files)

    def inputs(self, rows: Tensor) -> Inputs:
        """Raises ``UnreadableImage`` where a file was damaged after it was checked."""
        files = [self.files[row] for row in rows.tolist()]
        images, _ = read_images(files, self.size, self.fit, "raise", self.max_pixels)
        return {
            "image": images.float() / 255,
            **{name: as_input(value[rows]) for name, value in self.others.items()},
        }

    def hashes(self) -> np.ndarray:
        return self.pixel_hashes


@dataclass(frozen=True)
class Decoding:
    """How image files become square pixels.

    Attributes:
        size: side in pixels, at least 1.
        fit: ``crop``, ``stretch`` or ``pad``, as in ``read_image``.
        on_error: ``raise`` at the first unreadable file, or ``skip`` all such files with one warning.
        max_pixels: refuse files of more pixels.
        memory: bytes that decoded images may take; 0 always decodes from the files.
    """

    size: int = 64
    fit: Fit = "crop"
    on_error: OnError = "raise"
    max_pixels: int = MAX_PIXELS
    memory: int = MEMORY

    def __post_init__(self) -> None:
        check_on_error(self.on_error)
        if self.size < 1:
            raise ValueError(f"size must be at least 1 pixel, got {self.size}")

    def decode(self, files: Sequence[ImageFile]) -> Decoded:
        """Every file once: finds the unreadable ones and hashes the pixels of the others.

        Raises:
            UnreadableImage: under ``on_error="raise"``.
            FileNotFoundError: a file is not there.
            ValueError: no file can be read.
        """
        fits = len(files) * 3 * self.size**2 <= self.memory
        kept: list[int] = []
        hashes: list[bytes] = []
        images = torch.empty(len(files) if fits else 0, 3, self.size, self.size, dtype=torch.uint8)
        errors: list[UnreadableImage] = []
        for row, image in enumerate(iter_images(files, self.size, self.fit, self.max_pixels)):
            if isinstance(image, UnreadableImage):
                if self.on_error == "raise":
                    raise UnreadableImage(f'{image}; on_error="skip" leaves such files out') from image
                errors.append(image)
                continue
            if fits:
                images[len(kept)] = image
            kept.append(row)
            hashes.append(content_hash(image.numpy().tobytes()))
        warn_unreadable(errors, len(files))
        readable = tuple(files[row] for row in kept)
        return Decoded(
            self, readable, kept, np.array(hashes, dtype="S16"), images[: len(kept)] if fits else None
        )


@dataclass(frozen=True)
class Decoded:
    """What one pass over image files gave."""

    how: Decoding
    files: tuple[ImageFile, ...]  # the readable ones
    kept: list[int]  # their positions among the files asked for
    hashes: np.ndarray  # (K,) "S16" of the pixels
    images: Tensor | None  # (K, 3, size, size) uint8, or None where they do not fit in memory

    def source(self, others: dict[str, Tensor]) -> Source:
        """The images with other modalities, (K, ...) each, from memory or from the files."""
        if self.images is not None:
            return ArraySource({"image": self.images, **others})
        how = self.how
        return FileSource(self.files, how.size, how.fit, how.max_pixels, others, self.hashes)
