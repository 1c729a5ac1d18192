"""MIRFLICKR-25K on a small tree in its official layout."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch

from robusthash.data import load_data
from robusthash.data.mirflickr import CONCEPTS, STRICT
from tests.unit.test_data_folder import picture

ITEMS = 30


@pytest.fixture
def mir(tmp_path: Path) -> Path:
    """Thirty images: im29 has no concept, im30 no common tag; lists with Windows line ends, below a prefix
    folder."""
    root = tmp_path / "mirflickr25k"
    images, lists = root / "mirflickr", root / "mirflickr25k_annotations_v080"
    for kind in ("meta/tags", "meta/tags_raw", "doc"):
        (images / kind).mkdir(parents=True)
    lists.mkdir()
    (lists / "README.txt").write_text("not a concept")
    (images / "doc" / "common_tags.txt").write_text("sky 845\r\nwater 641\r\nnikon 600\r\n")
    for number in range(1, ITEMS + 1):
        picture(images / f"im{number}.png", number).rename(images / f"im{number}.jpg")
        tags = ["rare"] if number == 30 else [("sky", "water")[number % 2], "rare"]
        (images / "meta" / "tags" / f"tags{number}.txt").write_text("\r\n".join(tags) + "\r\n")
        (images / "meta" / "tags_raw" / f"tags{number}.txt").write_text("Blue Sky\nNikon D50\n")
    for place, concept in enumerate(CONCEPTS):
        members = [number for number in range(1, ITEMS + 1) if number % 24 == place and number != 29] or [1]
        (lists / f"{concept}.txt").write_text("".join(f"{number}\r\n" for number in members))
        if concept in STRICT:
            (lists / f"{concept}_r1.txt").write_text(f"{members[0]}\r\n")
    return tmp_path


def test_layout_filter_and_label_order(mir: Path) -> None:
    data = load_data("mirflickr", root=mir, query=4, train=10, size=8)
    assert data.label_names == CONCEPTS
    assert [len(split) for split in data.splits.values()] == [10, 4, 24]
    assert data.train_in_database == 10
    assert data.vocabulary == 3
    assert "1 of 30 items dropped: no label. 1 of 29 items dropped: no common tag." in data.note
    for split in data.splits.values():
        assert split.labels is not None
        assert (split.labels.sum(1) >= 1).all()
        assert (split.batch(torch.arange(len(split))).inputs["text"].sum(1) >= 1).all()


def test_numbers_not_names_give_the_order(mir: Path) -> None:
    data = load_data("mirflickr", root=mir, split="ucch", query=3, mir_filter="none", size=12, fit="stretch")
    assert len(data.database) == 27
    first = data.database.batch(torch.arange(10))
    assert first.labels is not None
    # im1..im10 in this order: im1 also stands in for the concepts without a member (29 - 24 = 5)
    assert first.labels[1:].argmax(1).tolist() == list(range(2, 11))
    assert first.inputs["text"][:, :2].argmax(1).tolist() == [1, 0] * 5
    last = data.query.batch(torch.arange(3))
    assert last.labels is not None
    assert last.labels.sum(1).tolist() == [1, 0, 1]
    assert last.inputs["text"].sum(1).tolist() == [1, 1, 0]


def test_thirty_eight_labels_imply_their_base(mir: Path) -> None:
    data = load_data("mirflickr", root=mir, query=4, train=10, size=8, concepts=38)
    assert len(data.label_names) == 38
    labels = data.database.labels
    assert labels is not None
    for name in STRICT:
        base, strict = data.label_names.index(name), data.label_names.index(f"{name}_r1")
        assert strict == base + 1
        assert (labels[:, base] >= labels[:, strict]).all()


@pytest.mark.parametrize("place", [".", "mirflickr25k/mirflickr/annotations"])
def test_the_archive_of_concepts_has_no_folder_of_its_own(mir: Path, place: str) -> None:
    """Unpacked where the images are, or into a folder of any name, beside other texts."""
    expected = load_data("mirflickr", root=mir, query=4, train=10, size=8, concepts=38)
    lists = mir / "mirflickr25k" / "mirflickr25k_annotations_v080"
    (mir / place).mkdir(exist_ok=True)
    for file in lists.iterdir():
        file.rename(mir / place / file.name)
    (mir / place / "notes.txt").write_text("not a concept")
    data = load_data("mirflickr", root=mir, query=4, train=10, size=8, concepts=38)
    assert data.label_names == expected.label_names
    assert torch.equal(data.database.labels, expected.database.labels)


def test_filters(mir: Path, caplog: pytest.LogCaptureFixture) -> None:
    def size(mir_filter: str) -> int:
        data = load_data("mirflickr", root=mir, query=4, train=10, size=8, mir_filter=mir_filter)
        return len(data.query) + len(data.database)

    assert [size(name) for name in ("none", "label", "label+tag")] == [30, 29, 28]
    with caplog.at_level(logging.WARNING):
        size("label")
    assert "1 of 29 items have an empty text" in caplog.text  # kept, as a bag of nothing
    with pytest.raises(ValueError, match=r"'none', 'label' or 'label\+tag', got 'tag'"):
        size("tag")


def test_named_splits_ask_for_their_sizes(mir: Path) -> None:
    for split, sizes in {
        "sfcl": "query=2000, train=5000",
        "dsarh": "query=1000",
        "dcmh": "train=10000",
    }.items():
        with pytest.raises(ValueError, match=sizes):
            load_data("mirflickr", root=mir, split=split)
    with pytest.raises(KeyError, match="no split is called 'djsrh'"):
        load_data("mirflickr", root=mir, split="djsrh")


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("mirflickr", r"no mirflickr in .*; mirflickr25k\.zip unpacks to"),
        (
            "mirflickr25k_annotations_v080",
            r"no animals\.txt in .*; mirflickr25k_annotations_v080\.zip",
        ),
        ("mirflickr/doc", r"no file .*common_tags\.txt; mirflickr25k\.zip unpacks to"),
        ("mirflickr/meta/tags", r"no file .*tags1\.txt; mirflickr25k\.zip unpacks to"),
    ],
)
def test_what_is_missing_belongs_to_which_archive(mir: Path, gone: str, message: str) -> None:
    shutil.rmtree(mir / "mirflickr25k" / gone)
    with pytest.raises(FileNotFoundError, match=message):
        load_data("mirflickr", root=mir, query=4, train=10, size=8)


def test_broken_lists(mir: Path) -> None:
    lists = mir / "mirflickr25k" / "mirflickr25k_annotations_v080"
    (lists / "sky.txt").write_text("im12.jpg\n")
    with pytest.raises(ValueError, match=r"sky\.txt should hold one image number a line, .* not 'im12\.jpg'"):
        load_data("mirflickr", root=mir, query=4, train=10, size=8)
    (lists / "sky.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"no sky\.txt in .*v080; mirflickr25k_annotations_v080\.zip"):
        load_data("mirflickr", root=mir, query=4, train=10, size=8)
