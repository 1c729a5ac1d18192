"""Indexes, searches, codes and the service of models that are no runs: the packaged hash, saved folders."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from service_parts import index, listening, parts

import robusthash as rh
from robusthash.apps.experiment.search_model import located
from robusthash.apps.image_hash.copy_hash import RADIUS
from robusthash.apps.service.api import create_app
from robusthash.apps.service.serving import Serving
from robusthash.apps.service.settings import ServiceSettings
from robusthash.client import Client
from robusthash.core.types import Codes
from robusthash.data.photos import PHOTOGRAPHS, photograph_path

__all__ = ["index", "parts"]  # fixtures

OPEN = ServiceSettings(rate=0, max_wait=60_000, attacks=True, detection=False)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six photographs, and next to the folder a changed copy of the first, and a plain image."""
    (tmp_path / "photos").mkdir()
    for number, each in enumerate(PHOTOGRAPHS[:6]):
        image = Image.open(photograph_path(each)).convert("RGB")
        image.save(tmp_path / "photos" / f"{number}.jpg", quality=92)
    image = Image.open(tmp_path / "photos/0.jpg")
    wide, high = image.size
    image.crop((wide // 20, high // 20, wide, high)).resize((200, 200)).save(
        tmp_path / "copy.jpg", quality=40
    )
    Image.new("RGB", (90, 90), "navy").save(tmp_path / "navy.png")
    return tmp_path / "photos"


@pytest.fixture
def built(call, photos: Path, tmp_path: Path) -> Path:
    """An index of the photographs by the packaged hash."""
    words = ("index", "build", tmp_path / "ix", "--images", photos, "--run", "copy-hash", "--json")
    code, out, err = call(*words)
    assert code == 0, err
    assert (json.loads(out)["added"], json.loads(out)["bits"]) == (6, 256)
    return tmp_path / "ix"


@pytest.fixture
def client(built: Path, photos: Path) -> Iterator[Client]:
    with served(built, photos) as url, Client(url) as client:
        yield client


@contextlib.contextmanager
def served(index: Path, images: Path, settings: ServiceSettings = OPEN) -> Iterator[str]:
    """The address of the service that ``robusthash serve INDEX --images DIR`` starts."""
    started = Serving.of(str(index), None, images, None, settings, device="cpu")
    with listening(create_app(started.service, started.tokens)) as (url, _):
        yield url


def searched(call, index: Path, image: Path, *words: Any) -> list[dict[str, Any]]:
    code, out, err = call("search", index, image, "--json", *words)
    assert code == 0, err
    return json.loads(out)


def refused(call, *words: Any) -> str:
    code, _, err = call(*words)
    assert code != 0
    assert "Traceback" not in err
    return err


def test_a_changed_copy_is_found_and_called_one(call, built: Path, photos: Path, tmp_path: Path) -> None:
    best, *others = searched(call, built, tmp_path / "copy.jpg")
    assert best["payload"] == {"path": str(photos / "0.jpg")}
    assert 0 < best["distance"] <= RADIUS[256]
    assert [best["copy"], *(one["copy"] for one in others)] == [True] + 5 * [False]
    assert rh.load("copy-hash").search(rh.open_index(f"file:{built}"), tmp_path / "copy.jpg")[0] == best
    table = call("search", built, tmp_path / "copy.jpg", "--html", tmp_path / "found.html")[1]
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines() if "│" in line]
    assert [row[2] for row in rows] == ["copy"] + 5 * ["no copy"]
    assert (tmp_path / "found.html").read_text().count("a copy") == 1


def test_files_are_added_by_the_model_of_the_index(call, built: Path, tmp_path: Path) -> None:
    assert call("index", "add", built, tmp_path / "copy.jpg")[0] == 0
    hits = searched(call, built, tmp_path / "copy.jpg")
    assert [(hit["distance"], hit["copy"]) for hit in hits[:2]] == [(0, True), (hits[1]["distance"], True)]
    again = call("index", "build", built, "--images", tmp_path / "photos", "--run", "copy-hash", "--json")
    assert json.loads(again[1])["unchanged"] == 6


def test_copies_among_the_images_are_no_fault_of_the_codes(call, photos: Path, tmp_path: Path) -> None:
    for number in range(1, 6):
        shutil.copy(photos / "0.jpg", photos / f"{number}.jpg")
    _, _, err = call("index", "build", tmp_path / "ix", "--images", photos, "--run", "copy-hash")
    assert "different code" not in err


def test_nothing_is_a_copy_of_a_plain_query(call, built: Path, photos: Path, tmp_path: Path) -> None:
    assert call("index", "add", built, tmp_path / "navy.png")[0] == 0
    code, out, err = call("search", built, tmp_path / "navy.png", "--json")
    assert code == 0
    assert json.loads(out)[0]["distance"] == 0
    assert not any(hit["copy"] for hit in json.loads(out))
    assert "one colour or one fine texture" in err
    plain = {"navy.png": True, "copy.jpg": False}
    with rh.open_index(f"file:{built}", create=False) as index, served(built, photos) as url:
        for name, expected in plain.items():
            hits = searched(call, built, tmp_path / name)
            hits += rh.load("copy-hash").search(index, tmp_path / name)
            told = httpx.post(f"{url}/v1/search", files={"image": (tmp_path / name).read_bytes()}).json()
            hits += told["results"]
            assert {hit["plain_query"] for hit in hits} == {told["plain"]} == {expected}
            with Client(url) as client:
                assert {hit.plain_query for hit in client.search(tmp_path / name)} == {expected}


