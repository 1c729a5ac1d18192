"""A collection of images becomes codes in parts: by folder, manifest and tars, in shards, killed and repeated."""

from __future__ import annotations

import io
import json
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import robusthash as rh
from robusthash.apps.collection.encoded_parts import CodesFolder
from robusthash.apps.experiment.config import make_config
from robusthash.apps.experiment.training_stages import train
from tests.flow.test_index_library import CONFIG
from tests.index_kills import make_library

COUNT = 47


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return train(make_config(CONFIG), tmp_path_factory.mktemp("runs")).path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Small JPEG files in a folder, a damaged one, and a text."""
    folder = make_library(tmp_path_factory.mktemp("pictures"), COUNT)
    (folder / "000/000003.jpg").write_bytes(b"no image")
    (folder / "read-me.txt").write_text("none either")
    return folder


@pytest.fixture
def encode(call, trained, tmp_path):
    """``robusthash encode --images``: the exit code, the report, stderr; parts of ten images by default."""

    def run(images, *words, out=None, code=0):
        words = (*words, "--json", "--processes", 0)
        if not str(images).endswith(".tar"):
            words = ("--part-size", 10, *words)
        got, text, err = call(
            "encode", "--images", images, "--run", trained, "--out", out or tmp_path / "codes", *words
        )
        assert got == code, err
        return json.loads(text) if text else err

    return run


def files(folder: Path) -> dict[str, bytes]:
    """The content of all files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def codes(folder: Path) -> dict[str, tuple[int, str, dict]]:
    """Id, code and payload by name, of all parts."""
    opened, held = CodesFolder.open(folder), {}
    for name in opened.card.parts:
        part = opened.read(name)
        rows = zip(part.names, part.codes.ids.tolist(), part.codes.hex(), part.payload, strict=True)
        held |= {name: (number, code, payload) for name, number, code, payload in rows}
    return held


def counts(report):
    return report["encoded"], report["unchanged"], report["done"], report["items"]


def test_the_codes_are_those_of_single_files_and_bad_files_are_named(
    call, encode, trained, pictures, tmp_path
):
    report = encode(pictures)
    assert counts(report) == (5, 0, 5, COUNT - 1)
    assert sorted(one["file"] for one in report["skipped"]) == ["000/000003.jpg", "read-me.txt"]
    assert json.loads((tmp_path / "codes/report.json").read_text())["skipped"] == report["skipped"]
    lines = call("encode", trained, pictures)[1].splitlines()
    single = {line.split("  ")[1]: line.split("  ")[0] for line in lines}
    assert {str(pictures / name): code for name, (_, code, _) in codes(tmp_path / "codes").items()} == single
    assert counts(encode(pictures)) == (0, 5, 5, COUNT - 1)


def test_python_and_a_decoding_process_give_the_same_files(encode, trained, pictures, tmp_path):
    encode(pictures)
    model, out = rh.load(trained), tmp_path / "by-python"
    report = rh.encode_collection(model, pictures, out, part_size=10, processes=1, batch_size=3)
    assert report["encoded"] == 5
    assert files(out) == files(tmp_path / "codes")


def test_shards_in_any_order_give_what_one_process_gives(encode, pictures, tmp_path):
    encode(pictures)
    out = tmp_path / "sharded"
    assert encode(pictures, "--shard", "2/3", out=out)["missing"] == ["part-000000", "part-000001", "part-000003", "part-000004"]  # fmt: skip
    encode(pictures, "--shard", "0/3", out=out)
    assert encode(pictures, "--shard", "1/2", out=out)["unchanged"] == 1  # shared out otherwise
    assert encode(pictures, "--shard", "1/3", out=out)["missing"] == []
    assert files(out) == files(tmp_path / "codes")


