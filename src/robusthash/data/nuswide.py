"""NUS-WIDE: photographs of Flickr with 81 concepts and 1,000 tags, in the folders of its official
archives."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from robusthash.core.registry import register
from robusthash.data.base import RetrievalData
from robusthash.data.image_files import MEMORY, Decoding
from robusthash.data.official import Pool, Protocol, choose, find, lines_of, make_data, protocol
from robusthash.data.text_modality import Texts, TextStyle
from robusthash.data.transforms import Fit, ImageFile, OnError

SPLITS = {
    "sfcl": Protocol(2100, 10500, "per-class", "SFCL"),
    "drfgd": Protocol(2100, 10500, "per-class", "DRFGD, EQB2A, TA-DCH"),
    "dsarh": Protocol(2100, 10500, "per-class", "DSARH"),
    "dadh": Protocol(2100, 10000, "random", "DADH, AGAH, CPAH (code)"),
    "djsrh": Protocol(2000, 5000, "per-class", "DJSRH, DSAH, JDSH (code)"),
    "ucch": Protocol(2100, None, "last", "UCCH (code)"),
}
_CONCEPTS = {"djsrh": 10, "ucch": 10}  # all others: 21
_COMPLETE, _FILTERED = 269_648, {21: 195_834, 10: 186_577}
_TAG_COUNT = 1000

_LISTS = (
    "ImageList.zip unpacks to ImageList/ with Imagelist.txt (269,648 lines like actor\\0001_2124494179.jpg)"
)
_TRUTH = "Groundtruth.zip unpacks to Groundtruth/AllLabels/ with 81 files Labels_airport.txt and so on"
_TAGS = "NUS_WID_Tags.zip unpacks to NUS_WID_Tags/ with AllTags1k.txt, All_Tags.txt, Train_Tags1k.dat, Test_Tags1k.dat"
_IMAGES = (
    "the photographs belong in Flickr/<concept>/<file>, as the image list names them "
    "(or name the folder: images=)"
)


@register("data", "nus-wide", paper="Chua et al. 2009", modality="image+text")
def nus_wide(
    root: str | Path = "data",
    images: str | Path | None = None,
    split: str = "sfcl",
    concepts: int | None = None,
    query: int | None = None,
    train: int | None = None,
    database: int | None = None,
    seed: int = 0,
    size: int = 64,
    fit: Fit = "crop",
    texts: Texts = True,
    tokenizer: str | Path | None = None,
    max_length: int = 64,
    on_error: OnError = "raise",
    memory: int = MEMORY,
) -> RetrievalData:
    """NUS-WIDE: 269,648 photographs of Flickr; those with one of its 21 (or 10) most frequent concepts are
    kept.

    The concepts are chosen by their number of images in ``AllLabels``; 21 keep 195,834 images and 10 keep
    186,577. Some photographs are no longer on the web: a partial set is used as far as it goes, and the note
    counts the rest. Splits are drawn by ``seed``: the published draws are not known. Differs: that SFCL draws
    equally over the classes is our reading of its sizes, 100 and 500 times 21.

    Args:
        root: folder that holds ``ImageList/``, ``Groundtruth/``, ``NUS_WID_Tags/`` and ``Flickr/``, at most
            three folders down; only the file names count, since copies of the set differ in their folders.
        images: the folder of the photographs where it is not ``Flickr``.
        split: sizes of ``sfcl``, ``drfgd`` or ``dsarh`` (21 concepts; 100 queries and 500 training items of
            each), ``dadh`` (21; 2,100 and 10,000 of all), ``djsrh`` (10; 200 and 500 of each) or ``ucch``
            (10; the last 2,100, trained on all others). All that are no queries are the database.
        concepts: another number of concepts, 1 to 81.
        query, train, database: other sizes, equal over the concepts where the split is; a cut database is
            drawn from all that are no queries.
        size, fit: of the square images in pixels, as in ``read_image``.
        texts: ``True`` is the bag of the 1,000 tags that come with the set, ``"tokens"`` all tags, joined by
            spaces, as token ids.
        tokenizer, max_length: for tokens, the folder with the tokenizer and the longest text.
        on_error, memory: as in ``folder``.

    Raises:
        FileNotFoundError: a file is missing; the message says which archive it is in and where it goes.
        KeyError: an unknown split.
        ValueError: files that do not belong together, an unknown option, too few items.
    """
    how = protocol(SPLITS, split)
    decoding = Decoding(size, fit, on_error, memory=memory)
    style = TextStyle(texts, tokenizer=tokenizer, max_length=max_length)
    root = Path(root)
    # the list has Windows separators
    listed = [line.replace("\\", "/") for line in lines_of(find(root, "Imagelist.txt", _LISTS))]
    wanted = _CONCEPTS.get(split, 21) if concepts is None else concepts
    labels, names = _most_frequent(find(root, "AllLabels", _TRUTH), len(listed), wanted)
    folder = find(root, "Flickr", _IMAGES) if images is None else Path(images)
    pool = Pool(tuple(ImageFile(folder / name) for name in listed), labels, names)
    chosen = labels.any(1)
    pool = pool.only(chosen, f"none of the {wanted} concepts")
    if len(listed) == _COMPLETE and wanted in _FILTERED:
        pool = pool.expect(_FILTERED[wanted])
    if texts == "tokens":
        tags = _raw_tags(find(root, "All_Tags.txt", _TAGS), listed)
        pool = replace(pool, texts=tuple(tags[item] for item in torch.nonzero(chosen).flatten().tolist()))
    elif texts:
        pool = replace(pool, bags=_tag_bags(root, listed, chosen))
    pool = pool.on_disk(_IMAGES)
    indices = choose(pool.labels, how, query, train, database, seed, names)
    note = f"Split {split}, seed {seed}; images {fit} to {size} x {size}; {wanted} concepts."
    return make_data("nus-wide", pool, indices, decoding, style, note)


def _most_frequent(folder: Path, count: int, wanted: int) -> tuple[Tensor, tuple[str, ...]]:
    """(N, wanted) labels of the concepts with most images, in alphabetical order of their names."""
    files = sorted(folder.glob("Labels_*.txt"))
    if not 1 <= wanted <= len(files):
        raise ValueError(
            f"concepts must lie in 1..{len(files)}, as many as {folder} has, got {wanted}; {_TRUTH}"
        )
    marks = {path.stem.removeprefix("Labels_"): _marks(path, count) for path in files}
    frequent = sorted(sorted(marks, key=lambda name: (-int(marks[name].sum()), name))[:wanted])
    if empty := [name for name in frequent if not marks[name].any()]:
        raise ValueError(f"no image has the concept {empty[0]!r}; ask for fewer than {wanted} concepts")
    return torch.from_numpy(np.stack([marks[name] for name in frequent], axis=1)).float(), tuple(frequent)


def _marks(path: Path, count: int) -> np.ndarray:
    """(N,) bool of a file with 0 or 1 on each line, whatever its line ends."""
    marks = np.frombuffer(path.read_bytes().translate(None, b" \t\r\n"), dtype=np.uint8) - ord("0")
    if len(marks) != count or (marks > 1).any():
        raise ValueError(
            f"{path} should hold {count} lines of 0 or 1, as many as the image list, and has {len(marks)}"
        )
    return marks == 1


def _tag_bags(root: Path, listed: list[str], chosen: Tensor) -> Tensor:
    """(chosen, 1000) bool, which of the tags that come with the set each chosen image has."""
    row = {listed[item]: row for row, item in enumerate(torch.nonzero(chosen).flatten().tolist())}
    bags = torch.zeros(len(row), _TAG_COUNT, dtype=torch.bool)
    seen = 0
    for name, line in _tag_lines(root, listed):
        if name in row:
            bags[row[name]] = torch.from_numpy(_tag_row(line, name))
            seen += 1
    if seen != len(row):
        raise ValueError(f"the tag files have rows for {seen} of {len(row)} images; {_TAGS}")
    return bags


def _tag_lines(root: Path, listed: list[str]) -> Iterator[tuple[str, str]]:
    """Image names with their lines of tags, from ``AllTags1k.txt`` or else from the files of both parts."""
    try:
        whole = find(root, "AllTags1k.txt", _TAGS)
    except FileNotFoundError:
        for part in ("Train", "Test"):
            names = [line.replace("\\", "/") for line in lines_of(find(root, f"{part}Imagelist.txt", _LISTS))]
            yield from _beside(names, find(root, f"{part}_Tags1k.dat", _TAGS))
    else:
        yield from _beside(listed, whole)


def _beside(names: list[str], path: Path) -> Iterator[tuple[str, str]]:
    """Each name with the non-empty line of ``path`` that stands beside it; lines are read as they are
    needed."""
    with path.open(encoding="utf-8", errors="replace") as opened:
        lines = (line for line in opened if line.strip())
        for name, line in itertools.zip_longest(names, lines):
            if name is None or line is None:
                raise ValueError(f"{path} has not as many lines as its image list, which has {len(names)}")
            yield name, line


def _tag_row(line: str, name: str) -> np.ndarray:
    """(1000,) bool of a line with 1000 marks, or with the number of the photo before them."""
    fields = line.split()
    if len(fields) == _TAG_COUNT + 1:
        _same_photo(fields.pop(0), name)
    marks = np.array(fields) == "1"
    if len(marks) != _TAG_COUNT or not set(fields) <= {"0", "1"}:
        raise ValueError(
            f"the tags of {name} should be {_TAG_COUNT} of 0 or 1, and are {len(fields)} fields; {_TAGS}"
        )
    return marks


def _raw_tags(path: Path, listed: list[str]) -> list[tuple[str, ...]]:
    """All tags of each image, from lines that begin with the number of the photo."""
    tags = []
    for name, line in _beside(listed, path):
        photo, *words = line.split()
        _same_photo(photo, name)
        tags.append(tuple(words))
    return tags


def _same_photo(photo: str, name: str) -> None:
    """The image list names ``actor/0001_2124494179.jpg`` where a line of tags begins with 2124494179."""
    if Path(name).stem.rpartition("_")[2] != photo:
        raise ValueError(
            f"the tags of photo {photo} stand beside {name}: the files are not in the same order; {_TAGS}"
        )
