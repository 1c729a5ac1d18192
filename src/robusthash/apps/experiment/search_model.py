"""A trained model in three lines of Python: load a run, encode images, search an index."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from robusthash.apps.experiment.run_directory import load_run
from robusthash.core.hamming import pack
from robusthash.core.runtime import Progress, choose_device, silent
from robusthash.core.types import Codes
from robusthash.data.image_files import pixels_of, read_image
from robusthash.index import CodeIndex
from robusthash.models.encoding import encode_signs
from robusthash.models.hasher import Hasher

OneImage = str | Path | Image.Image | np.ndarray | Tensor


@dataclass(frozen=True)
class SearchModel:
    """The image hasher of a run, ready to encode and search."""

    hasher: Hasher
    side: int  # pixels a side of the images that it was trained on
    origin: str  # digest of its weights: codes carry it, an index refuses those of another model

    @property
    def bits(self) -> int:
        return self.hasher.bits

    def encode(
        self, images: OneImage | Iterable[OneImage], batch_size: int = 256, progress: Progress = silent
    ) -> Codes:
        """Codes of images, as files give them: cropped to a square and resized, encoded in batches.

        Args:
            images: one or several of a path, a PIL image, an (H, W) or (H, W, 3) uint8 array, a (3, H, W)
                tensor: uint8, or floats in [0, 1] of the model's own size. Lists, iterators, and arrays and
                tensors of four axes are several; all others are one.
            progress: called with (images done, images in all or 0 where unknown, "encoding").

        Returns:
            (N, ...) codes, ids 0 to N - 1.

        Raises:
            FileNotFoundError, ValueError: an image that cannot be read or used; its place is named.
        """
        one = isinstance(images, (str, Path, Image.Image))
        one = one or (isinstance(images, (np.ndarray, Tensor)) and images.ndim < 4)
        several: Any = [images] if one else images
        total = len(several) if hasattr(several, "__len__") else 0
        signs, done = [], 0
        for batch in _batched(iter(several), batch_size):
            pixels = [self._pixels(image, done + place) for place, image in enumerate(batch)]
            signs.append(encode_signs(self.hasher, "image", torch.stack(pixels)))
            done += len(batch)
            progress(done, total, "encoding")
        if not signs:
            raise ValueError("there is no image to encode")
        return Codes(pack(torch.cat(signs)), self.bits, torch.arange(done), self.origin)

    def search(
        self, index: CodeIndex, image: OneImage, k: int = 10, where: Mapping[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """The k nearest items of one image: ``id``, ``distance`` in bits, ``payload``."""
        ranking = index.search(self.encode(image), k, where=where)
        ids = [item for item in ranking.ids[0].tolist() if item >= 0]
        rows = zip(ids, ranking.distances[0].tolist(), index.payload(ids), strict=False)
        return [{"id": item, "distance": distance, "payload": payload} for item, distance, payload in rows]

    def _pixels(self, image: OneImage, place: int) -> Tensor:
        """(3, side, side) float in [0, 1] of one image."""
        try:
            if isinstance(image, (str, Path)):
                return read_image(image, self.side).float() / 255
            if isinstance(image, Tensor) and image.is_floating_point():
                return self._ready(image)
            if isinstance(image, Tensor):
                image = image.permute(1, 2, 0).cpu().numpy()
            return pixels_of(image, self.side).float() / 255
        except ValueError as error:
            raise ValueError(f"image {place}: {error}") from error

    def _ready(self, image: Tensor) -> Tensor:
        size = (3, self.side, self.side)
        if tuple(image.shape) != size:
            raise ValueError(
                f"a float tensor must be {size} already, got {tuple(image.shape)}; give a PIL image or a "
                "uint8 array to have it resized"
            )
        least, largest = float(image.min()), float(image.max())
        if not (least >= 0 and largest <= 1):
            raise ValueError(f"floats must lie in [0, 1], got {least:g} to {largest:g}")
        return image.float()


def load(path: str | Path, device: str = "auto") -> SearchModel:
    """Load the image hasher of a trained run.

    Args:
        path: the run's directory.
        device: ``auto`` (an accelerator where there is one), ``cpu``, ``cuda``, ...

    Raises:
        RunError: no trained run, or damaged weights.
        ValueError: a run that does not hash images of pixels.
    """
    run = load_run(path)
    card, hasher = run.card(), run.load_hasher()
    if "image" not in hasher.modalities or len(card["image_size"]) != 2:
        raise ValueError(
            f"{path} hashes {', '.join(hasher.modalities)} of size {card['image_size']}, not pixels"
        )
    return SearchModel(hasher.to(choose_device(device)), int(card["image_size"][0]), card["digest"])


def _batched(items: Iterator[OneImage], size: int) -> Iterator[list[OneImage]]:
    if size < 1:
        raise ValueError(f"batch_size must be at least 1, got {size}")
    while batch := list(islice(items, size)):
        yield batch
