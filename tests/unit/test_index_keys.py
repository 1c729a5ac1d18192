"""Items by key: upsert, ids that are never given twice, filters, old files, read-only disks and forks."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from robusthash.core import hamming
from robusthash.core.types import Codes
from robusthash.index import CodeIndex, open_index


def codes(count: int, seed: int = 0, bits: int = 32) -> Codes:
    draws = torch.Generator().manual_seed(seed)
    return Codes(hamming.pack(torch.randn(count, bits, generator=draws)), bits, torch.arange(count))


SERVERS = {"scan": "postgresql", "hnsw": "postgresql", "bin-flat": "milvus", "bin-ivf-flat": "milvus"}


@pytest.fixture(params=["faiss", "numpy", "faiss-ivf", *SERVERS])
def engine(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def url(engine: str, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if engine in SERVERS:
        return request.getfixturevalue(SERVERS[engine]).empty(32, engine)
    return f"file:{tmp_path / 'index'}"


@pytest.fixture
def index(engine: str, url: str):
    with open_index(url, 32, engine) as opened:
        yield opened


def nearest(index: CodeIndex, code: Codes, row: int) -> tuple[int, int]:
    found = index.search(Codes(code.packed[row : row + 1], 32, torch.arange(1)), 1)
    return int(found.ids), int(found.distances)


def test_adding_again_updates_under_the_same_id(index: CodeIndex) -> None:
    first, second = codes(3, 1), codes(3, 2)
    added = index.add(first, [{"n": 1}] * 3, keys=["a", "b", "c"])
    assert (added.ids.tolist(), added.held.tolist()) == ([0, 1, 2], [False] * 3)
    assert nearest(index, first, 1) == (1, 0)
    again = index.add(second, [{"n": 2}] * 3, keys=["b", "d", "a"])
    assert (again.ids.tolist(), again.held.tolist()) == ([1, 3, 0], [True, False, True])
    assert index.count() == 4
    assert [nearest(index, second, row) for row in range(3)] == [(1, 0), (3, 0), (0, 0)]
    assert nearest(index, first, 1)[1] > 0  # the code that b had is gone
    assert index.payload([0, 1, 2, 3]) == [{"n": 2}, {"n": 2}, {"n": 1}, {"n": 2}]
    index.add(codes(1, 3), keys=["c"])
    assert index.payload([2]) == [{}]  # replaced whole


def test_skip_keeps_and_error_writes_nothing(index: CodeIndex) -> None:
    first, second = codes(2, 1), codes(2, 2)
    index.add(first, keys=["a", "b"], stamps=["1", "1"])
    skipped = index.add(second, keys=["b", "c"], on_duplicate="skip", stamps=["2", "2"])
    assert (skipped.ids.tolist(), skipped.held.tolist()) == ([1, 2], [True, False])
    assert index.held(["a", "b", "c", "x"]) == {"a": (0, "1"), "b": (1, "1"), "c": (2, "2")}
    assert nearest(index, first, 1) == (1, 0)
    with pytest.raises(
        ValueError, match=r"'c' \(id 2\) is already in the index.*'update' replaces.*'skip' keeps"
    ):
        index.add(second, keys=["d", "c"], on_duplicate="error")
    assert index.keys() == ["a", "b", "c"]
    with pytest.raises(
        ValueError, match=r"on_duplicate \(--on-duplicate\) is one of error, skip, update, got 'overwrite'"
    ):
        index.add(second, keys=["d", "c"], on_duplicate="overwrite")


def test_ids_are_updated_or_skipped_too(index: CodeIndex) -> None:
    first, second = codes(3, 1), codes(3, 2)
    index.add(first)
    index.add(second, on_duplicate="skip")
    assert nearest(index, first, 2) == (2, 0)
    index.add(second, on_duplicate="update")
    assert nearest(index, second, 2) == (2, 0)
    assert index.count() == 3


def test_no_id_is_given_twice(index: CodeIndex, url: str) -> None:
    index.add(codes(3), keys=["a", "b", "c"])
    assert index.remove(keys=["c", "x"]) == 1
    assert index.next_id() == 3
    assert index.add(codes(1), keys=["c"]).ids.tolist() == [3]
    index.add(Codes(codes(1).packed, 32, torch.tensor([50])))  # an id of the caller's own
    index.remove([50])
    with open_index(url, create=False) as again:
        assert again.add(codes(2), keys=["e", "f"]).ids.tolist() == [51, 52]
    assert index.add(codes(1), keys=["g"]).ids.tolist() == [53]


def test_removal_by_keys_and_by_payload(index: CodeIndex) -> None:
    index.add(
        codes(6),
        [{"label": "cat" if at % 2 else "dog"} for at in range(6)],
        keys=[f"k/{at}" for at in range(6)],
    )
    assert index.keys("k/") == [f"k/{at}" for at in range(6)]
    assert index.remove({"label": "cat"}) == 3
    assert index.keys() == ["k/0", "k/2", "k/4"]
    assert index.remove(keys=["k/0", "k/0"]) == 1
    assert index.search(codes(1), 3).ids[0].sort().values.tolist() == [-1, 2, 4]
    for wrong in ({}, None):
        with pytest.raises(ValueError, match="remove takes ids, payload values or keys: one of them"):
            index.remove(wrong)
    with pytest.raises(ValueError, match="one of them"):
        index.remove([2], keys=["k/2"])


def test_keys_that_cannot_be(index: CodeIndex) -> None:
    for keys, match in (
        (["a", "a"], "key 'a' is given more than once"),
        (["a"], r"2 codes with the keys \['a'\]"),
        ("ab", "2 codes with the keys 'ab'"),
        (["a", 5], "keys are text, got 5"),
        (["a", "\udce9"], "cannot be written as JSON"),
    ):
        with pytest.raises(ValueError, match=match):
            index.add(codes(2), keys=keys)
        assert index.count() == 0


def test_writers_at_once_both_succeed(tmp_path: Path) -> None:
    """Two openers add the same keys and own ones, in turn as the disk lets them."""
    url = f"file:{tmp_path / 'index'}"

    def write(name: str) -> None:
        with open_index(url, 32) as index:
            for batch in range(20):
                index.add(codes(3), keys=[f"both {batch}", f"{name} {batch}", f"{name} {batch} more"])

    writers = [threading.Thread(target=write, args=(name,)) for name in ("one", "two")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    with open_index(url) as index:
        held = index.held(index.keys())
        assert len(held) == index.count() == 20 * 5
        assert len({item for item, _ in held.values()}) == 100
        assert index.next_id() == 100


# Filters


def items_found(index: CodeIndex, where: dict) -> list[int]:
    ids = index.search(codes(1), index.count(), where=where).ids[0].tolist()
    return sorted(item for item in ids if item >= 0)


def test_a_number_and_its_text_are_the_same_value(index: CodeIndex) -> None:
    stored = [2, "2", [2, 3], ["2"], 3, "02", None, {"2": 2}]
    index.add(codes(8), [{"label": each} for each in stored])
    for value in (2, "2", 2.0, [2], ["2", "never"]):
        assert items_found(index, {"label": value}) == [0, 1, 2, 3], value


def test_a_number_is_found_however_it_is_written(index: CodeIndex) -> None:
    stored = [2, "2", 2.0, "2.0", ["x", "2.00"], "2e0", 20, "02", "+2", "2.", 2.5]
    index.add(codes(11), [{"n": each} for each in stored])
    for value in ("2.0", "2.00", "2e0", "20e-1", "0.2E+1", 2.0, np.int64(2), np.float32(2)):
        assert items_found(index, {"n": value}) == [0, 1, 2, 3, 4, 5], value


def test_large_and_small_numbers_are_compared_exactly(index: CodeIndex) -> None:
    large = 2**63 + 1
    stored = [large, large - 1, str(large), [1, large], -large, 0.1, "0.10", 1e300, -0.0, 10**400, [0.25]]
    index.add(codes(11), [{"n": each} for each in stored])
    cases = (
        (large, [0, 2, 3]), (str(large - 1), [1]), (-large, [4]), ("1e-1", [5, 6]),
        (10**400, [9]), ("1e400", [9]), (1e300, [7]), ("1e300", [7]), ("-0", [8]), (0, [8]), (0.25, [10]),
    )  # fmt: skip
    for value, found in cases:
        assert items_found(index, {"n": value}) == found, value


def test_null_is_found_and_values_are_those_stored(index: CodeIndex) -> None:
    stored = [None, True, [None, 2**63 + 1], "no", {"a": 1}, [], [[1]]]
    index.add(codes(7), [{"z z": each} for each in stored])
    for value, found in ((None, [0, 2]), ("null", [0, 2]), (1, []), ("[1]", []), ("no", [3]), (False, [])):
        assert items_found(index, {"z z": value}) == found, value
    assert index.values("z z") == [None, True, 2**63 + 1, "no"]


def test_texts_that_only_look_like_numbers_stay_texts(index: CodeIndex) -> None:
    index.add(codes(4), [{"code": "007"}, {"code": 7}, {"code": True}, {"code": 1}])
    for value, found in (("007", [0]), ("7", [1]), (True, [2]), ("true", [2]), (1, [3]), ("1", [3])):
        assert items_found(index, {"code": value}) == found, value


def test_a_misspelt_key_is_refused_and_a_value_is_not(index: CodeIndex) -> None:
    assert index.search(codes(1), 1, where={"lable": 1}).ids.tolist() == [[-1]]  # an empty index has no keys
    index.add(codes(3), [{"label": "cat", "år": 1}, {}, {"label": ["dog", "sky"]}])
    with pytest.raises(ValueError, match=r"no item .* payload key 'lable'; did you mean 'label'"):
        index.search(codes(1), 1, where={"lable": "cat"})
    with pytest.raises(ValueError, match="did you mean 'label'"):
        index.remove({"label": "cat", "labels": 1})
    assert index.search(codes(1), 1, where={"label": "cow"}).ids.tolist() == [[-1]]
    assert sorted(index.values("label")) == ["cat", "dog", "sky"]
    assert index.values("label", 2) == ["cat", "dog"]


# Files of an older version


def old_index(home: Path, paths: list[str]) -> None:
    """An index as format 1 wrote it: no keys, no counter."""
    with open_index(f"file:{home}", 32) as index:
        index.add(codes(len(paths)), [{"path": path} for path in paths])
    with sqlite3.connect(home / "index.sqlite") as store:
        store.executescript("DROP TABLE keys; DROP TABLE changes; DELETE FROM meta WHERE key = 'next_id'")
        store.execute("UPDATE meta SET value = '1' WHERE key = 'format'")
    store.close()


def test_an_old_index_opens_and_the_first_write_brings_it_up(tmp_path: Path) -> None:
    home, here = tmp_path / "index", tmp_path / "here.jpg"
    here.touch()
    old_index(home, ["/x/a.jpg", os.path.relpath(here), "/x/a.jpg"])
    with open_index(f"file:{home}") as index:
        assert index.info()["format"] == 1
        assert (index.count(), index.next_id(), index.keys()) == (3, 3, [])
        assert index.held(["/x/a.jpg"]) == {}
        index.add(codes(2, 5), keys=["/x/a.jpg", str(here)])  # the path was relative to where we stand
        assert index.info()["format"] == 3
        assert index.keys() == sorted(["/x/a.jpg", str(here)])
        assert index.held(["/x/a.jpg"])["/x/a.jpg"] == (2, "")
        assert (index.count(), index.next_id()) == (3, 3)
    old_index(tmp_path / "other", ["/x/a.jpg", "/x/b.jpg"])
    with open_index(f"file:{tmp_path / 'other'}") as index:
        assert index.remove([1]) == 1
        assert (index.keys(), index.next_id()) == (["/x/a.jpg"], 2)


# Disks and processes

READER = """
import json, os, sys
import robusthash as rh, torch
from robusthash.core.types import Codes
home = sys.argv[1]
rh.open_index, torch.linspace, __import__("secrets"), __import__("faiss")  # a stranger may not read our libraries
if os.getuid() == 0:
    os.setgid(65534); os.setuid(65534)
