"""What hurts an encoding from outside: listings that change, odd tars and manifests, damaged cards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.flow.test_encode_collection import codes, encode, pictures, trained

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
