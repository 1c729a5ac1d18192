"""What hurts an encoding from outside: listings that change, odd tars and manifests, damaged cards."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest

from tests.flow.test_encode_collection import codes, encode, make_shards, pictures, trained

__all__ = ["encode", "pictures", "trained"]  # fixtures


@pytest.fixture
def library(pictures, tmp_path) -> Path:
    """Four images, two parts of two."""
    folder = tmp_path / "library"
    folder.mkdir()
    for number in range(1, 5):
        shutil.copy(pictures / f"000/{10 + number:06d}.jpg", folder / f"{number}.jpg")
    return folder


def test_a_listing_that_changes_between_shards_is_reported_and_mended(
    call, encode, trained, library, tmp_path
):
    two = ("--part-size", 2)
    encode(library, *two, "--shard", "0/2")
    (library / "1.jpg").unlink()
    report = encode(library, *two, "--shard", "1/2", code=1)  # 3.jpg is of the first part now
    assert (report["done"], report["stale"], report["missing"]) == (1, ["part-000000"], [])
    again = ("encode", "--images", library, "--run", trained, "--out", tmp_path / "codes", *two)
    _, _, err = call(*again, "--shard", "1/2", "--processes", 0)
    assert "changed since part-000000 were encoded; the same command without --shard" in err
    load = ("index", "build", tmp_path / "ix", "--run", trained, "--codes", tmp_path / "codes", "--json")
    loaded = json.loads(call(*load)[1])
    assert (loaded["count"], loaded["stale"], loaded["not_encoded"]) == (1, ["part-000000"], [])
    mended = encode(library, *two)
    assert (mended["encoded"], mended["stale"], mended["items"]) == (1, [], 3)
    assert sorted(codes(tmp_path / "codes")) == ["2.jpg", "3.jpg", "4.jpg"]
    assert json.loads(call(*load)[1])["stale"] == []


def test_the_process_that_ends_last_sees_the_listing_of_the_others(encode, trained, library, tmp_path):
    from robusthash.apps.collection.collection_run import Encoding, EncodingJob, encode_part

    first = EncodingJob.of(trained, library, tmp_path / "codes", 2, "jsonl")
    parts = list(first.source.parts(0, 1))
    (library / "1.jpg").unlink()
    encode(library, "--part-size", 2, "--shard", "1/2")
    assert encode_part(first.model, parts[0], first.folder, Encoding(processes=0)) == "encoded"
    assert first.folder.write_report()["stale"] == ["part-000000"]


def test_rows_that_change_in_a_manifest_make_their_part_stale(encode, library, tmp_path):
    manifest = library / "a.csv"
    rows = [f"{number}.jpg,{number}\n" for number in range(1, 5)]
    manifest.write_text("file,price\n" + "".join(rows))
    encode(manifest, "--part-size", 2, "--shard", "0/2")
    manifest.write_text("file,price\n1.jpg,9\n" + "".join(rows[1:]))
    assert encode(manifest, "--part-size", 2, "--shard", "1/2", code=1)["stale"] == ["part-000000"]
    manifest.write_text("file,price\n" + "".join(rows) + "5.jpg,5\n")  # at the end: the others stay
    report = encode(manifest, "--part-size", 2, "--shard", "1/2")
    assert (report["stale"], report["missing"]) == ([], ["part-000002"])


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("root", 5, "root is 5"),
        ("bits", "32", "bits is '32'"),
        ("bits", 0, "bits is 0"),
        ("origin", None, "origin is None"),
        ("parts", "part-000000", "parts is 'part-000000'"),
        ("parts", ["../a"], "parts is ['../a']"),
        ("listings", ["a"], "listings has 1 digests of 2 parts"),
        ("items", "xml", "items is 'xml'"),
        ("items", [], "items is []"),
    ],
)
def test_a_wrong_field_of_a_card_is_named(call, encode, trained, library, tmp_path, field, value, said):
    encode(library, "--part-size", 2)
    card = tmp_path / "codes/collection.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {field: value}))
    for words in (
        ("index", "build", tmp_path / "ix", "--run", trained, "--codes", tmp_path / "codes"),
        ("encode", "--images", library, "--run", trained, "--out", tmp_path / "codes", "--part-size", 2),
    ):
        code, _, err = call(*words)
        assert code == 1
        assert err.splitlines()[-1].endswith(f"{card} is damaged: {said}; encode into another folder"), err


@pytest.mark.parametrize(
    ("status", "said"),
    [
        ({"state": "done"}, "is damaged: it lacks source"),
        ({"state": "done", "source": "", "items": 2, "skipped": []}, "is damaged: it lacks sha256"),
        ({"state": "failed"}, "is damaged: it lacks reason"),
        ({"state": 3}, "is damaged: state is 3"),
        ([], "is damaged: state is None"),
        ("{", "is not JSON"),
    ],
)
def test_a_wrong_field_of_a_status_is_named_and_encoded_again(
    call, encode, trained, library, tmp_path, status, said
):
    encode(library, "--part-size", 2)
    file = tmp_path / "codes/parts/part-000001.json"
    file.write_text(status if isinstance(status, str) else json.dumps(status))
    build = ("index", "build", tmp_path / "ix", "--run", trained, "--codes", tmp_path / "codes")
    code, _, err = call(*build)
    assert (code, f"{file} {said}" in err) == (1, True), err
    assert "'robusthash encode' with the same options makes it again" in err
    report = encode(library, "--part-size", 2, "--shard", "0/2", code=1)
    assert f"{file} {said}" in report["failed"]["part-000001"]
    assert encode(library, "--part-size", 2)["encoded"] == 1
    assert call(*build)[0] == 0


def header(kind: bytes, size: int, content: bytes = b"") -> bytes:
    """The blocks of a header of a tar, which may say another size than its content has."""
    member = tarfile.TarInfo("header")
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % tarfile.BLOCKSIZE)


def record(key: str, value: str) -> bytes:
    """A record of a PAX header."""
    text = f" {key}={value}\n"
    return next(f"{n}{text}".encode() for n in range(9999) if n == len(f"{n}{text}".encode()))


SPARSE = record("GNU.sparse.major", "1") + record("GNU.sparse.minor", "0")
BACK = record("size", "-2048")
ODD = {
    "a sparse map that is none": header(tarfile.XHDTYPE, len(SPARSE), SPARSE),
    "headers without end": header(tarfile.XHDTYPE, 0) * 5000,
    "a large header": header(tarfile.XHDTYPE, 3 << 30),
    "a long name": header(tarfile.GNUTYPE_LONGNAME, 3 << 30),
    "a negative size": header(tarfile.XHDTYPE, len(BACK), BACK),
}


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_tar_fails_alone(encode, pictures, tmp_path, odd):
    shards = make_shards(tmp_path / "shards", pictures, count=2)
    hurt = shards / "s-01.tar"
    whole = hurt.read_bytes()
    hurt.write_bytes(ODD[odd] + whole)
    with hurt.open("ab") as file:
        file.truncate(1 << 32)  # a hole: what a header says is there
    report = encode(shards / "s-{00..01}.tar", code=1)
    assert (report["done"], list(report["failed"])) == (1, ["s-01"])
    assert report["failed"]["s-01"].startswith(f"{hurt}: not a plain tar, or damaged (")
    hurt.write_bytes(whole)
    assert encode(shards / "s-{00..01}.tar")["done"] == 2


def test_a_large_header_is_not_read(tmp_path):
    import tracemalloc

    from robusthash.apps.collection.collection_items import SourceError
    from robusthash.apps.collection.tar_source import TarPart

    path = tmp_path / "a.tar"
    path.write_bytes(header(tarfile.XHDTYPE, 50 << 20))
    with path.open("ab") as file:
        file.truncate(60 << 20)
    tracemalloc.start()
    with pytest.raises(SourceError, match="headers of more than 65536 bytes"):
        list(TarPart(path, "a.tar").entries())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 << 20


def test_a_tar_that_is_a_pipe_is_refused(encode, pictures, tmp_path):
    import os

    shards = make_shards(tmp_path / "shards", pictures, count=1)
    os.mkfifo(shards / "s-01.tar")
    report = encode(shards / "s-{00..01}.tar", code=1)
    assert report["failed"] == {"s-01": f"{shards / 's-01.tar'}: it is a pipe (fifo), not a tar"}


def test_payload_that_no_index_takes_is_passed_over_before_it_is_encoded(
    call, encode, trained, library, tmp_path
):
    rows = [
        {"file": "1.jpg", "size": 3},
        {"file": "2.jpg", 'size "in"': 3},
        {"file": "3.jpg", "text": ["a", {"b": "\0"}]},
        {"file": "4.jpg", "a\0": 1},
        {"file": "x\ud800.jpg"},
        {"file": "a\0.jpg"},
    ]
    manifest = library / "a.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = encode(manifest)
    assert report["items"] == 1
    reasons = [(one["file"], one["reason"].removeprefix(f"{manifest}, ")) for one in report["skipped"]]
    keys = "payload keys are text without quotes, backslashes, controls, got"
    name, reason = reasons.pop(1)
    assert name == "3.jpg"
    assert reason.startswith("line 3: its payload ")
    assert reasons == [
        ("2.jpg", f"line 2: {keys} 'size \"in\"'"),
        ("4.jpg", f"line 4: {keys} 'a\\x00'"),
        ("x\\ud800.jpg", "line 5: no file name holds half of a surrogate pair"),
        ("a\0.jpg", "line 6: no file name holds a NUL character"),
    ]
    load = ("index", "build", tmp_path / "ix", "--run", trained, "--codes", tmp_path / "codes", "--json")
    assert json.loads(call(*load)[1])["count"] == 1


def test_a_column_that_no_index_takes_is_refused_before_anything_is_encoded(call, trained, library, tmp_path):
    manifest = library / "a.csv"
    manifest.write_text('file,"a""b"\n1.jpg,3\n')
    code, _, err = call("encode", "--images", manifest, "--run", trained, "--out", tmp_path / "codes")
    assert code == 1
    assert "line 2: payload keys are text without quotes" in err
    assert "got 'a\"b'; rename the column" in err
    assert not (tmp_path / "codes").exists()
    manifest.write_text("file,ab\n1.jpg,3\n")
    assert call("encode", "--images", manifest, "--run", trained, "--out", tmp_path / "codes")[0] == 0


def test_payload_of_a_tar_that_no_index_takes_is_passed_over(encode, library, tmp_path):
    image = (library / "1.jpg").read_bytes()
    files = {"a.jpg": image, "a.json": b'{"b\\"c": 1}', "b.jpg": image, "b.txt": b"a\0b", "c\0d.jpg": image}
    with tarfile.open(library / "s.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.pax_headers = len(content), {"path": name}
            tar.addfile(member, io.BytesIO(content))
    report = encode(library / "s.tar")
    assert sorted(codes(tmp_path / "codes")) == ["s.tar:a.jpg", "s.tar:b.jpg"]
    assert {one["file"]: one["reason"].partition(" ")[0] for one in report["skipped"]} == {
        "s.tar:a.json": "payload",
        "s.tar:b.txt": "it",
        "s.tar:c\0d.jpg": "no",
    }


def test_a_damaged_parquet_manifest_is_named(call, trained, library, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    manifest = library / "a.parquet"
    parquet.write_table(pyarrow.table({"file": [f"{n % 4 + 1}.jpg" for n in range(50_000)]}), manifest)
    whole = manifest.read_bytes()
    for damaged in (b"PAR1", whole[:50] + b"?" * 100 + whole[150:], whole[:-100], whole[:-20] + b"?" * 20):
        manifest.write_bytes(damaged)
        code, _, err = call("encode", "--images", manifest, "--run", trained, "--out", tmp_path / "codes")
        assert code == 1
        assert f"{manifest} cannot be read as Parquet: " in err.splitlines()[-1], err
        assert len([line for line in err.splitlines() if line]) == 1, err


def test_what_names_no_image_says_why(call, trained, tmp_path):
    manifest = tmp_path / "a.jsonl"
    manifest.write_text(json.dumps({"file": "a\ud800.jpg"}) + "\n" + json.dumps({"file": "b\0.jpg"}) + "\n")
    code, _, err = call("encode", "--images", manifest, "--run", trained, "--out", tmp_path / "codes")
    assert code == 1
    assert (
        f"{manifest} names no image; 2 files were passed over: a\\ud800.jpg ({manifest}, line 1: no " in err
    )
