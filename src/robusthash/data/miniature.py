"""Miniatures of data sets: a few generated items in the layout that the official archives unpack to.

They stand in for data that are not there, so that a recipe can be tried at its true image size. Readers take
them as they take the archives; numbers measured on them mean nothing.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from robusthash.core.registry import check
from robusthash.data import mirflickr, mscoco, nuswide
from robusthash.data.copies import CHANGES
from robusthash.data.splits import SplitProtocol
from robusthash.data.wikipedia import CATEGORIES

_CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SPLITS = ("train", "query", "database")

_PHOTOGRAPH = (500, 375)  # width and height of a photograph of Flickr
_TAGS = {"mirflickr": 1386, "nus-wide": 1000}
_WORDS = {"ucmerced": 304, "wikipedia": 20_000, "mscoco": 25_000}  # different words of the training texts
_LONGEST = 2500  # words of a text here: enough for every vocabulary of a recipe
_NO_FILES = ("photos", "synthetic")

Options = Mapping[str, Any]
Sizes = dict[str, int]
"""Items of ``train``, ``query`` and ``database``."""


@dataclass(frozen=True)
class Miniature:
    """A data set that was generated in the place of another.

    Attributes:
        settings: of the data component that reads it.
        official: items of each split of the set in whose place it stands.
    """

    settings: dict[str, Any]
    official: Sizes


def write_miniature(component: Options | str, root: Path, train: int, query: int, database: int) -> Miniature:
    """Write a miniature of the data set that a recipe names, large enough for splits of these sizes.

    Args:
        component: the section ``data`` of a recipe.
        root: an empty folder.
        train, query, database: items; a split that is written down by the set itself may have some more.

    Raises:
        ValueError: a data set without a layout that is known here, or options of files of your own.
    """
    card, explicit = check("data", component)
    if card.name in _NO_FILES:  # they need no files, and are cut as real data are
        defaults = _with_defaults(card.make, explicit)
        sizes = {name: int(defaults[name]) for name in SPLITS if name in defaults}
        return Miniature({"name": card.name, **explicit}, sizes)
    if card.name not in LAYOUTS:
        raise ValueError(f"there is no miniature of the data set {card.name!r}, only of {', '.join(LAYOUTS)}")
    options = _with_defaults(card.make, explicit)
    for name in ("manifest", "archive"):
        if explicit.get(name) is not None and card.name == "folder":
            raise ValueError(
                f"a miniature of 'folder' has class folders, and data.{name} is set; leave it out"
            )
    layout, requested = LAYOUTS[card.name], {"train": train, "query": query, "database": database}
    changes = layout.write(root, requested, options)
    elsewhere = ("npz", "archive", "manifest", *(["images"] if card.name == "nus-wide" else []))
    settings = {key: value for key, value in explicit.items() if key not in elsewhere}
    return Miniature({"name": card.name, **settings, "root": str(root), **changes}, layout.sizes(options))


def _with_defaults(make: Callable[..., Any], settings: Options) -> dict[str, Any]:
    parameters = inspect.signature(make).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty} | dict(settings)


# ------------------------------------------------------------------------------------------ parts of a layout


def picture(path: Path, number: int, size: tuple[int, int] = _PHOTOGRAPH) -> Path:
    """Write a JPEG of soft random colours, another for every number; ``size`` is width and height."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colours = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC).save(path, "JPEG", quality=85)
    return path


