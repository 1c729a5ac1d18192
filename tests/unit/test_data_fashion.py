"""Fashion-MNIST: IDX files in each place and form, pooling, splits and damaged files."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from robusthash.data import fashion, load_data
from robusthash.data.fashion import read_idx

SMALL = {"train": 20, "query": 10, "database": 40}


def idx(array: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return head + array.tobytes()


def images(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 28, 28), dtype=np.uint8)


def write(folder: Path, packed: bool, train: np.ndarray | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for part, content in (("train", images(100, 0) if train is None else train), ("t10k", images(30, 1))):
        labels = (np.arange(len(content)) % 10).astype(np.uint8)
        for kind, array in (("images-idx3", content), ("labels-idx1", labels)):
            path = folder / f"{part}-{kind}-ubyte"
            if packed:
                path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(idx(array)))
            else:
                path.write_bytes(idx(array))
    return folder


@pytest.fixture(autouse=True)
def no_system_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fashion, "_DEBIAN", tmp_path / "system")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("place", [".", "FashionMNIST/raw"])
def test_found_in_each_place_and_form(tmp_path: Path, packed: bool, place: str) -> None:
    write(tmp_path / place, packed)
    data = load_data("fashion-mnist", root=tmp_path, **SMALL)
    assert {name: len(split) for name, split in data.splits.items()} == SMALL
    batch = data.database.batch(torch.arange(40))
    assert batch.inputs["image"].shape == (40, 3, 28, 28)
    assert torch.equal(batch.inputs["image"][:, 0], batch.inputs["image"][:, 2])
    assert batch.labels is not None
    assert batch.labels.sum(0).tolist() == [4] * 10
    assert data.train_in_database == 0


def test_found_where_debian_installs_it(tmp_path: Path) -> None:
    write(tmp_path / "system", True)
    assert len(load_data("fashion-mnist", root=tmp_path / "elsewhere", **SMALL).query) == 10


def test_pixels_labels_and_parts_belong_together(tmp_path: Path) -> None:
    write(tmp_path, False)
    data = load_data("fashion-mnist", root=tmp_path, **SMALL)
    for split, seed in ((data.query, 1), (data.train, 0), (data.database, 0)):
        stored = {
            image.tobytes(): row % 10 for row, image in enumerate(images(100 if seed == 0 else 30, seed))
        }
        batch = split.batch(torch.arange(len(split)))
        assert batch.labels is not None
        for image, label in zip(batch.inputs["image"][:, 0], batch.labels, strict=True):
            assert stored[(image * 255).round().to(torch.uint8).numpy().tobytes()] == int(label.argmax())


def test_pooling_is_the_area_mean(tmp_path: Path) -> None:
    write(tmp_path, False)
    whole = load_data("fashion-mnist", root=tmp_path, **SMALL)
    half = load_data("fashion-mnist", root=tmp_path, pool=14, **SMALL)
    assert half.image_size == (14, 14)
    before = whole.query.batch(torch.arange(10)).inputs["image"] * 255
    after = half.query.batch(torch.arange(10)).inputs["image"] * 255
    blocks = before.reshape(10, 3, 14, 2, 14, 2).mean((3, 5))
    assert (after - blocks).abs().max() <= 0.5 + 1e-3
    assert load_data("fashion-mnist", root=tmp_path, pool=16, **SMALL).image_size == (16, 16)


def test_repeated_pixels_are_kept_once(tmp_path: Path) -> None:
    train = images(100, 0)
    train[:10] = images(30, 1)[:10]  # ten training images equal test images
    write(tmp_path, False, train)
    data = load_data("fashion-mnist", root=tmp_path, train=20, query=None, database=None)
    assert len(data.query) == 20
    assert len(data.database) == 80


def test_seed_and_cuts(tmp_path: Path) -> None:
    write(tmp_path, False)
    first = load_data("fashion-mnist", root=tmp_path, **SMALL)
    assert load_data("fashion-mnist", root=tmp_path, **SMALL).fingerprint() == first.fingerprint()
    assert load_data("fashion-mnist", root=tmp_path, seed=1, **SMALL).fingerprint() != first.fingerprint()
    whole = load_data("fashion-mnist", root=tmp_path, train=None, query=None, database=None)
    assert [len(split) for split in whole.splits.values()] == [100, 30, 100]
    with pytest.raises(ValueError, match="class 't-shirt' has 3 items left for the queries and 50"):
        load_data("fashion-mnist", root=tmp_path)


def test_nothing_there_says_what_belongs_where(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        load_data("fashion-mnist", root=tmp_path)
    for part in (
        "train-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
        "FashionMNIST",
        "dataset-fashion-mnist",
    ):
        assert part in str(caught.value)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "images"
    path.write_bytes(b"\x89PNG and more bytes than a header")
    with pytest.raises(ValueError, match=r"images is no IDX file of 3 dimensions: it starts with 0x89504e47"):
        read_idx(path, 3)
    path.write_bytes(idx(images(3, 0))[:-1])
    with pytest.raises(ValueError, match=r"says \(3, 28, 28\) and holds 2351 bytes"):
        read_idx(path, 3)
    path.write_bytes(b"\0\0\x08\x03\0")
    with pytest.raises(ValueError, match="no IDX file"):
        read_idx(path, 3)
    path.write_bytes(idx(images(3, 0)))
    with pytest.raises(ValueError, match="no IDX file of 1 dimensions"):
        read_idx(path, 1)


@pytest.mark.parametrize(
    "damage", [b"no gzip at all", gzip.compress(b"x" * 500)[:20]], ids=["foreign", "cut"]
)
def test_broken_compression_is_named(tmp_path: Path, damage: bytes) -> None:
    write(tmp_path, True)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(damage)
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz cannot be decompressed"):
        load_data("fashion-mnist", root=tmp_path, **SMALL)


def test_files_that_do_not_fit_together(tmp_path: Path) -> None:
    write(tmp_path, False)
    labels = tmp_path / "train-labels-idx1-ubyte"
    labels.write_bytes(idx(np.zeros(99, np.uint8)))
    with pytest.raises(ValueError, match="100 train images and 99 labels"):
        load_data("fashion-mnist", root=tmp_path, **SMALL)
    labels.write_bytes(idx(np.full(100, 11, np.uint8)))
    with pytest.raises(ValueError, match="a train label is 11"):
        load_data("fashion-mnist", root=tmp_path, **SMALL)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(np.zeros((100, 32, 32), np.uint8)))
    with pytest.raises(ValueError, match="train images of 32 x 32, not 28 x 28"):
        load_data("fashion-mnist", root=tmp_path, **SMALL)


def test_wrong_pool_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pool must lie in 4\.\.28 pixels, got 3"):
        load_data("fashion-mnist", root=tmp_path, pool=3)
