"""The packaged hash for copies: hashes, copies, groups of a folder, verbs, and its stated numbers."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import robusthash as rh
from robusthash.apps.audit.measurement import run_audit
from robusthash.apps.audit.targets import AuditOptions, Tier
from robusthash.apps.cli import app
from robusthash.apps.image_hash.copy_hash import RADIUS, copy_model, hashes, plain, proved_levels
from robusthash.apps.image_hash.duplicate_groups import hash_files
from robusthash.data.base import as_input
from robusthash.data.own_data import one_image
from robusthash.data.photos import PHOTOGRAPHS, photograph_path
from robusthash.models.block_dct import COPY_WINDOW
from robusthash.robustness.certificates.linear_codes import most_flips

ROOT = Path(__file__).resolve().parents[2]


def opened() -> list[Image.Image]:
    return [Image.open(photograph_path(each)).convert("RGB") for each in PHOTOGRAPHS]


def saved_small(image: Image.Image) -> Image.Image:
    """A tenth cut away, half as large, 20 % darker, JPEG 40."""
    wide, high = image.size
    cut = image.crop((wide * 0.05, high * 0.05, wide * 0.95, high * 0.95)).resize((wide // 2, high // 2))
    stream = io.BytesIO()
    cut.point(lambda level: level * 0.8).save(stream, "JPEG", quality=40)
    return Image.open(stream).convert("RGB")


@pytest.mark.parametrize(
    ("bits", "least"), [(64, 0.75), (128, 0.85), (256, 0.93)]
)  # the moon, darkened, has hardly any contrast
def test_copies_match_and_different_photographs_do_not(bits: int, least: float) -> None:
    images = [image for image in opened() if not rh.hash_image(image).plain]
    assert len(images) >= 15
    own = [rh.hash_image(image, bits) for image in images]
    copies = [rh.hash_image(saved_small(image), bits) for image in images]
    found = [one.matches(copy) for one, copy in zip(own, copies, strict=True)]
    assert np.mean(found) >= least, found
    pairs = [(a, b) for at, a in enumerate(own) for b in own[:at]]
    assert not any(a.matches(b) for a, b in pairs)


def test_fine_textures_are_plain() -> None:
    names = {each.name for each, one in zip(PHOTOGRAPHS, opened(), strict=True) if rh.hash_image(one).plain}
    assert {"brick", "grass", "gravel"} <= names


def test_a_shorter_hash_is_the_begin_of_a_longer_one_and_forms_of_an_image_agree(tmp_path: Path) -> None:
    image = opened()[0]
    image.save(tmp_path / "a.png")
    whole = rh.hash_image(image)
    assert rh.hash_image(image, 64).packed == whole.packed[:8]
    assert rh.hash_image(tmp_path / "a.png") == rh.hash_image(str(tmp_path / "a.png")) == whole
    assert rh.hash_image(np.asarray(image)) == whole
    assert str(whole) == whole.packed.hex()
    model = rh.load("copy-hash")
    assert model.encode(image).packed.numpy().tobytes() == whole.packed
    assert whole - whole == 0


def test_hashes_of_different_lengths_and_lengths_that_are_none_are_refused() -> None:
    image = opened()[0]
    with pytest.raises(ValueError, match="64 and 256 bits"):
        _ = rh.hash_image(image, 64) - rh.hash_image(image)
    with pytest.raises(ValueError, match="64, 128, 256 bits, got 100"):
        rh.hash_image(image, 100)


def test_images_of_one_colour_match_nothing_but_their_own_pixels(tmp_path: Path) -> None:
    for name, colour in {"a": "navy", "b": "navy", "c": "blue"}.items():
        Image.new("RGB", (90, 90), colour).save(tmp_path / f"{name}.png")
    one, two = (rh.hash_image(tmp_path / f"{name}.png") for name in "ab")
    assert one.plain
    assert not one.matches(two)
    found = rh.find_duplicates(tmp_path)
    assert [[Path(copy.path).name for copy in group] for group in found.groups] == [["a.png", "b.png"]]
    assert len(found.plain) == 3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six photographs, copies of two of them, and a file that is no image."""
    home = tmp_path / "photos"
    (home / "sub").mkdir(parents=True)
    for number, image in enumerate(opened()[:6]):
        image.save(home / f"{number}.jpg", quality=92)
        if number in (0, 2):
            saved_small(image).save(home / "sub" / f"copy-{number}.png")
    (home / "bad.jpg").write_text("no image")
    return home


