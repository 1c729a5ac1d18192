"""MS-COCO: photographs with 80 categories of objects and five captions, in the folders of its archives."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from robusthash.core.limited_files import read_json
from robusthash.core.registry import register
from robusthash.data.base import RetrievalData, find, flat_options
from robusthash.data.image_files import ImageFile, ImageOptions
from robusthash.data.image_text import Pool, TextOptions, make_data
from robusthash.data.splits import Indices, SplitOptions, SplitProtocol, find_protocol, protocol_split

SPLITS = {
    "sfcl": SplitProtocol(5000, 10000, "random", "SFCL"),
    "drfgd": SplitProtocol(2000, 10000, "random", "DRFGD, EQB2A, TA-DCH"),
    "ucch": SplitProtocol(5000, None, "last", "UCCH (code)"),
}
_ANNOTATIONS = 4 << 30  # bytes of a file of annotations; instances_train2017.json has 450 million
_KARPATHY, _OFFICIAL = "dsarh", "official"  # splits that are written down, not drawn


@register("data", "mscoco", paper="Lin et al. 2014", modality="image+text")
@flat_options()
def mscoco(
    root: str | Path = "data",
    year: Literal[2014, 2017] = 2017,
    karpathy: str | Path | None = None,
    unlabelled: Literal["drop", "keep"] = "drop",
    image: ImageOptions = ImageOptions(),
    text: TextOptions = TextOptions(vocabulary=2000),
    splits: SplitOptions = SplitOptions("sfcl"),
) -> RetrievalData:
    """MS-COCO: 123,287 photographs, 80 categories of objects (several an image) and five captions an image.

    Items stand in the order train then val, by image number. 1,069 of the full set show no object of any
    category; they have no relevant item at all, and are dropped and counted in the note. Crowds count as
    their category. Splits are drawn by ``seed``: the published draws are not known.

    Args:
        root: folder that holds ``annotations/`` and the image folders ``train2017/`` and ``val2017/`` (or
            2014), at most three folders down.
        year: 2014 (82,783 and 40,504 images) or 2017 (118,287 and 5,000 of the same).
        karpathy: ``dataset_coco.json``: its ``images`` have ``cocoid`` and ``split`` (train, restval, val or
            test).
        unlabelled: ``drop`` images without any category, or ``keep`` them.
        text: ``True`` is a bag of the words of the captions without stop words, ``"tokens"`` token ids.
        splits: sizes of ``sfcl`` (5,000 queries, 10,000 training items), ``drfgd`` (2,000 and 10,000),
            ``ucch`` (the last 5,000, trained on all others); ``dsarh`` follows the ``karpathy`` file (5,000
            queries, 5,000 for validation, all others trained on and searched); ``official`` has the val
            images as queries. A cut database is drawn from all that are no queries.
    """
    written = (_KARPATHY, _OFFICIAL)
    protocol = find_protocol({**SPLITS, **dict.fromkeys(written, SPLITS["sfcl"])}, splits.split)
    if splits.split in written:
        splits.refuse_sizes(f", and {splits.split!r} is written down")
    pool, numbers = _pool(Path(root), year, bool(text.texts))
    if unlabelled == "drop":
        labelled = pool.labels.any(1)
        pool, numbers = pool.only(labelled, "no label"), numbers[labelled]
    belong = f"train{year}.zip and val{year}.zip unpack to train{year}/ and val{year}/ next to annotations/"
    there = torch.tensor([file.path.is_file() for file in pool.files])
    pool, numbers = pool.on_disk(belong), numbers[there]
    seed = ""
    if splits.split == _KARPATHY:
        indices = _karpathy_split(karpathy, numbers)
    elif splits.split == _OFFICIAL:
        is_val = torch.tensor([file.path.parent.name.startswith("val") for file in pool.files])
        rest = torch.nonzero(~is_val).flatten()
        indices = Indices(rest, torch.nonzero(is_val).flatten(), rest)
    else:
        indices, seed = protocol_split(pool.labels, protocol, splits, pool.names), f", seed {splits.seed}"
    note = f"Split {splits.split}{seed}; images {image}; {year}."
    return make_data("mscoco", pool, indices, image, text, note)


def _pool(root: Path, year: int, texts: bool) -> tuple[Pool, Tensor]:
    """All images of both parts, and their image numbers (N,)."""
    files, numbers, labels, captions = [], [], [], []
    names: tuple[str, ...] = ()
    for part in (f"train{year}", f"val{year}"):
        name = f"instances_{part}.json"
        instances = _annotations(root, name, "categories", "images", "annotations")
        # numbers of categories have gaps (1 to 90 for 80): columns follow them in ascending order
        categories = sorted(instances["categories"], key=lambda category: category["id"])
        part_names = tuple(category["name"] for category in categories)
        if names and part_names != names:
            raise ValueError(f"{name} has other categories than the training part")
        names = part_names
        images = sorted(instances["images"], key=lambda image: image["id"])
        part_numbers = [image["id"] for image in images]
        columns = [category["id"] for category in categories]
        labels.append(_labels(instances["annotations"], part_numbers, columns, name))
        folder = find(root, part, f"{part}.zip unpacks to a folder of that name next to annotations/")
        files += [ImageFile(folder / image["file_name"]) for image in images]
        numbers += part_numbers
        if texts:
            by_image = _captions(root, f"captions_{part}.json")
            captions += [by_image.get(number, ()) for number in part_numbers]
    pool = Pool(tuple(files), torch.cat(labels), names)
    if texts:
        pool = replace(pool, texts=tuple(captions), stop_words=_stop_words())
    return pool, torch.tensor(numbers)


def _labels(annotations: list[dict], images: list[int], categories: list[int], name: str) -> Tensor:
    """(N, C) multi-hot labels of these image numbers, with a column for each category number."""
    row = {number: position for position, number in enumerate(images)}
    column = {number: position for position, number in enumerate(categories)}
    labels = torch.zeros(len(images), len(categories))
    for annotation in annotations:
        image, category = row.get(annotation["image_id"]), column.get(annotation["category_id"])
        if image is None or category is None:
            raise ValueError(f"{name} has an object of an unknown image or category: {annotation}")
        labels[image, category] = 1
    return labels


def _annotations(root: Path, name: str, *keys: str) -> dict[str, Any]:
    year = Path(name).stem[-4:]
    belong = f"annotations_trainval{year}.zip unpacks to annotations/ with {name}"
    path = find(root, f"annotations/{name}", belong)
    content = read_json(path, _ANNOTATIONS, depth=None)
    if not isinstance(content, dict) or set(keys) - set(content):
        raise ValueError(f"{path} should hold {', '.join(keys)}; is it the file of another task?")
    return content


def _captions(root: Path, name: str) -> dict[int, tuple[str, ...]]:
    """Image number -> its captions, by annotation number."""
    captions = defaultdict(list)
    for each in sorted(_annotations(root, name, "annotations")["annotations"], key=lambda each: each["id"]):
        captions[each["image_id"]].append(" ".join(each["caption"].split()))
    return {image: tuple(texts) for image, texts in captions.items()}


def _karpathy_split(file: str | Path | None, numbers: Tensor) -> Indices:
    """The split that ``dataset_coco.json`` writes down."""
    if file is None or not Path(file).is_file():
        raise FileNotFoundError(f"split='dsarh' needs karpathy=, the file dataset_coco.json: {file}")
    try:
        images = read_json(file, _ANNOTATIONS, depth=None)["images"]
        part = {image["cocoid"]: image["split"] for image in images}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} should hold images with cocoid and split: {error!r}") from error
    if unknown := [number for number in numbers.tolist() if number not in part]:
        raise ValueError(f"{file} knows nothing of {len(unknown)} images (first: {unknown[0]})")

    def rows(*parts: str) -> Tensor:
        mask = torch.tensor([part[number] in parts for number in numbers.tolist()])
        return torch.nonzero(mask).flatten()

    training, validation = rows("train", "restval"), rows("val")
    return Indices(training, rows("test"), training, validation if len(validation) else None)


def _stop_words() -> frozenset[str]:
    from sklearn.feature_extraction.text import (
        ENGLISH_STOP_WORDS,
    )  # a second to import, and only bags need it

    return ENGLISH_STOP_WORDS