def test_runs_say_nothing_of_copies(call, index: Path, parts: tuple[Path, Path]) -> None:
    hits = searched(call, index, parts[1] / "03.png")
    assert all(set(hit) == {"id", "distance", "payload"} for hit in hits)
    with served(index, parts[1]) as url, Client(url) as client:
        assert client.search(parts[1] / "03.png")[0].copy is None
        answer = httpx.get(f"{url}/v1/info").json()
        assert "copy_radius" not in answer


# --- the service


def test_the_service_says_what_is_a_copy(client: Client, tmp_path: Path) -> None:
    best, *others = client.search(tmp_path / "copy.jpg")
    assert (best.payload["file"], best.copy) == ("0.jpg", True)
    assert [one.copy for one in others] == 5 * [False]
    number = client.add([tmp_path / "navy.png"], keys=["navy"])[0]
    assert [(hit.id, hit.distance, hit.copy) for hit in client.search(tmp_path / "navy.png", k=1)] == [
        (number, 0, False)
    ]


def test_answers_show_of_copies_what_they_show_of_distances(
    built: Path, photos: Path, tmp_path: Path
) -> None:
    content, shown = (tmp_path / "copy.jpg").read_bytes(), {"distance", "copy", "plain_query"}
    for kind, fields in {"ids": set(), "coarse": shown, "codes": shown}.items():
        with served(built, photos, OPEN.model_copy(update={"answer": kind})) as url:
            answer = httpx.post(f"{url}/v1/search", files={"image": content}).json()
            assert set(answer["results"][0]) - {"id", "id_text", "payload"} == fields, kind
            assert answer["plain"] is False
            info = httpx.get(f"{url}/v1/info").json()
            assert (info["copy_radius"], info["bits"], info["image_size"]) == (RADIUS[256], 256, 64)


def test_an_attack_on_a_query_is_told_without_data(built: Path, photos: Path, tmp_path: Path) -> None:
    with served(built, photos) as url:
        content = (tmp_path / "copy.jpg").read_bytes()
        told = httpx.post(f"{url}/v1/story", files={"image": content}, data={"eps": "4"}, timeout=60).json()
        model = told["models"][0]
        assert (model["name"], model["bits"], model["clean"]["ap"]) == ("copy-hash", 256, None)
        assert 0 < model["flipped_bits"] < 128
        assert model["clean"]["results"][0]["copy"]
        assert len(httpx.get(f"{url}/v1/samples").json()["items"]) > 0


# --- identity


def test_an_index_of_another_model_is_refused(
    call, index: Path, built: Path, photos: Path, parts: tuple[Path, Path], tmp_path: Path
) -> None:
    held, own = rh.load("copy-hash").origin, rh.load(parts[0]).origin
    with rh.open_index(f"file:{tmp_path / 'same'}", bits=256) as same:
        code = rh.load("copy-hash").encode(photos / "0.jpg")
        same.add(Codes(code.packed, 256, code.ids, own))
    for words in (("search",), ("index", "add")):
        told = refused(call, *words, tmp_path / "same", photos / "0.jpg", "--run", "copy-hash")
        assert f"{held!r} do not fit an index of origin {own!r}" in told
    told = refused(call, "serve", tmp_path / "same", "--run", "copy-hash", "--port", 0)
    assert f"holds codes of another model ({own})" in told
    for words in (("search", index, photos / "0.jpg"), ("index", "add", index, photos)):
        assert "256" in refused(call, *words, "--run", "copy-hash"), "another length"
    words = ("--images", photos, "--run", parts[0])
    assert "256" in refused(call, "index", "build", built, *words)


