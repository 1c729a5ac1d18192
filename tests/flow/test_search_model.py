"""A trained run in three lines of Python: every form of an image gives the code that its file gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import robusthash as rh
from robusthash.apps.experiment.config import make_config
from robusthash.apps.experiment.index_run import encode_images
from robusthash.apps.experiment.run_directory import RunError, load_run
from robusthash.apps.experiment.training_stages import train
from robusthash.core.types import Codes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        small = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        small.resize((80, 60), Image.Resampling.BICUBIC).save(root / f"{name}.png")
    return root


CONFIG = {
    "name": "tiny",
    "data": {"name": "synthetic", "size": 32, "train": 24, "query": 8, "database": 16},
    "hasher": {"bits": 16, "image": {"name": "small", "width": 4}},
    "training": {"objective": "csq", "epochs": 1, "batch_size": 12},
    "runtime": {"device": "cpu"},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(make_config(CONFIG), tmp_path_factory.mktemp("runs")).path


@pytest.fixture
def model(trained):
    return rh.load(trained)


def test_every_form_of_an_image_gives_the_code_of_its_file(model, trained, folder):
    paths = sorted(folder.iterdir())
    expected = torch.cat([codes.packed for codes, _ in encode_images(load_run(trained), [folder])])
    pictures = [Image.open(path) for path in paths]
    arrays = [np.asarray(picture) for picture in pictures]
    tensors = [torch.from_numpy(array.copy()).permute(2, 0, 1) for array in arrays]
    seen: list[tuple[int, int]] = []
    for images in (
        paths,
        [str(p) for p in paths],
        pictures,
        arrays,
        iter(arrays),
        np.stack(arrays),
        torch.stack(tensors),
    ):
        codes = model.encode(images, batch_size=2, progress=lambda done, total, _: seen.append((done, total)))
        assert torch.equal(codes.packed, expected)
        assert codes.origin == load_run(trained).card()["digest"]
    assert (3, 3) in seen
    assert (3, 0) in seen  # an iterator does not know how many
    ready = torch.stack([model._pixels(path, 0) for path in paths])
    assert torch.equal(model.encode(ready).packed, expected)
    assert torch.equal(model.encode(paths[1]).packed, expected[1:2])


def test_what_cannot_be_used_is_named(model, folder, tmp_path):
    (tmp_path / "no.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"image 1: cannot read .*no\.png"):
        model.encode([folder / "a.png", tmp_path / "no.png"])
    with pytest.raises(ValueError, match=r"image 0: an array must be .* uint8 .* got float64"):
        model.encode(np.zeros((9, 9, 3)))
    with pytest.raises(ValueError, match="image 0: floats must lie in"):
        model.encode(torch.full((3, model.side, model.side), 2.0))
    with pytest.raises(ValueError, match="image 0: a float tensor must be"):
        model.encode(torch.zeros(3, 5, 5))
    with pytest.raises(ValueError, match="there is no image to encode"):
        model.encode([])
    with pytest.raises(RunError, match="is not a run directory"):
        rh.load(tmp_path)


def test_search_finds_an_image_that_was_added(model, folder, tmp_path):
    paths = sorted(folder.iterdir())
    with rh.open_index(f"file:{tmp_path / 'index'}", bits=model.bits) as index:
        index.add(model.encode(paths), [{"path": path.name} for path in paths])
        nearest = model.search(index, Image.open(paths[2]), k=1)[0]
        assert nearest["distance"] == 0
        foreign = Codes(model.encode(paths[0]).packed, model.bits, torch.arange(1), "another model")
        with pytest.raises(ValueError, match="model"):
            index.search(foreign, 1)


@pytest.mark.parametrize("bits", [7, 16, 33])
def test_codes_from_numpy(bits):
    signs = np.random.default_rng(bits).choice([-1, 1], (5, bits))
    expected = Codes.from_numpy(signs)
    assert np.array_equal(expected.signs().numpy(), signs)
    for array in (signs.astype(np.int8), (signs > 0).astype(np.uint8), signs > 0, signs.astype(np.float32)):
        assert torch.equal(Codes.from_numpy(array).packed, expected.packed)
    packed = np.packbits(signs > 0, axis=1)
    assert torch.equal(Codes.from_numpy(packed, bits).packed, expected.packed)
    assert np.array_equal(expected.numpy(), packed)
    assert expected.hex() == [row.tobytes().hex() for row in packed]
    with pytest.raises(ValueError, match=r"got .* columns of int8"):
        Codes.from_numpy(packed.view(np.int8), bits)
    with pytest.raises(ValueError, match="packed codes need bits="):
        Codes.from_numpy(np.full((2, bits), 7))
