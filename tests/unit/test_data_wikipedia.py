"""Wikipedia documents: the packed features, the official archive on a small tree, and an encoder for
vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.io import savemat

from robusthash.data import load_data
from robusthash.data.wikipedia import CATEGORIES
from robusthash.models import build_hasher, encode_split
from robusthash.objectives import DPSH
from robusthash.training import HashingRecipe, fit
from tests.helpers import train_config
from tests.unit.test_data_folder import picture

TRAIN, TEST = 20, 6


def features(seed: int = 0) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    made = {}
    for part, count in (("train", TRAIN), ("test", TEST)):
        made[f"image_{part}"] = draw.random((count, 128), dtype=np.float32)
        made[f"text_{part}"] = draw.random((count, 10), dtype=np.float32)
        made[f"label_{part}"] = (np.arange(count) % 10).astype(np.uint8)
    return made


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """The folder that the official archive unpacks to, 26 documents; one text is no sound XML."""
    root = tmp_path / "wikipedia_dataset"
    (root / "texts").mkdir(parents=True)
    made = features()
    names = {"image_train": "I_tr", "text_train": "T_tr", "image_test": "I_te", "text_test": "T_te"}
    savemat(root / "raw_features.mat", {new: made[old].astype(np.float64) for old, new in names.items()})
    for part, start, count in (("train", 0, TRAIN), ("test", TRAIN, TEST)):
        lines = []
        for number in range(start, start + count):
            category = (number - start) % 10
            file = root / "images" / CATEGORIES[category] / f"i{number}.jpg"
            picture(file.with_suffix(".png"), number).rename(file)
            (root / "texts" / f"t{number}-1.2.xml").write_text(
                f"<document><text>Art &amp; life {number} & x</text>"
            )
            lines.append(f"t{number}-1.2\ti{number}\t{category + 1}\r\n")
        (root / f"{part}set_txt_img_cat.list").write_bytes("".join(lines).encode())
    return tmp_path


def test_packed_and_official_features_are_the_same(archive: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", **features())
    official = load_data("wikipedia", root=archive)
    packed = load_data("wikipedia", npz=tmp_path / "other.npz")
    assert official.fingerprint() == packed.fingerprint()
    assert [len(split) for split in official.splits.values()] == [TRAIN, TEST, TRAIN]
    assert official.image_size == (128,)
    assert official.vocabulary == 10
    assert official.label_names == CATEGORIES
    rows = torch.arange(TEST)
    batch = official.query.batch(rows)
    assert torch.equal(batch.inputs["image"], torch.from_numpy(features()["image_test"]))
    assert batch.labels is not None
    assert batch.labels.argmax(1).tolist() == list(range(6))
    assert load_data("wikipedia", root=archive, texts=False).modalities == ("image",)


def test_cut_sizes_are_drawn_by_the_seed(archive: Path) -> None:
    data = load_data("wikipedia", root=archive, query=3, train=8, database=10, seed=1)
    assert [len(split) for split in data.splits.values()] == [8, 3, 10]
    assert "query=3, train=8, database=10, seed 1" in data.note
    again = load_data("wikipedia", root=archive, query=3, train=8, database=10, seed=1)
    assert again.fingerprint() == data.fingerprint()
    assert (
        load_data("wikipedia", root=archive, query=3, seed=2).query.fingerprint() != data.query.fingerprint()
    )
    with pytest.raises(ValueError, match="7 query documents were asked for and 6 are there"):
        load_data("wikipedia", root=archive, query=7)


def test_pixels_with_topics_and_with_words(archive: Path) -> None:
    data = load_data("wikipedia", root=archive, images="pixels", size=8)
    batch = data.query.batch(torch.arange(TEST))
    assert batch.inputs["image"].shape == (TEST, 3, 8, 8)
    assert torch.equal(batch.inputs["text"], torch.from_numpy(features()["text_test"]))
    assert batch.labels is not None
    assert batch.labels.argmax(1).tolist() == list(range(6))
    words = load_data("wikipedia", root=archive, images="pixels", texts="bag", size=8)
    assert words.vocabulary == 3 + TRAIN  # art, life, x and the training numbers; no "amp", no "document"
    assert words.query.batch(torch.arange(TEST)).inputs["text"].sum(1).tolist() == [3] * TEST


def test_missing_files(archive: Path, tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no raw_features\.mat in .*; wikipedia_dataset\.zip unpacks to"
    ):
        load_data("wikipedia", root=tmp_path / "nowhere")
    with pytest.raises(
        FileNotFoundError, match=r"no file .*none\.npz; it should hold the arrays image_train"
    ):
        load_data("wikipedia", npz=tmp_path / "none.npz")
    root = archive / "wikipedia_dataset"
    (root / "texts" / "t3-1.2.xml").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file .*t3-1\.2\.xml"):
        load_data("wikipedia", root=archive, images="pixels", texts="bag", size=8)
    (root / "testset_txt_img_cat.list").unlink()
    with pytest.raises(FileNotFoundError, match=r"no testset_txt_img_cat\.list"):
        load_data("wikipedia", root=archive)


def test_broken_files(archive: Path, tmp_path: Path) -> None:
    made = features()
    made["text_test"][2, 3] = np.nan
    np.savez(tmp_path / "a.npz", **made)
    with pytest.raises(ValueError, match="text features hold NaN"):
        load_data("wikipedia", npz=tmp_path / "a.npz")
    del made["text_test"]
    np.savez(tmp_path / "b.npz", **made)
    with pytest.raises(ValueError, match=r"b\.npz is not a Wikipedia archive: it lacks the arrays text_test"):
        load_data("wikipedia", npz=tmp_path / "b.npz")
    short = features()
    short["text_train"] = short["text_train"][:-1]
    np.savez(tmp_path / "c.npz", **short)
    with pytest.raises(ValueError, match="modalities of different length"):
        load_data("wikipedia", npz=tmp_path / "c.npz")
    (archive / "wikipedia_dataset" / "trainset_txt_img_cat.list").write_text("t0\ti0\t11\n")
    with pytest.raises(ValueError, match=r"category \(1 to 10\) a line, and hold \['t0', 'i0', '11'\]"):
        load_data("wikipedia", root=archive)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": "vectors"}, "'features' or 'pixels', got 'vectors'"),
        ({"texts": "words"}, "got 'words'"),
        ({"texts": "bag"}, "goes with images='pixels'"),
        ({"npz": "a.npz", "images": "pixels"}, "needs the official archive"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_data("wikipedia", **options)


def test_a_hasher_learns_from_vectors(archive: Path) -> None:
    data = load_data("wikipedia", root=archive)
    hasher = build_hasher(
        bits=8,
        image={"name": "vector", "inputs": 128, "widths": [16]},
        text={"name": "mlp", "widths": [16]},
        vocabulary=data.vocabulary,
    )
    lines = fit(HashingRecipe(hasher, DPSH()), data, train_config(3))
    assert len(lines) == 3
    codes = encode_split(hasher, data.query)
    assert {name: len(value) for name, value in codes.items()} == {"image": TEST, "text": TEST}
    with pytest.raises(
        ValueError, match=r"takes 128 features an item, and the images come as \(2, 3, 8, 8\)"
    ):
        hasher({"image": torch.zeros(2, 3, 8, 8)})
    small = torch.rand(3, 128)
    encoder = hasher.encoders["image"].eval()
    torch.testing.assert_close(
        encoder(0.1 * small)[0], encoder(small)[0], rtol=1e-3, atol=1e-3
    )  # scale is no matter
    with pytest.raises(ValueError, match="inputs and widths must be positive"):
        build_hasher(bits=8, image={"name": "vector", "inputs": 0})


@pytest.mark.data
def test_real_features(shared_data: Path) -> None:
    data = load_data("wikipedia", root=shared_data)
    assert {name: len(split) for name, split in data.splits.items()} == {
        "train": 2173,
        "query": 693,
        "database": 2173,
    }
    assert data.image_size == (128,)
    assert data.train.labels is not None
    assert data.train.labels.sum(0).tolist() == [138, 272, 244, 248, 202, 178, 186, 144, 214, 347]