def test_ids_stay_and_parts_that_changed_are_encoded_again(encode, pictures, tmp_path):
    library = shutil.copytree(pictures, tmp_path / "library")
    encode(library)
    before = codes(tmp_path / "codes")
    shutil.copy(library / "000/000020.jpg", library / "000/000044.jpg")
    changed = encode(library)
    assert (changed["encoded"], changed["unchanged"]) == (1, 4)
    after = codes(tmp_path / "codes")
    assert after["000/000044.jpg"][1] == before["000/000020.jpg"][1]
    (library / "000/0.jpg").hardlink_to(library / "000/000020.jpg")
    encode(library)
    grown = codes(tmp_path / "codes")
    assert {name: grown[name] for name in after} == after
    assert len(grown) == len(after) + 1
    for path in sorted(library.rglob("*.jpg"))[:15]:
        path.unlink()
    assert encode(library)["parts"] == 4
    assert len(list((tmp_path / "codes/parts").glob("*.npy"))) == 4


def written_manifests(pictures: Path, folder: Path) -> list[Path]:
    """The same rows as CSV, JSON lines and Parquet, with a file that is not there and one named again."""
    import pyarrow
    import pyarrow.parquet

    names = sorted(path.relative_to(pictures) for path in pictures.rglob("*.jpg"))[:12]
    rows = [{"file": str(pictures / n), "labels": "cat;dog", "year": str(i)} for i, n in enumerate(names)]
    rows += [{"file": "gone.jpg", "labels": "", "year": ""}, rows[11]]
    (folder / "a.csv").write_text(
        "file,labels,year\n" + "".join(",".join(row.values()) + "\n" for row in rows)
    )
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet")
    return [folder / f"a.{ending}" for ending in ("csv", "jsonl", "parquet")]


def test_manifests_of_any_format_give_the_same(encode, pictures, tmp_path):
    pytest.importorskip("pyarrow")
    outs = []
    for manifest in written_manifests(pictures, tmp_path):
        outs.append(tmp_path / f"out-{manifest.suffix[1:]}")
        report = encode(
            manifest, "--items", "parquet" if manifest.suffix == ".csv" else "jsonl", out=outs[-1]
        )
        assert sorted((one["file"], one["reason"]) for one in report["skipped"]) == [
            (str(pictures / "000/000003.jpg"), "its content is none of JPEG, PNG, GIF, BMP, TIFF, WEBP, PPM, JPEG2000, AVIF"),
            (str(pictures / "000/000011.jpg"), "its name is there already"),
            ("gone.jpg", "there is no such file"),
        ]  # fmt: skip
    held = [codes(out) for out in outs]
    assert held[0] == held[1] == held[2]
    assert held[0][str(pictures / "000/000005.jpg")][2] == {"labels": ["cat", "dog"], "year": "5"}