def test_a_folder_of_the_name_is_a_folder(
    call, parts: tuple[Path, Path], tmp_path: Path, monkeypatch
) -> None:
    run, pictures = parts
    monkeypatch.chdir(tmp_path)
    rh.load(run).save_pretrained("copy-hash")
    for name, bits in {"./copy-hash": 16, tmp_path / "copy-hash": 16, "copy-hash": 256}.items():
        words = ("index", "build", tmp_path / "ix", "--run", name, "--images", pictures, "--json")
        code, out, err = call(*words)
        assert code == 0, err
        assert json.loads(out)["bits"] == bits, name
        hits = searched(call, tmp_path / "ix", pictures / "03.png")
        assert ("copy" in hits[0]) == (bits == 256)
        code, out, _ = call("encode", name, pictures / "03.png", "--json")
        assert {len(code) for code in json.loads(out)["codes"].values()} == {bits // 4}
        shutil.rmtree(tmp_path / "ix")
    assert rh.load(Path("copy-hash")).bits == 16
    assert located("copy-hash") == "copy-hash"
    assert located("./copy-hash") == str(tmp_path / "copy-hash")


def test_a_saved_folder_serves_as_its_run_does(
    call, index: Path, parts: tuple[Path, Path], tmp_path: Path
) -> None:
    run, pictures = parts
    rh.load(run).save_pretrained(tmp_path / "saved")
    words = ("--run", tmp_path / "saved", "--images", pictures)
    assert call("index", "build", tmp_path / "ix", *words)[0] == 0
    query = pictures / "05.png"
    expected = [(hit["id"], hit["distance"]) for hit in searched(call, index, query)]
    assert [(hit["id"], hit["distance"]) for hit in searched(call, tmp_path / "ix", query)] == expected
    assert searched(call, index, query, "--run", tmp_path / "saved"), "of one origin"
    with served(tmp_path / "ix", pictures) as url, Client(url) as client:
        assert [(hit.id, hit.distance) for hit in client.search(query)] == expected
    shutil.rmtree(tmp_path / "saved")
    assert "or it has moved; name it with --run" in refused(call, "search", tmp_path / "ix", query)
    assert [(hit["id"], hit["distance"]) for hit in searched(call, tmp_path / "ix", query, "--run", run)] == (
        expected
    )


def test_an_index_by_a_registry_entry_knows_the_run(
    call, parts: tuple[Path, Path], tmp_path: Path, monkeypatch
) -> None:
    run, pictures = parts
    home = tmp_path / "home"
    (home / "registry").mkdir(parents=True)
    entry = (Path(__file__).parents[2] / "registry/cifar10-csq-seed0.yaml").read_text()
    for old, new in (("cifar10-csq", "tiny"), (re.search(r"digest: (\w+)", entry)[1], rh.load(run).origin)):
        entry = entry.replace(old, new)
    (home / "registry/tiny-seed0.yaml").write_text(entry)
    shutil.copytree(run, home / "runs/tiny" / run.name)
    monkeypatch.chdir(home)
    words = ("index", "build", tmp_path / "ix", "--run", "tiny-seed0", "--images", pictures)
    assert call(*words)[0] == 0
    monkeypatch.chdir(tmp_path)
    assert searched(call, tmp_path / "ix", pictures / "03.png")[0]["distance"] == 0
    with rh.open_index(f"file:{tmp_path / 'ix'}") as opened:
        assert opened.build_source()["run"] == str(home / "runs/tiny" / run.name)


# --- codes


def test_codes_of_a_collection_go_by_shards_into_an_index(
    call, built: Path, photos: Path, tmp_path: Path
) -> None:
    words = ("encode", "--images", photos, "--run", "copy-hash", "--out", tmp_path / "codes", "--json")
    words = (*words, "--part-size", 2, "--processes", 0)
    first = json.loads(call(*words, "--shard", "0/2")[1])
    assert (first["encoded"], first["items"]) == (2, 4)
    rest = json.loads(call(*words)[1])
    assert (rest["encoded"], rest["unchanged"], rest["items"]) == (1, 2, 6)
    build = ("index", "build", tmp_path / "iy", "--run", "copy-hash", "--codes", tmp_path / "codes")
    assert call(*build)[0] == 0
    one, other = (searched(call, index, tmp_path / "copy.jpg") for index in (built, tmp_path / "iy"))
    assert [(hit["payload"], hit["distance"], hit["copy"]) for hit in one] == [
        (hit["payload"], hit["distance"], hit["copy"]) for hit in other
    ]
    elsewhere = (*build[:2], tmp_path / "iz", *build[3:], "--images", "/elsewhere")
    assert call(*elsewhere)[0] == 0, "the folder of another machine"
    assert searched(call, tmp_path / "iz", tmp_path / "copy.jpg")[0]["payload"] == {
        "path": "/elsewhere/0.jpg"
    }
    hexes = json.loads(call("encode", "copy-hash", photos / "0.jpg", "--json")[1])
    assert hexes["codes"] == {str(photos / "0.jpg"): str(rh.hash_image(photos / "0.jpg"))}


def test_codes_of_another_model_are_refused(
    call, photos: Path, parts: tuple[Path, Path], tmp_path: Path
) -> None:
    codes = ("--images", photos, "--out", tmp_path / "codes", "--processes", 0)
    assert call("encode", "--run", "copy-hash", *codes)[0] == 0
    assert "holds codes of another model" in refused(call, "encode", "--run", parts[0], *codes)
    build = ("index", "build", tmp_path / "ix", "--codes", tmp_path / "codes", "--run", parts[0])
    assert "holds codes of another model" in refused(call, *build)
    assert not (tmp_path / "ix").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("index", "build", "ix", "--run", "copy-hash"), "copy-hash brings no data; name what is indexed"),
        (("encode", "copy-hash"), "copy-hash brings no data; name the images: encode copy-hash IMAGES"),
        (("index", "build", "ix", "--run", "copyhash", "--images", "."), "'copyhash' is neither a run"),
        (("index", "build", "ix", "--run", "./copy-hash", "--images", "."), "'./copy-hash' is neither a run"),
    ],
)
def test_what_a_model_cannot_do_is_one_line(call, words, message, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(call, *words)
    assert not Path("ix").exists()
