"""NUS-WIDE on a small tree in its official layout, with the traps of its copies."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from robusthash.data import RetrievalData, load_data
from tests.unit.test_data_folder import picture

CONCEPTS = ("actor", "beach", "cat", "sky", "zebra")  # the real set has 81
COUNTS = {"sky": 20, "cat": 12, "zebra": 8, "beach": 3, "actor": 2}
ITEMS = 24


def name_of(number: int) -> str:
    return f"{CONCEPTS[number % 5]}\\{number:04d}_{7000 + number}.jpg"


def has(number: int, concept: str) -> bool:
    return (number * 7 + CONCEPTS.index(concept)) % ITEMS < COUNTS[concept]


def tags_of(number: int) -> np.ndarray:
    tags = np.zeros(1000, dtype=int)
    tags[[number, 500 + number % 3]] = 1
    return tags


@pytest.fixture
def nus(tmp_path: Path) -> Path:
    """24 images below a prefix folder; Windows separators and line ends; labels with spaces after them."""
    root = tmp_path / "NUS-WIDE"
    for folder in ("ImageList", "Groundtruth/AllLabels", "NUS_WID_Tags"):
        (root / folder).mkdir(parents=True)
    write(root / "ImageList" / "Imagelist.txt", [name_of(number) for number in range(ITEMS)])
    for concept in CONCEPTS:
        marks = [f"{int(has(number, concept))} " for number in range(ITEMS)]
        write(root / "Groundtruth" / "AllLabels" / f"Labels_{concept}.txt", marks)
    write(
        root / "NUS_WID_Tags" / "All_Tags.txt", [f"{7000 + number}      blue  sky" for number in range(ITEMS)]
    )
    write_tags(root / "NUS_WID_Tags" / "AllTags1k.txt", range(ITEMS), with_photo=True)
    for number in range(ITEMS):
        file = root / "Flickr" / name_of(number).replace("\\", "/")
        picture(file.with_suffix(".png"), number).rename(file)
    return tmp_path


def write(path: Path, lines: list[str]) -> None:
    path.write_bytes("".join(f"{line}\r\n" for line in lines).encode())


def write_tags(path: Path, numbers: range, with_photo: bool) -> None:
    rows = ["\t".join(map(str, tags_of(number))) for number in numbers]
    write(
        path,
        [f"{7000 + number}\t{row}" if with_photo else row for number, row in zip(numbers, rows, strict=True)],
    )


def load(root: Path, **options: object) -> RetrievalData:
    return load_data(
        "nus-wide", **{"root": root, "concepts": 2, "query": 4, "train": 8, "size": 8, **options}
    )


def test_concepts_are_chosen_by_their_counts(nus: Path) -> None:
    data = load(nus)
    assert data.label_names == ("cat", "sky")
    kept = [number for number in range(ITEMS) if has(number, "cat") or has(number, "sky")]
    assert len(data.query) + len(data.database) == len(kept)
    assert f"{ITEMS - len(kept)} of {ITEMS} items dropped: none of the 2 concepts." in data.note
    assert load(nus, concepts=3).label_names == ("cat", "sky", "zebra")
    with pytest.raises(ValueError, match=r"concepts must lie in 1\.\.5"):
        load(nus, split="sfcl", concepts=None)  # 21 by name


def test_rows_of_all_files_belong_together(nus: Path) -> None:
    data = load(nus, split="ucch", concepts=5, query=3)
    kept = [number for number in range(ITEMS) if any(has(number, concept) for concept in CONCEPTS)]
    assert [len(split) for split in data.splits.values()] == [8, 3, len(kept) - 3]
    batch = data.database.batch(torch.arange(len(kept) - 3))
    assert batch.labels is not None
    for row, number in enumerate(kept[:-3]):
        assert batch.labels[row].tolist() == [float(has(number, concept)) for concept in CONCEPTS]
        assert torch.equal(batch.inputs["text"][row], torch.from_numpy(tags_of(number)).float())


@pytest.mark.parametrize("layout", ["1000 columns", "two parts"])
def test_tags_of_other_layouts_are_the_same(nus: Path, layout: str) -> None:
    expected = load(nus)
    folder = nus / "NUS-WIDE" / "NUS_WID_Tags"
    (folder / "AllTags1k.txt").unlink()
    if layout == "1000 columns":
        write_tags(folder / "AllTags1k.txt", range(ITEMS), with_photo=False)
    else:  # the parts are in another order than the whole list
        for part, numbers in (("Train", range(15, ITEMS)), ("Test", range(15))):
            write(
                nus / "NUS-WIDE" / "ImageList" / f"{part}Imagelist.txt",
                [name_of(number) for number in numbers],
            )
            write_tags(folder / f"{part}_Tags1k.dat", numbers, with_photo=False)
    data = load(nus)
    assert data.vocabulary == 1000
    rows = torch.arange(4)
    assert torch.equal(data.query.batch(rows).inputs["text"], expected.query.batch(rows).inputs["text"])


def test_partial_images_are_counted(nus: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = load(nus, concepts=5, split="dadh")
    (nus / "NUS-WIDE" / "Flickr" / name_of(0).replace("\\", "/")).unlink()
    with caplog.at_level(logging.WARNING):
        data = load(nus, concepts=5, split="dadh")
    assert "1 of 21 images are not there" in caplog.text
    assert "items dropped: their image file is not there" in data.note
    assert len(data.database) == len(whole.database) - 1
    shutil.rmtree(nus / "NUS-WIDE" / "Flickr")
    with pytest.raises(
        FileNotFoundError, match=r"no Flickr in .*; the photographs belong in Flickr/<concept>/<file>"
    ):
        load(nus)
    with pytest.raises(FileNotFoundError, match=r"none of the \d+ images is there"):
        load(nus, images=nus)


def test_images_may_lie_side_by_side(nus: Path) -> None:
    expected, flat = load(nus), nus / "images"
    flat.mkdir()
    for file in (nus / "NUS-WIDE" / "Flickr").rglob("*.jpg"):
        file.rename(flat / file.name)
    data = load(nus, images=flat)
    assert list(data.database.hashes) == list(expected.database.hashes)
    assert "not there" not in data.note


def test_files_that_do_not_belong_together(nus: Path) -> None:
    folder = nus / "NUS-WIDE" / "NUS_WID_Tags"
    write_tags(folder / "AllTags1k.txt", range(1, ITEMS + 1), with_photo=True)
    with pytest.raises(
        ValueError, match=r"the tags of photo 70\d\d are paired with .*: the files are not in the same order"
    ):
        load(nus)
    write_tags(folder / "AllTags1k.txt", range(ITEMS - 1), with_photo=True)
    with pytest.raises(
        ValueError, match=r"AllTags1k\.txt has not as many lines as its image list, which has 24"
    ):
        load(nus)
    write(folder / "AllTags1k.txt", ["0 1 1"] * ITEMS)
    with pytest.raises(ValueError, match="should be 1000 of 0 or 1, and are 3 fields"):
        load(nus)
    labels = nus / "NUS-WIDE" / "Groundtruth" / "AllLabels" / "Labels_sky.txt"
    write(labels, ["1"] * (ITEMS - 1))
    with pytest.raises(ValueError, match=r"Labels_sky\.txt should hold 24 lines of 0 or 1, .* not 23"):
        load(nus)


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("ImageList", r"no Imagelist\.txt in .*; ImageList\.zip unpacks to"),
        ("Groundtruth", r"no AllLabels in .*; Groundtruth\.zip unpacks to"),
        ("NUS_WID_Tags", r"no TrainImagelist\.txt in|no Train_Tags1k\.dat in .*; NUS_WID_Tags\.zip"),
    ],
)
def test_what_is_missing_belongs_to_which_archive(nus: Path, gone: str, message: str) -> None:
    shutil.rmtree(nus / "NUS-WIDE" / gone)
    with pytest.raises(FileNotFoundError, match=message):
        load(nus)