def add_file(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def make_shards(folder: Path, pictures: Path, count: int = 3, each: int = 8) -> Path:
    """Webdataset shards ``s-00.tar``, ...: each sample an image, its class, and of every second a JSON."""
    folder.mkdir()
    for shard in range(count):
        with tarfile.open(folder / f"s-{shard:02d}.tar", "w") as tar:
            for number in range(each):
                key = f"{shard:02d}{number:04d}"
                add_file(
                    tar, f"{key}.jpg", (pictures / f"000/{10 + shard * each + number:06d}.jpg").read_bytes()
                )
                add_file(tar, f"{key}.cls", str(number).encode())
                if number % 2:
                    add_file(tar, f"{key}.json", json.dumps({"shop": "a", "price": 3}).encode())
    return folder


def test_tars_are_parts_and_samples_become_payload(encode, pictures, tmp_path):
    shards = make_shards(tmp_path / "shards", pictures)
    with tarfile.open(shards / "s-02.tar", "a") as tar:
        add_file(tar, "bad.jpg", b"no image")
        add_file(tar, "odd.json", b"[1]")
        add_file(tar, "odd.png", (pictures / "000/000040.jpg").read_bytes())
    report = encode(shards / "s-{00..02}.tar")
    assert counts(report) == (3, 0, 3, 25)
    assert [one["file"] for one in report["skipped"]] == ["s-02.tar:odd.json", "s-02.tar:bad.jpg"]
    held, out = codes(tmp_path / "codes"), tmp_path / "of-the-folder"
    assert held["s-01.tar:010003.jpg"][2] == {"class": "3", "shop": "a", "price": 3}
    encode(pictures, out=out)
    assert held["s-01.tar:010003.jpg"][1] == codes(out)["000/000021.jpg"][1]
    # another process with the rest of the shards joins them
    make_shards(tmp_path / "more", pictures, 4)
    shutil.copy(tmp_path / "more/s-03.tar", shards)
    assert counts(encode(shards / "s-{03..03}.tar")) == (1, 0, 4, 33)
    assert held == {name: value for name, value in codes(tmp_path / "codes").items() if "s-03" not in name}


@pytest.mark.parametrize("damage", ["cut in a file", "cut between files", "overwritten", "no tar", "gone"])
def test_a_damaged_tar_fails_alone_and_is_tried_again(call, encode, trained, pictures, tmp_path, damage):
    shards = make_shards(tmp_path / "shards", pictures)
    hurt = shards / "s-01.tar"
    content = hurt.read_bytes()
    second = content.index(b"010001.jpg")
    broken = {
        "cut in a file": content[: second + 600],
        "cut between files": content[:second],
        "overwritten": content[:second] + b"x" * 512 + content[second + 512 :],
        "no tar": b"<html>not found</html>",
    }
    hurt.unlink() if damage == "gone" else hurt.write_bytes(broken[damage])
    report = encode(shards / "s-{00..02}.tar", code=1)
    assert (report["done"], list(report["failed"])) == (2, ["s-01"])
    assert str(hurt) in report["failed"]["s-01"]
    assert sorted(path.name for path in (tmp_path / "codes/parts").glob("s-01*")) == ["s-01.json"]
    _, out, err = call(
        "encode", "--images", shards / "s-{00..02}.tar", "--run", trained, "--out", tmp_path / "codes"
    )
    assert out == f"{tmp_path / 'codes'}\n"
    assert "failed: s-01: " in err
    hurt.write_bytes(content)
    assert counts(encode(shards / "s-{00..02}.tar")) == (1, 2, 3, 24)


def test_a_part_in_use_is_left_to_the_other_process(encode, pictures, tmp_path):
    encode(pictures, out=tmp_path / "whole")
    encode(pictures, "--shard", "0/2")
    folder, taken, let_go = CodesFolder.open(tmp_path / "codes"), threading.Event(), threading.Event()

    def other() -> None:
        with folder.working_on("part-000001"):
            taken.set()
            let_go.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    taken.wait(60)
    report = encode(pictures, code=1)
    assert (report["encoded"], report["in_use"], report["missing"]) == (1, ["part-000001"], ["part-000001"])
    let_go.set()
    thread.join()
    assert encode(pictures)["encoded"] == 1
    assert files(tmp_path / "codes") == files(tmp_path / "whole")


def test_killed_at_any_moment_and_repeated_it_ends_with_the_same_files(encode, trained, tmp_path):
    library = make_library(tmp_path / "library", 400)
    whole = encode(library, "--part-size", 40, out=tmp_path / "whole")
    words = ["--images", library, "--run", trained, "--out", tmp_path / "codes", "--part-size", 40]
    command = [sys.executable, "-m", "robusthash", "encode", *map(str, words), "--processes", "0"]
    parts, killed = tmp_path / "codes/parts", 0
    for files_there in (1, 4, 11, 17):  # of 30 at the end
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(parts.glob("*"))) < files_there:
            time.sleep(0.001)
        time.sleep(0.01 * random.Random(files_there).random())
        process.kill()
        killed += process.wait() == -signal.SIGKILL
    assert killed >= 3
    assert 0 < len(list(parts.glob("*.npy"))) < 10, "no kill hit the work"
    report = encode(library, "--part-size", 40)
    assert report["items"] == whole["items"] == 400
    assert files(tmp_path / "codes") == files(
        tmp_path / "whole"
    )  # no lock, nothing half written, no duplicate


