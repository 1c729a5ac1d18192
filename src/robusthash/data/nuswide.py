"""NUS-WIDE: photographs of Flickr with 81 concepts and 1,000 tags, in the folders of its archives."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from robusthash.core.registry import register
from robusthash.data.base import RetrievalData, find, flat_options, lines_of
from robusthash.data.image_files import ImageFile, ImageOptions
from robusthash.data.image_text import Pool, TextOptions, make_data
from robusthash.data.splits import SplitOptions, SplitProtocol, find_protocol, protocol_split

SPLITS = {
    "sfcl": SplitProtocol(2100, 10500, "per-class", "SFCL"),
    "drfgd": SplitProtocol(2100, 10500, "per-class", "DRFGD, EQB2A, TA-DCH"),
    "dsarh": SplitProtocol(2100, 10500, "per-class", "DSARH"),
    "dadh": SplitProtocol(2100, 10000, "random", "DADH, AGAH, CPAH (code)"),
    "djsrh": SplitProtocol(2000, 5000, "per-class", "DJSRH, DSAH, JDSH (code)"),
    "ucch": SplitProtocol(2100, None, "last", "UCCH (code)"),
}
CONCEPTS = {"djsrh": 10, "ucch": 10}  # all others: 21
COMPLETE, FILTERED = 269_648, {21: 195_834, 10: 186_577}
_TAG_COUNT = 1000

_LISTS = (
    "ImageList.zip unpacks to ImageList/ with Imagelist.txt (269,648 lines like actor\\0001_2124494179.jpg)"
)
_TRUTH = (
    "Groundtruth.zip unpacks to Groundtruth/AllLabels/ with 81 files Labels_airport.txt and so on, and to "
    "TrainTestLabels/, which has a broken line and is not read"
)
_TAGS = "NUS_WID_Tags.zip unpacks to NUS_WID_Tags/: All_Tags.txt, AllTags1k.txt or {Train,Test}_Tags1k.dat"
_IMAGES = "the photographs belong in Flickr/<concept>/<file>, as the image list names them, or in images="


@register("data", "nus-wide", paper="Chua et al. 2009", modality="image+text")
@flat_options("caption", "vocabulary")
def nus_wide(
    root: str | Path = "data",
    images: str | Path | None = None,
    concepts: int | None = None,
    image: ImageOptions = ImageOptions(),
    text: TextOptions = TextOptions(),
    splits: SplitOptions = SplitOptions("sfcl"),
) -> RetrievalData:
    """NUS-WIDE: 269,648 photographs of Flickr; those with one of its 21 (or 10) most frequent concepts.

    The concepts are chosen by their number of images in ``AllLabels``; 21 keep 195,834 images and 10 keep
    186,577. Some photographs are no longer on the web: a partial set is used as far as it goes, and the note
    counts the rest. Splits are drawn by ``seed``: the published draws are not known. Differs: that SFCL draws
    equally over the classes is our reading of its sizes, 100 and 500 times 21.

    Args:
        root: folder that holds ``ImageList/``, ``Groundtruth/``, ``NUS_WID_Tags/`` and ``Flickr/``, at most
            three folders down; only the file names count, since copies of the set differ in their folders.
        images: the folder of the photographs where it is not ``Flickr``; with the folders of the image list
            in it, or with all files side by side, as some copies have them.
        concepts: another number of concepts, 1 to 81.
        text: ``True`` is the bag of the 1,000 tags that come with the set, ``"tokens"`` all tags, joined by
            spaces, as token ids.
        splits: sizes of ``sfcl``, ``drfgd`` or ``dsarh`` (21 concepts; 100 queries and 500 training items of
            each), ``dadh`` (21; 2,100 and 10,000 of all), ``djsrh`` (10; 200 and 500 of each) or ``ucch``
            (10; the last 2,100, trained on all others). All that are no queries are the database; a cut one
            is drawn from them.
    """
    protocol = find_protocol(SPLITS, splits.split)
    root = Path(root)
    listed = _image_names(find(root, "Imagelist.txt", _LISTS))
    count = CONCEPTS.get(str(splits.split), 21) if concepts is None else concepts
    labels, names = _most_frequent(find(root, "AllLabels", _TRUTH), len(listed), count)
    folder = find(root, "Flickr", _IMAGES) if images is None else Path(images)
    labelled = labels.any(1)
    pool = Pool(tuple(ImageFile(path) for path in _image_paths(folder, listed)), labels, names)
    pool = pool.only(labelled, f"none of the {count} concepts")
    if len(listed) == COMPLETE and count in FILTERED:
        pool = pool.expect(FILTERED[count])
    if text.texts == "tokens":
        tags = _raw_tags(find(root, "All_Tags.txt", _TAGS), listed)
        pool = replace(pool, texts=tuple(tags[row] for row in torch.nonzero(labelled).flatten().tolist()))
    elif text.texts:
        pool = replace(pool, bags=_tag_bags(root, listed, labelled))
    pool = pool.on_disk(_IMAGES)
    indices = protocol_split(pool.labels, protocol, splits, names)
    note = f"Split {splits.split}, seed {splits.seed}; images {image}; {count} concepts."
    return make_data("nus-wide", pool, indices, image, text, note)


def _image_names(path: Path) -> list[str]:
    """The lines of an image list, which have Windows separators."""
    return [line.replace("\\", "/") for line in lines_of(path)]


def _image_paths(folder: Path, listed: list[str]) -> list[Path]:
    """Paths of the images: in the folders of the list, or side by side where ``folder`` has none of these."""
    has_folders = any((folder / name).is_dir() for name in {name.partition("/")[0] for name in listed})
    return [folder / (name if has_folders else Path(name).name) for name in listed]


def _most_frequent(folder: Path, images: int, concepts: int) -> tuple[Tensor, tuple[str, ...]]:
    """(N, concepts) labels of the concepts with most images, in alphabetical order of their names."""
    files = sorted(folder.glob("Labels_*.txt"))
    if not 1 <= concepts <= len(files):
        raise ValueError(
            f"concepts must lie in 1..{len(files)}, the files of {folder}, got {concepts}; {_TRUTH}"
        )
    marks = {path.stem.removeprefix("Labels_"): _marks(path, images) for path in files}
    frequent = sorted(sorted(marks, key=lambda name: (-int(marks[name].sum()), name))[:concepts])
    if empty := [name for name in frequent if not marks[name].any()]:
        raise ValueError(f"no image has the concept {empty[0]!r}; ask for fewer than {concepts} concepts")
    return torch.from_numpy(np.stack([marks[name] for name in frequent], axis=1)).float(), tuple(frequent)


def _marks(path: Path, count: int) -> np.ndarray:
    """(N,) bool of a file with 0 or 1 on each line, whatever its line ends."""
    marks = np.frombuffer(path.read_bytes().translate(None, b" \t\r\n"), dtype=np.uint8) - ord("0")
    if len(marks) != count or (marks > 1).any():
        raise ValueError(f"{path} should hold {count} lines of 0 or 1, as the image list, not {len(marks)}")
    return marks == 1


def _tag_bags(root: Path, listed: list[str], mask: Tensor) -> Tensor:
    """(N, 1000) bool, the tags that come with the set, of the ``listed`` images where ``mask`` holds."""
    row = {listed[item]: row for row, item in enumerate(torch.nonzero(mask).flatten().tolist())}
    bags = torch.zeros(len(row), _TAG_COUNT, dtype=torch.bool)
    lines = 0
    for name, line in _tag_lines(root, listed):
        if name in row:
            bags[row[name]] = torch.from_numpy(_tag_row(line, name))
            lines += 1
    if lines != len(row):
        raise ValueError(f"the tag files have rows for {lines} of {len(row)} images; {_TAGS}")
    return bags


def _tag_lines(root: Path, listed: list[str]) -> Iterator[tuple[str, str]]:
    """Image names with their lines of tags, from ``AllTags1k.txt`` or else from the files of both parts."""
    try:
        yield from _line_by_line(listed, find(root, "AllTags1k.txt", _TAGS))
    except FileNotFoundError:
        for part in ("Train", "Test"):
            names = _image_names(find(root, f"{part}Imagelist.txt", _LISTS))
            yield from _line_by_line(names, find(root, f"{part}_Tags1k.dat", _TAGS))


def _line_by_line(names: list[str], path: Path) -> Iterator[tuple[str, str]]:
    """Each name with its non-empty line of ``path``; lines are read as they are needed."""
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
        _check_photo(fields.pop(0), name)
    if len(fields) != _TAG_COUNT or not set(fields) <= {"0", "1"}:
        raise ValueError(
            f"the tags of {name} should be 1000 of 0 or 1, and are {len(fields)} fields; {_TAGS}"
        )
    return np.array(fields) == "1"


def _raw_tags(path: Path, listed: list[str]) -> list[tuple[str, ...]]:
    """All tags of each image, from lines that begin with the number of the photo."""
    tags = []
    for name, line in _line_by_line(listed, path):
        photo, *words = line.split()
        _check_photo(photo, name)
        tags.append(tuple(words))
    return tags


def _check_photo(photo: str, name: str) -> None:
    """The image list names ``actor/0001_2124494179.jpg`` where a line of tags begins with 2124494179."""
    if Path(name).stem.rpartition("_")[2] != photo:
        raise ValueError(
            f"the tags of photo {photo} are paired with {name}: the files are not in the same order"
        )