def _lines(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _words(number: int, different: int) -> str:
    """A text of as many different words as the training texts of the set have, as far as it is needed."""
    return " ".join(f"word{(number + place) % different}" for place in range(min(different, _LONGEST)))


def _pool(requested: Sizes, classes: int) -> int:
    """Items from which splits are drawn: enough for each class to give its share."""
    return max(2 * classes, 4 * (requested["train"] + requested["query"]), sum(requested.values()))


def _labelled(number: int, classes: int) -> set[int]:
    """One or two labels; each class has about as many items."""
    return {number % classes, (5 * number + 2) % classes}


def _tokens(root: Path, options: Options) -> dict[str, Any]:
    """A tokenizer where the recipe's folder is needed and is not there."""
    requested = options.get("tokenizer")
    if options.get("texts") != "tokens" or requested == "minilm":
        return {}
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    _lines(root / "tokenizer" / "vocab.txt", pieces)
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512}
    (root / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    (root / "tokenizer" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    return {"tokenizer": str(root / "tokenizer")}


def _by_protocol(total: int, options: Options, protocols: Mapping[str, SplitProtocol]) -> Sizes:
    protocol = protocols[options["split"]]
    return _rest(total, options, protocol.query, protocol.train)


def _rest(total: int, options: Options, query: int, train: int | None, disjoint: bool = False) -> Sizes:
    """Sizes where ``None`` is all that is no query, and with ``disjoint`` no training item either."""
    query = options["query"] or query
    train = options["train"] or train or total - query
    return {
        "train": train,
        "query": query,
        "database": options["database"] or total - query - train * disjoint,
    }


# ---------------------------------------------------------------------------------------------- the layouts


def _write_flickr(root: Path, requested: Sizes, options: Options) -> dict[str, Any]:
    folder, lists, count = root / "mirflickr", root / "mirflickr25k_annotations_v080", _pool(requested, 24)
    tags = [f"tag{number}" for number in range(_TAGS["mirflickr"])]
    _lines(folder / "doc" / "common_tags.txt", [f"{tag} {2000 - place}" for place, tag in enumerate(tags)])
    for number in range(1, count + 1):
        picture(folder / f"im{number}.jpg", number)
        own = [tags[number * step % len(tags)] for step in (1, 7, 31)]
        _lines(folder / "meta" / "tags" / f"tags{number}.txt", own)
        _lines(folder / "meta" / "tags_raw" / f"tags{number}.txt", [tag.title() for tag in own])
    for place, concept in enumerate(mirflickr.CONCEPTS):
        members = [str(number) for number in range(1, count + 1) if place in _labelled(number, 24)]
        _lines(lists / f"{concept}.txt", members)
        if concept in mirflickr.STRICT:
            _lines(lists / f"{concept}_r1.txt", members[::2])
    return {**requested, **_tokens(root, options)}


def _flickr_sizes(options: Options) -> Sizes:
    total = {"none": 25_000, "label": 24_581, "label+tag": 20_015}[options["mir_filter"]]
    return _by_protocol(total, options, mirflickr.SPLITS)


def _write_nus(root: Path, requested: Sizes, options: Options) -> dict[str, Any]:
    count, tags = _pool(requested, 21), _TAGS["nus-wide"]
    photos = [7_000_000 + number for number in range(count)]
    names = [f"concept{photo % 5}\\{number:04d}_{photo}.jpg" for number, photo in enumerate(photos)]
    _lines(root / "ImageList" / "Imagelist.txt", names)
    frequent = options["concepts"] or nuswide.CONCEPTS.get(options["split"], 21)
    for concept in range(81):  # the last ones belong to few images, so that they are not among the frequent
        rare = concept >= frequent
        marks = [n == concept if rare else concept in _labelled(n, frequent) for n in range(count)]
        lines = [str(int(mark)) for mark in marks]
        _lines(root / "Groundtruth" / "AllLabels" / f"Labels_concept{concept:02d}.txt", lines)
    rows = np.zeros((count, tags), dtype=int)
    rows[np.arange(count), np.arange(count) % tags] = rows[np.arange(count), 7 * np.arange(count) % tags] = 1
    folder, marked = root / "NUS_WID_Tags", zip(photos, rows, strict=True)
    _lines(folder / "AllTags1k.txt", ["\t".join(map(str, [photo, *row])) for photo, row in marked])
    _lines(folder / "All_Tags.txt", [f"{photo}      blue  sky  tag{photo % 9}" for photo in photos])
    for number, name in enumerate(names):
        picture(root / "Flickr" / name.replace("\\", "/"), number)
    return {**requested, **_tokens(root, options)}


def _nus_sizes(options: Options) -> Sizes:
    concepts = options["concepts"] or nuswide.CONCEPTS.get(options["split"], 21)
    return _by_protocol(nuswide.FILTERED.get(concepts, nuswide.COMPLETE), options, nuswide.SPLITS)


_COCO = {2014: (82_783, 40_504), 2017: (118_287, 5_000)}
_COCO_KARPATHY = {"train": 113_287, "query": 5_000, "database": 113_287}


def _write_coco(root: Path, requested: Sizes, options: Options) -> dict[str, Any]:
    year = options["year"]
    is_sampled = options["split"] in mscoco.SPLITS
    trained, val = (
        (_pool(requested, 80), 20) if is_sampled else (max(requested["train"], 80), requested["query"])
    )
    categories = [{"id": number, "name": f"category{number}"} for number in range(1, 81)]
    written, part = [], {"train": range(1, trained + 1), "val": range(trained + 1, trained + val + 1)}
    for name, numbers in part.items():
        images, objects, captions = [], [], []
        for number in numbers:
            file = f"COCO_{name}{year}_{number:012d}.jpg" if year == 2014 else f"{number:012d}.jpg"
            picture(root / f"{name}{year}" / file, number, (640, 480))
            images.append({"id": number, "file_name": file})
            for label in sorted(_labelled(number, 80)):
                objects.append({"image_id": number, "category_id": label + 1, "iscrowd": 0})
            for place in range(5):
                text = _words(number, _WORDS["mscoco"]) if place == 0 else f"a photo of word{number}"
                captions.append({"id": 5 * number + place, "image_id": number, "caption": text})
            written.append({"cocoid": number, "split": "train" if name == "train" else "test"})
        _json(root / "annotations" / f"instances_{name}{year}.json",
              images=images, annotations=objects, categories=categories)  # fmt: skip
        _json(root / "annotations" / f"captions_{name}{year}.json", images=images, annotations=captions)
    _json(root / "dataset_coco.json", images=written)
    changes = requested if is_sampled else {}
    karpathy = {"karpathy": str(root / "dataset_coco.json")} if options["split"] == "dsarh" else {}
    return {**changes, **karpathy, **_tokens(root, options)}


def _coco_sizes(options: Options) -> Sizes:
    if options["split"] == "dsarh":
        return _COCO_KARPATHY
    trained, val = _COCO[options["year"]]
    if options["split"] == "official":
        return {"train": trained, "query": val, "database": trained}
    total = trained + val - 1_069 * (options["unlabelled"] == "drop")
    return _by_protocol(total, options, mscoco.SPLITS)


def _json(path: Path, **content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def _write_cifar(root: Path, requested: Sizes, options: Options) -> dict[str, Any]:
    """The packed file: torchvision checks the official batches by their digests, which nothing else has."""
    tested, count = max(20, requested["query"]), _pool(requested, 10)
    files = [picture(root / "jpeg" / f"{n}.jpg", n, (32, 32)).read_bytes() for n in range(count + tested)]
    number = np.arange(len(files))
    offset = np.concatenate([[0], np.cumsum([len(file) for file in files])])
    pixels, label = np.frombuffer(b"".join(files), np.uint8), number % 10
    path, is_test = root / "cifar10.npz", number >= count
    np.savez(path, jpeg=pixels, offset=offset, label=label, is_test=is_test, classes=np.array(_CIFAR))
    return dict(requested)


def _cifar_sizes(options: Options) -> Sizes:
    if options["split"] == "official-test":
        whole = {"train": 50_000, "query": 10_000, "database": 50_000}
        return {name: options[name] or size for name, size in whole.items()}
    return _rest(60_000, options, 1_000, 5_000, disjoint=options["split"] == "deephash")


def _write_fashion(root: Path, requested: Sizes, options: Options) -> dict[str, Any]:
    for part, count in {"train": _pool(requested, 10), "t10k": max(20, 2 * requested["query"])}.items():
        pixels = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for kind, values in {"images-idx3": pixels, "labels-idx1": labels}.items():
            head = np.array([0x0800 + values.ndim, *values.shape], ">u4").tobytes()
            (root / f"{part}-{kind}-ubyte").write_bytes(head + values.tobytes())
    return requested | ({"train": None} if options["train"] is None else {})


def _fashion_sizes(options: Options) -> Sizes:
    train = options["train"] or 60_000
    rest = 60_000 - (train if options["train"] else 0)
    return {"train": train, "query": options["query"] or 10_000, "database": options["database"] or rest}


def _write_wikipedia(root: Path, requested: Sizes, options: Options) -> dict[str, Any]:
    from scipy.io import savemat  # half a second to import

    trained, tested = max(20, requested["train"], requested["database"]), max(10, requested["query"])
    matrices = {}
    parts = {"train": range(trained), "test": range(trained, trained + tested)}
    for part, numbers in parts.items():
        lines, short = [], part[:2]
        for number in numbers:
            category = CATEGORIES[number % len(CATEGORIES)]
            lines.append(f"text{number}\timage{number}\t{number % len(CATEGORIES) + 1}")
            picture(root / "images" / category / f"image{number}.jpg", number)
            text = f"<document><text>{_words(number, _WORDS['wikipedia'])}</text></document>"
            _lines(root / "texts" / f"text{number}.xml", [text])
        _lines(root / f"{part}set_txt_img_cat.list", lines)
        draws = np.random.default_rng(len(numbers))
        for name, width in {"I": 128, "T": 10}.items():
            matrices[f"{name}_{short}"] = draws.random((len(numbers), width))
    savemat(root / "raw_features.mat", matrices)
    return {**requested, **_tokens(root, options)}


def _wikipedia_sizes(options: Options) -> Sizes:
    whole = {"train": 2_173, "query": 693, "database": 2_173}
    return {name: options[name] or size for name, size in whole.items()}


def _write_merced(root: Path, requested: Sizes, options: Options) -> dict[str, Any]:
    trained, rows = max(42, requested["train"], requested["database"]), []
    for number in range(trained + 2 * max(10, requested["query"])):
        name = f"class{number % 21:02d}"
        file = picture(root / "ucmerced" / name / f"{name}{number:03d}.jpg", number, (256, 256))
        labels = [f"label{label:02d}" for label in sorted(_labelled(number, 17))]
        captions = [_words(number, _WORDS["ucmerced"]), *(f"There is word{number} ." for _ in range(4))]
        split = "train" if number < trained else ("test", "val")[number % 2]
        row = {"file": str(file.relative_to(root)), "id": file.stem, "class": name, "labels": labels}
        rows.append(json.dumps({**row, "captions": captions, "split": split}))
    _lines(root / "ucmerced.jsonl", rows)
    return _tokens(root, options)


def _merced_sizes(options: Options) -> Sizes:
    return {"train": 1_680, "query": 210 * len(options["query_splits"]), "database": 1_680}


def _write_folders(root: Path, requested: Sizes, options: Options) -> dict[str, Any]:
    """A hundred class folders, as ImageNet-100 has them."""
    for number in range(max(300, _pool(requested, 100))):
        name = f"n{1_440_764 + number % 100:08d}"
        picture(root / name / f"{name}_{number}.JPEG", number)
    return requested | ({} if options["train"] else {"train": None})


def _folder_sizes(options: Options) -> Sizes:
    return _rest(133_503, options, 133_503 // 5, None, disjoint=options["train"] is not None)


def _write_images(root: Path, requested: Sizes, options: Options) -> dict[str, Any]:
    for number in range(24):
        picture(root / f"{number}.jpg", number)
    return {"copies": 4, "asked": 4}


def _copies_sizes(options: Options) -> Sizes:
    return {"train": 8_000, "query": len(CHANGES) * options["asked"], "database": options["limit"]}


@dataclass(frozen=True)
class Layout:
    """A layout: the writer of a miniature, which returns changed options, and the sizes of the whole set."""

    write: Callable[[Path, Sizes, Options], dict[str, Any]]
    sizes: Callable[[Options], Sizes]


LAYOUTS = {
    "mirflickr": Layout(_write_flickr, _flickr_sizes),
    "nus-wide": Layout(_write_nus, _nus_sizes),
    "mscoco": Layout(_write_coco, _coco_sizes),
    "cifar10": Layout(_write_cifar, _cifar_sizes),
    "folder": Layout(_write_folders, _folder_sizes),
    "wikipedia": Layout(_write_wikipedia, _wikipedia_sizes),
    "fashion-mnist": Layout(_write_fashion, _fashion_sizes),
    "ucmerced": Layout(_write_merced, _merced_sizes),
    "copies": Layout(_write_images, _copies_sizes),
}
"""By the name of the reader."""