def test_an_index_loads_the_codes_by_their_ids(call, encode, trained, pictures, tmp_path):
    encode(pictures)
    held = codes(tmp_path / "codes")
    code, out, err = call(
        "index", "build", tmp_path / "ix", "--run", trained, "--codes", tmp_path / "codes", "--json"
    )
    assert code == 0, err
    assert {key: json.loads(out)[key] for key in ("added", "updated", "count")} == {"added": 46, "updated": 0, "count": 46}  # fmt: skip
    best = json.loads(call("search", tmp_path / "ix", pictures / "000/000017.jpg", "--json", "-k", 46)[1])
    paths = {one["payload"]["path"]: one for one in best}
    assert {one["id"] for one in best} == {number for number, _, _ in held.values()}
    assert paths[str(pictures / "000/000017.jpg")]["distance"] == 0
    out = call("index", "add", tmp_path / "ix", "/mnt/pictures", "--codes", tmp_path / "codes", "--json")[1]
    assert {key: json.loads(out)[key] for key in ("added", "updated", "count")} == {"added": 0, "updated": 46, "count": 46}  # fmt: skip
    found = json.loads(call("search", tmp_path / "ix", pictures / "000/000017.jpg", "--json")[1])[0]
    assert found["payload"]["path"].startswith("/mnt/pictures/000/")


def test_loading_names_what_is_missing_and_refuses_what_is_damaged(call, encode, trained, pictures, tmp_path):
    encode(pictures, "--shard", "0/2")
    load = ("index", "build", tmp_path / "ix", "--run", trained, "--codes", tmp_path / "codes")
    info = json.loads(call(*load, "--json")[1])
    assert (info["added"], info["not_encoded"]) == (26, ["part-000001", "part-000003"])
    file = tmp_path / "codes/parts/part-000000.npy"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    code, _, err = call(*load)
    assert code == 1
    assert f"{file} is damaged; 'robusthash encode' with the same options makes it again" in err
    assert counts(encode(pictures)) == (3, 2, 5, 46)
    assert call(*load)[0] == 0


def test_a_name_of_two_parts_is_loaded_once(call, encode, trained, pictures, tmp_path):
    manifest = tmp_path / "twice.csv"
    names = [pictures / f"000/{number:06d}.jpg" for number in (*range(10, 24), 12)]
    manifest.write_text("file\n" + "".join(f"{name}\n" for name in names))
    encode(manifest)
    out = call("index", "build", tmp_path / "ix", "--run", trained, "--codes", tmp_path / "codes", "--json")[
        1
    ]
    info = json.loads(out)
    assert (info["count"], info["repeated"]) == (14, [str(pictures / "000/000012.jpg")])


def test_codes_of_another_model_or_collection_are_refused(call, encode, trained, pictures, tmp_path):
    encode(pictures)
    other = train(make_config({**CONFIG, "runtime": {"device": "cpu", "seed": 1}}), tmp_path / "runs").path
    out = tmp_path / "codes"
    for words, said in [
        (("--images", pictures, "--run", other, "--part-size", 10), "holds codes of another model"),
        (
            ("--images", pictures / "000", "--run", trained, "--part-size", 10),
            "holds codes of another collection",
        ),
        (("--images", pictures, "--run", trained), "holds parts of another size (part_size 10, here 4096)"),
        (("--images", pictures, "--run", trained, "--part-size", 10, "--items", "parquet"), "another format"),
    ]:
        code, _, err = call("encode", *words, "--out", out)
        assert (code, said in err) == (1, True), err
    code, _, err = call("index", "build", tmp_path / "ix", "--run", other, "--codes", out)
    assert code == 1
    assert "holds codes of another model (origin " in err
    assert not (tmp_path / "ix").exists()


