"""Miniatures: every reader takes the generated layout as it takes its archives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from robusthash.core.registry import build
from robusthash.data.miniature import LAYOUTS, write_miniature

# settings of a recipe, items of the whole set by split, width of its texts, labels
CASES: list[tuple[dict[str, Any], tuple[int, int, int], int | None, int]] = [
    ({"name": "mirflickr"}, (5_000, 2_000, 18_015), 1386, 24),
    ({"name": "mirflickr", "split": "dsarh", "mir_filter": "none", "concepts": 38}, (5_000, 1_000, 24_000), 1386, 38),
    ({"name": "nus-wide", "images": "elsewhere"}, (10_500, 2_100, 193_734), 1000, 21),
    ({"name": "nus-wide", "split": "djsrh"}, (5_000, 2_000, 184_577), 1000, 10),
    ({"name": "mscoco", "unlabelled": "keep"}, (10_000, 5_000, 118_287), 2000, 80),
    ({"name": "mscoco", "year": 2014, "split": "dsarh", "karpathy": "x"}, (113_287, 5_000, 113_287), 2000, 80),
    ({"name": "mscoco", "split": "official"}, (118_287, 5_000, 118_287), 2000, 80),
    ({"name": "cifar10", "npz": "elsewhere.npz"}, (5_000, 1_000, 54_000), None, 10),
    ({"name": "cifar10", "split": "official-test", "train": 7}, (7, 10_000, 50_000), None, 10),
    ({"name": "fashion-mnist"}, (2_000, 500, 10_000), None, 10),
    ({"name": "wikipedia"}, (2_173, 693, 2_173), 10, 10),
    ({"name": "wikipedia", "images": "pixels", "texts": "bag"}, (2_173, 693, 2_173), 1000, 10),
    ({"name": "ucmerced", "archive": "x.tar"}, (1_680, 420, 1_680), 306, 17),
    ({"name": "ucmerced", "labels": "class", "query_splits": ["test"]}, (1_680, 210, 1_680), 306, 21),
    ({"name": "folder", "root": "x", "split": "balanced", "train": 100, "query": 50}, (100, 50, 133_353), None, 100),
    ({"name": "copies", "root": "x"}, (8_000, 600, 1_000), None, 24),
]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "official", "vocabulary", "labels"), CASES, ids=lambda value: str(value)[:60]
)
def test_readers_take_the_layout(
    tmp_path: Path,
    settings: dict[str, Any],
    official: tuple[int, int, int],
    vocabulary: int | None,
    labels: int,
) -> None:
    small = write_miniature(
        {"size": 32, **settings} if settings["name"] not in ("cifar10", "fashion-mnist") else settings,
        tmp_path,
        6,
        4,
        8,
    )
    assert tuple(small.official[name] for name in ("train", "query", "database")) == official
    data = build("data", small.settings)
    assert len(data.train) >= 6
    assert len(data.query) >= 4
    assert len(data.database) >= 8
    assert data.without_relevant() < len(data.query)
    assert data.vocabulary == vocabulary
    assert len(data.label_names) == labels


def test_every_layout_is_tried() -> None:
    assert {settings["name"] for settings, *_ in CASES} == set(LAYOUTS)


def test_token_ids_need_no_folder_of_the_user(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    settings = {
        "name": "ucmerced",
        "size": 32,
        "texts": "tokens",
        "tokenizer": "weights/bert",
        "max_length": 40,
    }
    data = build("data", write_miniature(settings, tmp_path, 4, 4, 4).settings)
    assert data.train.batch(torch.arange(2)).inputs["text"].shape == (2, 40)


def test_sets_without_a_layout_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"class folders, and data\.manifest is set; leave it out"):
        write_miniature({"name": "folder", "manifest": "x.csv"}, tmp_path, 4, 4, 4)
    assert write_miniature("synthetic", tmp_path, 4, 4, 4).settings == {"name": "synthetic"}
    assert not list(tmp_path.iterdir())
