"""The embedded data set: windows of twenty photographs that come with scikit-image and scikit-learn.

Every item is a window of one photograph under the changes that a copy goes through: cropping and scaling,
mirroring, brightness and contrast, JPEG compression. With the label of the photograph, retrieval is copy
detection; with tags that photographs share, it is multi-label retrieval. Nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from robusthash.core.registry import register
from robusthash.core.runtime import Draws
from robusthash.data.base import ArraySource, RetrievalData, Split
from robusthash.data.image_files import read_image
from robusthash.data.image_text import Vocabulary
from robusthash.data.splits import Indices, assemble, check_sizes, hash_pixels
from robusthash.data.transforms import through_jpeg

Labels = Literal["photo", "tags", "both"]

_CHOOSING_SIDE = 256  # shorter side on which windows are chosen, so that they are the same at every size
_DRAWING_FACTOR = 4  # items are drawn from photographs of 4 times the size: 1.6 pixels or more for each one
_TRIES, _ROUNDS = 40, 25  # windows drawn for an item in one round, and rounds before giving up
_LEAST_DEVIATION = 10.0  # grey levels; a window below it (sky, black border) carries no identity


@dataclass(frozen=True)
class Photograph:
    """One photograph and what is written about it."""

    name: str
    file: str  # package / path inside the package
    tags: tuple[str, ...]  # each is shared with another photograph
    phrases: tuple[str, ...]  # its names in captions


# The wheels also hold drawings (chessboards, colour wheel, horse, phantom, logo), tiny crops (microaneurysms,
# LFW faces, multi-page TIFF) and the right-hand view of the motorcycle. That view shows the scene of the left
# one from a step aside: as a photograph of its own it would be a near copy that counts as irrelevant.
# fmt: off
PHOTOGRAPHS = (
    Photograph("astronaut", "skimage/data/astronaut.png", ("person", "face", "space"),
               ("a smiling astronaut in an orange suit",
                "a woman in a space suit before a flag and a model of the shuttle")),
    Photograph("brick", "skimage/data/brick.png", ("texture", "building"),
               ("a brick wall", "rows of long bricks in a wall")),
    Photograph("camera", "skimage/data/camera.png", ("person", "outdoor", "building"),
               ("a man behind a camera on a tripod", "a photographer in a dark coat on a lawn")),
    Photograph("cell", "skimage/data/cell.png", ("medical",),
               ("a bright cell under the microscope", "a single round cell in saline")),
    Photograph("cat", "skimage/data/chelsea.png", ("face", "closeup"),
               ("a tabby cat", "the face of a ginger cat with green eyes")),
    Photograph("clock", "skimage/data/clock_motion.png", ("indoor",),
               ("a wall clock blurred by motion", "a blurred grey clock")),
    Photograph("coffee", "skimage/data/coffee.png", ("indoor", "closeup"),
               ("a cup of coffee on a wooden table", "espresso in a red cup with a spoon")),
    Photograph("coins", "skimage/data/coins.png", ("metal", "closeup"),
               ("rows of ancient coins", "old greek coins on a dark ground")),
    Photograph("grass", "skimage/data/grass.png", ("texture", "plant"),
               ("blades of grass", "a meadow seen from above")),
    Photograph("gravel", "skimage/data/gravel.png", ("texture",),
               ("a bed of gravel", "many small grey stones")),
    Photograph("galaxies", "skimage/data/hubble_deep_field.jpg", ("space", "sky", "night"),
               ("distant galaxies in a black sky", "the deep field of a space telescope")),
    Photograph("tissue", "skimage/data/ihc.png", ("medical", "texture"),
               ("stained tissue under the microscope", "brown and blue stained cells of a gland")),
    Photograph("moon", "skimage/data/moon.png", ("space",),
               ("the surface of the moon", "craters on the grey ground of the moon")),
    Photograph("motorcycle", "skimage/data/motorcycle_left.png", ("vehicle", "indoor", "metal"),
               ("a red motorcycle in a garage", "a parked motorcycle before shelves")),
    Photograph("page", "skimage/data/page.png", ("document",),
               ("a printed page", "a page of text about segmentation")),
    Photograph("retina", "skimage/data/retina.jpg", ("medical",),
               ("the retina of an eye with its blood vessels", "a red eye ground with a bright disc")),
    Photograph("rocket", "skimage/data/rocket.jpg", ("vehicle", "space", "sky", "night", "outdoor"),
               ("a rocket on its launch pad", "a white rocket between two towers at dusk")),
    Photograph("writing", "skimage/data/text.png", ("document",),
               ("words written by hand", "handwriting seen aslant")),
    Photograph("pagoda", "sklearn/datasets/images/china.jpg", ("building", "plant", "sky", "outdoor"),
               ("a chinese pagoda among trees", "a temple tower above a lake")),
    Photograph("flower", "sklearn/datasets/images/flower.jpg", ("plant", "closeup", "outdoor"),
               ("an orange dahlia", "a round flower with many petals")),
)
# fmt: on

TAGS = tuple(sorted({tag for photograph in PHOTOGRAPHS for tag in photograph.tags}))


@dataclass(frozen=True)
class PhotoItem:
    """The window and the changes that made one item."""

    photograph: str
    tags: tuple[str, ...]
    box: tuple[float, float, float, float]  # left, top, right, bottom as shares of width and height
    mirrored: bool
    brightness: float  # factor on the mean grey level
    contrast: float  # factor on the deviation from the mean
    quality: int  # of the JPEG file that the pixels went through
    caption: str


@dataclass(frozen=True)
class PhotoSource(ArraySource):
    """Rendered items in memory, with the record of how each was made."""

    items: tuple[PhotoItem, ...]


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
    """
    if not 16 <= size <= 256:
        raise ValueError(f"size must lie in 16..256 pixels, got {size}")
    if not 0 < max_overlap <= 1:
        raise ValueError(f"max_overlap must lie in (0, 1], got {max_overlap}")
    check_sizes(train=train, query=query, database=database)
    draws = Draws(seed).within("photos")
    opened = [_open(photograph) for photograph in PHOTOGRAPHS]
    tables = [_summed(_reduced(image, _CHOOSING_SIDE)) for image in opened]
    boxes = {"query": _windows(tables, query, draws.within("query"), None, max_overlap)}
    for part, count in (("train", train), ("database", database)):
        boxes[part] = _windows(tables, count, draws.within(part), boxes["query"], max_overlap)
    parts = [_describe(boxes[part], draws.within(part)) for part in ("train", "query", "database")]
    items = [item for part in parts for item in part]
    reduced = [_reduced(image, _DRAWING_FACTOR * size) for image in opened]
    by_name = {photograph.name: image for photograph, image in zip(PHOTOGRAPHS, reduced, strict=True)}
    arrays = {"image": torch.stack([_render(item, by_name[item.photograph], size) for item in items])}
    note = f"Windows of 20 photographs; IoU of a query window with another is {max_overlap} at most."
    vocabulary = None
    if texts:
        vocabulary = Vocabulary.fit(item.caption for item in items[:train])
        arrays["text"] = vocabulary.encode([item.caption for item in items])
        unseen, total = vocabulary.unseen(item.caption for item in items[train:])
        note += f" {unseen} of {total} caption words of query and database are outside the vocabulary."
    rows = torch.arange(len(items))
    indices = Indices(rows[:train], rows[train : train + query], rows[train + query :])
    names, columns = _label_columns(items, labels)
    # a caption does not make another image: the hashes are of the pixels alone
    hashes = hash_pixels(arrays["image"])
    source = PhotoSource(arrays, tuple(items))
    return assemble("photos", source, columns, hashes, indices, names, note, text_form=vocabulary)