def test_an_index_that_nothing_can_be_read_for_is_not_made(call, encode, trained, pictures, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.csv").write_text("name\nx.jpg\n")
    encode(pictures)
    damaged = tmp_path / "codes/parts/part-000000.npy"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    undone = shutil.copytree(tmp_path / "codes", tmp_path / "undone")
    for status in undone.glob("parts/*.json"):
        status.unlink()
    for words, said in [
        (("--codes", tmp_path / "nowhere"), "holds no encoded collection"),
        (("--codes", tmp_path / "empty"), "holds no encoded collection"),
        (("--codes", tmp_path / "codes"), "part-000000.npy is damaged"),
        (("--codes", undone), "no part of"),
        (("--images", tmp_path / "nowhere"), "nowhere"),
        (("--images", tmp_path / "empty"), "empty"),
        (("--images", pictures, "--payload", tmp_path / "bad.csv"), "bad.csv"),
        (("--payload", tmp_path / "bad.csv"), "describes the files of --images"),
    ]:
        code, _, err = call("index", "build", tmp_path / "made/ix", "--run", trained, *words)
        assert (code, said in err) == (1, True), err
        assert not (tmp_path / "made").exists()


def test_what_cannot_be_encoded_is_refused_in_a_line(call, trained, pictures, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.tar.gz").write_bytes(b"x")
    (tmp_path / "b.csv").write_text("name\nx.jpg\n")
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "x.jpg").write_text("no image")
    run, out = ("--run", trained), ("--out", tmp_path / "codes")
    for words, said in [
        (("--images", pictures, *out), "name the run once"),
        ((trained, "--images", pictures, *run, *out), "name the run once"),
        (("--images", pictures, *run), "--images needs --out"),
        (
            ("--images", pictures, *run, "--out", pictures),
            "holds other files; give the codes a folder of their own",
        ),
        (("--images", pictures, *run, "--out", pictures / "read-me.txt"), "is a file"),
        (("--images", tmp_path / "empty", *run, *out), "names no image; 0 files were passed over"),
        (("--images", bad, *run, *out), "none of the 1 images could be read: x.jpg"),
        (("--images", tmp_path / "s-{00..9}.tar", *run, *out), "did you mean {00..09}?"),
        (("--images", tmp_path / "s-{0..9}.tar", *run, *out), f"no tar {tmp_path / 's-0.tar'}"),
        (("--images", tmp_path / "a.tar.gz", *run, *out), "is compressed"),
        (("--images", tmp_path / "b.csv", *run, *out), "line 2 names no file"),
        (("--images", tmp_path / "no", *run, *out), "no folder, manifest or tar"),
        (("--images", pictures / "read-me.txt", *run, *out), "is no collection"),
        (("--images", pictures, *run, *out, "--shard", "2/2"), "--shard takes I/N"),
        (("--images", pictures, *run, *out, "--items", "xml"), "jsonl or parquet, got 'xml'"),
        (("--images", pictures, *run, *out, "--workers", 2), "decoded by --processes"),
        (("--images", pictures, *run, *out, "--index", "file:x"), "--index goes with --ray"),
        ((trained, pictures, "--shard", "0/2"), "--shard is for collections"),
        ((trained, pictures, "--out", tmp_path / "codes"), "ends in .npz"),
    ]:
        code, _, err = call("encode", *words)
        assert code == 1, words
        assert said in err, err
        lines = [
            line for line in err.splitlines() if not line.startswith("encoding images: ")
        ]  # of a busy machine
        assert len(lines) == 1, err


def test_names_that_are_no_utf8_come_back(encode, pictures, tmp_path):
    library = tmp_path / "library"
    library.mkdir()
    odd = Path(str(library), b"caf\xe9.jpg".decode("utf-8", "surrogateescape"))
    shutil.copy(pictures / "000/000010.jpg", odd)
    encode(library)
    (row,) = map(json.loads, (tmp_path / "codes/parts/part-000000.jsonl").read_text().splitlines())
    assert (row["name"], bytes.fromhex(row["name_hex"])) == ("caf\\xe9.jpg", b"caf\xe9.jpg")
    assert list(codes(tmp_path / "codes")) == [odd.name]


def test_codes_are_read_by_numpy_alone(encode, pictures, tmp_path):
    encode(pictures)
    packed = np.load(tmp_path / "codes/parts/part-000001.npy")
    rows = (tmp_path / "codes/parts/part-000001.jsonl").read_text().splitlines()
    assert (packed.dtype, packed.shape, len(rows)) == (np.uint8, (10, 4), 10)


def test_a_large_image_is_passed_over_unless_allowed(encode, tmp_path):
    library = make_library(tmp_path / "library", 2)
    Image.new("RGB", (300, 200)).save(library / "wide.png")
    assert encode(library, "--max-pixels", 50_000)["skipped"][0]["file"] == "wide.png"
