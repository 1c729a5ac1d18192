"""A trained run in three lines of Python: every form of an image gives the code that its file gives."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import robusthash as rh
from robusthash.apps.cli import app
from robusthash.apps.experiment import search_model
from robusthash.apps.experiment.config import make_config
from robusthash.apps.experiment.index_run import encode_images
from robusthash.apps.experiment.run_directory import RunError, load_run
from robusthash.apps.experiment.run_files import sealed
from robusthash.apps.experiment.training_stages import train
from robusthash.core.out_of_memory import SmallerBatch
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
    expected = torch.cat([codes.packed for codes, _ in encode_images(rh.load(trained), [folder])])
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
    with pytest.raises(ValueError, match=r"image 0: pixels are uint8 .* got torch.int64"):
        model.encode(np.zeros((9, 9, 3), int))
    with pytest.raises(ValueError, match=r"image 0: images are uint8 .* array of object"):
        model.encode(np.zeros((9, 9, 3), object))
    with pytest.raises(ValueError, match="image 0: floats must lie in"):
        model.encode(torch.full((3, model.side, model.side), 2.0))
    with pytest.raises(ValueError, match="image 0: floats must be 32 x 32 pixels already"):
        model.encode(torch.zeros(3, 5, 5))
    with pytest.raises(ValueError, match="there is no image to encode"):
        model.encode([])
    with pytest.raises(ValueError, match="encode takes images, or texts, one or several; got NoneType"):
        model.encode(None)
    with pytest.raises(RunError, match="is not a run directory"):
        rh.load(tmp_path)
    with pytest.raises(ValueError, match="this model encodes image, not 'text' items"):
        model.encode(["a red disc"], modality="text")


def test_what_cannot_be_read_is_skipped_and_counted(model, folder, tmp_path, caplog):
    paths = sorted(folder.iterdir())
    (tmp_path / "no.png").write_bytes(b"no image")
    mixed = [paths[0], tmp_path / "no.png", tmp_path / "gone.png", paths[1]]
    codes = model.encode(mixed, batch_size=2, on_error="skip")
    assert codes.ids.tolist() == [0, 3]
    assert codes.hex() == model.encode(paths[:2]).hex()
    assert "2 of 4 images skipped" in caplog.text
    assert "no.png" in caplog.text
    assert "gone.png" in caplog.text
    with pytest.raises(ValueError, match=r"there is no image to encode: image 0: cannot read .*no\.png"):
        model.encode(mixed[1:2], on_error="skip")
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        model.encode(mixed[2:])


def test_memory_that_runs_out_halves_the_batch(model, folder, monkeypatch):
    paths, whole = sorted(folder.iterdir()), search_model.encode_signs

    def small(hasher, modality, inputs, size):
        if size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(hasher, modality, inputs, size)

    expected = model.encode(paths)
    monkeypatch.setattr(search_model, "encode_signs", small)
    with pytest.warns(SmallerBatch, match="1 were encoded at a time"):
        assert torch.equal(model.encode(paths).packed, expected.packed)


def test_a_saved_model_gives_the_same_codes_in_a_fresh_process(model, trained, folder, tmp_path):
    model.save(tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "hasher.safetensors",
        "model.json",
    ]
    program = (
        "import sys, robusthash as rh\n"
        "model = rh.load(sys.argv[1], device='cpu')\n"
        "print(model.origin, *model.encode(sorted(__import__('pathlib').Path(sys.argv[2]).iterdir())).hex())"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "model"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [model.origin, *model.encode(sorted(folder.iterdir())).hex()]
    model.save(tmp_path / "model")  # again, in its place
    with pytest.raises(FileExistsError, match="which is no part of a model"):
        model.save(trained)


def test_a_damaged_model_is_refused(model, tmp_path):
    def broken(name: str, change) -> None:
        folder = tmp_path / f"{name}{len(list(tmp_path.iterdir()))}"
        model.save(folder)
        (folder / name).write_bytes(change((folder / name).read_bytes()))
        rh.load(folder)

    def with_card(**changes):
        return lambda old: json.dumps(sealed({**json.loads(old), **changes})).encode()

    flip = lambda old: old[:-1] + bytes([old[-1] ^ 1])  # noqa: E731
    for name, change, said in (
        ("hasher.safetensors", flip, "sha256 is not that of the card"),
        ("hasher.safetensors", lambda old: old[:50], "is damaged"),
        ("model.json", lambda old: old[:50], "is damaged"),
        ("model.json", lambda _: b"null", "is damaged"),
        ("model.json", with_card(schema="robusthash.model/9"), "schema 'robusthash.model/9'"),
        ("model.json", with_card(hasher={"bits": 8}), "is damaged"),
        (
            "model.json",
            with_card(hasher={"bits": 16, "image": {"name": "not_there:net"}}),
            "PLUGINS=not_there",
        ),
    ):
        with pytest.raises(RunError, match=said):
            broken(name, change)


def test_a_hasher_that_was_just_trained_is_saved_and_searched(tmp_path, folder):
    hasher = rh.build_hasher(bits=12, image={"name": "small", "width": 4, "grid": 1})
    model = rh.SearchModel(hasher, side=16)
    model.save(tmp_path / "model")
    assert (
        rh.load(tmp_path / "model").encode(sorted(folder.iterdir())).hex()
        == model.encode(sorted(folder.iterdir())).hex()
    )
    with pytest.raises(ValueError, match="Linear is a wrapped net"):
        rh.SearchModel(rh.wrap(torch.nn.Linear(2, 2), bits=2), 16).save(tmp_path / "other")


def test_texts_are_encoded_by_the_words_of_the_training_set(tmp_path):
    hasher = {"bits": 16, "image": {"name": "small", "width": 4}, "text": {"name": "mlp", "widths": [8]}}
    training = {"objective": "dcmh", "epochs": 1, "batch_size": 12}
    run = train(make_config({**CONFIG, "hasher": hasher, "training": training}), tmp_path).path
    data = rh.load_data(**CONFIG["data"])
    caption = "a red round disc on a striped ground, to the left"
    bag = data.text_form.encode([caption])
    expected = search_model.encode_signs(load_run(run).load_hasher(), "text", bag)
    model = rh.load(run)
    codes = model.encode([caption, caption], modality="text")
    assert torch.equal(codes.signs(), expected.expand(2, -1))
    model.save(tmp_path / "model")
    assert rh.load(tmp_path / "model").encode(caption, modality="text").hex() == codes.hex()[:1]
    (run / "texts.json").unlink()  # a run of an earlier version
    assert rh.load(run).encode(caption, modality="text").hex() == codes.hex()[:1]
    with rh.open_index(f"file:{tmp_path / 'index'}", bits=16) as index:
        index.add(
            model.encode([data.database.batch(torch.arange(4)).inputs["image"][place] for place in range(4)])
        )
        found = model.search(index, caption, k=3, modality="text")
        assert len(found) == 3
        with pytest.raises(ValueError, match="is no file; to search with a sentence, modality='text'"):
            model.search(index, caption)
    page = tmp_path / "found.html"
    words = ["search", str(tmp_path / "index"), "--run", str(run), "-k", "3"]
    answer = CliRunner().invoke(app, [*words, "--text", caption, "--html", str(page), "--json"])
    assert json.loads(answer.stdout) == found
    assert caption in page.read_text()
    for refused, said in (
        ([*words], "search with one of the two"),
        ([*words, "a.png", "--text", caption], "search with one of the two"),
        ([*words, "--text", "zebra quux"], "text 0, 'zebra quux': the model knows none of its words"),
    ):
        assert said in str(CliRunner().invoke(app, refused).exception)
    with pytest.raises(ValueError, match="text 1 is a int"):
        model.encode([caption, 5], modality="text")


def test_a_registry_entry_names_the_run_with_its_weights(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match=r"'tiny-seed0' is neither a run.* no registry/ here"):
        rh.load("tiny-seed0")
    (tmp_path / "registry").mkdir()
    entry = (Path(__file__).parents[2] / "registry" / "cifar10-csq-seed0.yaml").read_text()
    digest = load_run(trained).card()["digest"]
    for old, new in (("cifar10-csq", "tiny"), (re.search(r"digest: (\w+)", entry)[1], digest)):
        entry = entry.replace(old, new)
    (tmp_path / "registry" / "tiny-seed0.yaml").write_text(entry)
    with pytest.raises(
        RunError, match=rf"weights {digest} .* are in no run of runs/; train it, 'robusthash train"
    ):
        rh.load("tiny-seed0")
    with pytest.raises(RunError, match="loaded from a folder or by the id of an entry, got None"):
        rh.load(None)
    with pytest.raises(RunError, match="did you mean 'tiny-seed0'"):
        rh.load("tiny-seed1")
    shutil.copytree(trained.parent, tmp_path / "runs" / "tiny")
    assert rh.load("tiny-seed0").origin == rh.load("registry/tiny-seed0.yaml").origin == digest
    card = next((tmp_path / "runs").glob("*/*/model.json"))
    card.write_text(json.dumps(sealed({**json.loads(card.read_text()), "digest": "0" * 16})))
    with pytest.raises(RunError, match="is of this recipe and seed with other weights, 0000000000000000"):
        rh.load("tiny-seed0")


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
    with pytest.raises(
        ValueError, match=r"got .* columns of int8; as bytes: array\.view\(np\.uint8\), or where 128 was"
    ):
        Codes.from_numpy(packed.view(np.int8), bits)
    if bits % 8:
        with pytest.raises(ValueError, match=f"ones after bit {bits}"):
            Codes.from_numpy(packed | 1, bits)
    with pytest.raises(ValueError, match="packed codes need bits="):
        Codes.from_numpy(np.full((2, bits), 7))
    with pytest.raises(ValueError, match="of real numbers take the sign first"):
        Codes.from_numpy(np.linspace(-2, 2, 5 * bits).reshape(5, bits))


def test_the_remedies_for_packed_codes_in_other_words_work():
    packed = np.random.default_rng(1).integers(0, 256, (3, 16), dtype=np.uint8)
    expected = Codes.from_numpy(packed, 128)
    words, shifted = packed.view(np.uint64), (packed.astype(int) - 128).astype(np.int8)
    with pytest.raises(ValueError, match=r"got 2 columns of uint64; as bytes: array\.view\(np\.uint8\)$"):
        Codes.from_numpy(words, 128)
    for array in (words.view(np.uint8), (shifted.astype(int) + 128).astype(np.uint8)):
        assert torch.equal(Codes.from_numpy(array, 128).packed, expected.packed)
    with pytest.raises(ValueError, match="packed codes need bits= and are uint8"):
        Codes.from_numpy(shifted)


def test_an_index_takes_arrays_and_tensors(tmp_path):
    signs = np.random.default_rng(0).choice([-1, 1], (6, 20))
    packed = np.packbits(signs > 0, axis=1)
    with rh.open_index(f"file:{tmp_path / 'index'}", bits=20) as index:
        index.add(signs[:2], [{"place": 0}, {"place": 1}])
        index.add(torch.from_numpy(signs[2:4] > 0))
        index.add(packed[4:])
        for queries in (signs, torch.from_numpy(signs).float(), packed, rh.Codes.from_numpy(signs)):
            found = index.search(queries, 1)
            assert (found.ids[:, 0].tolist(), found.distances.sum()) == (list(range(6)), 0)
            assert [len(ids) for ids in index.range(queries, 0).ids] == [1] * 6
        with pytest.raises(
            ValueError, match="codes of 20 bits are 20 columns, or 3 packed uint8 columns; got 19"
        ):
            index.add(signs[:, :19])
        with pytest.raises(ValueError, match="codes are Codes, an array or a tensor, got a list"):
            index.search([[1, 0]], 1)
        assert index.count() == 6
