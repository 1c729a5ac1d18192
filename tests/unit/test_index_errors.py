"""Bad input, damaged files, full disks and kills: each with a clear error, and nothing half-done."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from robusthash.core import hamming
from robusthash.core.types import Codes
from robusthash.index import CodeIndex, open_index
from robusthash.index import sqlite_file as schema_module
from robusthash.index import sqlite_store as store_module
from robusthash.index.file_index import FileIndex


def codes(ids: list[int], bits: int = 32, origin: str = "") -> Codes:
    draws = torch.Generator().manual_seed(len(ids))
    return Codes(hamming.pack(torch.randn(len(ids), bits, generator=draws)), bits, torch.tensor(ids), origin)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "index"


@pytest.fixture
def index(home: Path):
    with open_index(f"file:{home}", 32) as opened:
        opened.add(codes([3, 1, 2], origin="model-a"), [{"label": "cat"}, {"label": "dog"}, {}])
        yield opened


def unchanged(index: CodeIndex, home: Path) -> None:
    """The three items of the fixture and no more, in memory and on disk; and the index still takes a
    write."""
    for opened in (index, open_index(f"file:{home}", create=False)):
        assert opened.count() == 3
        assert sorted(opened.search(codes([1]), 5).ids[0].tolist()) == [-1, -1, 1, 2, 3]
        assert opened.payload([3, 1, 2]) == [{"label": "cat"}, {"label": "dog"}, {}]
        assert opened.info()["origin"] == "model-a"
    index.add(codes([77]))
    assert index.count() == 4


# Addresses and opening


@pytest.mark.parametrize("url", ["redis://host:19530/name", "index", "", "file:"])
def test_an_unknown_address_names_the_schemes(url: str) -> None:
    with pytest.raises(ValueError, match=r"file:DIR.*supported schemes: file"):
        open_index(url, 32)


def test_a_file_address_with_a_host_is_refused() -> None:
    with pytest.raises(ValueError, match="names a host"):
        open_index("file://index/here", 32)


def test_a_file_address_with_three_slashes_is_absolute(home: Path) -> None:
    with open_index(f"file://{home}", 32) as index:
        assert index.info()["url"] == f"file:{home}"
    assert (home / "index.sqlite").exists()


@pytest.mark.parametrize("bits", [0, -8])
def test_bits_must_be_positive(home: Path, bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits must be positive, got {bits}"):
        open_index(f"file:{home}", bits)
    assert not home.exists()


def test_a_new_index_needs_bits(home: Path) -> None:
    with pytest.raises(ValueError, match="needs the number of bits"):
        open_index(f"file:{home}")
    assert not home.exists()


def test_a_missing_index_is_not_made_when_told_so(home: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no index in"):
        open_index(f"file:{home}", 32, create=False)
    assert not home.exists()


def test_an_unknown_engine_offers_the_nearest(home: Path) -> None:
    with pytest.raises(ValueError, match=r"'fais'; did you mean 'faiss'\?"):
        open_index(f"file:{home}", 32, "fais")


def test_opening_with_other_bits_names_both(index: CodeIndex, home: Path) -> None:
    with pytest.raises(ValueError, match="holds codes of 32 bits, asked for 64"):
        open_index(f"file:{home}", 64)


def test_a_file_in_place_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("something else")
    with pytest.raises(ValueError, match="is a file"):
        open_index(f"file:{tmp_path / 'taken'}", 32)


def test_two_that_make_the_same_index_at_once_share_it(home: Path) -> None:
    opened: list[CodeIndex] = []
    start = threading.Barrier(4)

    def make() -> None:
        start.wait()
        opened.append(open_index(f"file:{home}", 32))

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 4
    opened[0].add(codes([1, 2]))
    assert [index.count() for index in opened] == [2] * 4
    for index in opened:
        index.close()
    assert [path.name for path in home.iterdir()] == ["index.sqlite"]


# Codes, ids and arguments


def test_codes_of_another_length_name_both(index: CodeIndex, home: Path) -> None:
    for call in (lambda c: index.add(c), lambda c: index.search(c, 1), lambda c: index.range(c, 1)):
        with pytest.raises(ValueError, match="codes of 64 bits do not fit an index of 32 bits"):
            call(codes([9], 64))
    unchanged(index, home)


def test_codes_of_another_origin_name_both(index: CodeIndex, home: Path) -> None:
    remedy = (
        r"'model-b'.*'model-a'.*encode with the model of origin 'model-a' \(--run .*\), or build a new index"
    )
    for call in (lambda c: index.add(c), lambda c: index.search(c, 1), lambda c: index.range(c, 1)):
        with pytest.raises(ValueError, match=remedy):
            call(codes([9], origin="model-b"))
    unchanged(index, home)


def test_an_emptied_index_takes_another_origin(index: CodeIndex) -> None:
    index.remove([1, 2, 3])
    assert index.search(codes([9], origin="model-b"), 1).ids.tolist() == [[-1]]
    index.add(codes([9], origin="model-b"))
    assert index.info()["origin"] == index.origin == "model-b"
    assert index.search(codes([9], origin="model-b"), 1).ids.tolist() == [[9]]
    with pytest.raises(ValueError, match=r"'model-a'.*'model-b'"):
        index.search(codes([9], origin="model-a"), 1)


def test_an_emptied_index_forgets_its_origin(index: CodeIndex) -> None:
    index.remove([1, 2, 3])
    assert index.origin == ""
    index.add(codes([9]))  # of unknown origin: any query is taken, and no model is named for them
    assert index.info()["origin"] == index.origin == ""
    assert index.search(codes([9], origin="model-b"), 1).ids.tolist() == [[9]]


def test_an_id_held_already_is_named(index: CodeIndex, home: Path) -> None:
    with pytest.raises(ValueError, match="id 2 is already in the index"):
        index.add(codes([10, 2, 11]), [{"a": 1}] * 3)
    unchanged(index, home)


def test_an_id_given_twice_is_named(index: CodeIndex, home: Path) -> None:
    with pytest.raises(ValueError, match="id 11 is given more than once"):
        index.add(codes([10, 11, 11]))
    unchanged(index, home)


def test_negative_ids_are_refused(index: CodeIndex, home: Path) -> None:
    with pytest.raises(ValueError, match="ids must be 0 or greater, got -1"):
        index.add(codes([10, -1]))
    unchanged(index, home)


@pytest.mark.parametrize("k", [0, -3])
def test_k_must_be_positive(index: CodeIndex, k: int) -> None:
    with pytest.raises(ValueError, match=f"k must be at least 1, got {k}"):
        index.search(codes([1]), k)


def test_radius_must_not_be_negative(index: CodeIndex) -> None:
    with pytest.raises(ValueError, match="radius must be 0 or greater, got -1"):
        index.range(codes([1]), -1)


def test_ones_in_the_padding_are_refused(home: Path) -> None:
    with open_index(f"file:{home}", 12) as index:
        bad = Codes(torch.tensor([[255, 0b11110001]], dtype=torch.uint8), 12, torch.tensor([1]))
        with pytest.raises(ValueError, match="ones after bit 12"):
            index.add(bad)
        with pytest.raises(ValueError, match="ones after bit 12"):
            index.search(bad, 1)


@pytest.mark.parametrize(
    ("packed", "ids", "match"),
    [
        (torch.zeros(2, 3, dtype=torch.uint8), [5, 6], r"got \(2, 3\) torch.uint8"),
        (torch.zeros(2, 4), [5, 6], "got .* torch.float32"),
        (torch.zeros(4, dtype=torch.uint8), [5], r"got \(4,\)"),
        (torch.zeros(2, 4, dtype=torch.uint8), [5], "2 codes with 1 ids"),
    ],
)
def test_rows_that_are_not_packed_codes(
    index: CodeIndex, home: Path, packed: torch.Tensor, ids: list, match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        index.add(Codes(packed, 32, torch.tensor(ids)))
    unchanged(index, home)


@pytest.mark.parametrize(
    ("payload", "match"),
    [
        ([{}], "2 codes with 1 payloads"),
        ([{}, "cat"], "payload of id 9 must be a mapping, got str"),
        ([{}, {"when": object()}], "payload of id 9 cannot be written as JSON"),
        ([{}, {"score": float("nan")}], "payload of id 9 cannot be written as JSON"),
        ([{}, {"text": "\ud800"}], "payload of id 9 cannot be written as JSON"),
        ([{}, {'a"b': 1}], "payload keys"),
        ([{}, {5: 1}], "payload keys .* got 5"),
    ],
)
def test_payload_that_cannot_be_kept(index: CodeIndex, home: Path, payload: list, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        index.add(codes([8, 9]), payload)
    unchanged(index, home)


@pytest.mark.parametrize(
    ("where", "match"),
    [
        ({"label": float("nan")}, "'label' can equal text, a number, a truth value or None, not nan"),
        ({"label": [{"a": 1}]}, "not {'a': 1}"),
        ({'a"b': 1}, "payload keys"),
        ([1.5], "whole numbers"),
        ("cat", "whole numbers"),
        (torch.tensor([True, False, True]), "whole numbers, got bool"),
        (torch.zeros(2, 2, dtype=torch.int64), "one dimension"),
    ],
)
def test_filters_that_mean_nothing(index: CodeIndex, where: object, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        index.search(codes([1]), 1, where=where)


def test_the_payload_of_an_unknown_id(index: CodeIndex) -> None:
    with pytest.raises(KeyError, match="id 99 is not in the index"):
        index.payload([1, 99])


def test_a_closed_index_says_so(index: CodeIndex) -> None:
    index.close()
    index.close()
    calls = [lambda: index.search(codes([1]), 1), lambda: index.add(codes([5])), index.count, index.info]
    for call in [
        *calls,
        lambda: index.remove([1]),
        lambda: index.payload([1]),
        lambda: index.snapshot("elsewhere"),
    ]:
        with pytest.raises(ValueError, match="is closed"):
            call()


@pytest.mark.parametrize("k", [2.5, True, "3", None, np.float64(2), np.True_])
def test_k_and_radius_are_whole_numbers(index: CodeIndex, k: object) -> None:
    for name, call in (("k", index.search), ("radius", index.range)):
        with pytest.raises(ValueError, match=re.escape(f"{name} must be a whole number, got {k!r}")):
            call(codes([1]), k)


def test_numbers_of_numpy_are_k_and_radius(index: CodeIndex) -> None:
    assert index.search(codes([1]), np.int64(2)).ids.shape == (1, 2)
    assert len(index.range(codes([1]), np.int32(32)).ids[0]) == 3


def test_a_huge_k_takes_no_memory(index: CodeIndex) -> None:
    found = index.search(codes([1]), 10**12)
    assert sorted(found.ids[0].tolist())[-4:] == [-1, 1, 2, 3]
    assert found.ids.shape == found.distances.shape == (1, 10_000)


def test_choice_and_origin_are_checked_when_nothing_is_new(index: CodeIndex, home: Path) -> None:
    with pytest.raises(ValueError, match=r"on_duplicate \(--on-duplicate\) is one of .*, got 'foo'"):
        index.add(codes([]), keys=[], on_duplicate="foo")
    with pytest.raises(ValueError, match="codes of origin 'model-b'"):
        index.add(codes([], origin="model-b"), keys=[])
    unchanged(index, home)


# Files


def test_a_snapshot_never_overwrites(index: CodeIndex, home: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    for target in (home, tmp_path / "copy"):
        with pytest.raises(FileExistsError, match="exists already"):
            index.snapshot(str(target))
    unchanged(index, home)


def test_a_snapshot_that_fails_leaves_nothing(
    index: CodeIndex, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(path: Path) -> None:
        raise OSError(5, "the disk is on fire", str(path))

    monkeypatch.setattr(store_module, "flush", fails)
    with pytest.raises(OSError, match="on fire"):
        index.snapshot(str(tmp_path / "copy"))
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def filled(home: Path) -> Path:
    with open_index(f"file:{home}", 64) as index:
        index.add(codes(list(range(5000)), 64), [{"label": "some text to fill pages with"}] * 5000)
    return home / "index.sqlite"


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
def test_a_truncated_store_is_named(home: Path, share: float) -> None:
    path = filled(home)
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(ValueError, match=r"index\.sqlite is damaged") as caught:
        open_index(f"file:{home}", 64)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None  # no traceback of SQLite's


def test_overwritten_pages_are_named(home: Path) -> None:
    path = filled(home)
    content = bytearray(path.read_bytes())
    content[4096 * 2 :] = os.urandom(len(content) - 4096 * 2)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"index\.sqlite is damaged"):
        open_index(f"file:{home}")


def test_something_else_under_the_name_of_the_store(home: Path) -> None:
    home.mkdir()
    (home / "index.sqlite").write_bytes(b"this is a text, no database. ..." * 256)
    with pytest.raises(ValueError, match=r"index\.sqlite is damaged"):
        open_index(f"file:{home}", 32)


def test_codes_of_a_wrong_width_in_the_store(index: CodeIndex, home: Path) -> None:
    index.close()
    with sqlite3.connect(home / "index.sqlite") as connection:
        connection.execute("UPDATE items SET code = x'00' WHERE id = 2")
    connection.close()
    with pytest.raises(ValueError, match=r"index\.sqlite is damaged: codes are not 4 bytes each"):
        open_index(f"file:{home}")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ("UPDATE meta SET value = 'null' WHERE key = 'bits'", "its setting bits is None"),
        ("UPDATE meta SET value = '\"x\"' WHERE key = 'bits'", "its setting bits is 'x'"),
        ("UPDATE meta SET value = '0' WHERE key = 'bits'", "its setting bits is 0"),
        ("DELETE FROM meta WHERE key = 'bits'", "its setting bits is None"),
        ("UPDATE meta SET value = '{' WHERE key = 'origin'", "its setting origin is no JSON"),
        ("UPDATE meta SET value = x'ff' WHERE key = 'origin'", "its setting origin is no JSON"),
        ("UPDATE meta SET value = '5' WHERE key = 'engine'", "its setting engine is 5"),
        ("UPDATE meta SET value = '[]' WHERE key = 'next_id'", r"its setting next_id is \[\]"),
        ("UPDATE items SET code = 'text' WHERE id = 1", "a code of it is no blob"),
        ("UPDATE payloads SET value = '{' WHERE id = 3", "malformed JSON|a payload is no JSON"),
        ("UPDATE payloads SET value = '[1]' WHERE id = 3", r"a payload is \[1\]"),
        ("UPDATE payloads SET value = cast(x'ff' AS TEXT) WHERE id = 3", "decode to UTF-8|JSON"),
        ("DROP TABLE keys", "its table keys is gone"),
        ("DROP TABLE changes", "its table changes is gone"),
    ],
)
def test_stored_values_of_no_sense_are_named(index: CodeIndex, home: Path, change: str, match: str) -> None:
    index.close()
    with sqlite3.connect(home / "index.sqlite") as connection:
        connection.execute(change)
    connection.close()
    whole = rf"index\.sqlite is damaged: .*({match}).*; restore it from a snapshot or build the index again"
    with pytest.raises(ValueError, match=whole), open_index(f"file:{home}") as opened:
        opened.payload([3])
    with pytest.raises(ValueError, match=r"is damaged|payload key"), open_index(f"file:{home}") as opened:
        opened.search(codes([1]), 1, where={"lable": 1})


def test_another_format_is_named(index: CodeIndex, home: Path) -> None:
    index.close()
    with sqlite3.connect(home / "index.sqlite") as connection:
        connection.execute("UPDATE meta SET value = '99' WHERE key = 'format'")
    connection.close()
    with pytest.raises(ValueError, match="has format 99, this version reads 1 to 3"):
        open_index(f"file:{home}")


def test_a_log_without_its_store_is_not_replayed_into_a_new_one(home: Path) -> None:
    home.mkdir()
    (home / "index.sqlite-wal").write_bytes(b"left over")
    with pytest.raises(ValueError, match="log of a store that is gone"):
        open_index(f"file:{home}", 32)


def test_a_full_disk_changes_nothing(home: Path) -> None:
    with FileIndex(home, 32) as index:
        index.add(codes([3, 1, 2], origin="model-a"), [{"label": "cat"}, {"label": "dog"}, {}])
        connection = index._opened()._connection
        connection.execute("PRAGMA max_page_count = 40")
        for payload in (None, [{"text": "long " * 100}] * 20_000):
            with pytest.raises(OSError, match="the disk is full"):
                index.add(codes(list(range(10, 20_010))), payload)
        unchanged(index, home)
        connection.execute("PRAGMA max_page_count = 1000000")
        index.add(codes(list(range(100, 20_100))))
        assert index.count() == 20_004


def test_an_index_that_cannot_be_made_leaves_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema_module, "SCHEMA", "CREATE TABLE meta (key, value); SELECT * FROM absent;")
    with pytest.raises(sqlite3.OperationalError, match="no such table"):
        open_index(f"file:{home}", 32)
    assert list(home.iterdir()) == []


def test_a_commit_reaches_the_disk_before_it_is_acknowledged(home: Path) -> None:
    with FileIndex(home, 32) as index:
        connection = index._opened()._connection
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("PRAGMA synchronous").fetchone() == (
            2,
        )  # full: the log is synced at each commit


def test_a_second_writer_waits_and_then_is_told(home: Path) -> None:
    with FileIndex(home, 32, wait=0.2) as index:
        index.add(codes([3, 1, 2], origin="model-a"), [{"label": "cat"}, {"label": "dog"}, {}])
        other = sqlite3.connect(home / "index.sqlite", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        for write in (lambda: index.add(codes([9])), lambda: index.remove([1])):
            with pytest.raises(
                TimeoutError, match=r"another process has been writing to .*index\.sqlite for 0\.2 s"
            ):
                write()
        assert index.search(codes([1]), 3).ids[0].sort().values.tolist() == [1, 2, 3]  # readers go on
        other.execute("ROLLBACK")
        other.close()
        unchanged(index, home)


WRITER = """
import sys, torch
from robusthash.core.types import Codes
from robusthash.index import open_index
index = open_index(sys.argv[1], 64)
for batch in range(int(sys.argv[2]), 100_000):
    ids = torch.arange(batch * 7, batch * 7 + 7)
    packed = (ids[:, None] >> torch.arange(0, 64, 8)).to(torch.uint8)
    index.add(Codes(packed, 64, ids), [{"batch": batch}] * 7)
    print(batch, flush=True)
"""


def test_every_acknowledged_item_survives_a_kill(home: Path) -> None:
    """Two writers, one after the other, each killed in the middle of its adds."""
    acknowledged = -1
    for count in (5, 60):
        command = [sys.executable, "-c", WRITER, f"file:{home}", str(acknowledged + 1)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            lines = [writer.stdout.readline() for _ in range(count)]
            os.kill(writer.pid, signal.SIGKILL)
            lines += writer.stdout.readlines()  # acknowledged before the kill reached it
        acknowledged = max(int(line) for line in lines if line.endswith("\n"))
        with open_index(f"file:{home}", create=False) as index:
            total = index.count()
            assert total % 7 == 0  # no half-written batch
            assert total >= (acknowledged + 1) * 7
            ids = torch.arange(total)
            assert index.payload(ids) == [{"batch": at // 7} for at in range(total)]
            packed = (ids[:, None] >> torch.arange(0, 64, 8)).to(torch.uint8)
            assert torch.equal(index.search(Codes(packed, 64, ids), 1).ids[:, 0], ids)
            acknowledged = total // 7 - 1
