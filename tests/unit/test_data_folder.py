"""A user's own images: class folders, manifests, tar archives, and every mistake that such files have."""

from __future__ import annotations

import json
import logging
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import robusthash as rh
from robusthash.core.labels import relevant
from robusthash.data import ArraySource, load_data
from robusthash.data.folder import manifest_rows
from robusthash.data.image_files import FileSource, UnreadableImage


def picture(path: Path, number: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(number).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Ten images in each of three class folders, one of them in a folder below."""
    root = tmp_path / "images"
    for number in range(30):
        name = ("cat", "apple", "boat")[number % 3]
        picture(
            root / name / ("deep/" if number == 3 else "") / f"{number}.{'PNG' if number == 4 else 'png'}",
            number,
        )
    (root / "cat" / "notes.txt").write_text("not an image")
    (root / "cat" / ".hidden.png").write_text("left by a file manager")
    return root


def rows_of(count: int = 12, **more: Any) -> list[dict[str, Any]]:
    return [
        {
            "file": f"all/{number}.png",
            "labels": [["sea", "sky"], ["sky"], ["tree"]][number % 3],
            "class": ["coast", "air", "wood"][number % 3],
            "captions": [f"a picture of number {number}", "one more"],
            "split": ["train", "train", "train", "test", "val", "train"][number % 6],
            **more,
        }
        for number in range(count)
    ]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """Twelve images below ``all`` and their manifest ``list.jsonl``."""
    for number in range(12):
        picture(tmp_path / "all" / f"{number}.png", number)
    write_jsonl(tmp_path / "list.jsonl", rows_of())
    return tmp_path


def load(listed: Path, rows: list[dict[str, Any]] | None = None, **options: Any) -> Any:
    if rows is not None:
        write_jsonl(listed / "list.jsonl", rows)
    return load_data("folder", root=listed, manifest=listed / "list.jsonl", size=8, **options)


def test_class_folders(classes: Path) -> None:
    data = load_data("folder", root=classes, size=8)
    assert data.label_names == ("apple", "boat", "cat")
    assert [len(split) for split in data.splits.values()] == [24, 6, 24]
    assert data.train_in_database == 24
    assert data.image_size == (8, 8)
    counts = sum(split.labels.sum(0) for split in (data.query, data.database) if split.labels is not None)
    assert torch.as_tensor(counts).tolist() == [10, 10, 10]
    assert "split random, seed 0" in data.note


def test_labels_and_pixels_belong_together(classes: Path) -> None:
    data = load_data("folder", root=classes, size=12, fit="stretch")
    means = {}
    for path in sorted(classes.rglob("*.[pP][nN][gG]")):
        if not path.name.startswith("."):
            image = np.asarray(Image.open(path).resize((12, 12), Image.Resampling.BICUBIC))
            means[image.tobytes()] = next(part for part in path.parts if part in data.label_names)
    batch = data.database.batch(torch.arange(24))
    assert batch.labels is not None
    for image, label in zip(batch.inputs["image"], batch.labels, strict=True):
        pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
        assert means[pixels.tobytes()] == data.label_names[int(label.argmax())]


def test_balanced_split_and_sizes(classes: Path) -> None:
    data = load_data("folder", root=classes, size=8, split="balanced", query=6, train=9, database=12, seed=2)
    assert [len(split) for split in data.splits.values()] == [9, 6, 12]
    for split, each in ((data.train, 3), (data.query, 2), (data.database, 4)):
        assert split.labels is not None
        assert split.labels.sum(0).tolist() == [each] * 3
    assert data.train_in_database == 0
    again = load_data("folder", root=classes, size=8, split="balanced", query=6, train=9, database=12, seed=2)
    assert again.fingerprint() == data.fingerprint()
    with pytest.raises(ValueError, match="class 'apple' has 10 items left for the queries and 20 are needed"):
        load_data("folder", root=classes, size=8, split="balanced", query=60)


@pytest.mark.parametrize("memory", [0, 30 * 3 * 8 * 8 - 1, 30 * 3 * 8 * 8])
def test_memory_decides_where_images_live_and_nothing_else(classes: Path, memory: int) -> None:
    data = load_data("folder", root=classes, size=8, memory=memory)
    assert isinstance(data.query.source, FileSource)
    assert len(data.query.source.images) == memory // (3 * 8 * 8)
    reference = load_data("folder", root=classes, size=8)
    assert data.fingerprint() == reference.fingerprint()
    rows = torch.tensor([5, 0, 3])
    assert torch.equal(data.query.batch(rows).inputs["image"], reference.query.batch(rows).inputs["image"])
    assert list(data.query.source.hashes[data.query.rows]) == list(data.query.hashes)


def test_file_damaged_after_loading_is_named(classes: Path) -> None:
    data = load_data("folder", root=classes, size=8, memory=0)
    for path in classes.rglob("*.png"):
        path.write_bytes(b"gone")
    with pytest.raises(UnreadableImage, match=r"cannot read .*\.png"):
        data.query.batch(torch.arange(3))


def test_hash_is_of_the_pixels_not_of_the_file(classes: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Image.open(classes / "cat" / "0.png") as image:
        for number in range(15):
            image.save(classes / "cat" / f"copy{number}.bmp")  # other bytes, equal pixels
    with caplog.at_level(logging.WARNING):
        data = load_data("folder", root=classes, size=8)
    dropped = 9 - len(data.query)
    assert dropped >= 1  # some of the sixteen are queries, and others are in the database
    assert f"{dropped} of 9 queries dropped: the same pixels are also in another split" in caplog.text
    assert f"{dropped} of 9 queries dropped" in data.note


def test_images_that_are_all_equal_leave_no_query(tmp_path: Path) -> None:
    for number in range(24):
        folder = tmp_path / ("cat", "dog")[number % 2]
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), "teal").save(folder / f"{number}.png")
    with pytest.raises(ValueError, match=r"no query is left.*\(1 of 24 items differ\).*leave copies out"):
        load_data("folder", root=tmp_path, size=8)


def test_empty_folder_and_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no folder .*nowhere; it should hold a folder of images for each"
    ):
        load_data("folder", root=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is empty: it holds neither class folders nor images"):
        load_data("folder", root=tmp_path)


def test_class_folder_without_images_is_named(classes: Path) -> None:
    (classes / "zebra").mkdir()
    (classes / "zebra" / "readme.txt").write_text("soon")
    with pytest.raises(ValueError, match=r"1 class folders of .* hold no image: zebra"):
        load_data("folder", root=classes)


def test_images_without_a_class_folder_have_no_label(classes: Path) -> None:
    picture(classes / "loose.png", 99)
    with pytest.raises(ValueError, match=r"1 images lie in .* no label \(first: loose\.png\)"):
        load_data("folder", root=classes)


def test_split_folders_are_not_taken_for_classes(tmp_path: Path) -> None:
    for number, name in enumerate(("train", "test")):
        picture(tmp_path / name / "cat" / "a.png", number)
    with pytest.raises(ValueError, match="named like splits"):
        load_data("folder", root=tmp_path)


def test_unreadable_image_raises_or_is_skipped(classes: Path, caplog: pytest.LogCaptureFixture) -> None:
    (classes / "boat" / "2.png").write_bytes(b"broken")
    with pytest.raises(UnreadableImage, match=r'2\.png.*on_error="skip"'):
        load_data("folder", root=classes, size=8)
    with caplog.at_level(logging.WARNING):
        data = load_data("folder", root=classes, size=8, on_error="skip")
    assert len(data.query) + len(data.database) == 29
    assert "1 of 30 images skipped as unreadable" in caplog.text
    lazy = load_data("folder", root=classes, size=8, on_error="skip", memory=0)
    assert lazy.fingerprint() == data.fingerprint()
    assert torch.equal(
        lazy.database.batch(torch.arange(23)).inputs["image"],
        data.database.batch(torch.arange(23)).inputs["image"],
    )


def test_pixel_limit_is_passed_on(classes: Path) -> None:
    with pytest.raises(UnreadableImage, match="16 x 12 = 192 pixels"):
        load_data("folder", root=classes, size=8, max_pixels=191)


def test_manifest_with_several_labels_and_its_own_split(listed: Path) -> None:
    data = load(listed)
    assert data.label_names == ("sea", "sky", "tree")
    assert {name: len(split) for name, split in data.splits.items()} == {
        "train": 8,
        "query": 2,
        "database": 8,
        "validation": 2,
    }
    assert data.query.labels is not None
    assert data.query.labels.tolist() == [[1, 1, 0], [1, 1, 0]]
    wider = load(listed, query_splits=["test", "val"])
    assert [len(wider.query), wider.validation] == [4, None]


def test_class_column_as_label(listed: Path) -> None:
    assert load(listed, label_field="class").label_names == ("air", "coast", "wood")


def test_random_split_overrules_the_column(listed: Path) -> None:
    data = load(listed, split="random", query=3, train=4, seed=1)
    assert [len(split) for split in data.splits.values()] == [4, 3, 5]
    assert data.train_in_database == 0
    with pytest.raises(ValueError, match="4 items have several"):
        load(listed, split="balanced", query=3)


def test_captions_become_bags_of_words(listed: Path) -> None:
    data = load(listed, texts=True)
    assert data.modalities == ("image", "text")
    text = data.query.batch(torch.arange(2)).inputs["text"]
    # a, picture, of, number, one, more and the numbers of the eight training images; those of the queries are
    # unknown
    assert text.shape == (2, 6 + 8)
    assert text.sum(1).tolist() == [6, 6]
    assert "outside the vocabulary of 14" in data.note
    assert load(listed, texts=True, vocabulary=4).query.batch(torch.arange(2)).inputs["text"].shape == (2, 4)


def test_csv_reads_as_json_does(listed: Path) -> None:
    lines = ['"file","labels","captions","split"']
    for row in rows_of():
        lines.append(
            f'"{row["file"]}","{"; ".join(row["labels"])}","{" ".join(row["captions"])}","{row["split"]}"'
        )
    (listed / "list.csv").write_text("\ufeff" + "\r\n".join(lines) + "\r\n", encoding="utf-8")
    data = load_data("folder", root=listed, manifest=listed / "list.csv", size=8, texts=True)
    assert data.fingerprint() == load(listed, texts=True).fingerprint()
    assert data.label_names == ("sea", "sky", "tree")


def test_plain_tar_is_read_in_place(listed: Path) -> None:
    with tarfile.open(listed / "all.tar", "w") as archive:
        for number in range(12):
            archive.add(listed / "all" / f"{number}.png", f"./all/{number}.png")
    expected = load(listed).fingerprint()
    for number in range(12):
        (listed / "all" / f"{number}.png").unlink()
    for memory in (0, 1 << 20):
        data = load_data(
            "folder", archive=listed / "all.tar", manifest=listed / "list.jsonl", size=8, memory=memory
        )
        assert data.fingerprint() == expected
        assert data.query.batch(torch.arange(2)).inputs["image"].shape == (2, 3, 8, 8)
    write_jsonl(listed / "list.jsonl", rows_of(13))
    with pytest.raises(FileNotFoundError, match=r"1 of 13 files .* are not in .*all\.tar: all/12\.png"):
        load_data("folder", archive=listed / "all.tar", manifest=listed / "list.jsonl")


def test_compressed_or_missing_tar(listed: Path) -> None:
    with tarfile.open(listed / "all.tar.gz", "w:gz") as archive:
        archive.add(listed / "all")
    with pytest.raises(ValueError, match=r"all\.tar\.gz is not a plain tar"):
        load_data("folder", archive=listed / "all.tar.gz", manifest=listed / "list.jsonl")
    with pytest.raises(FileNotFoundError, match=r"no archive .*none\.tar"):
        load_data("folder", archive=listed / "none.tar", manifest=listed / "list.jsonl")


def test_files_that_are_not_there_are_counted_and_named(listed: Path) -> None:
    (listed / "all" / "3.png").unlink()
    (listed / "all" / "7.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"2 of 12 files of .*: all/3\.png and all/7\.png"):
        load(listed)
    with pytest.raises(FileNotFoundError, match=r"no manifest .*none\.csv"):
        load_data("folder", root=listed, manifest=listed / "none.csv")


def test_files_outside_the_root_are_refused(listed: Path) -> None:
    for name in ("../secret.png", "/etc/secret.png", "..\\secret.png"):
        with pytest.raises(ValueError, match="files must lie below"):
            load(listed, [*rows_of(11), {"file": name, "labels": ["x"], "split": "train"}])


def test_repeated_files_and_ids(listed: Path) -> None:
    with pytest.raises(ValueError, match=r"1 values of column 'file' occur twice in .*: all/2\.png"):
        load(listed, [*rows_of(), {**rows_of()[2], "file": "./all/2.png"}])
    with pytest.raises(ValueError, match=r"column 'id' occur twice in .*: 7"):
        load(listed, rows_of(id=7))


def test_items_without_a_label_stay_and_are_similar_to_nothing(
    listed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = rows_of()
    for number in (3, 5, 10):  # of the query, training and validation items, as the split column says
        rows[number]["labels"] = []
    with caplog.at_level(logging.WARNING):
        data = load(listed, rows)
    assert "3 of 12 items have no label and are similar to nothing." in data.note
    assert "3 of 12 items have no label" in caplog.text
    assert data.describe()["unlabelled"] == {"train": 1, "query": 1, "database": 1, "validation": 1}
    assert sum(len(split) for name, split in data.splits.items() if name != "database") == 12
    assert data.label_names == ("sea", "sky", "tree")
    assert data.query.labels is not None
    assert data.database.labels is not None
    assert relevant(data.query.labels, data.database.labels).any(1).tolist() == [False, True]
    rows = rows_of(split="", labels=["sky"])
    rows[2]["labels"] = []
    with pytest.raises(ValueError, match="needs one label an item and 1 items have none; use 'random'"):
        load(listed, rows, split="balanced")
    assert "no label" not in load(listed, rows_of()).note


def test_items_without_a_label_train_are_attacked_and_counted(listed: Path) -> None:
    rows = rows_of()
    for number in (3, 5):
        rows[number]["labels"] = []
    data = load(listed, rows)
    for objective in (rh.objectives.CSQ(), rh.objectives.DPSH()):
        hasher = rh.build_hasher(bits=8, image={"name": "small", "width": 4, "grid": 1})
        rh.fit(
            rh.HashingRecipe(hasher, objective), data, rh.TrainConfig(epochs=1, batch_size=8, device="cpu")
        )
        clean = rh.evaluate(hasher, data)
        assert (clean.empty, clean.per_query["MAP"].tolist()[0]) == (1, 0.0)
        for attack in (
            rh.attacks.mainstay(steps=2),
            rh.attacks.mainstay_targeted(steps=2),
            rh.attacks.hag(steps=2),
        ):
            result = rh.evaluate(hasher, data, attack=attack)
            assert all(np.isfinite(value) for value in result.values.values())


def test_missing_columns_and_labels(listed: Path) -> None:
    rows = rows_of()
    del rows[4]["labels"]
    with pytest.raises(ValueError, match=r"1 of 12 rows of .* have no column 'labels' \(first: line 5\)"):
        load(listed, rows)
    with pytest.raises(ValueError, match="have no column 'file'"):
        load(listed, [{"name": "a.png", "labels": ["x"]}])
    with pytest.raises(
        ValueError, match=r"no row of .*list\.jsonl has a label in the column 'labels'; .* 'class'"
    ):
        load(listed, rows_of(labels=[]))
    data = load(listed, rows_of(labels=[], **{"class": ""}))  # for objectives without labels
    assert (data.label_names, data.train.unlabelled()) == ((), len(data.train))
    rows = [{key: value for key, value in row.items() if key != "captions"} for row in rows_of()]
    with pytest.raises(ValueError, match="have no column 'captions'"):
        load(listed, rows, texts=True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"file": "x"}\n{"file": \n', r"line 2 is not JSON"),
        ("a.jsonl", '["x"]\n', "line 1 is not a JSON object; write one object a line"),
        ("a.jsonl", "3\n", "line 1 is not a JSON object$"),
        ("a.jsonl", "\n\n", "has no rows"),
        ("a.csv", "file,labels\nx.png\n", "line 2 has not as many fields as the header"),
        ("a.csv", "file,labels\nx.png,a,b\n", "line 2 has not as many fields as the header"),
        ("a.csv", 'file,labels\n"x.png"y,a\n', "after line 1: not CSV"),
        ("a.csv", "file;labels\nx.png;a;b\n", "line 2 has not as many fields as the header"),
        ("a.csv", "file,labels\n", "has no rows"),
    ],
)
def test_broken_manifests_name_the_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name}.*{message}"):
        load_data("folder", root=tmp_path, manifest=tmp_path / name)


def test_manifest_that_is_no_text(tmp_path: Path) -> None:
    for content in (b"\xff\xfe\x00", "file,labels\na.png,x\n".encode("utf-16"), b"file,labels\n\xe4.png,x\n"):
        (tmp_path / "a.csv").write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.csv is not UTF-8 text \(byte \d+\); save it as UTF-8"):
            load_data("folder", root=tmp_path, manifest=tmp_path / "a.csv")


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize(("mark", "end"), [("", "\n"), ("\ufeff", "\r\n")])
def test_tables_as_other_programs_write_them(
    tmp_path: Path, name: str, separator: str, mark: str, end: str
) -> None:
    rows = [["file", "labels"], ["a.png", '"x;y"'], ["b.png", '"x, y"'], ["c.png", ""]]
    text = mark + end.join(separator.join(row) for row in rows) + end
    (tmp_path / name).write_bytes(text.encode())
    cells = [row for _, row in manifest_rows(tmp_path / name)]
    assert [row["file"] for row in cells] == ["a.png", "b.png", "c.png"]
    assert [row["labels"] for row in cells] == ["x;y", "x, y", ""]


def test_values_of_the_split_column_must_go_somewhere(listed: Path) -> None:
    rows = rows_of()
    rows[0]["split"] = "dev"
    with pytest.raises(ValueError, match="split column holds 'dev', which no split takes"):
        load(listed, rows)
    with pytest.raises(
        ValueError, match="no row of the manifest is for the query split; its split column holds"
    ):
        load(listed, rows_of(), query_splits=["query"], validation_splits=["test", "val"])
    with pytest.raises(
        ValueError, match="query_splits of data 'folder' must be a list, each item a text, got 'test'"
    ):
        load(listed, rows_of(), query_splits="test")
    with pytest.raises(ValueError, match="sizes of a drawn split"):
        load(listed, rows_of(), query=2)
    rows = [{key: value for key, value in row.items() if key != "split"} for row in rows_of()]
    with pytest.raises(ValueError, match="needs a manifest with a column 'split'"):
        load(listed, rows, split="manifest")
    assert len(load(listed, rows).query) == 2  # without the column: drawn


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either root .* or archive"),
        ({"root": "a", "archive": "b"}, "either root .* or archive"),
        ({"archive": "b.tar"}, "an archive needs a manifest"),
        ({"root": "a", "texts": True}, "texts=True needs the texts: set manifest to a file"),
        ({"root": "a", "label_field": "tags"}, "'labels' or 'class', got 'tags'"),
        ({"root": "a", "on_error": "ignore"}, "'skip' or 'raise', got 'ignore'"),
        ({"root": "a", "size": 0}, "size must be at least 1"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_data("folder", **options)


def test_wrong_split_rule_is_named(classes: Path) -> None:
    with pytest.raises(ValueError, match="'manifest', 'random' or 'balanced', got 'even'"):
        load_data("folder", root=classes, size=8, split="even")


@pytest.mark.data
def test_uc_merced_in_place(shared_data: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {
        "archive": shared_data / "ucmerced.tar",
        "manifest": shared_data / "ucmerced.jsonl",
        "size": 32,
    }
    data = load_data("folder", query_splits=["test", "val"], texts=True, **options)
    assert {name: len(split) for name, split in data.splits.items()} == {
        "train": 1680,
        "query": 420,
        "database": 1680,
    }
    assert len(data.label_names) == 17
    counts = sum(split.labels.sum(0) for split in (data.query, data.database) if split.labels is not None)
    assert torch.as_tensor(counts)[data.label_names.index("trees")] == 1009
    assert not caplog.records  # the one identical pair is on the database side of this split
    every = np.concatenate([data.query.hashes, data.database.hashes])
    assert len(every) - len(np.unique(every)) == 1


def test_the_other_label_column_comes_along(listed: Path) -> None:
    data = load(listed)
    assert data.label_systems == ("class",)
    assert data.by("class").query.labels is not None
    assert load(listed, label_field="class").label_systems == ("labels",)
    rows = rows_of()
    rows[4]["class"] = ""
    partial = load(listed, rows)
    assert partial.label_systems == ()
    assert "1 of 12 items have no 'class', which is left out" in partial.note


def test_empty_text_is_kept_counted_and_warned_of(listed: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = rows_of()
    rows[3]["captions"], rows[5]["captions"] = [], ["", "  "]
    with caplog.at_level(logging.WARNING):
        data = load(listed, rows, texts=True)
    assert "2 of 12 items have an empty text" in caplog.text
    assert "2 of 12 items have an empty text" in data.note
    sums = data.query.batch(torch.arange(2)).inputs["text"].sum(1)
    assert sums[0] == 0
    assert sums[1] > 0


def test_first_caption_or_all(listed: Path) -> None:
    assert load(listed, texts=True).vocabulary == 6 + 8
    assert load(listed, texts=True, caption="first").vocabulary == 4 + 8
    with pytest.raises(ValueError, match="'first' or 'all', got 'last'"):
        load(listed, texts=True, caption="last")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"texts": "words"}, "'bag' or 'tokens', got 'words'"),
        ({"texts": "tokens"}, "needs tokenizer="),
        ({"texts": True, "tokenizer": "x"}, "a tokenizer is for texts='tokens'"),
    ],
)
def test_wrong_text_options(listed: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(listed, **options)


def test_modalities_of_different_length() -> None:
    with pytest.raises(ValueError, match=r"modalities of different length: \{'image': 2, 'text': 3\}"):
        ArraySource({"image": torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "text": torch.zeros(3, 5)})
