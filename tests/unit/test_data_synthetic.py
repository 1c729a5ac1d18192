"""The generated world: small, deterministic, learnable, and what its options say."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from robusthash.core.labels import overlap
from robusthash.data import load_data


def test_defaults() -> None:
    data = load_data("synthetic")
    assert {name: len(split) for name, split in data.splits.items()} == {
        "train": 200,
        "query": 40,
        "database": 200,
    }
    assert data.modalities == ("image", "text")
    assert data.image_size == (16, 16)
    assert data.label_names == ("red", "green", "blue", "yellow", "disc", "square", "cross", "ring")
    assert data.train_in_database == 0
    labels = data.database.labels
    assert labels is not None
    assert labels.sum(1).unique().tolist() == [2]
    assert set(overlap(labels[:32], labels).unique().tolist()) == {0, 1, 2}


def test_same_seed_same_world() -> None:
    first = load_data("synthetic", seed=3)
    assert load_data("synthetic", seed=3).fingerprint() == first.fingerprint()
    assert load_data("synthetic", seed=4).fingerprint() != first.fingerprint()
    assert list(load_data("synthetic", seed=3, train=10, query=50).query.hashes[:40]) == list(
        first.query.hashes
    )


def test_single_label() -> None:
    data = load_data("synthetic", multilabel=False, texts=False, size=32, train=32)
    assert data.label_names[:5] == ("red disc", "green disc", "blue disc", "yellow disc", "red square")
    assert data.train.labels is not None
    assert data.train.labels.sum(0).tolist() == [2] * 16
    assert data.modalities == ("image",)
    assert data.image_size == (32, 32)


def test_labels_are_in_the_pixels_and_in_the_words() -> None:
    data = load_data("synthetic", train=64)
    batch = data.train.batch(torch.arange(64))
    assert batch.labels is not None
    red = batch.labels[:, 0] == 1
    excess = batch.inputs["image"][:, 0].amax((1, 2)) - batch.inputs["image"][:, 2].amax((1, 2))
    blue = batch.labels[:, 2] == 1
    assert excess[red].min() > 0
    assert excess[blue].max() < 0
    text = batch.inputs["text"]
    columns = [column for column in range(text.shape[1]) if torch.equal(text[:, column], batch.labels[:, 0])]
    assert len(columns) == 1  # the word "red" and nothing else


def test_a_small_net_learns_it_in_seconds() -> None:
    torch.manual_seed(1)
    data = load_data("synthetic")
    train, query = data.train.batch(torch.arange(200)), data.query.batch(torch.arange(40))
    assert train.labels is not None
    assert query.labels is not None
    net = nn.Sequential(
        nn.Conv2d(3, 12, 3, 1, 1), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(12, 24, 3, 1, 1), nn.BatchNorm2d(24), nn.ReLU(), nn.AdaptiveMaxPool2d(1),
        nn.Flatten(), nn.Linear(24, 8),
    )  # fmt: skip
    optimiser = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(60):
        optimiser.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(net(train.inputs["image"]), train.labels).backward()
        optimiser.step()
    net.eval()
    right = ((net(query.inputs["image"]) > 0).float() == query.labels).float().mean()
    assert right > 0.92  # 0.875 with the colours alone


@pytest.mark.parametrize(
    ("options", "message"),
    [({"size": 8}, r"12\.\.64 pixels, got 8"), ({"database": 0}, "database must be at least 1")],
)
def test_wrong_options_are_named(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_data("synthetic", **options)