def describe_item(split: Split, position: int) -> PhotoItem:
    """Return how the item at ``position`` was made; ValueError where the split is of another data set."""
    if not isinstance(split.source, PhotoSource):
        raise ValueError(f"the {split.name} split is not made of the embedded photographs")
    return split.source.items[int(split.rows[position])]


def thumbnail(item: PhotoItem, size: int = 256) -> Tensor:
    """The item drawn at another size, for people: (3, size, size) uint8."""
    photograph = next(each for each in PHOTOGRAPHS if each.name == item.photograph)
    return _render(item, _reduced(_open(photograph), _DRAWING_FACTOR * size), size)


def photograph_path(photograph: Photograph) -> Path:
    """The file inside the installed package, which itself is not imported."""
    package, _, inside = photograph.file.partition("/")
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / inside if spec is not None and spec.origin else Path(photograph.file)
    if not path.is_file():
        raise FileNotFoundError(
            f"the photograph {photograph.file} is missing; install the wheels that hold it again: "
            "pip install --force-reinstall --no-deps scikit-image scikit-learn"
        )
    return path


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

    Each item takes the first of its candidates that has content and keeps away from the windows to ``avoid``.
    """
    boxes = np.empty((count, 4))
    for number, table in enumerate(tables):
        height, width = table.shape[1] - 1, table.shape[2] - 1
        avoided = np.empty((0, 4)) if avoid is None else avoid[number :: len(tables)]
        waiting = torch.tensor(range(number, count, len(tables))).long()  # of few items maybe none
        for number_of_round in range(_ROUNDS):
            numbers = draws.within("window", number_of_round).uniform(waiting, (_TRIES, 4))
            candidates = _candidates(width, height, numbers.double().numpy())
            allowed = _deviation(table, candidates) >= _LEAST_DEVIATION
            for box in avoided:
                allowed &= overlap(candidates, box) <= max_overlap
            done = allowed.any(axis=1)
            boxes[waiting.numpy()[done]] = candidates[done, allowed[done].argmax(axis=1)]
            waiting = waiting[torch.from_numpy(~done)]
            if len(waiting) == 0:
                break
        else:
            raise ValueError(
                f"{_ROUNDS * _TRIES} windows of the photograph {PHOTOGRAPHS[number].name!r} all overlap a "
                f"query window by an IoU above {max_overlap}; raise max_overlap or ask for fewer queries"
            )
    return boxes


def _candidates(width: int, height: int, numbers: np.ndarray) -> np.ndarray:
    """(..., 4) in [0, 1) -> (..., 4) boxes: side 40-100 % of the shorter side, aspect 4:5 to 5:4."""
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
    """An item of every box: its photograph, changes drawn by its number, and a caption of them."""
    # numpy's float64 and not Python's float: only it makes ``_render`` compute in double precision
    numbers = draws.within("changes").uniform(torch.arange(len(boxes)), (5,)).double().numpy()
    items = []
    for number, (box, (flip, light, contrast, quality, phrase)) in enumerate(
        zip(boxes, numbers, strict=True)
    ):
        photograph = PHOTOGRAPHS[number % len(PHOTOGRAPHS)]
        changes = (flip < 0.5, 0.75 + 0.5 * light, 0.75 + 0.5 * contrast, 30 + int(quality * 66))
        words = photograph.phrases[int(phrase * len(photograph.phrases))]
        left, top, right, bottom = box.tolist()
        caption = _caption(words, (right - left) * (bottom - top), *changes)
        window = (left, top, right, bottom)
        items.append(PhotoItem(photograph.name, photograph.tags, window, *changes, caption))
    return items


def _caption(
    phrase: str, share: float, mirrored: bool, brightness: float, contrast: float, quality: int
) -> str:
    """A phrase and the changes: "a tabby cat, cropped closely, mirrored and slightly darker"."""
    changes = [
        "cropped closely" if share < 0.25 else "cropped" if share < 0.6 else "",
        "mirrored" if mirrored else "",
        "darker" if brightness < 0.85 else "slightly darker" if brightness < 0.95 else "",
        "brighter" if brightness > 1.15 else "slightly brighter" if brightness > 1.05 else "",
        "with less contrast" if contrast < 0.87 else "with more contrast" if contrast > 1.13 else "",
        "strongly compressed" if quality < 50 else "",
    ]
    words = [change for change in changes if change]
    if len(words) > 1:
        words = [*words[:-2], f"{words[-2]} and {words[-1]}"]
    return ", ".join([phrase, *words])


def _render(item: PhotoItem, image: Image.Image, size: int) -> Tensor:
    """(3, size, size) uint8: the window resized (antialiased), mirrored, re-lit, through a JPEG file."""
    left, top, right, bottom = item.box
    window = (left * image.width, top * image.height, right * image.width, bottom * image.height)
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=window), dtype=np.float32)
    if item.mirrored:
        pixels = pixels[:, ::-1]
    mean = pixels.mean()
    lit = (pixels - mean) * item.contrast + mean * item.brightness
    return through_jpeg(np.rint(lit).clip(0, 255).astype(np.uint8), item.quality)


def _label_columns(items: Sequence[PhotoItem], labels: Labels) -> tuple[tuple[str, ...], Tensor]:
    """Label names and the (N, C) multi-hot matrix."""
    names = () if labels == "tags" else tuple(photograph.name for photograph in PHOTOGRAPHS)
    names += () if labels == "photo" else TAGS
    rows = [[float(name == item.photograph or name in item.tags) for name in names] for item in items]
    return names, torch.tensor(rows)
