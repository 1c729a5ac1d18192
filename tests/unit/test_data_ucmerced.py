"""UC Merced: the preset over a manifest, on a small set in its layout and on the real one."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from robusthash.data import load_data


@pytest.fixture
def merced(tmp_path: Path) -> Path:
    """Twelve pictures below ``ucmerced`` and their manifest."""
    lines = []
    for number in range(12):
        file = tmp_path / "ucmerced" / ("beach", "river")[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(file)
        row = {"file": str(file.relative_to(tmp_path)), "labels": [["sand", "sea"], ["water"]][number % 2]}
        row |= {"class": file.parent.name, "captions": ["first words here", "a second sentence"]}
        lines.append(json.dumps({**row, "split": ["train", "train", "test", "val"][number % 4]}))
    (tmp_path / "ucmerced.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_both_label_systems_and_all_captions(merced: Path) -> None:
    data = load_data("ucmerced", root=merced, size=8)
    assert data.name == "ucmerced"
    assert [len(split) for split in data.splits.values()] == [6, 6, 6]
    assert data.label_names == ("sand", "sea", "water")
    assert data.label_systems == ("class",)
    assert data.vocabulary == 6
    classes = data.by("class").query.labels
    assert classes is not None
    assert torch.equal(classes, torch.nn.functional.one_hot(torch.tensor([0, 1] * 3), 2).float())
    swapped = load_data(
        "ucmerced", root=merced, size=8, labels="class", caption="first", query_splits=["test"]
    )
    assert swapped.label_names == ("beach", "river")
    assert swapped.label_systems == ("labels",)
    assert swapped.vocabulary == 3
    assert swapped.validation is not None
    main = load_data("ucmerced", root=merced, size=8, query_splits=["test"]).query.labels
    other = swapped.query.also["labels"]
    assert main is not None
    assert torch.equal(other, main)


def test_archive_beside_the_manifest_comes_first(merced: Path) -> None:
    expected = load_data("ucmerced", root=merced, size=8).fingerprint()
    with tarfile.open(merced / "ucmerced.tar", "w") as archive:
        archive.add(merced / "ucmerced", "ucmerced")
    for file in (merced / "ucmerced").rglob("*.png"):
        file.unlink()
    assert load_data("ucmerced", root=merced, size=8).fingerprint() == expected


def test_missing_files_are_named(tmp_path: Path, merced: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no UC Merced at .*ucmerced\.jsonl: it should hold one JSON object"
    ):
        load_data("ucmerced", root=tmp_path / "nowhere")
    (merced / "ucmerced").rename(merced / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"neither .*ucmerced\.tar nor the folder"):
        load_data("ucmerced", root=merced)


@pytest.mark.data
def test_the_real_set(shared_data: Path) -> None:
    data = load_data("ucmerced", root=shared_data, size=16)
    assert {name: len(split) for name, split in data.splits.items()} == {
        "train": 1680,
        "query": 420,
        "database": 1680,
    }
    assert len(data.label_names) == 17
    classes = data.by("class")
    assert classes.query.labels is not None
    assert classes.query.labels.shape == (420, 21)
    assert classes.query.labels.sum(1).tolist() == [1] * 420
