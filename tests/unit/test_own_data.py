"""Arrays and torch data sets of a user: every usual form gives the same data, and what is doubtful is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import robusthash as rh
from robusthash.data.label_cells import read_labels
from robusthash.training.shallow_recipe import ShallowRecipe

ITEMS = 24
PIXELS = np.random.default_rng(0).integers(0, 256, (ITEMS, 8, 8, 3), dtype=np.uint8)
CLASSES = np.arange(ITEMS) % 3
from_arrays, from_dataset = rh.RetrievalData.from_arrays, rh.RetrievalData.from_dataset


class Pairs(Dataset):
    """Images with classes as a torch data set has them."""

    classes = ("cat", "dog", "owl")

    def __init__(self, images, labels=CLASSES):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, number):
        return self.images[number], self.labels[number]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(
            [{"image": image, "label": int(label)} for image, label in zip(PIXELS, CLASSES, strict=True)]
        )


def test_every_form_of_images_is_the_same_data(tmp_path):
    first = torch.from_numpy(PIXELS).permute(0, 3, 1, 2)
    pictures = [Image.fromarray(image) for image in PIXELS]
    paths = [tmp_path / f"{number:02}.png" for number in range(ITEMS)]
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path)
    expected = from_arrays(PIXELS, CLASSES).fingerprint()
    for images in (
        first,
        first.float() / 255,
        PIXELS.astype(np.float64) / 255,
        pictures,
        paths,
        list(PIXELS),
    ):
        data = from_arrays(images, CLASSES)
        assert data.fingerprint() == expected
        assert data.train.source.arrays["image"].dtype == torch.uint8
    sets = [
        Pairs(PIXELS),
        Pairs(pictures),
        TensorDataset(first.float() / 255, torch.from_numpy(CLASSES)),
        Stream(),
    ]
    sets += [DataLoader(Pairs(first), batch_size=5, shuffle=True), DataLoader(Stream())]
    for dataset in sets:
        assert from_dataset(dataset).fingerprint() == expected
    grey = PIXELS[..., 0]
    expected = from_arrays(np.repeat(grey[..., None], 3, 3), CLASSES).fingerprint()
    for images in (grey, grey[..., None], grey[:, None]):
        assert from_arrays(images, CLASSES).fingerprint() == expected


def test_floats_between_the_levels_stay_floats():
    images = np.random.default_rng(1).random((ITEMS, 3, 8, 8)).astype(np.float32)
    data = from_arrays(images, CLASSES, seed=1)
    assert torch.equal(
        data.query.batch(torch.arange(2)).inputs["image"], torch.from_numpy(images)[data.query.rows[:2]]
    )
    assert from_dataset(Pairs(torch.from_numpy(images)), seed=1).fingerprint() == data.fingerprint()


def test_the_data_do_not_change_with_the_arrays_they_came_from():
    images = PIXELS.transpose(0, 3, 1, 2).copy()
    for mine in (images, torch.from_numpy(images)):
        data = from_arrays(mine, CLASSES)
        before = data.query.batch(torch.arange(1)).inputs["image"]
        mine[:] = 0
        assert torch.equal(data.query.batch(torch.arange(1)).inputs["image"], before)
        images[:] = PIXELS.transpose(0, 3, 1, 2)


def test_images_are_resized_as_files_are():
    large = [Image.fromarray(image).resize((20 + number, 30)) for number, image in enumerate(PIXELS)]
    data = from_arrays(large, CLASSES, size=16)
    assert data.image_size == (16, 16)
    assert from_dataset(Pairs(large), size=16).fingerprint() == data.fingerprint()
    with pytest.raises(
        ValueError, match=r"images of 24 sizes, such as \(30, 20\) and \(30, 43\); give size="
    ):
        from_arrays(large, CLASSES)


def test_a_large_data_set_is_read_again_for_each_batch():
    whole = from_dataset(Pairs(PIXELS))
    data = from_dataset(Pairs(PIXELS), memory=1000)
    assert data.fingerprint() == whole.fingerprint()
    rows = torch.tensor([3, 0])
    assert torch.equal(data.query.batch(rows).inputs["image"], whole.query.batch(rows).inputs["image"])
    with pytest.raises(ValueError, match="more than memory=1000 bytes"):
        from_dataset(Stream(), memory=1000)


def test_loaders_and_subsets_keep_their_choice_and_names():
    subset = Subset(Pairs(PIXELS), range(5, 20))
    data = from_dataset(DataLoader(subset, batch_size=4), query=3)
    assert sum(len(split) for split in (data.query, data.database)) == 15
    assert data.label_names == ("cat", "dog", "owl")
    sampled = DataLoader(Pairs(PIXELS), sampler=torch.utils.data.SubsetRandomSampler([7, 5, 9, 2]))
    data = from_dataset(sampled, rows={"query": [0], "database": [1, 2, 3]})
    for drawing in (
        torch.utils.data.WeightedRandomSampler([1.0] * ITEMS, ITEMS),
        torch.utils.data.WeightedRandomSampler([1.0] * ITEMS, 9, replacement=False),
    ):
        with pytest.raises(ValueError, match="the WeightedRandomSampler of the loader draws other items"):
            from_dataset(DataLoader(Pairs(PIXELS), sampler=drawing))
    assert (
        data.query.batch(torch.tensor([0]))
        .inputs["image"]
        .mul(255)
        .round()
        .byte()[0]
        .permute(1, 2, 0)
        .tolist()
        == PIXELS[2].tolist()
    )


@pytest.mark.parametrize(
    "labels",
    [
        CLASSES.tolist(),
        torch.from_numpy(CLASSES),
        CLASSES.astype(np.float64),
        [[number] for number in CLASSES.tolist()],
        np.eye(3)[CLASSES],
        torch.eye(3, dtype=torch.bool)[torch.from_numpy(CLASSES)],
        list(torch.eye(3)[torch.from_numpy(CLASSES)]),
        [torch.tensor(number) for number in CLASSES],
        [{number} for number in CLASSES.tolist()],
    ],
)
def test_every_form_of_labels_is_the_same_relevance(labels):
    hot, names = read_labels(labels, ITEMS)
    assert torch.equal(hot, torch.eye(3)[torch.from_numpy(CLASSES)])
    assert names == ("0", "1", "2")


def test_names_and_several_labels():
    hot, names = read_labels([["sea", "sky"], [], ["sky "]], 3)
    assert (hot.tolist(), names) == ([[1, 1], [0, 0], [0, 1]], ("sea", "sky"))
    hot, names = read_labels([2, 0], 2, ("a", "b", "c"))
    assert (hot.tolist(), names) == ([[0, 0, 1], [1, 0, 0]], ("a", "b", "c"))
    assert read_labels(["c", "a"], 2, ("a", "b", "c"))[0].tolist() == [[0, 0, 1], [1, 0, 0]]


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([0, 1], "2 labels for 3 items"),
        ([0, 1, None], "item 2 has the label None"),
        ([0.0, float("nan"), 1.0], "item 1 has the label nan"),
        ([0, -1, 1], "item 1 has the label -1"),
        ([0, 1.5, 1], "item 1 has the label 1.5"),
        (["", "a", "b"], "item 0 has the label ''"),
        ([0, "0", 1], "numbers and names at once, such as 0 and '0'"),
        ([[0], 1, [1]], "item 1 has one label and item 0 a list"),
        ([[0, 1, 0], [1, 0, 0], [0, 0, 1]], "can be multi-hot rows or lists of the classes 0 and 1"),
        (np.array([[0], [1], [1]]), r"shape \(3, 1\) are neither"),
        (np.array([[0, 1], [2, 0], [1, 0]]), "multi-hot labels are 0 and 1, got 2"),
        ("abc", None),
    ],
)
def test_labels_that_can_be_misread_are_refused(labels, said):
    if said is None:
        assert read_labels(list(labels), 3)[1] == ("a", "b", "c")
        return
    with pytest.raises(ValueError, match=said):
        read_labels(labels, 3)


def test_items_without_a_label_are_counted(caplog):
    labels = [[row % 3] if row % 2 else [] for row in range(ITEMS)]
    data = from_arrays(PIXELS, labels, query=4)
    assert data.note == "12 of 24 items have no label and are similar to nothing."
    assert f"arrays: {data.note} They are kept." in caplog.text
    assert from_arrays(PIXELS, [[row % 3] for row in range(ITEMS)], query=4).note == ""


def test_labels_outside_of_the_names_are_refused():
    with pytest.raises(ValueError, match="label 3 is not among the 3 label names"):
        read_labels([0, 3], 2, ("a", "b", "c"))
    with pytest.raises(ValueError, match=r"'bird' is not among the 2 label names.*did you mean 'birds'"):
        read_labels(["cats", "bird"], 2, ("birds", "cats"))
    with pytest.raises(ValueError, match="2 label names for 3 columns"):
        read_labels(np.eye(3), 3, ("a", "b"))


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (PIXELS.astype(np.float32), "got 0 to 255; divide by 255"),
        (PIXELS / 127.5 - 1, "got -1 to 1; undo the normalisation"),
        (PIXELS.astype(np.int64), "got torch.int64"),
        (
            np.where(np.arange(ITEMS)[:, None, None, None] < 7, 0.5, PIXELS / np.nan),
            "infinite, first in image 7",
        ),
        (
            np.where(np.arange(ITEMS)[:, None, None, None] < 7, 0.5, [[[np.inf] * 3]]),
            "infinite, first in image 7",
        ),
        ([*PIXELS[1:], PIXELS[0] * np.nan], "image 23: pixels are NaN or infinite$"),
        (PIXELS[..., :2], r"3 channels or 1, first or last, got shape \(8, 8, 2\)"),
        (PIXELS[:, :0], "there is no pixel"),
        (np.zeros(ITEMS, np.uint8), "images are"),
        ([*PIXELS[1:], "missing.png"], "missing.png"),
        ([*PIXELS[1:], 5], "image 23: an image is a path"),
        (PIXELS[:-1], "24 labels for 23 items"),
    ],
)
def test_images_that_are_none_are_refused(images, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        from_arrays(images, CLASSES)


def test_given_rows_are_the_splits_and_share_no_query():
    rows = {"query": range(4), "database": np.arange(4, ITEMS)}
    data = from_arrays(PIXELS, CLASSES, rows=rows)
    assert data.query.rows.tolist() == [0, 1, 2, 3]
    assert torch.equal(data.train.rows, data.database.rows)
    for wrong, said in (
        ({**rows, "train": [3, 5]}, r"1 queries are also in 'train' \(first: row 3"),
        ({"query": [0], "database": [24]}, "rows of 'database' reach from 24 to 24; there are 0 to 23"),
        ({"query": [0, 0], "database": [1]}, "rows of 'query' name a row twice"),
        ({"query": [], "database": [1]}, "rows of 'query' are row numbers, at least one"),
        ({"query": [0]}, "needs the rows of 'database'"),
        ({**rows, "query": slice(0, 3)}, r"rows of 'query' are row numbers.* got slice\(0, 3, None\)"),
        ({**rows, "query": "12"}, "rows of 'query' are row numbers.* got '12'"),
        ({**rows, "query": 1}, "rows of 'query' are row numbers.* got 1 "),
        ({**rows, "query": [1.5]}, r"rows of 'query' are row numbers.* got \[1.5\]"),
        ({**rows, "query": [True, False]}, r"or a mask of 24: got \[True, False\]"),
        ({**rows, "test": [1]}, "got 'test'"),
    ):
        with pytest.raises(ValueError, match=said):
            from_arrays(PIXELS, CLASSES, rows=wrong)
    with pytest.raises(ValueError, match="query would draw them"):
        from_arrays(PIXELS, CLASSES, rows=rows, query=3)
    with pytest.raises(ValueError, match="are split, query, train, database, seed, got qeury"):
        from_arrays(PIXELS, CLASSES, qeury=3)
    with pytest.raises(ValueError, match=r"query must be a whole number or null, got 8\.0"):
        from_arrays(PIXELS, CLASSES, query=8.0)
    for few in (set(range(4)), iter(range(4)), np.arange(ITEMS) < 4, [number < 4 for number in range(ITEMS)]):
        data = from_arrays(PIXELS, CLASSES, rows={**rows, "query": few})
        assert data.query.rows.tolist() == [0, 1, 2, 3]
    assert len(from_arrays(PIXELS, CLASSES, split="balanced", query=6, train=9).train) == 9


def test_the_same_picture_is_no_query_and_in_the_database():
    twice = np.concatenate([PIXELS, PIXELS[:1]])
    with pytest.raises(ValueError, match="no query is left"):
        from_arrays(twice, [*CLASSES, 0], rows={"query": [0], "database": range(1, ITEMS + 1)})


def test_items_that_cannot_be_used_are_named():
    class Noisy(Pairs):
        def __getitem__(self, number):
            return torch.rand(3, 8, 8), 0

    with pytest.raises(ValueError, match="item 0 is another image when it is read again"):
        from_dataset(Noisy(PIXELS))

    class Seldom(Pairs):
        def __getitem__(self, number):  # item 0 never changes, every other one at its second reading
            self.read = [*getattr(self, "read", []), number]
            return self.images[number] // min(self.read.count(number), 2 if number else 1), 0

    with pytest.raises(ValueError, match="item 3 is another image when it is read again"):
        from_dataset(Seldom(PIXELS))
    images = PIXELS.copy()
    data = from_dataset(Pairs(images), memory=1000, rows={"query": range(8), "database": range(8, 24)})
    images[5] = 0
    with pytest.raises(ValueError, match="item 5 is another image when it is read again"):
        data.query.batch(torch.arange(8))
    with pytest.raises(ValueError, match="item 0 is a ndarray; items are"):
        from_dataset(PIXELS)
    with pytest.raises(ValueError, match="item 0 has image, and not image and label"):
        from_dataset([{"image": PIXELS[0]}])
    with pytest.raises(ValueError, match="item 1: floats must lie in"):
        from_dataset([(PIXELS[0], 0), (PIXELS[0] - 300.0, 1)])
    with pytest.raises(ValueError, match="a int is no data set"):
        from_dataset(5)


def test_texts_make_an_image_text_set():
    texts = [f"a picture of class {label}" for label in CLASSES]
    data = from_arrays(PIXELS, CLASSES, texts=texts, query=4)
    assert data.modalities == ("image", "text")
    assert torch.equal(data.text_form.encode(["class 2"]).sum(1), torch.tensor([2.0]))
    vectors = np.random.default_rng(2).random((ITEMS, 5))
    assert from_arrays(PIXELS, CLASSES, texts=vectors).vocabulary == 5
    for form in (np.array(texts), np.array(texts, object)):
        assert from_arrays(PIXELS, CLASSES, texts=form, query=4).fingerprint() == data.fingerprint()
    for wrong, said in (
        (texts[1:], "23 texts for 24 images"),
        ("a" * ITEMS, "one text for each item, got the one text 'aaaa"),
        ([*texts[1:], None], "text 23 is None and no str"),
        ([["a", "red"], *texts[1:]], r"text 0 is \['a', 'red'\] and no str: join words"),
        ([b"a", *texts[1:]], "text 0 is b'a' and no str: .* decode bytes"),
    ):
        with pytest.raises(ValueError, match=said):
            from_arrays(PIXELS, CLASSES, texts=wrong)


def test_own_data_are_trained_on_and_searched():
    data = from_dataset(Pairs(PIXELS), query=6)
    hasher = rh.build_hasher(bits=8, image={"name": "small", "width": 4, "grid": 1})
    rh.fit(rh.HashingRecipe(hasher, rh.objectives.CSQ()), data, rh.TrainConfig(epochs=1, batch_size=9))
    assert 0 < rh.evaluate(hasher, data)["MAP"] <= 1


def test_items_without_labels_train_what_needs_none_and_are_not_scored():
    texts = (np.random.default_rng(1).random((ITEMS, 12)) < 0.3).astype(np.float32)
    data = from_arrays(PIXELS, [[]] * ITEMS, texts=texts, query=4, seed=0)
    assert data.label_names == ()
    hasher = rh.build_hasher(image={"name": "small", "width": 4}, text="mlp", bits=8, vocabulary=12)
    training = rh.TrainConfig(epochs=1, batch_size=10)
    rh.fit(rh.HashingRecipe(hasher, rh.objectives.DJSRH()), data, training)
    assert len(rh.encode_split(hasher, data.database)["image"]) == len(data.database)
    with pytest.raises(ValueError, match="has a label, so no search of it can be scored"):
        rh.evaluate(hasher, data)
    flat = rh.build_hasher(image={"name": "features", "inputs": 192}, bits=8, head="linear")
    rh.fit(ShallowRecipe(flat, rh.objectives.CSQ(), "itq"), data, training)
    with pytest.raises(ValueError, match="sdh is supervised, and no training item has a label; itq"):
        rh.fit(ShallowRecipe(flat, rh.objectives.CSQ(), "sdh"), data, training)
    with pytest.raises(ValueError, match="dcmh learns from labels"):
        rh.fit(rh.HashingRecipe(hasher, rh.objectives.DCMH()), data, training)
