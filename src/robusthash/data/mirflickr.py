"""MIRFLICKR-25K: photographs with tags and 24 concepts, in the folders of its official archives."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from robusthash.core.registry import register
from robusthash.data.base import RetrievalData, find, flat_options, lines_of
from robusthash.data.image_files import ImageFile, ImageOptions
from robusthash.data.image_text import Pool, TextOptions, make_data
from robusthash.data.splits import SplitOptions, SplitProtocol, find_protocol, protocol_split

logger = logging.getLogger(__name__)

SPLITS = {
    "sfcl": SplitProtocol(2000, 5000, "random", "SFCL"),
    "drfgd": SplitProtocol(2000, 5000, "random", "DRFGD, EQB2A, TA-DCH"),
    "dsarh": SplitProtocol(1000, 5000, "random", "DSARH"),
    "dcmh": SplitProtocol(2000, 10000, "random", "DCMH, SSAH, AGAH, DADH (code)"),
    "ucch": SplitProtocol(2000, None, "last", "UCCH (code)"),
}

# fmt: off
CONCEPTS = (
    "animals", "baby", "bird", "car", "clouds", "dog", "female", "flower", "food", "indoor", "lake", "male",
    "night", "people", "plant_life", "portrait", "river", "sea", "sky", "structures", "sunset", "transport",
    "tree", "water",
)
STRICT = (
    "baby", "bird", "car", "clouds", "dog", "female", "flower", "male", "night", "people", "portrait",
    "river", "sea", "tree",
)
"""Concepts, and those that have a stricter list ``_r1`` too."""
# fmt: on

_IMAGES = (
    "mirflickr25k.zip unpacks to mirflickr/ with im1.jpg to im25000.jpg, meta/tags, meta/tags_raw and doc"
)
_LABELS = "mirflickr25k_annotations_v080.zip unpacks to animals.txt and 37 more; a folder of its own is best"
_COMPLETE, _FILTERED = 25000, 20015


@register("data", "mirflickr", paper="Huiskes and Lew 2008", modality="image+text")
@flat_options("caption", "vocabulary")
def mirflickr(
    root: str | Path = "data",
    mir_filter: Literal["none", "label", "label+tag"] = "label+tag",
    concepts: Literal[24, 38] = 24,
    image: ImageOptions = ImageOptions(),
    text: TextOptions = TextOptions(),
    splits: SplitOptions = SplitOptions("sfcl"),
) -> RetrievalData:
    """MIRFLICKR-25K: 25,000 photographs of Flickr, 24 or 38 concepts (several an image) and owners' tags.

    Papers use 24 concepts and, of the 25,000, the 20,015 that have a concept and a common tag (the default
    filter). SFCL and DSARH say 25,000; with their number of queries the two cannot be told apart. Splits are
    drawn by ``seed``: the published draws are not known, and the order of ``ucch`` is that of the image
    numbers here.

    Args:
        root: folder that holds ``mirflickr/`` and the lists of the concepts, at most three folders down; the
            archive of the lists has no folder of its own, so any will do.
        mir_filter: ``none`` keeps every image, ``label`` those with a concept, ``label+tag`` those with a tag
            of the common ones as well.
        concepts: 24, or 38 with the stricter ``_r1`` lists of 14 of them, which imply their base.
        text: ``True`` is a bag of the 1,386 common tags, ``"tokens"`` the raw tags, joined by spaces, as ids.
        splits: sizes of ``sfcl`` or ``drfgd`` (2,000 queries, 5,000 training items), ``dsarh`` (1,000 and
            5,000), ``dcmh`` (2,000 and 10,000), ``ucch`` (the last 2,000, trained on all others). All others
            are the database; a cut one is drawn from all that are no queries.
    """
    protocol = find_protocol(SPLITS, splits.split)
    folder = find(Path(root), "mirflickr", _IMAGES)
    numbers = _image_numbers(folder)
    labels, names = _labels(find(Path(root), "animals.txt", _LABELS).parent, numbers, concepts)
    bags = _tag_bags(folder, numbers) if text.texts or mir_filter == "label+tag" else None
    raw = tuple(_tags(folder, "tags_raw", number) for number in numbers) if text.texts == "tokens" else None
    pool = Pool(tuple(ImageFile(folder / f"im{number}.jpg") for number in numbers), labels, names, raw, bags)
    if mir_filter != "none":
        pool = pool.only(pool.labels.any(1), "no label")
    if mir_filter == "label+tag" and pool.bags is not None:
        pool = pool.only(pool.bags.any(1), "no common tag")
        pool = pool.expect(_FILTERED) if len(numbers) == _COMPLETE else pool
    indices = protocol_split(pool.labels, protocol, splits, names)
    note = f"Split {splits.split}, seed {splits.seed}; images {image}; filter {mir_filter}."
    return make_data("mirflickr", pool, indices, image, text, note)


def _image_numbers(folder: Path) -> list[int]:
    """The numbers of the images, ascending: im2 comes before im10."""
    matches = [re.fullmatch(r"im(\d+)\.jpg", path.name) for path in folder.iterdir()]
    numbers = sorted(int(match[1]) for match in matches if match)
    if not numbers:
        raise FileNotFoundError(f"no im1.jpg or other image in {folder}; {_IMAGES}")
    return numbers


def _labels(folder: Path, numbers: list[int], concepts: int) -> tuple[Tensor, tuple[str, ...]]:
    """(N, C) labels and their names, in alphabetical order of the files; ``_r1`` follows its base."""
    names = CONCEPTS if concepts == 24 else sorted([*CONCEPTS, *(f"{name}_r1" for name in STRICT)])
    lists = [folder / f"{name}.txt" for name in names]
    if missing := [path.name for path in lists if not path.is_file()]:
        raise FileNotFoundError(f"no {missing[0]} in {folder}; {_LABELS}")
    row = {number: position for position, number in enumerate(numbers)}
    labels = torch.zeros(len(numbers), len(lists))
    for column, path in enumerate(lists):
        for line in lines_of(path):
            if not line.isdecimal() or not 1 <= int(line) <= _COMPLETE:
                raise ValueError(f"{path} should hold one image number a line, 1 to 25000, not {line!r}")
            if int(line) in row:  # a partial set has only some of the images
                labels[row[int(line)], column] = 1
    if empty := [path.stem for path, count in zip(lists, labels.sum(0).tolist(), strict=True) if count == 0]:
        logger.warning("mirflickr: no image here has the concepts %s", ", ".join(empty))
    return labels, tuple(path.stem for path in lists)


def _tag_bags(folder: Path, numbers: list[int]) -> Tensor:
    """(N, V) bool, the common tags of each image; the columns are the lines of ``common_tags.txt``."""
    listed = folder / "doc" / "common_tags.txt"
    if not listed.is_file():
        raise FileNotFoundError(f"no file {listed}; {_IMAGES}")
    column = {line.split()[0]: number for number, line in enumerate(lines_of(listed))}
    bags = torch.zeros(len(numbers), len(column), dtype=torch.bool)
    for row, number in enumerate(numbers):
        bags[row, [column[tag] for tag in _tags(folder, "tags", number) if tag in column]] = True
    return bags


def _tags(folder: Path, kind: str, number: int) -> tuple[str, ...]:
    """The tags of one image, one a line; an image may have none, but it has the file."""
    path = folder / "meta" / kind / f"tags{number}.txt"
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; {_IMAGES}")
    return tuple(lines_of(path))