def test_groups_of_a_folder(folder: Path) -> None:
    found = rh.find_duplicates(folder)
    names = [[Path(copy.path).name for copy in group] for group in found.groups]
    assert names == [["0.jpg", "copy-0.png"], ["2.jpg", "copy-2.png"]]
    assert [group[0].distance for group in found.groups] == [0, 0]
    assert all(0 < group[1].distance <= found.radius for group in found.groups)
    assert (found.images, found.bits, found.radius) == (8, 256, RADIUS[256])
    assert [Path(one.file).name for one in found.skipped] == ["bad.jpg"]
    assert rh.find_duplicates([folder, folder / "0.jpg"]).groups == found.groups, "a file named twice"
    assert rh.find_duplicates(folder, radius=0).groups == ()


def test_many_equal_images_are_one_group(tmp_path: Path) -> None:
    content = photograph_path(PHOTOGRAPHS[0]).read_bytes()
    for number in range(300):
        (tmp_path / f"{number:03d}.png").write_bytes(content)
    assert [len(group) for group in rh.find_duplicates(tmp_path).groups] == [300]


def test_the_verbs(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "copies.html"
    done = CliRunner().invoke(app, ["duplicates", str(folder), "--json", "--html", str(page)])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert [len(group) for group in told["groups"]] == [2, 2]
    text = page.read_text()
    assert text.count("<img") == 4
    assert "copy-0.png" in text
    assert "bad.jpg" in text
    hashed = CliRunner().invoke(app, ["hash", str(folder / "0.jpg"), "--bits", "64"])
    assert hashed.stdout.split()[0] == str(rh.hash_image(folder / "0.jpg", 64))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["hash", "gone.jpg"], "no file or folder gone.jpg"),
        (["duplicates", "."], "there is no image to hash in ."),
        (["duplicates", ".", "--radius", "128"], "radius must lie in 0..127"),
        (["duplicates", ".", "--html", "."], "--html takes the name of a file"),
        (["duplicates", ".", "--html", "a.png"], "--html takes the name of a file"),
        (["duplicates", ".", "--html", "no/such/a.html"], "for the page a.html"),
        (["hash", ".", "--bits", "65"], "64, 128, 256 bits, got 65"),
    ],
)
def test_what_cannot_be_hashed_is_one_line(words, message, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1
    assert message in str(done.exception)


def test_an_attack_that_nobody_sees_does_not_hide_a_copy(tmp_path: Path) -> None:
    """White box at 4/255 on the packaged photographs; unseen ones: docs/methods/copy-hash.md."""
    tier = Tier("test", 20, 20, 20, 20, checked=1)
    options = AuditOptions(tier=tier, eps=4 / 255, radius=RADIUS[256])
    rows = run_audit("copy-hash", tmp_path, None, options)["rows"]
    kinds = {row["kind"]: row["recognised"] for row in rows}
    assert kinds["hide-worst"] >= 0.6
    assert kinds["imitate-worst"] <= 0.05


def flipped_by_attack(images: torch.Tensor, level: int) -> torch.Tensor:
    """(N,) most bits that 60 steps with momentum up a steep tanh flip, within a level of 255."""
    hasher, eps = copy_model().hasher.requires_grad_(False), level / 255
    clean = hasher({"image": images})["image"].logits
    moved, momentum = torch.zeros_like(images), torch.zeros_like(images)
    most = torch.zeros(len(images), dtype=torch.int64)
    for step in range(60):
        moved.requires_grad_(True)
        logits = hasher({"image": (images + moved).clamp(0, 1)})["image"].logits
        most = torch.maximum(most, ((logits > 0) != (clean > 0)).sum(1))
        (slope,) = torch.autograd.grad(-torch.tanh(10 * logits * clean.sign()).sum(), moved)
        momentum = 0.75 * momentum + slope / slope.abs().mean((1, 2, 3), keepdim=True)
        moved = (moved.detach() + eps / (2 if step < 20 else 10) * momentum.sign()).clamp(-eps, eps)
    return most


@pytest.mark.parametrize("level", [2, 4, 8])
def test_no_attack_flips_more_bits_than_is_proved(level: int) -> None:
    images = torch.stack([as_input(one_image(image, 64)) for image in opened()])
    hasher = copy_model().hasher
    with torch.no_grad():
        logits, weights = hasher({"image": images})["image"].logits, hasher.heads["image"].linear.weight
        bounds = most_flips(weights, logits, level / 255, COPY_WINDOW)
    flipped = flipped_by_attack(images, level)
    assert (flipped <= bounds).all()
    assert flipped.float().mean() > 0.4 * bounds.float().mean(), (
        "the bound says little, or the attack is weak"
    )


def test_no_change_within_the_proved_level_makes_an_image_plain() -> None:
    """Each pixel moved towards the mean of its channel's blocks, which lowers their deviation most."""
    images = torch.stack([as_input(one_image(image, 64)) for image in opened()])
    levels, made_plain = proved_levels(images), 0
    assert not any(level for level, one in zip(levels, plain(images).tolist(), strict=True) if one)
    blocks = torch.nn.functional.avg_pool2d(images, 4)
    away = (blocks - blocks.mean((2, 3), keepdim=True)).sign().repeat_interleave(4, 2).repeat_interleave(4, 3)
    for level in range(1, 13):
        hidden = plain((images - away * level / 255).clamp(0, 1)).tolist()
        assert not any(one and each >= level for one, each in zip(hidden, levels, strict=True))
        made_plain += sum(hidden)
    assert made_plain > 0, "the attack does nothing"


def test_json_lists_what_text_passes_over(folder: Path, tmp_path: Path) -> None:
    (folder / "broken.jpg").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("no picture")
    for words in ([], ["--proof"]):
        text = CliRunner().invoke(app, ["hash", str(folder), *words])
        done = CliRunner().invoke(app, ["hash", str(folder), *words, "--json"])
        told = json.loads(done.stdout)
        assert text.exit_code == done.exit_code == 0
        assert (told["images"], told["passed_over"]) == (len(text.stdout.splitlines()), len(told["skipped"]))
        assert len(told["hashes"]) == told["images"]
        assert {Path(one["file"]).name for one in told["skipped"]} > {"broken.jpg", "notes.txt"}
        told_text = "".join(text.stderr.split())
        assert all("".join(one["reason"].split()) in told_text for one in told["skipped"])
    encoded = CliRunner().invoke(app, ["encode", "copy-hash", str(folder), "--json"])
    assert json.loads(encoded.stdout)["skipped"] == told["skipped"]
    with pytest.raises(ValueError, match="there is no image to hash"):
        hash_files([folder / "broken.jpg"])


def test_paths_that_are_written_alike_are_all_listed(tmp_path: Path) -> None:
    opened()[0].save(tmp_path / "\\xe9.png")
    os.rename(tmp_path / "\\xe9.png", os.fsencode(tmp_path) + b"/\xe9.png")
    opened()[1].save(tmp_path / "\\xe9.png")
    for words in ([], ["--proof"]):
        assert len(CliRunner().invoke(app, ["hash", str(tmp_path), *words]).stdout.splitlines()) == 2


def test_the_proved_level_is_the_last_whose_bound_is_within_the_radius(folder: Path) -> None:
    pixels = torch.stack([one_image(image, 64) for image in opened()])
    levels = proved_levels(pixels)
    assert len(set(levels)) > 3
    for bits, radius in ((64, 9), (256, 20)):
        assert all(a <= b for a, b in zip(proved_levels(pixels, bits, radius), levels, strict=True))
    done = CliRunner().invoke(app, ["hash", str(folder / "0.jpg"), "--proof", "--json"])
    (entry,) = json.loads(done.stdout)["hashes"].values()
    assert entry["hash"] == str(rh.hash_image(folder / "0.jpg"))
    assert entry["proved_level"] in (levels[0] - 1, levels[0], levels[0] + 1)
    lines = CliRunner().invoke(app, ["hash", str(folder / "0.jpg"), "--proof"]).stdout.split()
    assert lines[1] == str(entry["proved_level"])


def test_the_radii_are_those_that_were_measured() -> None:
    measured = json.loads((ROOT / "results/copy-hash.json").read_text())
    for name, bits in (("copy-hash", 256), ("copy-hash-128", 128), ("copy-hash-64", 64)):
        assert measured[name]["radius"]["1e-5"] == RADIUS[bits]
        assert measured[name]["pairs"] > 10_000_000


def test_hashes_do_not_depend_on_their_batch() -> None:
    pixels = torch.randint(
        0, 256, (7, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    together = hashes(pixels)
    assert [hashes(one[None])[0] for one in pixels] == together


@pytest.mark.parametrize("form", ["onnx", "torchscript"])
def test_it_can_be_taken_away_and_searched_with(form: str, tmp_path: Path) -> None:
    if form == "onnx":
        pytest.importorskip("onnx")
    suffix = {"onnx": ".onnx", "torchscript": ".pt"}[form]
    done = CliRunner().invoke(
        app, ["export", "copy-hash", "--to", form, "--out", str(tmp_path / f"hash{suffix}"), "--json"]
    )
    assert done.exit_code == 0, done.output
    model, images = rh.load("copy-hash"), opened()[:3]
    with rh.open_index(f"file:{tmp_path / 'index'}", bits=256) as index:
        index.add(model.encode(images))
        assert [model.search(index, image, k=1)[0]["distance"] for image in images] == [0, 0, 0]


def test_a_folder_of_the_name_is_not_taken_for_the_packaged_model(tmp_path: Path, monkeypatch) -> None:
    whole = rh.hash_image(opened()[0])
    (tmp_path / "copy-hash").mkdir()
    monkeypatch.chdir(tmp_path)
    assert rh.load("copy-hash").encode(opened()[0]).packed.numpy().tobytes() == whole.packed


def test_plain_images_are_compared_by_all_of_their_pixels(tmp_path: Path) -> None:
    """Wide banners with a white middle and different ends."""
    ends = [image.resize((300, 300)) for image in opened()[:2]]
    for name, end in {"a": ends[0], "b": ends[1], "c": ends[0]}.items():
        banner = Image.new("RGB", (1000, 300), "white")
        banner.paste(end)
        banner.save(tmp_path / f"{name}.png")
    found = rh.find_duplicates(tmp_path)
    assert len(found.plain) == 3
    assert [[Path(copy.path).name for copy in group] for group in found.groups] == [["a.png", "c.png"]]


@pytest.mark.skipif(os.name == "nt", reason="file names of Windows hold no newline")
def test_a_name_forges_no_line(tmp_path: Path) -> None:
    for name in ("a.png", "a\n9    0  b.png"):
        opened()[0].save(tmp_path / name)
    for words in (["duplicates", str(tmp_path)], ["hash", str(tmp_path)]):
        assert len(CliRunner().invoke(app, words).stdout.splitlines()) == 2


def test_numbers_of_another_type_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"got 64\.0"):
        rh.hash_image(folder / "0.jpg", 64.0)  # type: ignore[arg-type]
    for radius in (1.5, "3"):
        with pytest.raises(ValueError, match="radius must lie in"):
            rh.find_duplicates(folder, radius=radius)  # type: ignore[arg-type]
