"""MS-COCO: photographs with 80 categories of objects and five captions, in the folders of its official
archives."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from robusthash.core.registry import register
from robusthash.data.base import RetrievalData
from robusthash.data.image_files import MEMORY, Decoding
from robusthash.data.official import Pool, Protocol, choose, find, make_data, protocol
from robusthash.data.splits import Indices
from robusthash.data.text_modality import Caption, Texts, TextStyle
from robusthash.data.transforms import Fit, ImageFile, OnError

SPLITS = {
    "sfcl": Protocol(5000, 10000, "random", "SFCL"),
    "drfgd": Protocol(2000, 10000, "random", "DRFGD, EQB2A, TA-DCH"),
    "ucch": Protocol(5000, None, "last", "UCCH (code)"),
}
_KARPATHY, _OFFICIAL = "dsarh", "official"  # splits that are written down, not drawn

_PARTS = ("train", "val")


@register("data", "mscoco", paper="Lin et al. 2014", modality="image+text")
def mscoco(
    root: str | Path = "data",
    year: Literal[2014, 2017] = 2017,
    split: str = "sfcl",
    karpathy: str | Path | None = None,
    unlabelled: Literal["drop", "keep"] = "drop",
    query: int | None = None,
    train: int | None = None,
    database: int | None = None,
    seed: int = 0,
    size: int = 64,
    fit: Fit = "crop",
    texts: Texts = True,
    caption: Caption = "all",
    vocabulary: int = 2000,
    tokenizer: str | Path | None = None,
    max_length: int = 64,
    on_error: OnError = "raise",
    memory: int = MEMORY,
) -> RetrievalData:
    """MS-COCO: 123,287 photographs, 80 categories of objects (several an image) and five captions an image.

    Items stand in the order train then val, by image number. 1,069 of the full set show no object of any
    category; they have no relevant item at all, and are dropped and counted in the note. Crowds count as
    their category. Splits are drawn by ``seed``: the published draws are not known.

    Args:
        root: folder that holds ``annotations/`` and the image folders ``train2017/`` and ``val2017/`` (or
            2014), at most three folders down.
        year: 2014 (82,783 and 40,504 images) or 2017 (118,287 and 5,000 of the same).
        split: sizes of ``sfcl`` (5,000 queries, 10,000 training items), ``drfgd`` (2,000 and 10,000),
            ``ucch`` (the last 5,000, trained on all others); ``dsarh`` follows the ``karpathy`` file (5,000
            queries, 5,000 for validation, all others trained on and searched); ``official`` has the val
            images as queries.
        karpathy: ``dataset_coco.json``: its ``images`` have ``cocoid`` and ``split`` (train, restval, val or
            test).
        unlabelled: ``drop`` images without any category, or ``keep`` them.
        query, train, database: other sizes of a drawn split; a cut database is drawn from all that are no
            queries.
        size, fit: of the square images in pixels, as in ``read_image``.
        texts: ``True`` is a bag of the words of the captions without stop words, ``"tokens"`` token ids.
        caption: use the ``first`` caption of an image (by annotation number), or ``all`` of them joined.
        vocabulary: most frequent words of the training captions that the bag counts.
        tokenizer, max_length: for tokens, the folder with the tokenizer and the longest text.
        on_error, memory: as in ``folder``.

    Raises:
        FileNotFoundError: a file is missing; the message says which archive it is in and where it goes.
        KeyError: an unknown split.
        ValueError: broken annotations, an unknown option, too few items.
    """
    if year not in (2014, 2017):
        raise ValueError(f"year must be 2014 or 2017, got {year!r}")
    if unlabelled not in ("drop", "keep"):
        raise ValueError(f"unlabelled must be 'drop' or 'keep', got {unlabelled!r}")
    drawn = split not in (_KARPATHY, _OFFICIAL)
    how = protocol({**SPLITS, **dict.fromkeys((_KARPATHY, _OFFICIAL), SPLITS["sfcl"])}, split)
    if not drawn and (query, train, database) != (None, None, None):
        raise ValueError(
            f"query, train and database are sizes of a drawn split, and {split!r} is written down"
        )
    decoding = Decoding(size, fit, on_error, memory=memory)
    style = TextStyle(
        texts, caption, vocabulary, tokenizer, max_length, _stop_words() if texts else frozenset()
    )
    pool, numbers = _pool(Path(root), year, bool(texts))
    wanted = torch.ones(len(pool), dtype=torch.bool) if unlabelled == "keep" else pool.labels.any(1)
    pool, numbers = pool.only(wanted, "no label"), numbers[wanted]
    belong = f"train{year}.zip and val{year}.zip unpack to train{year}/ and val{year}/ beside annotations/"
    pool, numbers = pool.on_disk(belong), numbers[torch.tensor([file.path.is_file() for file in pool.files])]
    if split == _KARPATHY:
        indices = _karpathy_split(karpathy, numbers)
    elif split == _OFFICIAL:
        is_val = torch.tensor([file.path.parent.name.startswith("val") for file in pool.files])
        rest = torch.nonzero(~is_val).flatten()
        indices = Indices(rest, torch.nonzero(is_val).flatten(), rest)
    else:
        indices = choose(pool.labels, how, query, train, database, seed, pool.names)
    note = (
        f"Split {split}" + (f", seed {seed}" if drawn else "") + f"; images {fit} to {size} x {size}; {year}."
    )
    return make_data("mscoco", pool, indices, decoding, style, note)


def _pool(root: Path, year: int, texts: bool) -> tuple[Pool, Tensor]:
    """All images of both parts, and their image numbers (N,)."""
    files, numbers, labels, captions = [], [], [], []
    names: tuple[str, ...] = ()
    for part in _PARTS:
        instances = _annotations(root, f"instances_{part}{year}.json", "categories", "images", "annotations")
        # numbers of categories have gaps (1 to 90 for 80): columns follow them in ascending order
        categories = sorted(instances["categories"], key=lambda category: category["id"])
        named = tuple(category["name"] for category in categories)
        if names and named != names:
            raise ValueError(f"instances_{part}{year}.json has other categories than the training part")
        names = named
        column = {category["id"]: place for place, category in enumerate(categories)}
        images = sorted(instances["images"], key=lambda image: image["id"])
        row = {image["id"]: place for place, image in enumerate(images)}
        shown = torch.zeros(len(images), len(names))
        for annotation in instances["annotations"]:
            image, category = row.get(annotation["image_id"]), column.get(annotation["category_id"])
            if image is None or category is None:
                raise ValueError(
                    f"instances_{part}{year}.json has an object of an unknown image or category: {annotation}"
                )
            shown[image, category] = 1
        labels.append(shown)
        folder = find(
            root, f"{part}{year}", f"{part}{year}.zip unpacks to a folder of that name beside annotations/"
        )
        files += [ImageFile(folder / image["file_name"]) for image in images]
        numbers += [image["id"] for image in images]
        if texts:
            said = _captions(root, f"captions_{part}{year}.json")
            captions += [said.get(image["id"], ()) for image in images]
    return Pool(tuple(files), torch.cat(labels), names, tuple(captions) if texts else None), torch.tensor(
        numbers
    )


def _annotations(root: Path, name: str, *keys: str) -> dict[str, Any]:
    year = Path(name).stem[-4:]
    path = find(
        root, f"annotations/{name}", f"annotations_trainval{year}.zip unpacks to annotations/ with {name}"
    )
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict) or set(keys) - set(content):
        raise ValueError(f"{path} should hold {', '.join(keys)}; is it the file of another task?")
    return content


def _captions(root: Path, name: str) -> dict[int, tuple[str, ...]]:
    """Image number -> its captions, by annotation number."""
    said = defaultdict(list)
    for annotation in sorted(
        _annotations(root, name, "annotations")["annotations"], key=lambda known: known["id"]
    ):
        said[annotation["image_id"]].append(" ".join(annotation["caption"].split()))
    return {image: tuple(captions) for image, captions in said.items()}


def _karpathy_split(file: str | Path | None, numbers: Tensor) -> Indices:
    """The split that ``dataset_coco.json`` writes down."""
    if file is None or not Path(file).is_file():
        raise FileNotFoundError(
            f"split='dsarh' needs karpathy=, the file dataset_coco.json of Karpathy's splits: {file}"
        )
    try:
        part = {image["cocoid"]: image["split"] for image in json.loads(Path(file).read_bytes())["images"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} should hold images with cocoid and split: {error!r}") from error
    if unknown := [number for number in numbers.tolist() if number not in part]:
        raise ValueError(f"{file} knows nothing of {len(unknown)} images (first: {unknown[0]})")

    def rows(*wanted: str) -> Iterator[int]:
        return (row for row, number in enumerate(numbers.tolist()) if part[number] in wanted)

    trained, asked, held = (
        torch.tensor(list(rows(*of)), dtype=torch.int64) for of in (("train", "restval"), ("test",), ("val",))
    )
    return Indices(trained, asked, trained, held if len(held) else None)


def _stop_words() -> frozenset[str]:
    from sklearn.feature_extraction.text import (
        ENGLISH_STOP_WORDS,  # a second to import, and only bags need it
    )

    return ENGLISH_STOP_WORDS
