"""MS-COCO on a small tree in its official layout and on a few hundred real images."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from robusthash.data import RetrievalData, load_data
from tests.unit.test_data_folder import picture

CATEGORIES = [(90, "toothbrush"), (1, "person"), (13, "stop sign")]  # numbers with gaps, in no order
PARTS = {"train": range(100, 116), "val": range(4, 12)}


def write_part(root: Path, part: str, numbers: range) -> None:
    images, instances, captions = [], [], []
    for number in reversed(numbers):  # the files are in no order either
        name = f"{number:012d}.jpg"
        folder = root / f"{part}2017"
        picture(folder / f"{number}.png", number).rename(folder / name)
        images.append({"id": number, "file_name": name})
        if number != 7:  # one image shows nothing
            for category in {CATEGORIES[number % 3][0], 1 if number % 2 else CATEGORIES[number % 3][0]}:
                instances.append({"image_id": number, "category_id": category, "iscrowd": number % 2})
        for place in (2, 1):
            said = f" the {'first' if place == 1 else 'second'} of\nnumber{number}"
            captions.append({"id": 10 * number + place, "image_id": number, "caption": said})
    categories = [{"id": number, "name": name} for number, name in CATEGORIES]
    put(root, f"instances_{part}2017.json", images=images, annotations=instances, categories=categories)
    put(root, f"captions_{part}2017.json", images=images, annotations=captions)


def put(root: Path, name: str, **content: Any) -> None:
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / name).write_text(json.dumps(content))


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    root = tmp_path / "coco"
    root.mkdir()
    for part, numbers in PARTS.items():
        write_part(root, part, numbers)
    return tmp_path


def load(root: Path, **options: Any) -> RetrievalData:
    return load_data("mscoco", **{"root": root, "query": 4, "train": 6, "size": 8, **options})


def test_layout_categories_and_order(coco: Path) -> None:
    data = load(coco, split="ucch", train=None)
    assert data.label_names == ("person", "stop sign", "toothbrush")
    assert [len(split) for split in data.splits.values()] == [19, 4, 19]
    assert "1 of 24 items dropped: no label." in data.note
    numbers = [*PARTS["train"], *(number for number in PARTS["val"] if number != 7)]
    columns = {0: 2, 1: 0, 2: 1}  # number % 3 -> place of CATEGORIES[number % 3] among the sorted
    for split, part in ((data.database, numbers[:-4]), (data.query, numbers[-4:])):
        assert split.labels is not None
        for row, number in enumerate(part):
            assert split.labels[row, columns[number % 3]] == 1
            assert split.labels[row, 0] == float(number % 3 == 1 or number % 2 == 1)
    kept = load(coco, split="ucch", train=None, unlabelled="keep")
    assert len(kept.query) + len(kept.database) == 24


def test_captions_first_or_all_without_stop_words(coco: Path) -> None:
    data = load(coco, split="official", query=None, train=None)
    assert [len(split) for split in data.splits.values()] == [16, 7, 16]
    assert (
        data.vocabulary == 17
    )  # "second" and the numbers of the training images; "the", "first", "of" are stop words
    text = data.train.batch(torch.arange(16)).inputs["text"]
    assert text.sum(1).tolist() == [2] * 16
    first = load(coco, split="official", query=None, train=None, caption="first")
    assert first.vocabulary == 16
    assert "7 of 23 caption words of query and database are outside the vocabulary of 16." in first.note
    assert load(coco, split="official", query=None, train=None, vocabulary=3).vocabulary == 3


def test_karpathy_split(coco: Path) -> None:
    parts = ["train", "restval", "val", "test"]
    images = [
        {"cocoid": number, "split": parts[number % 4]} for numbers in PARTS.values() for number in numbers
    ]
    (coco / "dataset_coco.json").write_text(json.dumps({"images": images}))
    data = load(coco, split="dsarh", karpathy=coco / "dataset_coco.json", query=None, train=None)
    assert {name: len(split) for name, split in data.splits.items()} == {
        "train": 12,
        "query": 5,
        "database": 12,
        "validation": 6,
    }
    with pytest.raises(FileNotFoundError, match=r"needs karpathy=, the file dataset_coco\.json"):
        load(coco, split="dsarh", query=None, train=None)
    (coco / "dataset_coco.json").write_text(json.dumps({"images": images[1:]}))
    with pytest.raises(ValueError, match=r"knows nothing of 1 images \(first: 100\)"):
        load(coco, split="dsarh", karpathy=coco / "dataset_coco.json", query=None, train=None)
    (coco / "dataset_coco.json").write_text("[]")
    with pytest.raises(ValueError, match="should hold images with cocoid and split"):
        load(coco, split="dsarh", karpathy=coco / "dataset_coco.json", query=None, train=None)


def test_image_without_a_caption_is_kept_and_counted(coco: Path) -> None:
    path = coco / "coco" / "annotations" / "captions_val2017.json"
    content = json.loads(path.read_text())
    content["annotations"] = [said for said in content["annotations"] if said["image_id"] != 11]
    path.write_text(json.dumps(content))
    data = load(coco, split="official", query=None, train=None)
    assert "1 of 23 items have an empty text." in data.note
    assert data.query.batch(torch.arange(7)).inputs["text"][-1].sum() == 0


def test_missing_and_broken_files(coco: Path) -> None:
    root = coco / "coco"
    (root / "annotations" / "captions_val2017.json").write_text("{")
    with pytest.raises(ValueError, match=r"captions_val2017\.json is not JSON"):
        load(coco)
    stray = {"image_id": 999, "category_id": 1}
    put(
        root,
        "instances_val2017.json",
        images=[],
        annotations=[stray],
        categories=[{"id": 1, "name": "person"}],
    )
    with pytest.raises(ValueError, match=r"instances_val2017\.json has other categories"):
        load(coco)
    categories = [{"id": number, "name": name} for number, name in CATEGORIES]
    put(root, "instances_val2017.json", images=[], annotations=[stray], categories=categories)
    with pytest.raises(ValueError, match=r"instances_val2017\.json has an object of an unknown image .*999"):
        load(coco)
    put(root, "instances_val2017.json", images=[])
    with pytest.raises(
        ValueError, match=r"instances_val2017\.json should hold categories, images, annotations"
    ):
        load(coco)
    (root / "annotations" / "instances_val2017.json").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"annotations_trainval2017\.zip unpacks to annotations/ with instances_"
    ):
        load(coco)
    (root / "train2017").rename(root / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"train2017\.zip unpacks to a folder of that name"):
        load(coco)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"year": 2015}, "2014 or 2017, got 2015"),
        ({"unlabelled": "zero"}, "'drop' or 'keep', got 'zero'"),
        ({"split": "official"}, "'official' is written down"),
    ],
)
def test_wrong_options(coco: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(coco, **options)


@pytest.mark.data
def test_real_images(shared_data: Path, tmp_path: Path) -> None:
    with tarfile.open(shared_data / "coco_mini.tar") as archive:
        archive.extractall(tmp_path, filter="data")
    data = load_data("mscoco", root=tmp_path, split="official", size=32)
    assert {name: len(split) for name, split in data.splits.items()} == {
        "train": 66,
        "query": 180,
        "database": 66,
    }
    assert len(data.label_names) == 80
    assert data.label_names[0] == "person"
    assert data.label_names[-1] == "toothbrush"
    labels = sum(split.labels.sum(0) for split in (data.query, data.database) if split.labels is not None)
    assert torch.as_tensor(labels)[0] == 131
    listed = [json.loads(line) for line in (shared_data / "coco_mini.jsonl").read_text().splitlines()]
    assert int(torch.as_tensor(labels).sum()) == sum(len(set(row["labels"])) for row in listed)
