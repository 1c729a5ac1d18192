"""Images without labels: each a class of its own, its changed copies the queries, scores by change."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import small_hasher, write_photographs
from PIL import Image

from robusthash.data import load_data
from robusthash.data.copies import CHANGES, HELD_OUT, TRAINED
from robusthash.data.image_files import read_image
from robusthash.evaluation.copy_detection import COPIES
from robusthash.evaluation.evaluate import evaluate
from robusthash.metrics.protocol import load_protocol
from robusthash.metrics.results import load_results, save_results
from robusthash.metrics.statistics import group_scores

SMALL = {"size": 16, "copies": 3, "asked": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photographs(tmp_path_factory.mktemp("photographs"), 20)


def test_the_database_holds_the_images_and_the_queries_are_copies_that_were_never_trained_on(folder: Path):
    data = load_data("copies", root=folder, **SMALL)
    assert {name: len(split) for name, split in data.splits.items()} == {
        "train": 16 * 3,
        "query": 8 * len(CHANGES),
        "database": 20,
    }
    for row, name in enumerate(data.label_names):
        stored = data.database.batch(torch.tensor([row])).inputs["image"][0]
        assert torch.equal((stored * 255).round().to(torch.uint8), read_image(folder / name, 16))
    assert torch.equal(data.database.labels, torch.eye(20))
    assert not np.isin(data.query.hashes, data.train.hashes).any()
    assert not np.isin(data.query.hashes, data.database.hashes).any()
    taught, groups = data.train.labels.sum(0) > 0, data.query.groups
    asked_of_taught = (data.query.labels * taught).sum(1) > 0
    assert torch.equal(groups[TRAINED], asked_of_taught)
    assert torch.equal(groups[HELD_OUT], ~asked_of_taught)
    assert int(groups[HELD_OUT].sum()) == 4 * len(CHANGES)
    assert torch.equal(
        torch.stack([groups[change.name] for change in CHANGES]).sum(0),
        torch.ones(len(asked_of_taught), dtype=torch.int64),
    )


def test_each_query_is_the_change_of_its_group(folder: Path):
    data = load_data("copies", root=folder, **SMALL)
    images = data.query.batch(torch.arange(len(data.query))).inputs["image"]
    stored = data.database.batch(torch.arange(20)).inputs["image"][data.query.labels.argmax(1)]
    ratio = images.mean((1, 2, 3)) / stored.mean((1, 2, 3))
    assert bool((ratio[data.query.groups["darker"]] < 0.85).all())
    assert bool((ratio[data.query.groups["jpeg-90"]] - 1).abs().max() < 0.02)
    mirrored = data.query.groups["mirrored"]
    assert float((images[mirrored].flip(-1) - stored[mirrored]).abs().mean()) < 0.02


def test_the_same_seed_gives_the_same_bytes(folder: Path):
    first, same = (load_data("copies", root=folder, **SMALL) for _ in range(2))
    assert first.fingerprint() == same.fingerprint()
    assert first.fingerprint() != load_data("copies", root=folder, seed=1, **SMALL).fingerprint()
    assert len(load_data("copies", root=folder, limit=12, **SMALL).database) == 12


def test_twins_damage_and_plain_areas_are_counted(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    shutil.copytree(folder, tmp_path / "all")
    shutil.copy(tmp_path / "all" / "0.jpg", tmp_path / "all" / "twin.jpg")
    (tmp_path / "all" / "broken.jpg").write_bytes(b"no picture")
    Image.new("RGB", (64, 64), (120, 120, 120)).save(tmp_path / "all" / "plain.png")
    data = load_data("copies", root=tmp_path / "all", size=16, copies=3, asked=21)
    assert len(data.database) == 21
    assert "1 files passed over" in data.note
    assert [Path(one.partition(" (")[0]).name for one in data.skipped] == ["broken.jpg"]
    assert "1 have the pixels of another" in data.note
    assert "dropped" in data.note  # copies of the plain area that have its own pixels
    assert len(data.query) < 21 * len(CHANGES)
    assert all(len(rows) == len(data.query) for rows in data.query.groups.values())


def test_what_cannot_be_trained_on_is_refused_in_one_line(folder: Path, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        load_data("copies", root=tmp_path / "none")
    with pytest.raises(ValueError, match="holds no image"):
        load_data("copies", root=tmp_path)
    for number in range(3):
        shutil.copy(folder / f"{number}.jpg", tmp_path)
    with pytest.raises(ValueError, match=r"holds 3 different readable images \(of 3 files\).*at least 10"):
        load_data("copies", root=tmp_path)
    with pytest.raises(ValueError, match="held_out must lie between 0 and 1, got 1"):
        load_data("copies", root=folder, held_out=1)


def test_results_hold_the_scores_of_each_group(folder: Path, tmp_path: Path):
    data = load_data("copies", root=folder, **SMALL)
    clean = evaluate(small_hasher(), data, "copies")
    assert set(clean.groups) == {change.name for change in CHANGES} | {TRAINED, HELD_OUT}
    for name, scores in clean.groups.items():
        own = clean.per_query["P@1"][data.query.groups[name]]
        assert scores.queries == len(own)
        assert scores.values["P@1"] == pytest.approx(float(own.mean()))
        low, high = scores.interval["P@1"]
        assert low - 1e-9 <= scores.values["P@1"] <= high + 1e-9
    save_results(tmp_path / "results.json", [clean])
    assert load_results(tmp_path / "results.json")[0].groups == clean.groups


def test_group_scores_leave_out_what_a_measure_leaves_out():
    values = {"MAP": torch.tensor([1.0, 0.5, float("nan"), 0.0]), "R@10": torch.full((4,), float("nan"))}
    groups = {"some": torch.tensor([True, True, True, False]), "none": torch.zeros(4, dtype=torch.bool)}
    scores = group_scores(values, groups)
    assert list(scores) == ["some"]
    assert scores["some"].queries == 3
    assert scores["some"].values == {"MAP": 0.75}


def test_one_protocol_of_copies():
    assert load_protocol("copies") == COPIES
    assert COPIES.measures == ("MAP", "P@1", "R@10")
