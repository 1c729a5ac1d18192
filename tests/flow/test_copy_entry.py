"""The registry entry of a hash for copies: written from its measurements, verified with and without data."""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import robusthash as rh
from robusthash.apps.image_hash import copy_entry, entry_data
from robusthash.apps.image_hash.copy_hash import RADIUS
from robusthash.core.limited_files import RunError
from robusthash.models.hub_folder import HubCard
from robusthash.robustness.evidence.records import load_any_entry
from tests.flow.conftest import Call

ROOT = Path(__file__).resolve().parents[2]
ABOUT = HubCard("own-hash", "apache-2.0", "some photographs", "principal components; make_it.py")


def rows_of(radius: dict[int, int]) -> dict[str, Any]:
    """Measurements as the script writes them, with numbers of their own for each length, and PDQ's."""
    rows = {"pdq": {"title": "PDQ"}}
    for bits, strict in radius.items():
        rows[f"copy-hash-{bits}"] = {
            "title": "copy-hash",
            "bits": bits,
            "pairs": 10_000_000 + bits,
            "radius": {"1e-4": strict + 4, "1e-5": strict},
            "false matches": {"1e-4": 9e-05, "1e-5": 8e-06 + bits / 1e9},
            "changes": {"JPEG 30": {"1e-4": 1.0, "1e-5": 0.9 + bits / 1e4}},
            "milliseconds": 1.0,
            "attacked": {"8": {"white box": bits / 1000, "1,000 queries": 0.9, "collisions": 0.0}},
            "certified": {"2": 1.0, "6": 0.5},
        }
    return rows


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The packaged hash in a folder of its own, with a card of these weights."""
    rh.load("copy-hash", "cpu").save_pretrained(tmp_path / "own-hash", ABOUT)
    return tmp_path / "own-hash"


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    path = tmp_path / "measured.json"
    path.write_text(json.dumps(rows_of(RADIUS)))
    return path


@pytest.fixture
def entry(call: Call, model: Path, measured: Path) -> Path:
    folder = model.parent / "registry"
    code, out, err = call("evidence", "copy-entry", measured, "--model", model, "--out", folder)
    assert code == 0, err
    return Path(out.strip())


def changed(entry: Path, **fields: Any) -> Path:
    entry.write_text(yaml.safe_dump({**yaml.safe_load(entry.read_text()), **fields}))
    return entry


def statuses(call: Call, entry: Path, *words: object) -> tuple[int, dict[str, str], str]:
    """Exit code, status of each check by its name, and stderr."""
    code, out, err = call("verify", entry, *words, "--json")
    return code, {each["name"]: each["status"] for each in json.loads(out)["checks"]}, err


def test_every_number_of_an_entry_is_one_that_was_measured(entry: Path, measured: Path) -> None:
    rows, plain = json.loads(measured.read_text()), yaml.safe_load(entry.read_text())
    assert [claim["bits"] for claim in plain["claims"]] == [256, 128, 64]
    for claim in plain["claims"]:
        row, (loose, strict) = rows[f"copy-hash-{claim['bits']}"], claim["within"]
        assert claim["pairs"] == row["pairs"]
        assert (loose["radius"], strict["radius"]) == (row["radius"]["1e-4"], row["radius"]["1e-5"])
        assert (loose["rate"], strict["rate"]) == (1e-4, 1e-5)
        assert strict["false_matches"] == row["false matches"]["1e-5"]
        assert strict["changes"] == {"JPEG 30": row["changes"]["JPEG 30"]["1e-5"]}
        assert strict["attacked"] == {8: row["attacked"]["8"]}
        assert strict["certified"] == {2: 1.0, 6: 0.5}
        assert "attacked" not in loose
    assert (plain["licence"], plain["data"], plain["method"]) == (ABOUT.licence, ABOUT.data, ABOUT.method)
    assert len(plain["photographs"]["hashes"]) == 20
    image = next(each for each in copy_entry.PHOTOGRAPHS if each.name == "cat")
    assert plain["photographs"]["hashes"]["cat"] == str(rh.hash_image(copy_entry.photograph_path(image)))
    assert 0 < plain["photographs"]["certified"][256][6] < plain["photographs"]["certified"][256][2] <= 1


def test_an_entry_that_holds_passes_line_by_line(call: Call, entry: Path) -> None:
    code, out, err = call("verify", entry)
    assert code == 0, err
    lines = out.splitlines()
    assert sum(line.startswith("pass ") for line in lines) == 11
    assert [line.split("  ")[1] for line in lines if line.startswith("not checked")] == [
        "weights, radii and recall, made again: give --data",
        "recall under attack: scripts/measure_copy_hash.py attacks again",
    ]


@pytest.mark.parametrize(
    ("fields", "failed"),
    [
        ({"config": "0" * 64}, "config"),
        ({"weights": "0" * 64}, "weights"),
        ({"licence": "mit"}, "licence, data and method"),
        ({"evidence": "registry/copy-hash.yaml"}, "claims"),
    ],
)
def test_a_fact_that_is_not_so_fails_by_its_name(call: Call, entry: Path, fields, failed) -> None:
    code, found, err = statuses(call, changed(entry, **fields))
    assert code == 1
    assert [name for name, status in found.items() if status == "fail"] == [failed]
    assert f"the entry does not hold: {failed}: " in err


def test_a_claim_that_was_not_measured_fails(call: Call, entry: Path) -> None:
    claims = yaml.safe_load(entry.read_text())["claims"]
    claims[0]["within"][1]["attacked"][8]["white box"] = 0.99
    code, found, _ = statuses(call, changed(entry, claims=claims))
    assert (code, found["claims"]) == (1, "fail")


def test_evidence_that_is_not_here_is_said_to_be_unchecked(call: Call, entry: Path, measured: Path) -> None:
    measured.unlink()
    code, found, _ = statuses(call, entry)
    assert (code, found["claims"]) == (0, "not checked")


def test_a_library_that_decodes_otherwise_is_noticed(call: Call, entry: Path, monkeypatch) -> None:
    def darker(image: Any, size: int | None = None) -> torch.Tensor:
        return real(image, size) * 9 // 10

    real = rh.data.own_data.read_image
    monkeypatch.setattr(rh.data.own_data, "read_image", darker)
    code, found, _ = statuses(call, entry)
    assert code == 1
    assert found["hashes of the packaged photographs"] == "fail"
    assert found["weights"] == "pass"


def test_the_radius_of_the_package_is_the_measured_one(
    call: Call, entry: Path, measured, monkeypatch
) -> None:
    monkeypatch.setitem(RADIUS, 128, RADIUS[128] + 1)
    code, found, _ = statuses(call, entry)
    assert (code, found["radius of 128 bits"], found["radius of 64 bits"]) == (1, "fail", "pass")
    code, _, err = call("evidence", "copy-entry", measured, "--model", entry.parents[1] / "own-hash")
    assert code == 1
    assert "the radius of 128 bits is not that of the package" in err


def test_weights_that_cannot_be_read_and_other_weights_are_a_line(
    call: Call, entry: Path, model: Path
) -> None:
    other = model.with_name("other")
    shutil.copytree(model, other)
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (other / "model.safetensors").write_bytes(data)
    code, found, _ = statuses(call, entry, "--run", other)
    assert (code, found["weights"], found["all else"]) == (1, "fail", "not checked")
    shutil.rmtree(model)
    code, out, _ = call("verify", entry)
    assert code == 1
    assert f"no {model / 'model.safetensors'}" in out


def test_a_card_of_other_weights_makes_no_entry(call: Call, model: Path, measured: Path) -> None:
    card = model / "README.md"
    card.write_text(card.read_text().replace("| digest | ", "| digest | 0"))
    code, _, err = call("evidence", "copy-entry", measured, "--model", model, "--out", model.parent)
    assert code == 1
    assert "README.md is of the weights 0" in err


@pytest.mark.parametrize("content", ["[]", "{}", '{"a": 1}', '{"a": {"title": "copy-hash"}}'])
def test_a_file_without_measurements_makes_no_entry(call: Call, measured: Path, content: str) -> None:
    measured.write_text(content)
    code, _, err = call("evidence", "copy-entry", measured, "--out", measured.parent)
    assert code == 1
    assert f"{measured} holds no measurement" in err


@pytest.mark.parametrize(
    ("within", "words"),
    [
        ({"radius": 256}, "radius 256 is no distance of 256 bits"),
        ({"false_matches": 0.5}, "false_matches 0.5 are above the rate"),
        ({"certfied": {}}, r"unknown field 'claims.0.within.0.certfied'; did you mean 'certified'"),
        ({"changes": {"blur": 1.5}}, r"claims.0.within.0.changes.blur: Input should be less"),
    ],
)
def test_a_bad_entry_is_refused_by_field(entry: Path, within: dict[str, Any], words: str) -> None:
    claims = yaml.safe_load(entry.read_text())["claims"]
    claims[0]["within"][0] |= within
    with pytest.raises(ValueError, match=words):
        load_any_entry(changed(entry, claims=claims))


def test_the_options_of_the_other_kind_are_refused(call: Call, entry: Path, tmp_path: Path) -> None:
    trained = ROOT / "registry/cifar10-csq-seed0.yaml"
    assert "is the entry of a trained model: give --run RUN" in call("verify", trained)[2]
    assert "--data is for" in call("verify", trained, "--run", tmp_path, "--data", tmp_path)[2]
    assert f"no folder {tmp_path / 'gone'}" in call("verify", entry, "--data", tmp_path / "gone")[2]
    assert "holds neither ucmerced.tar" in call("verify", entry, "--data", tmp_path)[2]


def test_an_entry_is_loaded_by_its_id(entry: Path, model: Path, monkeypatch) -> None:
    monkeypatch.chdir(entry.parents[1])
    assert rh.load("own-hash").bits == rh.load("registry/own-hash.yaml").bits == 256
    monkeypatch.chdir("/")
    assert rh.load(str(entry)).bits == 256
    changed(entry, weights="0" * 64)
    with pytest.raises(RunError, match="holds the weights"):
        rh.load(str(entry))


def test_the_entry_of_the_packaged_hash_holds(call: Call, monkeypatch) -> None:
    """It is made by robusthash evidence copy-entry results/copy-hash.json"""
    monkeypatch.chdir(ROOT)
    code, out, err = call("verify", "registry/copy-hash.yaml")
    assert code == 0, err
    assert "those of results/copy-hash.json" in out


# -------------------------------------------------------------------------------------------- with data


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def picture(number: int, side: int = 72) -> Image.Image:
    """Smooth colours, another picture for each number."""
    coarse = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def as_jpeg(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=95)
    return stream.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Little sets in the layout of the real ones."""
    folder = tmp_path / "data"
    folder.mkdir()
    files = {f"ucmerced/{number:02d}.jpg": as_jpeg(picture(number)) for number in range(70)}
    write_tar(folder / "ucmerced.tar", files)
    parts = ["train"] * 8 + ["test", "val"]
    facts = {"labels": ["sand"], "class": "beach", "captions": ["a b", "c d"]}
    rows = [{"file": name, "split": parts[place % 10], **facts} for place, name in enumerate(files)]
    (folder / "ucmerced.jsonl").write_text("\n".join(map(json.dumps, rows)))
    photographs = {f"coco_mini/{number}.jpg": as_jpeg(picture(1000 + number, 256)) for number in range(8)}
    write_tar(folder / "coco_mini.tar", photographs)
    jpegs = [as_jpeg(picture(2000 + number, 32)) for number in range(30)]
    np.savez(
        folder / "cifar10.npz",
        jpeg=np.frombuffer(b"".join(jpegs), np.uint8),
        offset=np.cumsum([0, *map(len, jpegs)]),
        is_test=np.arange(30) % 3 > 0,
    )
    return folder