with rh.open_index("file:" + home, create=False) as index:
    query = Codes(torch.zeros(1, 4, dtype=torch.uint8), 32, torch.tensor([0]))
    answer = [index.count(), len(index.search(query, 9).ids[0]), index.payload([0]), index.info()["count"]]
    try:
        index.add(query)
    except PermissionError as error:
        answer.append(str(error))
print(json.dumps(answer))
"""


def test_keys_of_items_of_an_index_of_the_format_before(tmp_path) -> None:
    """Format 2 has keys, and no table of changes."""
    with open_index(f"file:{tmp_path / 'idx'}", 32) as index:
        index.add(codes(3), keys=["a", "b", "c"])
        version = index.info()["format"]
    with contextlib.closing(sqlite3.connect(tmp_path / "idx" / "index.sqlite")) as connection, connection:
        connection.execute("DROP TABLE changes")
        connection.execute("UPDATE meta SET value = '2' WHERE key = 'format'")
    with open_index(f"file:{tmp_path / 'idx'}", 32) as index:
        assert index.info()["format"] == 2 < version
        assert index.keys_of([0, 2, 9]) == {0: "a", 2: "c"}
        index.add(codes(1), keys=["d"])
        assert index.info()["format"] == version
        assert index.keys_of([3]) == {3: "d"}


@pytest.mark.parametrize("old", [False, True])
def test_a_read_only_disk_is_searched(old: bool) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as top:
        home = Path(top, "index")
        os.chmod(top, 0o755)
        old_index(home, ["/x/a.jpg"] * 9) if old else None
        with open_index(f"file:{home}", 32) as index:
            if not old:
                index.add(codes(9), [{"path": "/x/a.jpg"}] * 9)
        os.chmod(home / "index.sqlite", 0o444)
        os.chmod(home, 0o555)
        done = subprocess.run([sys.executable, "-c", READER, str(home)], capture_output=True, text=True)
        os.chmod(home, 0o755)
        assert done.returncode == 0, done.stderr
        *facts, refusal = json.loads(done.stdout)
        assert facts == [9, 9, [{"path": "/x/a.jpg"}], 9]
        assert "read-only here, it can be searched but not changed" in refusal
        assert os.listdir(home) == ["index.sqlite"]


def test_a_reader_without_rights_follows_a_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "index"
    with open_index(f"file:{home}", 32) as index:
        index.add(codes(3), keys=["a", "b", "c"])
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and allowed(path, mode))
    with open_index(f"file:{home}") as reader:
        assert reader.count() == 3
        monkeypatch.setattr(os, "access", allowed)
        with open_index(f"file:{home}") as writer:
            writer.add(codes(2, 1), keys=["d", "e"])
            monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and allowed(path, mode))
            assert reader.count() == 5  # from the log of the other
        assert reader.count() == 5
        assert nearest(reader, codes(2, 1), 1) == (4, 0)


FORKED = """
import os, sys, time, torch
import robusthash as rh
from robusthash.core import hamming
from robusthash.core.types import Codes
home, engine, anew = sys.argv[1:]
def codes(count, seed):
    signs = torch.randn(count, 64, generator=torch.Generator().manual_seed(seed))
    return Codes(hamming.pack(signs), 64, torch.arange(count))
