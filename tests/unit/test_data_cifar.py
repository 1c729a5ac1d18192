"""CIFAR-10: the three splits, both layouts, and what is said when files are missing or damaged."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.datasets.cifar
from PIL import Image

from robusthash.data import RetrievalData, load_data

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
SMALL = {"query": 20, "train": 50}


def noise(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def arrays(count: int = 200, side: int = 32) -> dict[str, Any]:
    files = []
    for image in noise(count):
        stream = io.BytesIO()
        Image.fromarray(image[:side, :side]).save(stream, "JPEG", quality=90)
        files.append(np.frombuffer(stream.getvalue(), np.uint8))
    return {
        "jpeg": np.concatenate(files),
        "offset": np.cumsum([0] + [len(file) for file in files]),
        "label": np.arange(count) % 10,
        "is_test": (np.arange(count) >= count * 3 // 4).astype(np.uint8),
        "classes": np.array(CLASSES),
    }


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cifar") / "cifar10.npz"
    np.savez(path, **arrays())
    return path


@pytest.fixture
def official(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Python batches in the official layout; their digests cannot be the official ones, so that check is
    off."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = noise(120).transpose(0, 3, 1, 2).reshape(6, 20, 3072)
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    for name, part in zip(names, pixels, strict=True):
        (folder / name).write_bytes(pickle.dumps({"data": part, "labels": [n % 10 for n in range(20)]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": CLASSES}))
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    return tmp_path


def hashes(data: RetrievalData, name: str) -> set[bytes]:
    return set(data.splits[name].hashes.tolist())


def test_deephash_leaves_train_out_of_the_database(archive: Path) -> None:
    data = load_data("cifar10", npz=archive, **SMALL)
    assert [len(split) for split in data.splits.values()] == [50, 20, 130]
    assert data.train_in_database == 0
    assert not hashes(data, "query") & (hashes(data, "train") | hashes(data, "database"))
    for split in data.splits.values():
        assert split.labels is not None
        assert split.labels.sum(0).tolist() == [len(split) / 10] * 10
    assert data.label_names == tuple(CLASSES)
    assert "re-encoded JPEG" in data.note
    assert "order is not the official one" in data.note


def test_deephash_with_train_searches_everything_but_queries(archive: Path) -> None:
    data = load_data("cifar10", npz=archive, split="deephash-with-train", **SMALL)
    assert len(data.database) == 180
    assert hashes(data, "train") <= hashes(data, "database")
    same = load_data("cifar10", npz=archive, **SMALL)
    assert data.query.fingerprint() == same.query.fingerprint()
    assert data.train.fingerprint() == same.train.fingerprint()


def test_official_test_images_are_the_queries(archive: Path) -> None:
    data = load_data("cifar10", npz=archive, split="official-test")
    assert [len(split) for split in data.splits.values()] == [150, 50, 150]
    assert hashes(data, "train") == hashes(data, "database")
    cut = load_data("cifar10", npz=archive, split="official-test", query=10, train=20, database=40)
    assert [len(split) for split in cut.splits.values()] == [20, 10, 40]
    assert hashes(cut, "query") < hashes(data, "query")


def test_cut_database_is_balanced_and_seeded(archive: Path) -> None:
    data = load_data("cifar10", npz=archive, database=40, seed=5, **SMALL)
    assert data.database.labels is not None
    assert data.database.labels.sum(0).tolist() == [4] * 10
    assert load_data("cifar10", npz=archive, database=40, seed=5, **SMALL).fingerprint() == data.fingerprint()
    assert load_data("cifar10", npz=archive, database=40, seed=6, **SMALL).fingerprint() != data.fingerprint()


def test_pixels_and_labels_belong_together(archive: Path) -> None:
    data = load_data("cifar10", npz=archive, **SMALL)
    batch = data.query.batch(torch.arange(20))
    assert batch.inputs["image"].shape == (20, 3, 32, 32)
    assert batch.labels is not None
    content = np.load(archive)
    stored = [
        np.asarray(Image.open(io.BytesIO(content["jpeg"][start:end].tobytes()))).transpose(2, 0, 1)
        for start, end in zip(content["offset"][:-1], content["offset"][1:], strict=True)
    ]
    for image, label in zip(batch.inputs["image"], batch.labels, strict=True):
        found = [
            row for row, pixels in enumerate(stored) if np.array_equal(pixels, (image * 255).round().numpy())
        ]
        assert [row % 10 for row in found] == [int(label.argmax())]


def test_official_layout(official: Path) -> None:
    data = load_data("cifar10", root=official, split="official-test")
    assert [len(split) for split in data.splits.values()] == [100, 20, 100]
    assert "re-encoded" not in data.note
    wanted = {image.transpose(2, 0, 1).tobytes() for image in noise(120)[100:]}
    read = (data.query.batch(torch.arange(20)).inputs["image"] * 255).round().to(torch.uint8).numpy()
    assert {image.tobytes() for image in read} == wanted


def test_altered_official_files_are_refused(official: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # torchvision's digests are checked again
    with pytest.raises(ValueError, match=r"cifar-10-batches-py is damaged or incomplete"):
        load_data("cifar10", root=official)


def test_nothing_there_says_what_belongs_where(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        load_data("cifar10", root=tmp_path)
    for part in ("cifar-10-batches-py", "cifar10.npz", "download=True", "npz=", str(tmp_path)):
        assert part in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"other\.npz; it should hold the arrays jpeg, offset"):
        load_data("cifar10", npz=tmp_path / "other.npz")


def test_archive_is_found_in_root(archive: Path) -> None:
    assert len(load_data("cifar10", root=archive.parent, **SMALL).query) == 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offset": None}, "lacks the arrays offset"),
        ({"offset": np.arange(5)}, "200 labels, 200 test marks and 5 offsets do not fit"),
        ({"label": np.full(200, 10)}, r"labels must lie in 0\.\.9"),
        ({"jpeg": np.zeros(10, np.uint8)}, "there are 10 bytes of images"),
    ],
)
def test_damaged_archives_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    content = {key: value for key, value in {**arrays(), **change}.items() if value is not None}
    np.savez(tmp_path / "bad.npz", **content)
    with pytest.raises(ValueError, match=rf"bad\.npz.*{message}"):
        load_data("cifar10", npz=tmp_path / "bad.npz", **SMALL)


def test_images_that_are_none_or_of_another_size(tmp_path: Path) -> None:
    content = arrays()
    np.savez(tmp_path / "zeros.npz", **{**content, "jpeg": np.zeros_like(content["jpeg"])})
    with pytest.raises(ValueError, match=r"image \d+ of .*zeros\.npz is no JPEG file"):
        load_data("cifar10", npz=tmp_path / "zeros.npz", **SMALL)
    np.savez(tmp_path / "small.npz", **arrays(side=16))
    with pytest.raises(ValueError, match=r"image \d+ of .*small\.npz is 16 x 16, not 32 x 32"):
        load_data("cifar10", npz=tmp_path / "small.npz", **SMALL)
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(ValueError, match=r"torn\.npz is not a CIFAR-10 archive"):
        load_data("cifar10", npz=tmp_path / "torn.npz")


def test_wrong_options_are_named(archive: Path) -> None:
    with pytest.raises(ValueError, match="'official-test', got 'cifar10-2'"):
        load_data("cifar10", npz=archive, split="cifar10-2")
    with pytest.raises(
        ValueError, match="class 'airplane' has 20 items left for the queries and 100 are needed"
    ):
        load_data("cifar10", npz=archive)
    with pytest.raises(ValueError, match="query must be at least 1, got 0"):
        load_data("cifar10", npz=archive, query=0)


@pytest.mark.data
def test_real_archive_at_the_customary_size(shared_data: Path) -> None:
    data = load_data("cifar10", npz=shared_data / "cifar10.npz", database=10000)
    assert [len(split) for split in data.splits.values()] == [5000, 1000, 10000]
    assert len(set(data.database.hashes.tolist())) == 10000
    mean = data.database.batch(torch.arange(10000)).inputs["image"].mean((0, 2, 3))
    assert mean.tolist() == pytest.approx([0.4917, 0.4826, 0.4472], abs=0.01)
