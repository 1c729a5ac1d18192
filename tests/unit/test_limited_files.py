"""Files of strangers: every reader refuses what is too large, too deep or would run code, in one line."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from robusthash.core.limited_files import parse_yaml, read_json, read_npz, read_text, read_yaml
from robusthash.models.pretrained_weights import read_tensors

LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{b}: &{b} {{<<: [{','.join([f'*{a}'] * 150)}]}}\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGED_MERGES = "- &a0 {k: 1}\n" + "".join(f"- &a{i + 1} {{<<: [*a{i},*a{i},*a{i}]}}\n" for i in range(30))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 1000 + "]" * 1000, "nested"),
        ("&a [*a]", "holds itself"),
        ("&a {b: {c: *a}}", "holds itself"),
        (LAUGHS, "more than 100,000 values"),
        (MERGES, "aliases"),
        (MERGED_MERGES, "more than 100,000 values, counting what << repeats"),
        ("--- a\n" * 100_000, "another document"),
        ("a: 1\nb: [", "line 2"),
        ("a: 1\nb: 2\na: 3", "line 3: the key 'a' is there twice, first in line 1; leave one"),
        ("{name: mainstay, name: hag}", "the key 'name' is there twice; leave one"),
        ("2020-99-99", "not valid YAML"),
        ("9" * 5000, "not valid YAML"),
        ("!!python/object/apply:os.getcwd []", "could not determine a constructor"),
    ],
)
def test_yaml_is_refused_in_a_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=said) as caught:
        read_yaml(path)
    assert "odd.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_key_that_is_merged_in_may_be_written_again() -> None:
    text = "a: &a {x: 1}\nb: &b {<<: *a, x: 2}\nc: {<<: *b, x: 3}\nd: {<<: *b}"
    assert parse_yaml(text, "t") == {"a": {"x": 1}, "b": {"x": 2}, "c": {"x": 3}, "d": {"x": 2}}


def test_yaml_that_repeats_itself_a_little_is_read() -> None:
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: *a", "it")["b"] == {"x": 1, "y": 2}


@pytest.mark.parametrize(
    "text", ["[" * 1000 + "]" * 1000, "[" * 100_000, "{", "", "9" * 5000, '{"a": [' * 80]
)
def test_json_is_refused_in_a_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "odd.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"odd\.json"):
        read_json(path)


def test_a_text_is_utf8_of_a_regular_file_within_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match="not UTF-8 text"):
        read_text(path)
    path.write_bytes(b"\xef\xbb\xbf" + "é".encode())
    assert read_text(path) == "é"
    with pytest.raises(ValueError, match="more than 2 bytes"):
        read_text(path, limit=2)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="no regular file"):
        read_text(tmp_path / "pipe")


def test_arrays_come_back_as_numpy_wrote_them(tmp_path: Path) -> None:
    wrote = {
        "a": np.arange(6.0).reshape(2, 3),
        "b": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "c": np.array(5),
    }
    wrote |= {"d": np.array(["x", "yé"]), "e": np.zeros((0, 3)), "f": np.array([True])}
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", **wrote)
        read = read_npz(tmp_path / "x.npz")
        assert list(read) == list(wrote)
        for key, values in wrote.items():
            np.testing.assert_array_equal(read[key], values)
            assert read[key].dtype == values.dtype
            assert read[key].flags.writeable
    with pytest.raises(ValueError, match="lacks the arrays z of a, z"):
        read_npz(tmp_path / "x.npz", ["a", "z"])


def zeros(shape: tuple[int, ...], mebibytes: int) -> bytes:
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("codes.npy", "w") as member,
    ):
        header = {"descr": "|i1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(member, header)
        for _ in range(mebibytes):
            member.write(bytes(1 << 20))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (zeros((300 << 20,), 300), "unpacks to 300 MiB; save what it holds without compression"),
        (zeros((1 << 50,), 1), "says that it is int8 of shape"),
        (zeros((-4,), 1), "which its bytes are not"),
        (b"hello", "not a zip file"),
    ],
)
def test_an_archive_is_refused_before_it_is_unpacked(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "odd.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read_npz(path)


def test_an_array_of_objects_is_not_opened(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", codes=np.array([{}, []], dtype=object))
    with pytest.raises(ValueError, match="Python objects, which would run code"):
        read_npz(tmp_path / "x.npz")


def test_weights_that_unpack_to_far_more_are_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(300 << 18)}, tmp_path / "whole.pth")
    with (
        zipfile.ZipFile(tmp_path / "whole.pth") as whole,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in whole.namelist():
            bomb.writestr(name, whole.read(name))
    assert read_tensors(tmp_path / "whole.pth")["w"].shape == (300 << 18,)
    with pytest.raises(ValueError, match=r"weights '.*bomb\.pth' has .* unpacks to 300 MiB"):
        read_tensors(tmp_path / "bomb.pth")