index, queries = rh.open_index(home, 64, engine), codes(200, 1)
index.add(codes(20_000, 0), keys=[str(at) for at in range(20_000)])
expected = index.search(queries, 10).ids
child = os.fork()
if child == 0:
    used = rh.open_index(home, create=False, engine=engine) if anew == "anew" else index
    same = torch.equal(used.search(queries, 10).ids, expected)
    used.add(codes(1, 2), keys=["child"])
    os._exit(0 if same and used.count() == 20_001 else 1)
for _ in range(600):
    pid, status = os.waitpid(child, os.WNOHANG)
    if pid:
        index.add(codes(1, 3), keys=["parent"])
        sys.exit(os.waitstatus_to_exitcode(status) or index.count() != 20_002)
    time.sleep(0.1)
os.kill(child, 9)
sys.exit("the child never answered")
"""


@pytest.mark.parametrize(("engine", "how"), [("faiss", "kept"), ("faiss", "anew"), ("numpy", "kept")])
def test_the_child_of_a_process_that_searched_answers(tmp_path: Path, engine: str, how: str) -> None:
    command = [sys.executable, "-c", FORKED, f"file:{tmp_path / 'index'}", engine, how]
    threads = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, env=threads, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_ids_beyond_sixty_three_bits_are_named(index: CodeIndex) -> None:
    with pytest.raises(ValueError, match=r"ids must be below 2\*\*63, got 9223372036854775808"):
        index.remove(np.array([2**63], dtype=np.uint64))
