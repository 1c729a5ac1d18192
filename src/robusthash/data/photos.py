"""The embedded data set: windows of twenty photographs that come with scikit-image and scikit-learn. No
download.

Every item is a window of one photograph under the changes that a copy goes through: cropping and scaling,
mirroring, brightness and contrast, JPEG compression. With the label of the photograph, retrieval is copy
detection; with tags that photographs share, it is multi-label retrieval.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from robusthash.core.registry import register
from robusthash.core.runtime import Draws
from robusthash.core.types import Inputs
from robusthash.data.base import ArraySource, RetrievalData, Split
from robusthash.data.photo_sources import PHOTOGRAPHS, TAGS, Photograph, photograph_path
from robusthash.data.splits import Indices, assemble, hash_pixels
from robusthash.data.transforms import Vocabulary, read_image

Labels = Literal["photo", "tags", "both"]

_CHOOSING_SIDE = (
    256  # windows are chosen on photographs of this shorter side, so that they are the same at every size
)
_DRAWING_FACTOR = (
    4  # and drawn from photographs of this many times the size: 1.6 pixels or more for each one drawn
)
_TRIES, _ROUNDS = 40, 25  # windows drawn for an item in one round, and rounds before giving up
_LEAST_DEVIATION = 10.0  # grey levels; a window below it (sky, black border) carries no identity


@dataclass(frozen=True)
class PhotoItem:
    """How one item was made."""

    photograph: str
    tags: tuple[str, ...]
    box: tuple[
        float, float, float, float
    ]  # left, top, right, bottom as shares of the photograph's width and height
    mirrored: bool
    brightness: float  # factor on the mean grey level
    contrast: float  # factor on the deviation from the mean
    quality: int  # of the JPEG file that the pixels went through
    caption: str


@dataclass(frozen=True)
class PhotoSource:
    """Rendered items in memory, with the record of how each was made."""

    arrays: ArraySource
    items: tuple[PhotoItem, ...]

    def __len__(self) -> int:
        return len(self.items)

    def inputs(self, rows: Tensor) -> Inputs:
        return self.arrays.inputs(rows)

    def hashes(self) -> np.ndarray:
        """Of the pixels alone: a caption does not make another image."""
        return hash_pixels(self.arrays.arrays["image"])


@register("data", "photos", state="measured")
def photos(
    size: int = 48,
    labels: Labels = "photo",
    texts: bool = False,
    train: int = 2000,
    query: int = 400,
    database: int = 2000,
    max_overlap: float = 0.75,
    seed: int = 0,
) -> RetrievalData:
    """Copies of twenty real photographs: windows, mirrored, brighter or darker, re-compressed. No download.

    A window covers 40 to 100 % of the photograph's shorter side. No query window has an intersection over
    union above ``max_overlap`` with a training or database window of the same photograph, mirrored ones
    included; a containment measure cannot be bounded, because a large window contains every small one. Items
    are balanced over the photographs: item i shows photograph i mod 20. The same options give the same bytes,
    for one version of Pillow.

    Args:
        size: side of the items in pixels, 16 to 256.
        labels: ``photo`` makes copies of the same photograph relevant; ``tags`` uses what several photographs
            share (face, space, texture and the like), multi-label; ``both`` has the columns of both.
        texts: adds a bag of the caption's words as modality ``text``; the vocabulary is that of the training
            captions.
        train, query, database: items in each split; the three are disjoint.
        max_overlap: in (0, 1].

    Raises:
        FileNotFoundError: scikit-image or scikit-learn came without its photographs.
        ValueError: an option outside its range, or no window keeps to ``max_overlap``.
    """
    _check_options(size, labels, max_overlap, train=train, query=query, database=database)
    draws = Draws(seed).within("photos")
    opened = [_open(photograph) for photograph in PHOTOGRAPHS]
    tables = [_summed(_reduced(image, _CHOOSING_SIDE)) for image in opened]
    asked = _windows(tables, query, draws.within("query"), None, max_overlap)
    items: list[PhotoItem] = []
    for part, count in (("train", train), ("query", query), ("database", database)):
        within = draws.within(part)
        items += _describe(
            asked if part == "query" else _windows(tables, count, within, asked, max_overlap), within
        )
    drawn = {
        photograph.name: _reduced(image, _DRAWING_FACTOR * size)
        for photograph, image in zip(PHOTOGRAPHS, opened, strict=True)
    }
    arrays = {"image": torch.stack([_render(item, drawn[item.photograph], size) for item in items])}
    note = f"Windows of {len(PHOTOGRAPHS)} photographs; IoU of a query window with another is {max_overlap} at most."
    if texts:
        vocabulary = Vocabulary.fit(item.caption for item in items[:train])
        arrays["text"] = vocabulary.encode([item.caption for item in items])
        unseen, total = vocabulary.unseen(item.caption for item in items[train:])
        note += f" {unseen} of {total} caption words of query and database are outside the vocabulary."
    source = PhotoSource(ArraySource(arrays), tuple(items))
    rows = torch.arange(len(items))
    indices = Indices(rows[:train], rows[train : train + query], rows[train + query :])
    names, columns = _label_columns(items, labels)
    return assemble("photos", source, columns, source.hashes(), indices, names, note)


def describe_item(split: Split, position: int) -> PhotoItem:
    """How the item at ``position`` of a split of ``photos`` was made.

    Raises:
        ValueError: the split is of another data set.
        IndexError: no such position.
    """
    if not isinstance(split.source, PhotoSource):
        raise ValueError(f"the {split.name} split is not made of the embedded photographs")
    return split.source.items[int(split.rows[position])]


def thumbnail(item: PhotoItem, size: int = 256) -> Tensor:
    """The item's own window under the item's own changes, drawn at another size: (3, size, size) uint8, for
    people."""
    photograph = next(known for known in PHOTOGRAPHS if known.name == item.photograph)
    return _render(item, _reduced(_open(photograph), _DRAWING_FACTOR * size), size)


def _check_options(size: int, labels: str, max_overlap: float, **counts: int) -> None:
    if not 16 <= size <= 256:
        raise ValueError(f"size must lie in 16..256 pixels, got {size}")
    if labels not in ("photo", "tags", "both"):
        raise ValueError(f"labels must be 'photo', 'tags' or 'both', got {labels!r}")
    if not 0 < max_overlap <= 1:
        raise ValueError(f"max_overlap must lie in (0, 1], got {max_overlap}")
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")


def _open(photograph: Photograph) -> Image.Image:
    return Image.fromarray(read_image(photograph_path(photograph)).permute(1, 2, 0).numpy())


def _reduced(image: Image.Image, side: int) -> Image.Image:
    """The photograph with ``side`` pixels on its shorter side, or itself where it has fewer."""
    scale = side / min(image.size)
    if scale >= 1:
        return image
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def _summed(image: Image.Image) -> np.ndarray:
    """(2, H + 1, W + 1) summed-area tables of the grey levels and of their squares."""
    grey = np.asarray(image.convert("L"), dtype=np.float64)
    return np.pad(np.stack([grey, grey**2]), ((0, 0), (1, 0), (1, 0))).cumsum(1).cumsum(2)


def _windows(
    tables: Sequence[np.ndarray], count: int, draws: Draws, avoid: np.ndarray | None, max_overlap: float
) -> np.ndarray:
    """(count, 4) boxes as shares of width and height; item i is of photograph i mod 20.

    Each item takes the first of its own candidates that has content and keeps away from the windows to
    ``avoid``.
    """
    boxes = np.empty((count, 4))
    for number, table in enumerate(tables):
        height, width = table.shape[1] - 1, table.shape[2] - 1
        taken = np.empty((0, 4)) if avoid is None else avoid[number :: len(tables)]
        waiting = torch.arange(number, count, len(tables))
        for attempt in range(_ROUNDS):
            numbers = draws.within("window", attempt).uniform(waiting, (_TRIES, 4))
            candidates = _candidates(width, height, numbers.double().numpy())
            allowed = _deviation(table, candidates) >= _LEAST_DEVIATION
            for box in taken:
                allowed &= overlap(candidates, box) <= max_overlap
            found = allowed.any(axis=1)
            boxes[waiting.numpy()[found]] = candidates[found, allowed[found].argmax(axis=1)]
            waiting = waiting[torch.from_numpy(~found)]
            if len(waiting) == 0:
                break
        else:
            raise ValueError(
                f"{_ROUNDS * _TRIES} windows of the photograph {PHOTOGRAPHS[number].name!r} all overlap one of its "
                f"{len(taken)} query windows by an IoU above {max_overlap}; raise max_overlap or ask for fewer queries"
            )
    return boxes


def _candidates(width: int, height: int, numbers: np.ndarray) -> np.ndarray:
    """(..., 4) in [0, 1) -> (..., 4) boxes: side 40-100 % of the shorter side, aspect 4:5 to 5:4, placed
    anywhere."""
    side = (0.4 + 0.6 * numbers[..., 0]) * min(width, height)
    stretch = np.exp((numbers[..., 1] - 0.5) * np.log(1.25))  # square root of the aspect
    across, down = np.minimum(side * stretch / width, 1), np.minimum(side / stretch / height, 1)
    left, top = numbers[..., 2] * (1 - across), numbers[..., 3] * (1 - down)
    return np.stack([left, top, left + across, top + down], axis=-1)


def overlap(boxes: np.ndarray, box: np.ndarray) -> np.ndarray:
    """(..., 4) boxes and one box (4,) -> (...) intersection over union."""
    shared = np.minimum(boxes[..., 2:], box[2:]) - np.maximum(boxes[..., :2], box[:2])
    intersection = shared.clip(min=0).prod(axis=-1)
    areas = (boxes[..., 2:] - boxes[..., :2]).prod(axis=-1) + (box[2:] - box[:2]).prod()
    return intersection / (areas - intersection)


def _deviation(table: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Summed-area tables and (..., 4) boxes -> (...) standard deviation of the grey levels inside."""
    height, width = table.shape[1] - 1, table.shape[2] - 1
    left, top, right, bottom = np.moveaxis(np.rint(boxes * [width, height, width, height]).astype(int), -1, 0)
    sums = table[:, bottom, right] - table[:, top, right] - table[:, bottom, left] + table[:, top, left]
    mean, mean_square = sums / ((right - left) * (bottom - top))
    return np.sqrt((mean_square - mean**2).clip(min=0))


