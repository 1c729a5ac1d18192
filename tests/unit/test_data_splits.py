"""Split builders: sizes, balance, disjointness, seeds, and the guard against repeated content."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from robusthash.core.runtime import Draws
from robusthash.data.base import ArraySource
from robusthash.data.splits import (
    Indices,
    SplitOptions,
    assemble,
    balanced_take,
    class_split,
    compact,
    hash_pixels,
    one_hot,
    random_split,
)

LABELS = torch.arange(120) % 4


def rows(indices: torch.Tensor) -> set[int]:
    assert indices.dtype == torch.int64
    assert len(set(indices.tolist())) == len(indices)
    return set(indices.tolist())


def test_balanced_take_is_balanced_in_every_prefix() -> None:
    taken = balanced_take(LABELS, 22, Draws(0), torch.ones(120, dtype=torch.bool))
    assert torch.bincount(LABELS[taken]).tolist() == [6, 6, 5, 5]
    for length in range(1, 23):
        counts = torch.bincount(LABELS[taken[:length]], minlength=4)
        assert counts.max() - counts.min() <= 1


def test_class_split_sizes_and_disjointness() -> None:
    split = class_split(LABELS, SplitOptions(query=8, train=20, seed=1))
    query, train, database = rows(split.query), rows(split.train), rows(split.database)
    assert (len(query), len(train), len(database)) == (8, 20, 92)
    assert not query & train
    assert not query & database
    assert not train & database
    assert torch.bincount(LABELS[split.query]).tolist() == [2, 2, 2, 2]
    assert torch.bincount(LABELS[split.train]).tolist() == [5, 5, 5, 5]


def test_class_split_with_training_items_in_the_database() -> None:
    split = class_split(LABELS, SplitOptions(query=8, train=20, seed=1), train_in_database=True)
    assert rows(split.train) <= rows(split.database)
    assert len(split.database) == 112
    cut = class_split(LABELS, SplitOptions(query=8, train=20, database=40, seed=1), train_in_database=True)
    assert len(cut.database) == 40
    assert 0 < len(rows(cut.train) & rows(cut.database)) < 20  # the cut does not prefer training items
    everything = class_split(LABELS, SplitOptions(query=8, train=None, seed=1))
    assert rows(everything.train) == rows(everything.database)


def test_queries_depend_on_the_seed_and_not_on_other_sizes() -> None:
    first = class_split(LABELS, SplitOptions(query=8, train=20, seed=1))
    assert torch.equal(
        first.query, class_split(LABELS, SplitOptions(query=8, train=40, database=12, seed=1)).query
    )
    assert torch.equal(
        first.train, class_split(LABELS, SplitOptions(query=8, train=20, database=12, seed=1)).train
    )
    assert not torch.equal(first.query, class_split(LABELS, SplitOptions(query=8, train=20, seed=2)).query)


def test_official_test_part_gives_the_queries_and_nothing_else() -> None:
    test = torch.arange(120) >= 100
    split = class_split(LABELS, SplitOptions(query=8, train=20, seed=0), query_among=test)
    assert min(rows(split.query)) >= 100
    assert max(rows(split.train) | rows(split.database)) < 100
    whole = class_split(LABELS, SplitOptions(query=None, train=None, seed=0), query_among=test)
    assert rows(whole.query) == set(range(100, 120))
    assert rows(whole.database) == set(range(100))
    assert len(class_split(LABELS, SplitOptions()).query) == 24  # without such a part, a fifth


def test_small_class_is_named_with_counts() -> None:
    labels = torch.tensor([0] * 10 + [1] * 3)
    with pytest.raises(
        ValueError, match=r"class 'cat' has 3 items left for the queries and 4 are needed \(8 over 2"
    ):
        class_split(labels, SplitOptions(query=8, train=2), names=("dog", "cat"))
    with pytest.raises(ValueError, match="class 'cat' has 2 items left for the training items and 3"):
        class_split(labels, SplitOptions(query=2, train=6), names=("dog", "cat"))
    with pytest.raises(ValueError, match="query must be at least 1, got 0"):
        class_split(labels, SplitOptions(query=0, train=6))


def test_random_split() -> None:
    split = random_split(50, SplitOptions(query=10, train=20, seed=3), train_in_database=False)
    parts = [rows(part) for part in (split.query, split.train, split.database)]
    assert [len(part) for part in parts] == [10, 20, 20]
    assert set.union(*parts) == set(range(50))
    assert torch.equal(split.query, random_split(50, SplitOptions(query=10, train=None, seed=3)).query)
    shared = random_split(50, SplitOptions(query=10, train=20, database=25, seed=3))
    assert len(rows(shared.database)) == 25
    assert 0 < len(rows(shared.train) & rows(shared.database)) < 20
    assert not rows(shared.query) & rows(shared.database)


@pytest.mark.parametrize(
    "sizes", [{"query": 50, "train": None}, {"query": 10, "train": 41}, {"query": 60, "train": 1}]
)
def test_random_split_of_too_few_items(sizes: dict[str, int | None]) -> None:
    with pytest.raises(ValueError, match="50 items are too few"):
        random_split(50, SplitOptions(**sizes))
    with pytest.raises(ValueError, match="database must be at least 1"):
        random_split(50, SplitOptions(query=1, train=1, database=0))


def test_compact_renumbers() -> None:
    needed, indices = compact(Indices(torch.tensor([9, 3]), torch.tensor([7]), torch.tensor([3, 20])))
    assert needed.tolist() == [3, 7, 9, 20]
    assert needed[indices.train].tolist() == [9, 3]
    assert needed[indices.query].tolist() == [7]
    assert needed[indices.database].tolist() == [3, 20]


def test_assemble_drops_repeated_queries_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    pixels = torch.arange(6, dtype=torch.uint8)[:, None, None, None].repeat(1, 3, 2, 2)
    pixels[5] = pixels[0]  # a query equal to a database item
    hashes = hash_pixels(pixels)
    assert hashes[5] == hashes[0]
    assert len(np.unique(hashes)) == 5
    indices = Indices(torch.tensor([0, 1]), torch.tensor([5, 4]), torch.tensor([0, 1, 2, 3]))
    labels = one_hot(torch.arange(6) % 2, 2)
    with caplog.at_level(logging.WARNING):
        data = assemble("toy", ArraySource({"image": pixels}), labels, hashes, indices, ("a", "b"), "Toy.")
    assert data.query.rows.tolist() == [4]
    assert data.train_in_database == 2
    assert data.note == "Toy. 1 of 2 queries dropped: the same pixels are also in another split."
    assert [record.getMessage() for record in caplog.records] == [
        "toy: 1 of 2 queries dropped: the same pixels are also in another split"
    ]
    assert data.query.labels is not None
    assert data.query.labels.tolist() == [[1.0, 0.0]]


def test_assemble_with_no_query_left() -> None:
    pixels = torch.zeros(2, 3, 2, 2, dtype=torch.uint8)
    indices = Indices(torch.tensor([0]), torch.tensor([1]), torch.tensor([0]))
    with pytest.raises(ValueError, match="no query is left"):
        assemble(
            "toy", ArraySource({"image": pixels}), torch.ones(2, 1), hash_pixels(pixels), indices, ("a",)
        )
