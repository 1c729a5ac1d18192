"""A user's own images without labels: each is a class of its own, and its changed copies are relevant."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from robusthash.core.registry import register
from robusthash.core.runtime import Draws
from robusthash.core.words import some_of
from robusthash.data.base import ArraySource, RetrievalData, flat_options
from robusthash.data.image_files import ImageOptions, Skipped, decode, pixels_of, read_image
from robusthash.data.image_listing import Listing, list_images
from robusthash.data.splits import Indices, assemble, hash_pixels
from robusthash.data.transforms import EVERYDAY, Change, crop, jpeg, through_jpeg, to_pixels

LEAST = 10  # different images, below which a search has next to nothing to tell apart
_CHANGING = 4  # files are changed at four times the size that the model sees, as they are outside

CHANGES = (
    *EVERYDAY,
    Change("mirrored", "left and right exchanged", "yes", lambda x: x.flip(-1)),
    Change(
        "several",
        "10 % cut away, 20 % darker, saved as a small JPEG",
        "yes",
        lambda x: jpeg(crop(x, 0.1) * 0.8, 50),
    ),
)
"""The changes that queries are made by, one query of each to an image."""


def trained_for_copies(data: Mapping[str, Any] | str) -> bool:
    """True where data, by their settings, hold changed copies of each item, which codes learn to find."""
    if isinstance(data, str):
        return data == "photos"
    if data["name"] == "copies":
        return True
    if data["name"] == "photos":
        return bool(data.get("labels", "photo") == "photo")
    return data.get("relevance") == "copies"


TRAINED, HELD_OUT = "trained on", "never trained on"
"""Groups of queries, by whether the image that they are copies of was trained on in any form."""


@dataclass(frozen=True)
class CopyOptions:
    """Numbers of images and of copies.

    Attributes:
        limit: images that take part; of a larger folder that many are drawn. An index takes all the same.
        held_out: share of them that is never trained on, in (0, 1).
        copies: changed copies of each image that is trained on; None is 8000 in all, 8 to 40 of each.
        asked: images whose copies are queries, half of them held out where there are enough.
        seed: of every draw.
    """

    limit: int = 1000
    held_out: float = 0.2
    copies: int | None = None
    asked: int = 60
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("limit", LEAST), ("copies", 1), ("asked", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must lie between 0 and 1, got {self.held_out}")


@dataclass(frozen=True)
class CopySource(ArraySource):
    """Changed and stored images in memory, with the groups of queries that are scored apart."""

    groups: dict[str, Tensor]  # by name, (N,) bool


@register("data", "copies", state="measured")
@flat_options()
def copies(
    root: str | Path,
    image: ImageOptions = ImageOptions(on_error="skip"),
    numbers: CopyOptions = CopyOptions(),
) -> RetrievalData:
    """Your own images without labels, in a folder and its subfolders: the copies of an image are relevant.

    The database holds each image as it is. Training items are copies changed at random: cut, made smaller,
    mirrored, brighter or darker, with another contrast, compressed. Queries are copies under each of
    ``CHANGES``, whose strengths are fixed; none has the pixels of a training or database item, and half of
    the images behind them were not trained on in any form. Files are changed at four times ``size`` and then
    reduced. Of images with the same pixels the first stays.

    Args:
        root: the folder.
        image, numbers: unreadable files are skipped and counted by default.
    """
    root = Path(root)
    draws = Draws(numbers.seed).within("copies")
    files, stored, skipped, note = _different(root, image, numbers.limit, draws)
    trained, query_rows = _trained_and_query_rows(len(files), numbers, draws)
    each = numbers.copies or min(40, max(8, 8000 // len(trained)))

    def changed_copies(row: int) -> tuple[list[Tensor], list[Tensor]]:
        pixels = read_image(files[row], _CHANGING * image.size, image.fit, image.max_pixels)
        training_copies = _random_copies(pixels, image.size, each, row, draws) if row in trained else []
        return training_copies, _query_copies(pixels, image.size) if row in query_rows else []

    rows = sorted(trained | query_rows)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        pairs = list(pool.map(changed_copies, rows))
    training = [
        (row, copy) for row, (training_copies, _) in zip(rows, pairs, strict=True) for copy in training_copies
    ]
    queries = [(row, copy) for row, (_, of_row) in zip(rows, pairs, strict=True) for copy in of_row]
    changed = [*training, *queries]
    pixels = torch.cat([torch.stack([copy for _, copy in changed]), stored])
    owner = torch.tensor([*(row for row, _ in changed), *range(len(files))])
    labels = torch.zeros(len(owner), len(files)).scatter_(1, owner[:, None], 1)
    parts = torch.arange(len(pixels)).split([len(training), len(queries), len(files)])
    names = tuple(str(Path(str(file)).relative_to(root)) for file in files)
    note += (
        f" {each} changed copies of each of {len(trained)} images are trained on; "
        f"{len(files) - len(trained)} images are not."
    )
    source = CopySource({"image": pixels}, _groups(parts[1], owner, trained))
    data = assemble("copies", source, labels, hash_pixels(pixels), Indices(*parts), names, note.strip())
    return replace(data, skipped=tuple(map(str, skipped))) if skipped else data


def images_below(root: Path) -> Listing:
    """The images of a folder and its subfolders, by name, and the files passed over; an error without one."""
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root.absolute()}; it should hold images")
    listing = list_images(root)
    if not listing.images:
        passed = some_of(listing.skipped) or "nothing, it is empty"
        raise ValueError(f"{root} holds no image; passed over: {passed}")
    return listing


def _different(
    root: Path, image: ImageOptions, limit: int, draws: Draws
) -> tuple[list[Path], Tensor, tuple[Skipped, ...], str]:
    """Readable images that differ in their pixels, at most ``limit``: paths, pixels, skipped, note.

    The pixels are (N, 3, size, size) uint8, as an index of the same folder encodes them.
    """
    listing = images_below(root)
    paths = listing.images
    order = torch.randperm(len(paths), generator=draws.within("images").generator())[:limit]
    sampled = [paths[row] for row in sorted(order.tolist())]
    source, readable = decode(sampled, image, whole=True)
    first = torch.from_numpy(np.sort(np.unique(source.hashes, return_index=True)[1]))
    files = [sampled[row] for row in readable[first].tolist()]
    if len(files) < LEAST:
        raise ValueError(
            f"{root} holds {len(files)} different readable images (of {len(paths)} files), and training "
            f"without labels needs at least {LEAST}, better 100 or more; add images"
        )
    skipped, twice = listing.skipped + source.skipped, len(readable) - len(files)
    note = f"Images {image}, each a class of its own."
    note += f" {len(files)} of {len(paths)} images take part." * (len(files) < len(paths))
    note += f" {twice} have the pixels of another." * (twice > 0)
    note += f" {len(skipped)} files passed over: {some_of(skipped, 3)}." if skipped else ""
    return files, source.images[first], skipped, note


def _trained_and_query_rows(count: int, numbers: CopyOptions, draws: Draws) -> tuple[set[int], set[int]]:
    """Images that are trained on, and images whose copies are queries, half of which are not trained on."""
    order = torch.randperm(count, generator=draws.within("held out").generator()).tolist()
    held = min(count - 2, max(2, round(numbers.held_out * count)))
    apart, trained = order[:held], order[held:]
    unseen = apart[: max(numbers.asked // 2, numbers.asked - len(trained))]
    return set(trained), {*unseen, *trained[: numbers.asked - len(unseen)]}


def _random_copies(pixels: Tensor, size: int, count: int, row: int, draws: Draws) -> list[Tensor]:
    """``count`` copies, each (3, size, size) uint8, of (3, H, H) uint8 pixels, changed by keyed draws."""
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    ids = row * 10_000 + torch.arange(count)
    numbers = draws.within("changes").uniform(ids, (9,)).double().numpy()
    return [_random_copy(image, size, each) for each in numbers]


def _random_copy(image: Image.Image, size: int, numbers: np.ndarray) -> Tensor:
    """One copy: cut, resized, mirrored, re-lit, through a JPEG file, by nine numbers in [0, 1)."""
    cut, stretch, across, down, side, flip, light, contrast, quality = numbers
    widths = [1 - 0.25 * cut * share for share in (1, 0.5 + 0.5 * stretch)]
    left, top = (1 - widths[0]) * across, (1 - widths[1]) * down
    box = [part * image.width for part in (left, top, left + widths[0], top + widths[1])]
    inner = round(size * 2 ** (2.5 * side - 1))  # half to nearly three times the size that the model sees
    pixels = np.asarray(image.resize((inner, inner), Image.Resampling.BICUBIC, box=tuple(box)), np.float32)
    pixels = pixels[:, ::-1] if flip < 0.5 else pixels
    mean = pixels.mean()
    lit = (pixels - mean) * (0.7 + 0.6 * contrast) + mean * (0.7 + 0.6 * light)
    saved = through_jpeg(np.rint(lit).clip(0, 255).astype(np.uint8), 30 + int(66 * quality))
    return pixels_of(saved.permute(1, 2, 0).numpy(), size)


def _query_copies(pixels: Tensor, size: int) -> list[Tensor]:
    """A copy by each of ``CHANGES``, (3, size, size) uint8."""
    large = pixels[None].float() / 255
    return [pixels_of(to_pixels(change(large))[0], size) for change in CHANGES]


def _groups(queries: Tensor, owner: Tensor, trained: Sequence[int] | set[int]) -> dict[str, Tensor]:
    """Queries by their change, and by whether their image was trained on: (N,) bool for each name."""
    kind = torch.full((len(owner),), -1)
    kind[queries] = torch.arange(len(queries)) % len(CHANGES)
    of_trained = torch.isin(owner, torch.tensor(sorted(trained)))
    groups = {change.name: kind == number for number, change in enumerate(CHANGES)}
    return {**groups, TRAINED: (kind >= 0) & of_trained, HELD_OUT: (kind >= 0) & ~of_trained}