def made_and_measured(data: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A hash that the script makes of the little sets, and its measurements by the script, but for attacks."""
    measuring, folder = script("measure_copy_hash"), data.parent / "own-hash"
    words = ["make_copy_hash.py", "--data", str(data), "--out", str(folder)]
    monkeypatch.setattr(sys, "argv", words)
    script("make_copy_hash").main()
    monkeypatch.setattr(measuring, "attacked", lambda *arguments: {})
    images, rows = entry_data.coco_photographs(data), {}
    for bits in RADIUS:
        own = measuring.Model(f"copy-hash-{bits}", "copy-hash", str(folder), bits)
        rows[own.name] = measuring.measured(own, images, data)
        monkeypatch.setitem(RADIUS, bits, rows[own.name]["radius"]["1e-5"])
    path = data.parent / "measured.json"
    path.write_text(json.dumps(rows))
    return folder, path


def test_weights_radii_and_recall_are_made_again(call: Call, data: Path, monkeypatch) -> None:
    folder, measured = made_and_measured(data, monkeypatch)
    registry = data.parent / "registry"
    code, out, err = call("evidence", "copy-entry", measured, "--model", folder, "--out", registry)
    assert code == 0, err
    entry = Path(out.strip())
    code, found, err = statuses(call, entry, "--data", data)
    assert code == 0, err
    assert [name for name, status in found.items() if status == "not checked"] == ["recall under attack"]
    again = {"weights, made again", "hashes by weights made again", "256 bits, certified"}
    again |= {f"{bits} bits, {of} at {rate}" for bits in RADIUS for of in ("radius", "recall") for rate in ("0.0001", "1e-05")}  # fmt: skip
    assert again <= set(found)

    (data / "cifar10.npz").unlink()
    code, found, _ = statuses(call, entry, "--data", data)
    assert (code, found["weights, made again"], found["radii and recall, made again"]) == (0, "pass", "not checked")  # fmt: skip


def test_claims_that_data_do_not_bear_out_fail(call: Call, data: Path, entry: Path) -> None:
    """The packaged weights, and measurements that are made up."""
    code, found, _ = statuses(call, entry, "--data", data)
    assert code == 1
    assert {found["weights, made again"], found["256 bits, radius at 1e-05"]} == {"fail"}
    assert found["256 bits, recall at 1e-05"] == "fail"
