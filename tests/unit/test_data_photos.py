"""The embedded photographs: deterministic, balanced, disjoint, with bounded overlap and honest captions."""

from __future__ import annotations

import builtins
from typing import Any

import numpy as np
import pytest
import torch

from robusthash.data import RetrievalData, load_data
from robusthash.data.photos import (
    PHOTOGRAPHS,
    TAGS,
    PhotoItem,
    PhotoSource,
    describe_item,
    overlap,
    photograph_path,
    thumbnail,
)
from robusthash.data.splits import hash_pixels

SMALL = {"train": 60, "query": 40, "database": 80}


@pytest.fixture(scope="module")
def data() -> RetrievalData:
    return load_data("photos", texts=True, labels="both", **SMALL)


def items_of(data: RetrievalData, name: str) -> list[PhotoItem]:
    split = data.splits[name]
    return [describe_item(split, position) for position in range(len(split))]


def test_sizes_modalities_and_ranges(data: RetrievalData) -> None:
    assert {name: len(split) for name, split in data.splits.items()} == SMALL
    batch = data.query.batch(torch.arange(40))
    assert batch.inputs["image"].shape == (40, 3, 48, 48)
    assert 0 <= batch.inputs["image"].min() < 0.1
    assert 0.9 < batch.inputs["image"].max() <= 1
    assert set(batch.inputs["text"].unique().tolist()) == {0.0, 1.0}
    assert data.image_size == (48, 48)


def test_same_options_same_bytes_and_another_seed_others(data: RetrievalData) -> None:
    again = load_data("photos", texts=True, labels="both", **SMALL)
    assert again.fingerprint() == data.fingerprint()
    assert torch.equal(
        again.train.batch(torch.arange(60)).inputs["image"],
        data.train.batch(torch.arange(60)).inputs["image"],
    )
    other = load_data("photos", texts=True, labels="both", seed=1, **SMALL)
    assert not set(other.query.hashes) & set(data.query.hashes)


def test_items_do_not_depend_on_the_sizes_of_other_splits(data: RetrievalData) -> None:
    larger = load_data("photos", texts=True, labels="both", train=100, query=40, database=20)
    assert list(larger.query.hashes) == list(data.query.hashes)
    assert list(larger.train.hashes[:60]) == list(data.train.hashes)
    assert list(larger.database.hashes) == list(data.database.hashes[:20])


def test_splits_are_disjoint_by_content(data: RetrievalData) -> None:
    every = np.concatenate([split.hashes for split in data.splits.values()])
    assert len(np.unique(every)) == sum(SMALL.values())
    assert data.train_in_database == 0


@pytest.mark.parametrize("limit", [0.75, 0.5])
def test_query_windows_overlap_no_other_by_more_than_stated(data: RetrievalData, limit: float) -> None:
    made = data if limit == 0.75 else load_data("photos", max_overlap=limit, **SMALL)
    largest = 0.0
    for query in items_of(made, "query"):
        for part in ("train", "database"):
            for other in items_of(made, part):
                if other.photograph == query.photograph:
                    largest = max(largest, float(overlap(np.array(query.box), np.array(other.box))))
    assert limit - 0.15 < largest <= limit  # the bound holds, and is what is holding


def test_overlap_is_intersection_over_union() -> None:
    box = np.array([0.0, 0.0, 0.5, 0.5])
    others = np.array(
        [[0.0, 0.0, 0.5, 0.5], [0.25, 0.0, 0.75, 0.5], [0.5, 0.5, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]]
    )
    assert overlap(others, box) == pytest.approx([1, 1 / 3, 0, 0.25])


def test_impossible_overlap_names_the_remedy() -> None:
    with pytest.raises(
        ValueError, match=r"photograph '\w+'.* above 0\.01; raise max_overlap or ask for fewer queries"
    ):
        load_data("photos", max_overlap=0.01, **SMALL)


def test_windows_lie_inside_and_have_the_stated_size(data: RetrievalData) -> None:
    for item in (item for name in SMALL for item in items_of(data, name)):
        left, top, right, bottom = item.box
        assert 0 <= left < right <= 1 + 1e-9
        assert 0 <= top < bottom <= 1 + 1e-9
        assert max(right - left, bottom - top) >= 0.35  # 40 % of the shorter side, aspect up to 5:4


def test_no_window_is_nearly_constant(data: RetrievalData) -> None:
    for name, count in SMALL.items():
        images = data.splits[name].batch(torch.arange(count)).inputs["image"]
        assert (images.mean(1).flatten(1).std(1) * 255).min() > 4  # 10 before contrast and compression


