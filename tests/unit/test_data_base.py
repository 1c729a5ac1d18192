"""Splits and data sets: what is refused when they are made, and the loader."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from robusthash.core.runtime import Draws
from robusthash.data import ArraySource, RetrievalData, Split, batches


def source(count: int = 12, seed: int = 0) -> ArraySource:
    pixels = torch.randint(
        0, 256, (count, 3, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    return ArraySource({"image": pixels, "text": torch.eye(count)})


def split(name: str, rows: list[int], held: ArraySource) -> Split:
    picked = torch.tensor(rows, dtype=torch.int64)
    labels = torch.nn.functional.one_hot(picked % 3, 3).float()
    return Split(name, held, picked, labels, held.hashes()[rows])


def test_a_query_in_the_database_or_the_training_set_is_an_error():
    held = source()
    train, database = split("train", [0, 1, 2], held), split("database", [3, 4, 5], held)
    with pytest.raises(ValueError, match=r"1 of 2 queries are also in the database split \(first: query 1"):
        RetrievalData("toy", train, split("query", [6, 3], held), database, ("a", "b", "c"))
    with pytest.raises(ValueError, match="also in the train split"):
        RetrievalData("toy", train, split("query", [0, 7], held), database, ("a", "b", "c"))


def test_equal_content_under_another_row_is_found():
    held = source()
    held.arrays["image"][9] = held.arrays["image"][3]
    held.arrays["text"][9] = held.arrays["text"][3]
    with pytest.raises(ValueError, match="also in the database"):
        RetrievalData(
            "toy", split("train", [0], held), split("query", [9], held), split("database", [3], held), ("a",)
        )


def test_training_items_in_the_database_are_recorded():
    held = source()
    data = RetrievalData(
        "toy",
        split("train", [0, 1], held),
        split("query", [6], held),
        split("database", [1, 2, 3], held),
        ("a",),
    )
    assert data.train_in_database == 1
    assert data.describe()["unlabelled"] == {"train": 0, "query": 0, "database": 0}
    assert data.describe()["sizes"] == {"train": 2, "query": 1, "database": 3}


def test_fingerprints_depend_on_content_and_order():
    held = source()
    assert split("a", [0, 1], held).fingerprint() == split("b", [0, 1], held).fingerprint()
    assert split("a", [0, 1], held).fingerprint() != split("a", [1, 0], held).fingerprint()


def test_bad_splits_are_refused():
    held = source()
    with pytest.raises(ValueError, match="train split is empty"):
        Split("train", held, torch.empty(0, dtype=torch.int64), None, np.array([], dtype="S16"))
    with pytest.raises(ValueError, match="2 label rows for 3 items"):
        Split("train", held, torch.arange(3), torch.zeros(2, 3), held.hashes()[:3])
    with pytest.raises(ValueError, match=r"labels are .* of 0 and 1, and one is nan"):
        Split("train", held, torch.arange(2), torch.full((2, 3), float("nan")), held.hashes()[:2])
    with pytest.raises(ValueError, match=r"different length.*'image': 4.*'text': 5"):
        ArraySource({"image": torch.zeros(4, 3, 8, 8, dtype=torch.uint8), "text": torch.zeros(5, 2)})
    for value in (-1.0, 2.0, 0.5):
        with pytest.raises(ValueError, match=f"of 0 and 1, and one is {value:g}"):
            Split("train", held, torch.arange(3), torch.full((3, 2), value), held.hashes()[:3])
    with pytest.raises(ValueError, match=r"multi-hot, got \[3\]"):
        Split("train", held, torch.arange(3), torch.zeros(3), held.hashes()[:3])


def test_batches_cover_every_item_once_and_shuffle_by_key():
    part = split("train", list(range(11)), source())
    plain = [batch.ids.tolist() for batch in batches(part, 4)]
    assert plain == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    shuffled = [i for batch in batches(part, 4, Draws(0)) for i in batch.ids.tolist()]
    assert sorted(shuffled) == list(range(11))
    assert shuffled != list(range(11))
    assert shuffled == [i for batch in batches(part, 3, Draws(0)) for i in batch.ids.tolist()]
    assert shuffled != [i for batch in batches(part, 4, Draws(1)) for i in batch.ids.tolist()]
    pool = [i for batch in batches(part, 2, positions=torch.tensor([5, 2, 7])) for i in batch.ids.tolist()]
    assert pool == [5, 2, 7]
    with pytest.raises(ValueError, match="batch_size"):
        next(batches(part, 0))


def test_batches_narrow_the_modalities():
    part = split("train", [0, 1, 2], source())
    batch = next(batches(part, 2, modalities=("image",)))
    assert list(batch.inputs) == ["image"]
    assert batch.inputs["image"].dtype == torch.float32
    assert 0 <= batch.inputs["image"].min() <= batch.inputs["image"].max() <= 1
    with pytest.raises(ValueError, match="audio"):
        next(batches(part, 2, modalities=("audio",)))