def _describe(boxes: np.ndarray, draws: Draws) -> list[PhotoItem]:
    numbers = draws.within("changes").uniform(torch.arange(len(boxes)), (5,)).double().numpy()
    items = []
    for number, (box, (flip, light, contrast, quality, phrase)) in enumerate(
        zip(boxes, numbers, strict=True)
    ):
        photograph = PHOTOGRAPHS[number % len(PHOTOGRAPHS)]
        changes = (flip < 0.5, 0.75 + 0.5 * light, 0.75 + 0.5 * contrast, 30 + int(quality * 66))
        words = photograph.phrases[int(phrase * len(photograph.phrases))]
        left, top, right, bottom = (float(edge) for edge in box)
        share = (right - left) * (bottom - top)
        items.append(
            PhotoItem(
                photograph.name,
                photograph.tags,
                (left, top, right, bottom),
                *changes,
                _caption(words, share, *changes),
            )
        )
    return items


def _caption(
    phrase: str, share: float, mirrored: bool, brightness: float, contrast: float, quality: int
) -> str:
    """A phrase and what was done to the photograph: "a tabby cat, cropped closely, mirrored and slightly
    darker"."""
    words = [
        "cropped closely" if share < 0.25 else "cropped" if share < 0.6 else "",
        "mirrored" if mirrored else "",
        "darker" if brightness < 0.85 else "slightly darker" if brightness < 0.95 else "",
        "brighter" if brightness > 1.15 else "slightly brighter" if brightness > 1.05 else "",
        "with less contrast" if contrast < 0.87 else "with more contrast" if contrast > 1.13 else "",
        "strongly compressed" if quality < 50 else "",
    ]
    said = [word for word in words if word]
    if len(said) > 1:
        said = [*said[:-2], f"{said[-2]} and {said[-1]}"]
    return ", ".join([phrase, *said])


def _render(item: PhotoItem, image: Image.Image, size: int) -> Tensor:
    """(3, size, size) uint8: the window resized (antialiased), mirrored, re-lit, through a JPEG file."""
    left, top, right, bottom = item.box
    window = (left * image.width, top * image.height, right * image.width, bottom * image.height)
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=window), dtype=np.float32)
    if item.mirrored:
        pixels = pixels[:, ::-1]
    mean = pixels.mean()
    lit = (pixels - mean) * item.contrast + mean * item.brightness
    stream = io.BytesIO()
    Image.fromarray(np.rint(lit).clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=item.quality)
    with Image.open(stream, formats=["JPEG"]) as copy:
        return torch.from_numpy(np.array(copy)).permute(2, 0, 1)


def _label_columns(items: Sequence[PhotoItem], labels: Labels) -> tuple[tuple[str, ...], Tensor]:
    """Label names and the (N, C) multi-hot matrix."""
    names = () if labels == "tags" else tuple(photograph.name for photograph in PHOTOGRAPHS)
    names += () if labels == "photo" else TAGS
    rows = [[float(name == item.photograph or name in item.tags) for name in names] for item in items]
    return names, torch.tensor(rows)