def test_photographs_are_balanced_and_labels_agree(data: RetrievalData) -> None:
    assert len(PHOTOGRAPHS) == 20
    assert data.label_names == (*(photograph.name for photograph in PHOTOGRAPHS), *TAGS)
    for name, count in SMALL.items():
        labels = data.splits[name].labels
        assert labels is not None
        assert labels[:, :20].sum(0).tolist() == [count / 20] * 20
        for row, item in zip(labels, items_of(data, name), strict=True):
            named = {data.label_names[column] for column in torch.nonzero(row).flatten().tolist()}
            assert named == {item.photograph, *item.tags}


def test_every_tag_is_shared_and_every_photograph_has_one() -> None:
    for tag in TAGS:
        assert sum(tag in photograph.tags for photograph in PHOTOGRAPHS) >= 2, tag
    assert all(photograph.tags for photograph in PHOTOGRAPHS)


def test_label_kinds() -> None:
    assert load_data("photos", train=20, query=20, database=20).label_names == tuple(
        p.name for p in PHOTOGRAPHS
    )
    tags = load_data("photos", labels="tags", train=20, query=20, database=20)
    assert tags.label_names == TAGS
    assert tags.query.labels is not None
    assert tags.query.labels.sum(1).max() > 1
    assert tags.modalities == ("image",)


def test_captions_say_what_was_done(data: RetrievalData) -> None:
    for item in (item for name in SMALL for item in items_of(data, name)):
        photograph = next(known for known in PHOTOGRAPHS if known.name == item.photograph)
        assert any(item.caption.startswith(phrase) for phrase in photograph.phrases)
        assert ("mirrored" in item.caption) == item.mirrored
        assert ("darker" in item.caption) == (item.brightness < 0.95)
        assert ("brighter" in item.caption) == (item.brightness > 1.05)
        assert ("strongly compressed" in item.caption) == (item.quality < 50)
    captions = {item.caption for item in items_of(data, "database")}
    assert len(captions) > 60


def test_captions_are_encoded_with_the_training_vocabulary(data: RetrievalData) -> None:
    width = data.train.batch(torch.arange(1)).inputs["text"].shape[1]
    words = {word for item in items_of(data, "train") for word in item.caption.replace(",", "").split()}
    assert width == len(words)
    assert "caption words of query and database are outside the vocabulary" in data.note


def test_changes_are_in_the_pixels(data: RetrievalData) -> None:
    item = describe_item(data.query, 0)
    plain = PhotoItem(item.photograph, item.tags, item.box, False, 1.0, 1.0, 95, "")
    mirrored = PhotoItem(item.photograph, item.tags, item.box, True, 1.0, 1.0, 95, "")
    bright = PhotoItem(item.photograph, item.tags, item.box, False, 1.2, 1.0, 95, "")
    first = thumbnail(plain, 64).float()
    assert (thumbnail(mirrored, 64).float().flip(2) - first).abs().mean() < 6
    assert (thumbnail(mirrored, 64).float() - first).abs().mean() > 12
    assert thumbnail(bright, 64).float().mean() > first.mean() + 10


def test_thumbnail_is_the_item_at_another_size(data: RetrievalData) -> None:
    item = describe_item(data.database, 3)
    assert thumbnail(item).shape == (3, 256, 256)
    same = thumbnail(item, 48)
    assert torch.equal(same.float() / 255, data.database.batch(torch.tensor([3])).inputs["image"][0])


def test_size_changes_pixels_and_not_windows(data: RetrievalData) -> None:
    large = load_data("photos", size=64, **SMALL)
    assert large.image_size == (64, 64)
    assert [item.box for item in items_of(large, "query")] == [item.box for item in items_of(data, "query")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 8}, r"16\.\.256 pixels, got 8"),
        ({"labels": "names"}, "'photo', 'tags' or 'both', got 'names'"),
        ({"max_overlap": 0.0}, "max_overlap must lie"),
        ({"query": 0}, "query must be at least 1, got 0"),
    ],
)
def test_wrong_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_data("photos", **options)


def test_unknown_option_offers_the_nearest() -> None:
    with pytest.raises(KeyError, match="'label'; did you mean 'labels'"):
        load_data("photos", label="tags")


def test_missing_photograph_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"astronaut\.png is missing.*scikit-image"):
        photograph_path(PHOTOGRAPHS[0])


def test_items_of_another_data_set_cannot_be_described() -> None:
    with pytest.raises(ValueError, match="embedded photographs"):
        describe_item(load_data("synthetic").query, 0)


def test_pixels_alone_decide_the_hash(data: RetrievalData) -> None:
    without = load_data("photos", **SMALL)
    assert list(without.query.hashes) == list(data.query.hashes)
    assert isinstance(data.query.source, PhotoSource)
    assert list(hash_pixels(data.query.source.arrays["image"])[:60]) == list(data.train.hashes)


def test_neither_package_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def guarded(name: str, *rest: Any, **named: Any) -> Any:
        assert name.partition(".")[0] not in ("skimage", "sklearn"), name
        return original(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", guarded)
    assert len(load_data("photos", train=20, query=20, database=20).query) == 20
